"""Which generated windows are worth keeping? Filters that know the generator's training windows and nothing else.

A filter is no judge: it is trained on, or fitted to, what the generator saw, so that what it keeps may be measured by
judges and test windows. What a filter gains is bought with yield, so both are reported.
"""

from pathlib import Path

import numpy as np
import torch

from mdlib.data.splits import apply_split, read_split
from mdlib.data.windows import DataError, WindowSet, load_windows
from mdlib.evaluation import gait_metrics
from mdlib.evaluation.classifiers import train_classifier
from mdlib.models.classifier import SmallCNN, features
from mdlib.pipeline import copy_windows

FILTERS = ("confidence", "margin", "specificity", "diversity")  # see `scores`
SPREADS = 3.0  # a user's range of a metric: the mean of the training windows, give or take so many deviations
SIFTED = ("torso_speed", "cadence", "step_length", "upper_envelope", "lower_envelope", "bandwidth")


def scores(windows: WindowSet, judge: SmallCNN) -> dict[str, np.ndarray]:
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
    """bool (N,): of each user, in each condition, the `share` of windows with the highest score, at least one."""
    kept, conditions = np.zeros(len(windows), dtype=bool), np.array([file.condition for file in windows.files])
    parts = [rows[conditions[rows] == one] for rows in _of_users(windows) for one in np.unique(conditions[rows])]
    for rows in parts:
        best = rows[np.argsort(-score[rows], kind="stable")]
        kept[best[: max(1, round(share * len(rows)))]] = True
    return kept


def keep_plausible(windows: WindowSet, train: WindowSet) -> np.ndarray:
    """bool (N,): kinematic sifting. Windows that a walking adult could have made and whose SIFTED metrics lie within
    the range of their user's training windows; a metric that cannot be read off a window does not drop it."""
    made, known = gait_metrics.measure(windows), gait_metrics.measure(train)
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


def select_folder(
    real: str | Path,
    generated: str | Path,
    split: str | Path,
    out: str | Path,
    by: str = "kinematics",
    share: float = 0.5,
    size: int = 64,
    steps: int = 400,
) -> tuple[int, int]:
    """Copy the generated windows that a filter keeps into `out`, with their manifest; returns how many of how many.

    Args:
        real, split: whose training windows are what the filter knows.
        generated: folder that `generate` or notebook 05 wrote.
        by: one of FILTERS, or kinematics for `keep_plausible`.
        share: of each user's windows, the best first; kinematics decides by itself.
        size: pixels a side at which windows are compared.
        steps: optimizer steps of the filter's judge.

    Raises:
        DataError: no such filter or share, users or split that do not fit, nothing kept, or `out` holds other windows.
    """
    if by not in (*FILTERS, "kinematics"):
        raise DataError(f"by must be one of {', '.join(FILTERS)} or kinematics, got {by!r}")
    if not 0 < share <= 1:
        raise DataError(f"keep must be a share between 0 and 1, got {share}")
    every = load_windows(real, size=size)
    train = apply_split(every, read_split(split))["train"]
    made = load_windows(generated, size=size, colormap=every.colormap, users=every.users)
    if by == "kinematics":
        kept = keep_plausible(made, train)
    else:
        judge = train_classifier(train.images, train.labels, train.num_users, steps)
        kept = keep_best(made, scores(made, judge)[by], share)
    if not kept.any():
        raise DataError(f"{by} keeps none of the {len(made)} windows of {generated}")
    copy_windows(generated, [made.paths[row] for row in np.flatnonzero(kept)], out)
    return int(kept.sum()), len(made)


def _of_users(windows: WindowSet) -> list[np.ndarray]:
    """Rows of each user who has any."""
    labels = windows.labels.numpy()
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]
