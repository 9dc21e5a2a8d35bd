"""The KL autoencoder: its loss by hand, calibrated latents, round trips, users."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from mdlib.models.kl import KLVAE
from mdlib.training.latents import decode_all, encode_all

SMALL = dict(image_size=16, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3)


def small_codec(**changes) -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(**{**SMALL, **changes}).eval()


def pictures(count: int, channels: int = 1, size: int = 16) -> torch.Tensor:
    """A bright blob at a random place of each image, in [−1, 1]."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(float(size))
    centre = torch.rand(count, 2, 1, 1, 1, generator=generator) * (size - 4) + 2
    blob = torch.exp(-((rows.view(-1, 1) - centre[:, 0]) ** 2 + (rows - centre[:, 1]) ** 2) / 8)  # (B, 1, H, W)
    return (2 * blob - 1).repeat(1, channels, 1, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch, grid", [((1, 1), (8, 8)), ((1, 2), (8, 4)), ((4, 2), (2, 4))])
def test_round_trips(tmp_path, patch, grid, channels):
    codec = small_codec(patch_size=patch, in_channels=channels)
    images = pictures(5, channels)
    with torch.no_grad():
        plain = codec.decode(codec.encode(images))
        codec.calibrate(images, batch_size=2)
        latents = codec.encode(images)
        assert latents.shape == (5, 3, *grid) == (5, *codec.latent_shape)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
        output = codec.decode(latents)
        assert output.shape == images.shape
        torch.testing.assert_close(output, plain, atol=1e-4, rtol=1e-4)  # decode takes the normalisation back
        codec.save_pretrained(tmp_path)
        again = KLVAE.from_pretrained(tmp_path)
        assert again.latent_shape == codec.latent_shape
        assert torch.equal(again.encode(images), latents)
        assert torch.equal(again.decode(latents), output)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_decoded_images_stay_in_their_range():
    codec = small_codec()
    images = codec.decode(100 * torch.randn(2, *codec.latent_shape))
    assert images.min() == -1 and images.max() == 1


@pytest.mark.parametrize("patch, rest", [((1, 1), (16, 16)), ((2, 4), (8, 4))])
def test_patches_keep_pixels_in_place(patch, rest):
    codec = small_codec(patch_size=patch, in_channels=3)
    images = torch.randn(2, 3, 16, 16)
    folded = codec._fold(images)
    assert folded.shape == (2, 3 * patch[0] * patch[1], *rest)
    rows, columns = patch
    corner = images[:, :, rows : 2 * rows, 2 * columns : 3 * columns]
    assert torch.equal(folded[:, :, 1, 2].view(2, 3, rows, columns), corner)
    assert torch.equal(codec._unfold(folded), images)
    assert torch.equal(small_codec(patch_size=(2, 2))._fold(images), F.pixel_unshuffle(images, 2))


@pytest.mark.parametrize("reconstruction", ["mse", "l1"])
@pytest.mark.parametrize("patch", [1, 2])
def test_the_loss_is_the_reconstruction_and_the_divergence_a_latent_value(reconstruction, patch):
    codec = small_codec(reconstruction=reconstruction, kl_weight=0.3, patch_size=(patch, patch))
    images = pictures(4)
    with torch.no_grad():
        loss, logs = codec.loss(images)
        moments = codec.vae.quant_conv(codec.vae.encoder(F.pixel_unshuffle(images, patch)))
        mean, log_variance = moments.chunk(2, 1)
        output = F.pixel_shuffle(codec.vae.decoder(codec.vae.post_quant_conv(mean)), patch)
    difference = output - images
    distance = difference.square().mean() if reconstruction == "mse" else difference.abs().mean()
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(loss, distance + 0.3 * divergence)
    torch.testing.assert_close(logs["kl"], divergence)
    torch.testing.assert_close(logs["mse"], difference.square().mean())
    torch.testing.assert_close(logs["psnr_db"], 20 * torch.log10(2 / difference.square().mean().sqrt()))


def test_training_draws_latents_and_evaluation_does_not():
    codec, images = small_codec(), pictures(4)
    assert codec.loss(images)[0] == codec.loss(images)[0]
    codec.train()
    assert codec.loss(images)[0] != codec.loss(images)[0]


def test_it_learns_a_handful_of_images():
    codec, images = small_codec(block_out_channels=(16, 16)), pictures(8)
    before = codec.loss(images)[1]["psnr_db"]
    optimizer = torch.optim.AdamW(codec.train().parameters(), lr=5e-3)
    for _ in range(100):
        loss, _ = codec.loss(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codec.eval()
    codec.calibrate(images)
    with torch.no_grad():
        output = codec.decode(codec.encode(images))
    after = 20 * torch.log10(2 / (output - images).square().mean().sqrt())
    spread = 20 * torch.log10(2 / images.std())  # what the mean image alone would reach, about
    assert after > before + 10 and after > spread + 6


def test_gradient_checkpointing_recomputes_and_changes_no_gradient():
    gradients, calls = [], []
    for checkpointing in (False, True):
        codec, images = small_codec(gradient_checkpointing=checkpointing), pictures(2)
        counted = []
        for part in (codec.vae.encoder.down_blocks[0], codec.vae.decoder.up_blocks[0]):
            part.resnets[0].register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        codec.loss(images)[0].backward()
        gradients.append({name: parameter.grad for name, parameter in codec.named_parameters()})
        calls.append(len(counted))
    assert calls == [2, 4]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_an_unknown_reconstruction_is_refused():
    with pytest.raises(ValueError, match="^reconstruction must be one of mse, l1, got 'ssim'$"):
        small_codec(reconstruction="ssim")


def test_an_image_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^image_size 20 must be a multiple of 8 and 4 \(patch \(4, 2\), 2 levels\)$"):
        small_codec(image_size=20, patch_size=(4, 2))


# Users -------------------------------------------------------------------------------------------------------------


def user_codec(**changes) -> KLVAE:
    """A codec of three users whose vectors are not zero."""
    codec = small_codec(num_users=3, **changes)
    for layer in (codec.encoder_shift, codec.decoder_shift):
        torch.nn.init.normal_(layer.weight)
    return codec


@torch.no_grad()
def test_at_first_users_make_no_difference():
    codec, plain, images, users = small_codec(num_users=3), small_codec(), pictures(4), torch.tensor([0, 1, 2, 3])
    assert codec.conditional and not plain.conditional
    assert torch.equal(codec.encode(images, users), plain.encode(images))
    assert torch.equal(codec.decode(codec.encode(images), users), plain.decode(plain.encode(images)))


@torch.no_grad()
def test_no_user_is_the_null_label_and_users_differ():
    codec, images = user_codec(), pictures(4)
    null, other = torch.full((4,), 3), torch.full((4,), 1)
    latents = codec.encode(images)
    assert torch.equal(codec.encode(images, null), latents)
    assert torch.equal(codec.decode(latents, null), codec.decode(latents))
    assert codec.loss(images, null)[0] == codec.loss(images)[0]
    assert not torch.allclose(codec.encode(images, other), latents)
    assert not torch.allclose(codec.decode(latents, other), codec.decode(latents))
    mixed = codec.encode(images, torch.tensor([3, 3, 1, 3]))
    torch.testing.assert_close(mixed[2:3], codec.encode(images[2:3], other[:1]))
    torch.testing.assert_close(mixed[:2], latents[:2])


def test_users_are_dropped_in_training_only():
    codec, images, users = user_codec(label_dropout=1.0), pictures(4), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        assert codec.loss(images, users)[0] != codec.loss(images)[0]
    losses = []
    for given in (users, None):
        torch.manual_seed(0)
        torch.rand(4) if given is None else None  # the random numbers of the dropout
        losses.append(codec.train().loss(images, given)[0])
    assert losses[0] == losses[1]


def test_users_reach_calibration_and_whole_sets(tmp_path):
    codec = user_codec()
    windows = torch.randint(0, 256, (7, 1, 16, 16), dtype=torch.uint8)
    images, users = windows / 127.5 - 1, torch.tensor([0, 1, 2, 0, 1, 2, 0])
    codec.calibrate(images, users, batch_size=3)
    latents = encode_all(codec, windows, "latents", tmp_path, users)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(latents, codec.encode(images, users))
        decoded = decode_all(codec, latents, 2, users)
        torch.testing.assert_close(decoded, codec.decode(latents, users))
        unconditional = encode_all(codec, windows, "latents", tmp_path)
        torch.testing.assert_close(unconditional, codec.encode(images))
    assert len(list(tmp_path.iterdir())) == 2


def test_unknown_users_are_refused():
    with pytest.raises(ValueError, match=r"^users must lie in 0…3, got 4…4$"):
        user_codec().encode(pictures(1), torch.tensor([4]))
