"""The codec: spatial tokens, a codebook that does not collapse, round trips; peers as oracles."""

import numpy as np
import pytest
import torch
from diffusers import VQModel

from mdlib.models.kl import KLVAE
from mdlib.models.vqvae import VQVAE, VectorQuantizer
from mdlib.systems import start
from mdlib.utils import DataError

SMALL = dict(image_size=16, block_out_channels=(8, 16), norm_num_groups=4, num_codes=8, code_dim=4)


def small_codec(**changes) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(**{**SMALL, **changes})


def test_a_token_belongs_to_its_place():
    quantizer = VectorQuantizer(3, 2).eval()
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    z = torch.zeros(1, 2, 4, 5)
    z[0, 0, 1, 2] = 9.0  # channel 0 large at one pixel only
    z[0, 1, 3, 4] = 9.0
    codes, indices, _ = quantizer(z)
    assert indices[0, 1, 2] == 1 and indices[0, 3, 4] == 2 and indices.sum() == 3
    assert torch.equal(codes[0, :, 1, 2], torch.tensor([10.0, 0.0]))


def test_a_change_in_the_image_changes_tokens_near_it_only():
    codec = small_codec(image_size=64).eval()
    codec.encoder.mid_block.attentions = torch.nn.ModuleList([None])
    images = torch.randn(1, 1, 64, 64).clamp(-1, 1)
    other = images.clone()
    other[:, :, :8, :8] = 1
    with torch.no_grad():
        first, second = codec._features(images), codec._features(other)
    # Group norms see the whole image, so far features move a little; the corner must move most by far.
    moved = (first - second).abs().mean(1)[0]
    assert moved[:6, :6].mean() > 5 * moved[16:, 16:].mean()


def test_forward_agrees_with_diffusers_quantizer():
    from diffusers.models.autoencoders.vae import VectorQuantizer as Reference

    reference = Reference(16, 4, beta=0.25, legacy=False, sane_index_shape=True)
    ours = VectorQuantizer(16, 4).eval()
    ours.codebook.copy_(reference.embedding.weight)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    mine = z.detach().clone().requires_grad_()
    expected, loss, (_, _, indices) = reference(z)
    codes, index, commitment = ours(mine)
    assert torch.equal(index, indices)
    torch.testing.assert_close(codes, expected)
    # legacy=False: β·‖z − sg(e)‖² + ‖sg(z) − e‖²; both terms have the same value, ours has no codebook term (EMA).
    torch.testing.assert_close(commitment * 1.25, loss)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (codes * weight).sum().backward()
    torch.testing.assert_close(mine.grad, z.grad)  # straight through


def test_ema_update_agrees_with_vector_quantize_pytorch():
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    reference = VectorQuantize(
        4, codebook_size=6, decay=0.9, eps=1e-5, kmeans_init=False, threshold_ema_dead_code=0
    ).train()
    book = reference._codebook
    ours = VectorQuantizer(6, 4, decay=0.9, revive_below=0.0).train()
    start = torch.randn(6, 4)
    for target in (book.embed, book.embed_avg):
        target.data.copy_(start.unsqueeze(0))
    book.cluster_size.data.fill_(1)
    ours.codebook.copy_(start)
    ours.sums.copy_(start)
    ours.counts.fill_(1)
    ours.initialised.fill_(True)
    for _ in range(5):
        vectors = torch.randn(40, 4)
        reference(vectors.unsqueeze(0))
        ours(vectors.T.reshape(1, 4, 40, 1))
        torch.testing.assert_close(ours.counts, book.cluster_size[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.codebook, book.embed[0], atol=1e-4, rtol=1e-3)


def test_the_codebook_starts_from_data_and_no_code_blows_up():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4).train()
    z = 3 + 0.1 * torch.randn(4, 4, 8, 8)
    for _ in range(30):
        quantizer(z)
    norms = quantizer.codebook.norm(dim=1)
    assert norms.max() < 2 * z.movedim(1, -1).norm(dim=-1).max(), "unused codes must not be divided by a tiny count"


def test_dead_codes_come_back_from_the_batch():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, decay=0.8).train()
    quantizer.initialised.fill_(True)  # as if started elsewhere: every code far from the data but one
    quantizer.codebook.copy_(torch.full((32, 4), 100.0))
    quantizer.codebook[0] = 0
    quantizer.sums.copy_(quantizer.codebook)
    z = torch.randn(8, 4, 8, 8)
    for _ in range(60):
        _, indices, _ = quantizer(z)
    assert len(indices.unique()) >= 30
    assert quantizer.codebook.abs().max() < 10


def test_evaluation_leaves_the_codebook_alone():
    codec = small_codec().eval()
    before = codec.quantizer.codebook.clone()
    codec.loss(torch.randn(4, 1, 16, 16))
    assert torch.equal(before, codec.quantizer.codebook)


@pytest.mark.parametrize("patch, shape", [((1, 1), (8, 8)), ((2, 2), (4, 4)), ((1, 2), (8, 4))])
def test_round_trips(tmp_path, patch, shape):
    codec = small_codec(patch_size=patch).eval()
    images = torch.rand(5, 1, 16, 16) * 2 - 1
    codec.train().loss(images)
    codec.eval()
    codec.calibrate(images)
    with torch.no_grad():
        tokens = codec.encode_tokens(images)
        assert tokens.shape == (5, *shape) == (5, *codec.token_shape) and tokens.dtype == torch.long
        output = codec.decode_tokens(tokens)
        assert output.shape == images.shape and output.abs().max() <= 1
        latents = codec.encode(images)
        assert latents.shape == (5, *codec.latent_shape)
        torch.testing.assert_close(codec.decode(latents), output)
        used = latents.std((0, 2, 3)) > 1e-3  # a channel in which every code is alike has no spread to normalise
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3))[used], torch.ones(int(used.sum())), atol=1e-3, rtol=0)
        codec.save_pretrained(tmp_path)
        again = VQVAE.from_pretrained(tmp_path)
        assert torch.equal(again.encode_tokens(images), tokens)
        torch.testing.assert_close(again.encode(images), latents)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))


def test_patches_keep_pixels_in_place():
    codec = small_codec(patch_size=(2, 4))
    codec.encoder, codec.decoder = torch.nn.Identity(), torch.nn.Identity()
    images = torch.randn(2, 1, 16, 16)
    folded = codec._features(images)
    assert folded.shape == (2, 8, 8, 4)
    assert torch.equal(folded[:, :, 3, 1].view(2, 2, 4), images[:, 0, 6:8, 4:8])
    assert torch.equal(codec._pixels(folded), images)


def test_an_image_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="image_size 20 must be a multiple of 8"):
        small_codec(image_size=20, block_out_channels=(8, 8, 8, 8))


def test_training_uses_the_codebook_and_reconstructs():
    """Blobs at random places: a few hundred small steps must use the codebook and lose most of the variance."""
    torch.manual_seed(0)
    rows = torch.arange(16.0)
    centre = torch.rand(128, 2, 1, 1) * 12 + 2
    images = (
        2 * torch.exp(-((rows.view(1, -1, 1) - centre[:, 0]) ** 2 + (rows - centre[:, 1]) ** 2) / 8).unsqueeze(1) - 1
    )
    codec = small_codec(num_codes=16).train()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    for step in range(120):
        loss, logs = codec.loss(images[torch.arange(32) + 32 * (step % 4)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codec.eval()
    _, logs = codec.loss(images)
    assert logs["usage"] >= 0.9
    assert logs["mse"] < 0.3 * images.var()
    share = np.bincount(codec.encode_tokens(images).flatten().numpy(), minlength=16) / (128 * 64)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert float(logs["perplexity"]) == pytest.approx(np.exp(entropy), rel=1e-4)


def test_an_unused_code_is_reset_to_a_vector_of_the_batch_with_the_average_count():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 2, revive_below=0.1).train()
    quantizer.counts.copy_(torch.tensor([8.0, 0.3, 7.7, 0.0]))
    before, batch = quantizer.codebook.clone(), torch.randn(10, 2)
    quantizer._reset_unused_codes(batch)
    assert torch.equal(quantizer.codebook[[0, 2]], before[[0, 2]])
    for code in (1, 3):
        assert (batch == quantizer.codebook[code]).all(1).any()
    assert quantizer.counts.tolist() == pytest.approx([8.0, 4.0, 7.7, 4.0])
    torch.testing.assert_close(quantizer.sums[[1, 3]], 4 * quantizer.codebook[[1, 3]])


def test_an_untrained_state_starts_from_data_again():
    torch.manual_seed(0)
    quantizer, fresh = VectorQuantizer(8, 4).train(), VectorQuantizer(8, 4)
    z = torch.randn(2, 4, 8, 8)
    quantizer(z)
    quantizer.load_state_dict(fresh.state_dict())
    quantizer(z)
    assert quantizer.initialised and (quantizer.codebook[:, None] - fresh.codebook).abs().sum(-1).min() > 1e-3


# diffusers' VQModel -----------------------------------------------------------------------------------------------

BLOCKS = dict(block_out_channels=(8, 16), norm_num_groups=4)
SIZES = dict(image_size=16, in_channels=3, num_codes=8, **BLOCKS)


def saved_vqmodel(folder, **changes) -> VQModel:
    """A VQModel with biases, and codes that are encodings."""
    torch.manual_seed(1)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    model = VQModel(**dict(latent_channels=5, num_vq_embeddings=8) | BLOCKS | kinds | changes).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    encodings = model.encode(torch.rand(4, 3, 16, 16)).latents.movedim(1, -1).flatten(0, 2)
    model.quantize.embedding.weight.data.copy_(encodings[torch.randperm(len(encodings))[:8]])
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_a_codec_that_starts_from_a_vqmodel_computes_what_that_does(tmp_path):
    model, codec = saved_vqmodel(tmp_path), VQVAE(code_dim=5, **SIZES).eval()
    with torch.device("meta"):  # as a run checks its settings
        start(VQVAE(code_dim=5, **SIZES), tmp_path)
    start(codec, tmp_path)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    _, _, (_, _, indices) = model.quantize(model.encode(images).latents)
    tokens = codec.encode_tokens(images)
    assert torch.equal(tokens.flatten(), indices) and len(indices.unique()) > 2
    torch.testing.assert_close(codec.decode_tokens(tokens), model(images).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    codec.train()
    before = codec.quantizer.codebook.clone()
    codec.loss(images)
    assert (codec.quantizer.codebook - before).norm() < before.norm(), "the codebook does not start from data again"


@torch.no_grad()
def test_codes_narrower_than_the_latents_are_loaded_too(tmp_path):
    model, codec = saved_vqmodel(tmp_path, vq_embed_dim=3), VQVAE(code_dim=3, **SIZES).eval()
    start(codec, tmp_path)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    _, _, (_, _, indices) = model.quantize(model.encode(images).latents)
    assert torch.equal(codec.encode_tokens(images).flatten(), indices)


def test_a_vqmodel_that_does_not_fit_is_refused_by_name(tmp_path):
    saved_vqmodel(tmp_path)
    for changes, problem in (
        (dict(num_codes=16), "shape mismatch in quantizer.codebook, quantizer.counts, quantizer.sums"),
        (dict(in_channels=1), "shape mismatch in decoder.conv_out.bias, decoder.conv_out.weight, encoder.conv_in"),
        (dict(layers_per_block=2), "missing keys decoder.up_blocks.0.resnets.2"),
    ):
        codec = VQVAE(**dict(code_dim=5) | SIZES | changes)
        unchanged = codec.encoder.conv_out.weight.clone()
        with pytest.raises(DataError, match=f"cannot start from .* does not fit this VQVAE: .*{problem}"):
            start(codec, tmp_path)
        assert torch.equal(codec.encoder.conv_out.weight, unchanged)
    with pytest.raises(DataError, match="cannot start from .*: a VQModel .* fits a VQVAE only; .* a KLVAE"):
        start(KLVAE(image_size=16, **BLOCKS), tmp_path)
    saved_vqmodel(tmp_path / "relu", act_fn="relu")
    with pytest.raises(DataError, match="cannot start from .*: a VQModel with act_fn silu .* this is act_fn relu"):
        start(VQVAE(code_dim=5, **SIZES), tmp_path / "relu")
