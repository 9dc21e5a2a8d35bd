"""Filters of generated windows, see docs/evaluation.md. They know the generator's training windows only, so that what
they keep can be evaluated on test windows."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mdlib.data.splits import apply_split, read_split
from mdlib.data.windows import WindowSet, load_windows
from mdlib.evaluation import gait_metrics
from mdlib.evaluation.classifiers import train_classifier
from mdlib.models.classifier import SmallCNN, features
from mdlib.pipeline import copy_windows
from mdlib.utils import DataError

FILTERS = ("confidence", "margin", "specificity", "diversity")  # see `scores`
SPREADS = 3.0  # a user's range of a metric: the mean of the training windows ± so many standard deviations
STEPS = 400  # optimizer steps of the classifier of `select_folder`
SIFTED = ["torso_speed", "cadence", "step_length", "upper_envelope", "lower_envelope", "bandwidth"]


def scores(windows: WindowSet, classifier: SmallCNN) -> dict[str, np.ndarray]:
    """The scores of FILTERS, each (N,), by a classifier of the training windows; diversity is in its features scaled to
    length 1, and infinite for a user's only window."""
    every, own = classifier.probabilities(windows.images), windows.labels[:, None]
    confidence, others = every.gather(1, own)[:, 0], every.scatter(1, own, 0.0)
    first, second = torch.nn.functional.pad(every, (0, 1)).topk(2).values.T  # padded: with one user there is no second
    found = torch.nn.functional.normalize(features(classifier, windows.images), dim=1)
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
    that cannot be read off a window does not remove it."""
    found, known = gait_metrics.measure(windows), gait_metrics.measure(train)
    of_users = known.groupby("label")[SIFTED]
    enough = of_users.count() > 2
    mean, spread = (part.where(enough).reindex(found["label"]).to_numpy() for part in (of_users.mean(), of_users.std()))
    beyond = (found[SIFTED] - mean).abs() > SPREADS * spread
    return (found["plausible"] & ~beyond.any(axis=1)).to_numpy()


def select_folder(
    real: str | Path,
    generated: str | Path,
    split: str | Path,
    out: str | Path,
    by: str = "kinematics",
    fraction: float = 0.5,
    size: int = 64,
) -> tuple[int, int]:
    """Copy the generated windows that a filter keeps into `out`, with their manifest; returns how many of how many.

    Args:
        real, split: their training windows are what the filter knows.
        generated: folder that `generate` or notebook 05 wrote.
        by: one of FILTERS, or kinematics for `keep_plausible`, which decides by itself how many to keep.
        fraction: of each user's windows to keep, best first.
        size: pixels a side at which windows are compared.
    """
    if by not in (*FILTERS, "kinematics"):
        raise DataError(f"by must be one of {', '.join(FILTERS)} or kinematics, got {by!r}")
    if not 0 < fraction <= 1:
        raise DataError(f"keep must be a fraction between 0 and 1, got {fraction}")
    every = load_windows(real, size=size)
    train = apply_split(every, read_split(split))["train"]
    windows = load_windows(generated, size=size, colormap=every.colormap, users=every.users)
    if by == "kinematics":
        kept = keep_plausible(windows, train)
    else:
        classifier = train_classifier(train.images, train.labels, train.num_users, STEPS)
        kept = keep_best(windows, scores(windows, classifier)[by], fraction)
    if not kept.any():
        raise DataError(f"{by} keeps none of the {len(windows)} windows of {generated}: choose another filter")
    copy_windows(generated, [windows.paths[row] for row in np.flatnonzero(kept)], out)
    return int(kept.sum()), len(windows)
