"""Plain image statistics against brute force, other libraries and closed forms; who is told apart by them."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from toys import evidence, gait, windows

from mdlib.evaluation.image_statistics import FEATURES, NAMES, describe, statistics, texture


def feature(images: torch.Tensor, name: str) -> np.ndarray:
    return describe(images)[:, FEATURES.index(name)]


def test_moments_are_scipys():
    images = windows(3, 0).images
    pixels = images.flatten(1).numpy() / 255
    np.testing.assert_allclose(feature(images, "mean"), pixels.mean(1), rtol=1e-4)
    np.testing.assert_allclose(feature(images, "deviation"), pixels.std(1), rtol=1e-4)
    np.testing.assert_allclose(feature(images, "skewness"), scipy.stats.skew(pixels, axis=1), rtol=1e-3)
    np.testing.assert_allclose(
        feature(images, "kurtosis"), scipy.stats.kurtosis(pixels, axis=1, fisher=False), rtol=1e-3
    )


def test_texture_is_that_of_counted_neighbours():
    torch.manual_seed(0)
    image, levels = torch.rand(7, 7), 4
    grey = (image * levels).long().clamp(max=levels - 1).numpy()
    found = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        counts = np.zeros((levels, levels))
        for row in range(7):
            for column in range(7):
                if row + down < 7 and 0 <= column + right < 7:
                    one, other = grey[row, column], grey[row + down, column + right]
                    counts[one, other] += 1
                    counts[other, one] += 1
        p, (i, j) = counts / counts.sum(), np.indices(counts.shape)
        found.append(
            [(p * (i - j) ** 2).sum(), (p * abs(i - j)).sum(), (p / (1 + (i - j) ** 2)).sum(), (p**2).sum() ** 0.5]
        )
    np.testing.assert_allclose(texture(image[None], levels)[0], np.mean(found, 0), rtol=1e-5)


def test_a_flat_window_has_no_texture_and_stripes_have_one_frequency():
    flat = torch.full((1, 1, 32, 32), 90, dtype=torch.uint8)
    contrast, dissimilarity, homogeneity, energy = texture(flat[:, 0] / 255)[0].tolist()
    assert (contrast, dissimilarity, homogeneity, energy) == (0, 0, 1, 1) and np.isfinite(describe(flat)).all()
    for period, band in ((32, 1), (8, 3), (4, 4)):  # cycles a pixel: 0.031, 0.125, 0.25
        wave = 127 + 100 * torch.cos(2 * torch.pi * torch.arange(32) / period)
        stripes = wave.expand(1, 1, 32, 32).to(torch.uint8)
        assert feature(stripes, f"spectrum_{band}")[0] > 0.99


def test_batches_and_channels_change_nothing():
    images = windows(3, 0).images
    np.testing.assert_allclose(describe(images, batch_size=5), describe(images), rtol=1e-6)
    np.testing.assert_allclose(describe(images.expand(-1, 3, -1, -1)), describe(images), rtol=1e-3, atol=1e-5)


def test_real_windows_are_alike_others_are_not():
    real = windows(20, 7)
    honest = statistics(evidence(real))
    swapped = statistics(evidence(windows(20, 7, of=lambda label, n, seed: gait((label + 1) % 4, n, seed))))
    noise = statistics(evidence(replace(real, images=torch.randint_like(real.images, 256))))
    ks, distance, typical = ([found[name]["value"] for found in (honest, swapped, noise)] for name in NAMES[:3])
    assert ks[0] < ks[1] < ks[2] == 1 and abs(ks[0] - honest["ks"]["real_vs_real"]) < 0.15
    assert distance[0] < distance[1] < distance[2] and distance[0] == pytest.approx(
        honest["mahalanobis"]["real"], rel=0.3
    )
    assert typical[0] > 0.7 > typical[1] > typical[2] == 0
    assert [row["feature"] for row in honest["ks_by_feature"]] == list(FEATURES)


def test_statistics_need_windows_in_every_set():
    found = statistics(evidence(windows(5, 7), val=windows(2, 2, 40), test=windows(2, 3, 42)))
    assert {name: found[name]["value"] for name in NAMES} == dict.fromkeys(NAMES)
