"""The codec's check and the choice between two: what is said of codecs whose answer is known."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import message
from torch import nn

from mdlib.data.windows import to_float
from mdlib.evaluation import codec_quality, metrics
from mdlib.evaluation.codec_quality import check_codec, choose_codec
from mdlib.models.kl import KLVAE
from mdlib.models.vqvae import VQVAE
from mdlib.reports import plots

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
    return codec_quality.lpips_weights("squeeze")


@pytest.mark.parametrize("psnr_db, grade", [(28.5, "excellent"), (25.5, "good"), (24.5, "fair"), (19.5, "poor")])
def test_the_verdict_names_the_grade(psnr_db, grade):
    found = check_codec(Noisy(error=2 * 10 ** (-psnr_db / 20)), images(), batch_size=7)
    assert found["psnr_db"] == pytest.approx(psnr_db, abs=0.01) == found["psnr_db_worst"]
    assert f"is {grade}: PSNR {psnr_db:.1f} dB" in found["verdict"] and "calibrate" not in found["verdict"]
    assert found["n"] == 20


def test_latents_that_were_not_calibrated_are_told():
    for codec in (Noisy(0.01, std=0.1), Noisy(0.01, mean=-1.0)):
        assert "calibrate() was not called" in check_codec(codec, images())["verdict"]


def test_latent_figures_are_those_of_their_channel():
    latents = torch.randn(50, 3, 20, 20, generator=torch.manual_seed(0))
    latents[:, 1] = 3 * latents[:, 1] + 2
    latents[0, 0, 0, 0] = 9.0
    found = codec_quality.latent_figures(latents)
    assert found["mean"] == pytest.approx([0, 2, 0], abs=0.1) and found["std"] == pytest.approx([1, 3, 1], rel=0.05)
    assert found["max"] == pytest.approx(max(9.0, float(latents.max())))
    assert 1 / latents.numel() <= found["beyond_4_sigma"] < 3e-4


@pytest.mark.parametrize("kind", [VQVAE, KLVAE])
def test_both_kinds_of_codec_are_checked(kind):
    torch.manual_seed(0)
    codec = kind(**SMALL).eval()
    codec.calibrate(to_float(images()))
    found = check_codec(codec, images(), batch_size=8)
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
    assert found["lpips"] is None and found["lpips_reason"].startswith("squeezenet1_1-b8a52dc0.pth is not in")
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

    monkeypatch.setattr(codec_quality, "load_lpips", Distance)
    found = check_codec(Noisy(0.1), images(), batch_size=7)
    assert found["lpips"] == pytest.approx(0.1, rel=1e-4) and "lpips_reason" not in found


def test_images_that_are_not_the_codecs_are_refused():
    for wrong in (images()[..., :16], images().float(), images()[:0], images().repeat(1, 3, 1, 1)):
        assert "size=32, channels=1" in message(check_codec, Noisy(0.1), wrong)


@pytest.mark.parametrize(
    "vq, usage, kl, choice",
    [(27.5, 0.9, 25.0, "vq"), (27.5, 0.8, 25.0, "kl"), (27.4, 0.9, 25.0, "kl"), (20.0, 1.0, 25.0, "kl")],
)
def test_the_choice_follows_the_rule(vq, usage, kl, choice):
    found = choose_codec({"psnr_db": vq, "usage": usage}, {"psnr_db": kl})
    assert found["choice"] == choice and found["ratio"] == pytest.approx(vq / kl)
    assert (found["vq_psnr_db"], found["kl_psnr_db"], found["usage"]) == (vq, kl, usage)
    assert found["sentence"].startswith(f"Take the {choice.upper()} codec") and f"{vq:.1f} dB" in found["sentence"]


def test_the_picture_of_latents_has_a_bar_a_channel():
    latents = torch.randn(6, 5, 4, 4) * torch.arange(1, 6).view(1, 5, 1, 1)
    left, right = plots.latent_statistics(latents).axes
    heights = [bar.get_height() for bar in right.patches]
    assert heights == pytest.approx(latents.std((0, 2, 3), correction=0).tolist(), rel=1e-4)
    assert len(left.patches) == 5
