"""Filters of generated windows keep what they say, of every user."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from toys import windows

from mdlib.evaluation import gait_metrics
from mdlib.evaluation.filters import keep_best, keep_plausible, scores
from mdlib.models.classifier import SmallCNN


class Stub(SmallCNN):
    """Names users by the first pixel: its brightness in quarters is the user; the second is how sure it is."""

    def features(self, images):
        return torch.cat([images[:, 0, 0, :2] + 2, torch.ones(len(images), 14)], 1)

    def forward(self, images):
        level = (images[:, 0, 0, 0] + 1) / 2
        return -20 * (level[:, None] - torch.arange(4) / 3).abs()


def stamped(labels: list[int], taken_for: list[float]):
    made = windows(3, 0).select([3 * label for label in labels])
    images = made.images.clone()
    images[:, 0, 0, 0] = (torch.tensor(taken_for) * 255 / 3).round().to(torch.uint8)
    return type(made)(images, made.labels, made.users, made.files, made.colormap, made.root)


def test_scores_are_what_the_classifier_says_of_the_own_user():
    made, classifier = stamped([0, 0, 1, 2], [0, 0.5, 1, 3]), Stub(4)
    found = scores(made, classifier)
    own = classifier.probabilities(made.images).numpy()[np.arange(4), made.labels]
    np.testing.assert_allclose(found["confidence"], own, rtol=1e-6)
    assert found["confidence"][1] == pytest.approx(0.5, abs=0.03) and found["confidence"][3] < 0.05
    every = np.sort(classifier.probabilities(made.images).numpy(), axis=1)
    np.testing.assert_allclose(found["margin"], every[:, -1] - every[:, -2], rtol=1e-5)
    right = found["confidence"] > 0.5  # named right, the two are one; else the user lies behind another
    np.testing.assert_allclose(found["specificity"][right], found["margin"][right], rtol=1e-5)
    assert found["specificity"][3] < -0.9 < 0.9 < found["margin"][3]
    assert 0 < found["diversity"][0] == found["diversity"][1] < 1
    assert np.isinf(found["diversity"][2:]).all(), "alone of their user"


def test_the_best_of_each_user_are_kept():
    made = windows(5, 0)
    score = np.tile([0.1, 0.5, 0.3, 0.9, 0.2], 4)
    assert keep_best(made, score, 0.4).tolist() == [False, True, False, True, False] * 4
    assert keep_best(made, score, 0.01).sum() == 4, "at least one"


def test_the_best_of_each_condition_are_kept():
    made = windows(4, 0)
    files = tuple(replace(file, condition="bag" if row % 4 < 2 else "") for row, file in enumerate(made.files))
    kept = keep_best(replace(made, files=files), np.tile([0.1, 0.2, 0.8, 0.9], 4), 0.5)
    assert kept.tolist() == [False, True, False, True] * 4


def test_windows_beyond_a_users_range_are_sifted(monkeypatch):
    speeds = {"train": np.tile([1.0, 1.1, 1.2], 4), "made": np.tile([1.1, 1.5, np.nan, 1.15, 0.6], 4)}

    def read(part):
        values = speeds["train" if len(part) == 12 else "made"]
        every = {name: np.full(len(values), np.nan) for name in gait_metrics.METRICS} | {"torso_speed": values}
        return pd.DataFrame({**every, "plausible": np.arange(len(values)) != 3, "label": part.labels.numpy()})

    monkeypatch.setattr(gait_metrics, "measure", read)
    assert keep_plausible(windows(5, 7), windows(3, 1)).tolist() == [True, False, True, False, False] + [
        *(True, False, True, True, False) * 3
    ]
