"""The codec's check, the choice between two, and codes as pictures."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import message, small_set
from torch import nn

from mdlib.evaluation import codec_quality, metrics
from mdlib.evaluation.codec_quality import cells, check_codec, code_patches, survey
from mdlib.models.kl import KLVAE
from mdlib.models.vqvae import VQVAE
from mdlib.reports import plots
from mdlib.utils import to_float

SMALL = dict(image_size=32, patch_size=(2, 2), block_out_channels=(8,), norm_num_groups=4)


class Noisy(nn.Module):
    """Latents are the pixels, in deviations from the mean; decoding adds an error of `error` in [−1, 1] units."""

    def __init__(self, error: float, mean: float = 0.0, std: float = 0.5):
        super().__init__()
        self.error, self.mean, self.std = error, mean, std
        self.config = SimpleNamespace(in_channels=1, image_size=32)
        self.device = torch.device("cpu")

    def encode(self, images):
        return (images - self.mean) / self.std

    def decode(self, latents):
        return latents * self.std + self.mean + self.error


def images(n: int = 20) -> torch.Tensor:
    """Grey noise around the middle: mean 0 and deviation 0.5 in [−1, 1]."""
    values = np.random.default_rng(0).normal(127.5, 64, (n, 1, 32, 32))
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """Where LPIPS's weights would lie; nothing is there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return codec_quality.checkpoint(codec_quality.LPIPS_BACKBONES["squeeze"])


@pytest.mark.parametrize("psnr_db, grade", [(28.5, "excellent"), (25.5, "good"), (24.5, "fair"), (19.5, "poor")])
def test_the_verdict_names_the_grade(psnr_db, grade):
    found = check_codec(Noisy(error=2 * 10 ** (-psnr_db / 20)), images())
    assert found["psnr_db"] == pytest.approx(psnr_db, abs=0.01) == found["psnr_db_worst"]
    assert f"is {grade}: PSNR {psnr_db:.1f} dB" in found["verdict"] and "calibrate" not in found["verdict"]
    assert found["n"] == 20


def test_latents_that_were_not_calibrated_are_told():
    for codec in (Noisy(0.01, std=0.1), Noisy(0.01, mean=-1.0)):
        assert "calibrate() was not called" in check_codec(codec, images())["verdict"]


def test_latent_metrics_are_those_of_their_channel():
    latents = torch.randn(50, 3, 20, 20, generator=torch.manual_seed(0))
    latents[:, 1] = 3 * latents[:, 1] + 2
    latents[0, 0, 0, 0] = 9.0
    found = codec_quality.latent_metrics(latents)
    assert found["mean"] == pytest.approx([0, 2, 0], abs=0.1) and found["std"] == pytest.approx([1, 3, 1], rel=0.05)
    assert found["max"] == pytest.approx(max(9.0, float(latents.max())))
    assert 1 / latents.numel() <= found["beyond_4_sigma"] < 3e-4


@pytest.mark.parametrize("kind", [VQVAE, KLVAE])
def test_both_kinds_of_codec_are_checked(kind):
    torch.manual_seed(0)
    codec = kind(**SMALL).eval()
    codec.calibrate(to_float(images()))
    found = check_codec(codec, images())
    with torch.no_grad():
        real = to_float(images())
        decoded = codec.decode(codec.encode(real))
        each = metrics.psnr(decoded, real)
    assert found["psnr_db"] == pytest.approx(float(each.mean()), rel=1e-4)
    assert found["psnr_db_worst"] == pytest.approx(float(each.min()), rel=1e-4)
    assert found["ssim"] == pytest.approx(float(metrics.ssim(decoded, real).mean()), abs=1e-4)
    assert len(found["latents"]["mean"]) == codec.latent_shape[0] and "latents are normalised" in found["verdict"]
    json.dumps(found)


def test_a_missing_lpips_is_told_and_nothing_is_downloaded(weights, monkeypatch):
    found = check_codec(Noisy(0.1), images())
    assert found["lpips"] is None and found["lpips_reason"].startswith("squeezenet1_1-b8a52dc0.pth is not on")
    weights.parent.mkdir(parents=True)
    weights.touch()
    monkeypatch.setitem(sys.modules, "lpips", None)  # the weights without the package
    assert "needs the package lpips" in check_codec(Noisy(0.1), images())["lpips_reason"]


def test_lpips_is_measured_where_its_weights_are(weights, monkeypatch):
    weights.parent.mkdir(parents=True)
    weights.touch()

    class Distance(nn.Module):
        def forward(self, one, other):
            return (one - other).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(codec_quality, "load_lpips", lambda net: Distance())
    found = check_codec(Noisy(0.1), images())
    assert found["lpips"] == pytest.approx(0.1, rel=1e-4) and "lpips_reason" not in found


def test_images_that_are_not_the_codecs_are_refused():
    for wrong in (images()[..., :16], images().float(), images()[:0], images().repeat(1, 3, 1, 1)):
        assert "size=32, channels=1" in message(check_codec, Noisy(0.1), wrong)


def test_the_picture_of_latents_has_a_bar_a_channel():
    latents = torch.randn(6, 5, 4, 4) * torch.arange(1, 6).view(1, 5, 1, 1)
    left, right = plots.latent_statistics(latents).axes
    heights = [bar.get_height() for bar in right.patches]
    assert heights == pytest.approx(latents.std((0, 2, 3), correction=0).tolist(), rel=1e-4)
    assert len(left.patches) == 5


@pytest.fixture
def surveyed():
    """A codec of 8 codes on 8×8 windows of three users (the last without windows), tokens that leave out code 5."""
    torch.manual_seed(0)
    codec = VQVAE(image_size=8, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4)
    windows = small_set(users=(4, 7, 9), n=3).select(slice(0, 6))
    tokens = torch.randint(0, 7, (6, *codec.token_shape))
    tokens[tokens == 5] = 7
    return codec, windows, tokens, survey(codec, windows, tokens)


def test_a_code_shows_the_mean_of_its_cells(surveyed):
    codec, windows, tokens, book = surveyed
    decoded = codec.decode_tokens(tokens).detach()
    for shown, images in ((book.decoded, decoded), (book.real, windows.float())):
        for code in set(tokens.flatten().tolist()):
            mine = [
                images[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                for n, row, column in (tokens == code).nonzero().tolist()
            ]
            torch.testing.assert_close(shown[code], torch.stack(mine).mean(0))


def test_an_unused_code_is_decoded_alone(surveyed):
    codec, _, _, book = surveyed
    alone = codec.decode_tokens(torch.full((1, 4, 4), 5)).detach()
    torch.testing.assert_close(book.decoded[5], alone[0, :, 4:6, 4:6])
    assert book.real[5].isnan().all() and book.times[5] == 0 and book.windows_with(5) == []


def test_use_is_counted_by_user_cell_and_window(surveyed):
    _, windows, tokens, book = surveyed
    for code in range(8):
        times = [int((grid == code).sum()) for grid in tokens]
        assert book.times[code] == sum(times)
        assert book.rates[0, code] == pytest.approx(sum(times[:3]) / 3)
        assert book.rates[1, code] == pytest.approx(sum(times[3:]) / 3)
        most = sorted((max(times[:3]), max(times[3:])), reverse=True)
        assert [times[row] for row in book.windows_with(code)] == [count for count in most if count]
        assert len({int(windows.labels[row]) for row in book.windows_with(code)}) == len(book.windows_with(code))
    assert book.rates[2].isnan().all(), "nothing is known of a user without windows"


def test_the_most_telling_code_is_the_one_that_users_share_least(surveyed):
    codec, windows, _, _ = surveyed
    tokens = torch.zeros(6, *codec.token_shape, dtype=torch.long)
    tokens[:, 0, :2] = 3  # everybody's
    tokens[3:, 2, 1:3] = 6  # the second user's
    tokens[:3, 2, 1], tokens[:3, 2, 2] = 3, 2
    assert survey(codec, windows, tokens).most_distinctive() == 6


def test_cells_of_unequal_sides_lie_where_they_are():
    images = torch.arange(2 * 1 * 4 * 6.0).view(2, 1, 4, 6)
    cut = cells(images, (2, 2))
    assert torch.equal(cut[1, 0, 1], images[1, :, :2, 3:])
    tokens = torch.tensor([[[0, 1], [1, 1]], [[1, 1], [1, 1]]])
    assert torch.equal(code_patches(images, tokens, 3)[0], images[0, :, :2, :3])
