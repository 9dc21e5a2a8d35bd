"""Which generated windows are worth keeping? Filters that know the generator's training windows and nothing else.

A filter is no judge: it is trained on, or fitted to, what the generator saw, so that what it keeps may be measured by
judges and test windows. What a filter gains is bought with yield, so both are reported.
"""

import numpy as np
import torch

from mdlib import kinematics
from mdlib.data import WindowSet
from mdlib.judge import Judge, features

FILTERS = ("confidence", "margin", "specificity", "diversity")  # see `scores`
SPREADS = 3.0  # a user's range of a metric: the mean of the training windows, give or take so many deviations
SIFTED = ("torso_speed", "cadence", "step_length", "upper_envelope", "lower_envelope", "bandwidth")


def scores(windows: WindowSet, judge: Judge) -> dict[str, np.ndarray]:
    """What FILTERS look at, each (N,), by a judge of the training windows.

    confidence: P(own user); margin: P of the likeliest user less that of the next, whoever they are; specificity: P(own
    user) less that of the likeliest other; diversity: distance to the nearest other window of the user in the judge's
    features, each of length 1 (infinite for a user's only window).
    """
    every, own = judge.probabilities(windows.images), windows.labels[:, None]
    confidence, others = every.gather(1, own)[:, 0], every.scatter(1, own, 0.0)
    first, second = torch.nn.functional.pad(every, (0, 1)).topk(2).values.T  # padded: of one user there is no second
    found = torch.nn.functional.normalize(features(judge, windows.images), dim=1)
    nearest = np.full(len(windows), np.inf)
    for rows in _of_users(windows):
        distance = torch.cdist(found[rows], found[rows]).fill_diagonal_(torch.inf)
        nearest[rows] = distance.min(1).values.numpy()
    likelihoods = {"confidence": confidence, "margin": first - second, "specificity": confidence - others.amax(1)}
    return {**{name: score.numpy() for name, score in likelihoods.items()}, "diversity": nearest}


def keep_best(windows: WindowSet, score: np.ndarray, share: float) -> np.ndarray:
    """bool (N,): of each user the `share` of windows with the highest score, at least one."""
    kept = np.zeros(len(windows), dtype=bool)
    for rows in _of_users(windows):
        best = rows[np.argsort(-score[rows], kind="stable")]
        kept[best[: max(1, round(share * len(rows)))]] = True
    return kept


def keep_plausible(windows: WindowSet, train: WindowSet) -> np.ndarray:
    """bool (N,): kinematic sifting. Windows that a walking adult could have made and whose SIFTED metrics lie within
    the range of their user's training windows; a metric that cannot be read off a window does not drop it."""
    made, known = kinematics.measure(windows), kinematics.measure(train)
    kept = made.plausible.copy()
    for name in SIFTED:
        for label in range(train.num_users):
            values = known.of_user(name, label)
            if len(values) < 3:
                continue
            mine = made.labels == label
            beyond = np.abs(made.values[name] - values.mean()) > SPREADS * values.std(ddof=1)
            kept &= ~(mine & beyond)
    return kept


def _of_users(windows: WindowSet) -> list[np.ndarray]:
    """Rows of each user who has any."""
    labels = windows.labels.numpy()
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]
