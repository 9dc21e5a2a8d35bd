"""Speckle of a known deviation and correlation is found again, and put only where real windows have it."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from mdlib.data.speckle import Speckle, fit_speckle

DEVIATION = 20.0  # grey levels


def ramp(count: int) -> torch.Tensor:
    """Smooth images (count, 1, 64, 64): black on top, then every intensity from left to right."""
    smooth = 4 * torch.arange(64) + torch.arange(64)[:, None] % 4
    smooth[:16] = 0
    return smooth.to(torch.uint8).expand(count, 1, 64, 64)


def speckled(smooth: torch.Tensor) -> torch.Tensor:
    """`smooth` as a display shows it: log-normal speckle, correlated along columns (each pixel with the one below: 1/2)
    and not along rows, clipped at both ends; none on black."""
    white = torch.randn(len(smooth), 1, 65, 64, generator=torch.Generator().manual_seed(1))
    grain = (white[:, :, 1:] + white[:, :, :-1]) / 2**0.5
    shown = (smooth.float() + DEVIATION * grain).round().clamp(0, 255)
    return torch.where(smooth > 0, shown, 0).to(torch.uint8)


@pytest.fixture(scope="module")
def fitted() -> Speckle:
    smooth = ramp(40)
    return fit_speckle(speckled(smooth), smooth)


def test_grey_gets_the_deviation_and_correlation_of_the_real_windows(fitted):
    grey = torch.full((20, 1, 64, 64), 128, dtype=torch.uint8)
    grain = fitted.add(grey, range(20)).float() - 128
    assert grain.mean().abs() < 2
    assert grain.std() == pytest.approx(DEVIATION, rel=0.15)
    correlation = lambda one, other: torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()
    assert correlation(grain[:, :, 1:], grain[:, :, :-1]) == pytest.approx(0.5, abs=0.07)
    assert correlation(grain[..., 1:], grain[..., :-1]) == pytest.approx(0.0, abs=0.07)


def test_black_stays_black_and_dark_pixels_are_clipped_as_in_real_windows(fitted):
    smooth = ramp(10)
    added, real = fitted.add(smooth, range(10)), speckled(smooth)
    assert (added[smooth == 0] == 0).all()
    dark = (smooth > 4) & (smooth < 20)
    clipped = [(images[dark] == 0).float().mean().item() for images in (real, added)]
    assert clipped[0] > 0.2 and clipped[1] == pytest.approx(clipped[0], abs=0.06)
    assert added.max() == 255


def test_speckle_depends_on_the_seed_of_its_window_alone(fitted):
    smooth = ramp(3)
    together = fitted.add(smooth, range(3))
    assert torch.equal(fitted.add(smooth[1:2], [1]), together[1:2])
    assert not torch.equal(together[0], together[1])


def test_intensities_that_no_training_window_has_get_the_speckle_of_darker_ones():
    smooth = ramp(40).clamp(max=150)
    fitted = fit_speckle(speckled(smooth), smooth)
    bright = torch.full((10, 1, 64, 64), 190, dtype=torch.uint8)
    added = fitted.add(bright, range(10)).float()
    assert added.mean() == pytest.approx(190, abs=8) and added.std() == pytest.approx(DEVIATION, rel=0.3)


def test_windows_without_speckle_stay_as_they_are():
    smooth = F.avg_pool2d(ramp(20).float(), 5, 1, 2).to(torch.uint8)
    added = fit_speckle(smooth, smooth).add(smooth, range(20))
    assert (added.float() - smooth.float()).abs().mean() < 8, "no more than the steps of the table"
    assert set(asdict(fit_speckle(smooth, smooth))) == {"intensities", "correlation"}
