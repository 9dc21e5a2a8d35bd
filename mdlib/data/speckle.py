"""Add the speckle of real windows to codec outputs, which are smooth expectations.

The power of a moving body's spectrogram is a smooth density times random speckle (Goodman 2007, "Speckle Phenomena in
Optics"), correlated as the window and hop of the short-time Fourier transform correlate it. In dB its deviation is
constant where many scatterers move independently. It is smaller on the steady trunk, and the display clips both ends.
So its distribution is measured: the intensities of real windows given that of the smooth image.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

LEVELS, QUANTILES, REACH = 16, 32, 3
LEAST = 100  # pixels from which quantiles are computed


@dataclass(frozen=True)
class Speckle:
    """Fitted speckle of windows of one size, intensities 0…255. Plain lists: a pipeline's config holds them.

    Args:
        intensities: (LEVELS, QUANTILES), row k: quantiles of the real intensities where the smooth one is in
            [k², (k + 1)²). Dark levels are finer, because there the display clips.
        correlation: (2 REACH + 1, 2 REACH + 1), of the speckle of pixels up to REACH rows and columns apart; its middle
            is 1.
    """

    intensities: list[list[float]]
    correlation: list[list[float]]

    def add(self, smooth: torch.Tensor, seeds: Iterable[int]) -> torch.Tensor:
        """Smooth images, uint8 (N, 1, S, S), with speckle; one seed an image."""
        kernel = torch.zeros(smooth.shape[-2:])
        kernel[: 2 * REACH + 1, : 2 * REACH + 1] = torch.tensor(self.correlation)
        power = torch.fft.fft2(kernel.roll((-REACH, -REACH), (0, 1))).real.clamp_min(0)
        each = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(smooth.shape[-2:], generator=one) for one in each])
        noise = torch.fft.ifft2(torch.fft.fft2(noise) * (power / power.mean()).sqrt()).real
        # Where in the table, −1 to 1: quantiles from left to right, levels downwards; cells are the bins.
        place = torch.stack([2 * torch.special.ndtr(noise) - 1, smooth[:, 0].float().sqrt() * 2 / LEVELS - 1], -1)
        table = torch.tensor(self.intensities).expand(len(smooth), 1, -1, -1)
        return F.grid_sample(table, place, padding_mode="border", align_corners=False).round().to(torch.uint8)


def fit_speckle(images: torch.Tensor, smooth: torch.Tensor) -> Speckle:
    """The speckle of real windows, uint8 (N, 1, S, S), given the same without it, such as reconstructions."""
    level, places = smooth.float().sqrt().long(), (np.arange(QUANTILES) + 0.5) / QUANTILES
    rows = [np.zeros(QUANTILES)]
    for k in range(LEVELS):
        here = images[level == k].numpy()
        # Too few pixels: as at the level below, brighter by the difference of the levels.
        rows.append(np.quantile(here, places) if len(here) >= LEAST else (rows[-1] + 2 * k).clip(max=255))
    power = torch.fft.fft2(images[:, 0].float() - smooth[:, 0].float()).abs().square().mean(0)
    correlation = torch.fft.ifft2(power).real.roll((REACH, REACH), (0, 1))[: 2 * REACH + 1, : 2 * REACH + 1]
    correlation = correlation / correlation[REACH, REACH].clamp_min(1e-6)
    return Speckle(np.stack(rows[1:]).round(1).tolist(), [[round(v, 3) for v in row] for row in correlation.tolist()])
