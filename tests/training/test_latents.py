"""Tokens are computed once and never mistaken for another codec's or another set's; the losses of joint fine-tuning."""

import pytest
import torch

from mdlib.models.kl import KLVAE
from mdlib.models.layers import fingerprint
from mdlib.models.unet import LatentDiffusion
from mdlib.models.vqvae import VQVAE
from mdlib.training.latents import JointFineTuning, encode_all

SIZES = dict(image_size=16, block_out_channels=(8, 8), norm_num_groups=4)


def codec() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(image_size=16, block_out_channels=(8,), norm_num_groups=4, num_codes=8, code_dim=4).eval()


def test_the_cache_is_keyed_by_weights_and_images(tmp_path):
    model = codec()
    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    tokens = encode_all(model, images, "tokens", tmp_path)
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


def pair() -> tuple[KLVAE, LatentDiffusion]:
    torch.manual_seed(0)
    codec = KLVAE(**SIZES, latent_channels=2)
    options = dict(block_out_channels=(8, 16), norm_num_groups=4, head_dim=8)
    return codec, LatentDiffusion(codec.latent_shape, num_users=3, **options)


def losses(joint: JointFineTuning) -> dict[str, float]:
    torch.manual_seed(1)
    joint.eval()
    _, logs = joint.loss(torch.rand(6, 1, 16, 16) * 2 - 1, torch.arange(6) % 3)
    return {name: float(value) for name, value in logs.items()}


def test_the_priors_loss_reaches_the_encoder():
    codec, prior = pair()
    images, labels = torch.rand(4, 1, 16, 16) * 2 - 1, torch.arange(4) % 3
    gradient = {}
    for weight in (0.0, 1.0):
        codec.zero_grad()
        torch.manual_seed(2)
        JointFineTuning(codec, prior, prior_weight=weight).loss(images, labels)[0].backward()
        gradient[weight] = codec.vae.encoder.conv_in.weight.grad.clone()
    assert (gradient[1.0] - gradient[0.0]).abs().max() > 1e-6
    assert prior.users.weight.grad[:3].abs().sum() > 0


def test_shrinking_the_latents_gains_nothing():
    codec, prior = pair()
    before = losses(JointFineTuning(codec, prior))
    with torch.no_grad():  # the posterior's means are the first half of the channels
        codec.vae.quant_conv.weight[:2] *= 0.01
        codec.vae.quant_conv.bias[:2] *= 0.01
    after = losses(JointFineTuning(codec, prior))
    assert after["latent_std"] < 0.05 * before["latent_std"]
    assert after["denoising_mse"] == pytest.approx(before["denoising_mse"], rel=1e-3)


def test_a_codebook_is_refused():
    codec = VQVAE(**SIZES, num_codes=8, code_dim=2)
    with pytest.raises(ValueError, match="needs a codec of continuous latents"):
        JointFineTuning(codec, LatentDiffusion(codec.latent_shape, 3, block_out_channels=(16,)))
