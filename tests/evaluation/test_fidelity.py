"""Distances between sets of windows; plain image statistics against brute force, other libraries and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from toys import USERS, evidence, gait, windows

from mdlib.evaluation import codec_quality
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.fidelity import FEATURES, STATISTICS, describe, fidelity, pairs_apart, statistics, texture
from mdlib.models.classifier import SmallCNN
from mdlib.models.pretrained import INCEPTION, LPIPS_BACKBONES


def test_pairs_of_a_user_share_no_step():
    pairs = pairs_apart(windows(10, 0, 40), gap=4)
    assert [mine.shape[1] for mine in pairs] == [21] * 4, "6 + 5 + 4 + 3 + 2 + 1 of ten in a row"
    assert all((mine[1] - mine[0] >= 4).all() for mine in pairs)
    assert pairs_apart(windows(1, 0), gap=0)[0].shape == (2, 0)


def test_fidelity_needs_windows_in_every_set():
    arms = Arms({"real_only": [SmallCNN(len(USERS))]}, {}, 0.5)
    found = fidelity(evidence(windows(5, 7), val=windows(2, 2, 40), test=windows(2, 3, 42)), arms)
    assert found["fd"]["value"] is None and "both halves" in found["fd_ratio"]["reason"]


def test_the_map_shows_users_with_generated_windows():
    made = windows(5, 7)
    case = evidence(made.select(made.labels >= 2))
    arms = Arms({"real_only": [SmallCNN(len(USERS))]}, {}, 0.5)
    points = fidelity(case, arms)["map"]
    assert {(point["user"], point["generated"]) for point in points} == {
        (user, kind) for user in USERS[2:] for kind in (True, False)
    }


def test_published_networks_measure_where_their_weights_are(tmp_path, monkeypatch):
    from torchvision.models import inception_v3

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    small = evidence(windows(2, 7), train=windows(1, 1), val=windows(4, 2, 40), test=windows(6, 3, 50))
    arms = Arms({"real_only": [SmallCNN(len(USERS))]}, {}, 0.5)
    absent = fidelity(small, arms)
    assert absent["fd_inception"]["reason"].startswith("inception_v3_google-0cc3c7bd.pth is not on")
    assert absent["lpips_diversity"]["reason"].startswith("squeezenet1_1-b8a52dc0.pth is not on")
    (tmp_path / "checkpoints").mkdir()
    torch.save(inception_v3(weights=None, init_weights=False).state_dict(), tmp_path / "checkpoints" / INCEPTION)
    (tmp_path / "checkpoints" / LPIPS_BACKBONES["squeeze"]).touch()
    apart = lambda first, second: (first - second).abs().mean((1, 2, 3))
    monkeypatch.setattr(codec_quality, "load_lpips", lambda net: Distance(apart))
    found = fidelity(small, arms)
    assert found["fd_inception"]["value"] > 0 and found["fd_inception"]["n"] == 4
    assert found["lpips_diversity"]["ratio"] == pytest.approx(1, abs=0.3)


class Distance(torch.nn.Module):
    """A stand-in for LPIPS."""

    def __init__(self, between):
        super().__init__()
        self.between, self.weight = between, torch.nn.Parameter(torch.zeros(1))

    def forward(self, first, second):
        return self.between(first, second)


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
    ks, distance, typical = ([found[name]["value"] for found in (honest, swapped, noise)] for name in STATISTICS[:3])
    assert ks[0] < ks[1] < ks[2] == 1 and abs(ks[0] - honest["ks"]["real_vs_real"]) < 0.15
    assert distance[0] < distance[1] < distance[2] and distance[0] == pytest.approx(
        honest["mahalanobis"]["real"], rel=0.3
    )
    assert typical[0] > 0.7 > typical[1] > typical[2] == 0


def test_statistics_need_windows_in_every_set():
    found = statistics(evidence(windows(5, 7), val=windows(2, 2, 40), test=windows(2, 3, 42)))
    assert {name: found[name]["value"] for name in STATISTICS} == dict.fromkeys(STATISTICS)
