"""Filters of generated windows. They know the generator's training windows only, so what they keep can be evaluated on
test windows."""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from mdlib.data.windows import WindowSet
from mdlib.evaluation import gait_metrics
from mdlib.models.classifier import SmallCNN, features

FILTERS = ("confidence", "margin", "specificity", "diversity")  # see `scores`
SPREADS = 3.0  # a user's range of a metric: the mean of the training windows ± so many standard deviations
SIFTED = ["torso_speed", "cadence", "step_length", "upper_envelope", "lower_envelope", "bandwidth"]


def scores(windows: WindowSet, classifier: SmallCNN) -> dict[str, np.ndarray]:
    """The scores of FILTERS, each (N,), by a classifier of the training windows; diversity is in its features scaled to
    length 1, and infinite for a user's only window."""
    every, own = classifier.probabilities(windows.images), windows.labels[:, None]
    confidence, others = every.gather(1, own)[:, 0], every.scatter(1, own, 0.0)
    first, second = F.pad(every, (0, 1)).topk(2).values.T  # padded: with one user there is no second
    found = F.normalize(features(classifier, windows.images), dim=1)
    nearest = torch.full((len(windows),), torch.inf)
    for label in windows.labels.unique():
        mine = windows.labels == label
        nearest[mine] = torch.cdist(found[mine], found[mine]).fill_diagonal_(torch.inf).min(1).values
    each = (confidence, first - second, confidence - others.amax(1), nearest)
    return {name: score.numpy() for name, score in zip(FILTERS, each, strict=True)}


def keep_best(windows: WindowSet, score: np.ndarray, fraction: float) -> np.ndarray:
    """bool (N,): of each user in each condition the `fraction` of windows with the highest score, at least one."""
    frame = pd.DataFrame(list(windows.files)).assign(score=score)
    groups = frame.groupby(["user", "condition"])["score"]
    rank = groups.rank(method="first", ascending=False)
    return (rank <= (fraction * groups.transform("size")).round().clip(lower=1)).to_numpy()


def keep_plausible(windows: WindowSet, train: WindowSet) -> np.ndarray:
    """bool (N,): plausible windows whose SIFTED metrics lie within the range of the user's training windows. A metric
    that cannot be measured from a window does not remove it."""
    found, known = gait_metrics.measure(windows), gait_metrics.measure(train)
    of_users = known.groupby("label")[SIFTED]
    enough = of_users.count() > 2
    mean, spread = (part.where(enough).reindex(found["label"]).to_numpy() for part in (of_users.mean(), of_users.std()))
    beyond = (found[SIFTED] - mean).abs() > SPREADS * spread
    return (found["plausible"] & ~beyond.any(axis=1)).to_numpy()
