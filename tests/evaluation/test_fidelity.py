"""Distances between sets of windows, and pairs of windows that share no step."""

import pytest
import torch
from toys import USERS, evidence, windows

from mdlib.evaluation import codec_quality
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.fidelity import fidelity, pairs_apart
from mdlib.models.classifier import SmallCNN
from mdlib.models.pretrained import INCEPTION, LPIPS_BACKBONES


def test_pairs_of_a_user_share_no_step():
    pairs = pairs_apart(windows(10, 0, 40), gap=4)
    assert [mine.shape[1] for mine in pairs] == [21] * 4, "6 + 5 + 4 + 3 + 2 + 1 of ten in a row"
    assert all((mine[1] - mine[0] >= 4).all() for mine in pairs)
    assert pairs_apart(windows(1, 0), gap=0)[0].shape == (2, 0)


def test_fidelity_needs_windows_in_every_set():
    arms = Arms([SmallCNN(len(USERS))], {}, 0.5)
    found = fidelity(evidence(windows(5, 7), val=windows(2, 2, 40), test=windows(2, 3, 42)), arms)
    assert found["fd"]["value"] is None and "both halves" in found["fd_ratio"]["reason"]


def test_published_networks_measure_where_their_weights_are(tmp_path, monkeypatch):
    from torchvision.models import inception_v3

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    small = evidence(windows(2, 7), train=windows(1, 1), val=windows(4, 2, 40), test=windows(6, 3, 50))
    arms = Arms([SmallCNN(len(USERS))], {}, 0.5)
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
