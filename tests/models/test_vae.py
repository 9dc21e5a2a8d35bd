"""The KL autoencoder: its loss by hand, calibrated latents, round trips, teachers."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from mdlib.models.kl import KLVAE

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


class Distance(torch.nn.Module):
    """A teacher with a weight of its own: mean square of the difference, times that weight."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, outputs, images):
        return self.scale * (outputs - images).square().mean((1, 2, 3))  # (B,)


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


def test_a_teacher_adds_to_the_loss_and_is_neither_trained_nor_saved(tmp_path):
    codec, images = small_codec(), pictures(4)
    plain, before = codec.loss(images)[0], set(codec.state_dict())
    teacher = Distance()
    codec.add_teacher("likeness", teacher, 0.5)
    loss, logs = codec.loss(images)
    torch.testing.assert_close(logs["likeness"], 3 * logs["mse"])
    torch.testing.assert_close(loss, plain + 0.5 * logs["likeness"])
    loss.backward()
    assert teacher.scale.grad is None and not any(parameter is teacher.scale for parameter in codec.parameters())
    codec.save_pretrained(tmp_path)
    again = KLVAE.from_pretrained(tmp_path).eval()
    assert set(again.state_dict()) == before
    torch.testing.assert_close(again.loss(images)[0], plain)


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
    with pytest.raises(ValueError, match="^reconstruction must be mse or l1, got 'ssim'$"):
        small_codec(reconstruction="ssim")


def test_an_image_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^image_size 20 must be a multiple of 8 and 4 \(patch \(4, 2\), 2 levels\)$"):
        small_codec(image_size=20, patch_size=(4, 2))
