"""Tokens are computed once and never mistaken for another codec's or another set's."""

import torch

from mdlib.models.vqvae import VQVAE
from mdlib.training.latents import encode_all, fingerprint


def codec() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(image_size=16, block_out_channels=(8,), norm_num_groups=4, num_codes=8, code_dim=4).eval()


def test_the_cache_is_keyed_by_weights_and_images(tmp_path):
    model = codec()
    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    tokens = encode_all(model, images, "tokens", tmp_path, batch_size=2)
    assert torch.equal(tokens, model.encode_tokens(images.float() / 127.5 - 1))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(encode_all(model, images, "tokens", tmp_path), tokens)
    assert len(list(tmp_path.iterdir())) == 1, "the second call reads"
    encode_all(model, 255 - images, "tokens", tmp_path)
    with torch.no_grad():
        model.quantizer.codebook.add_(1)
    encode_all(model, images, "tokens", tmp_path)
    encode_all(model, images, "latents", tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_fingerprint_sees_one_weight():
    model = codec()
    before = fingerprint(model)
    assert fingerprint(codec()) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(model) != before
