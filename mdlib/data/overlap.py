"""Image similarity of windows: whether two share columns of a recording, regardless of their names."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from mdlib.data.files import WindowFile
from mdlib.data.splits import PARTS
from mdlib.data.windows import WindowSet, concatenate
from mdlib.utils import to_float

SIDE = 64  # pixels at which windows are compared: speckle, which only the same columns have in common, is that fine
FARTHEST = SIDE * 3 // 4  # longest shift in time that is tried: windows that share less than a quarter pass as apart
FEW = 4  # windows of a kind, below which their mean is not known
# Between the similarity of windows apart (0) and of neighbours (1): above it, windows share columns. Two thirds of the
# pairs that share half of their columns are above it, and under 3 % of the test windows of proper splits.
SHARED = 0.6
COPY = 0.9  # similarity from which on two windows are one image, recompressed or shifted by a few columns
IN_ORDER = 0.3  # fraction of consecutive windows that share columns, below which names do not give the order in time
LEAST = 20  # windows of a set, below which nothing is said of their order
ROWS = 40  # windows of a user that are compared with other users': enough for a median


def residuals(windows: WindowSet, whole: bool = False) -> torch.Tensor:
    """Residuals of windows, float (N, SIDE, SIDE): minus the means of set, user and condition (unless `whole`) and a
    local mean, with local contrast normalised. They are similar where windows share columns."""
    images = to_float(windows.images).mean(1, keepdim=True)
    images = functional.interpolate(images, size=(SIDE, SIDE), mode="area" if images.shape[-1] > SIDE else "bilinear")
    kinds = ["all"] * len(windows), windows.labels.tolist(), [(file.user, file.condition) for file in windows.files]
    for names in () if whole else kinds:
        _, group = np.unique([str(name) for name in names], return_inverse=True)
        for place in range(group.max() + 1):
            mine = torch.from_numpy(group == place)
            if mine.sum() >= FEW:
                images[mine] -= images[mine].mean(0)
    images -= _smooth(images)
    return (images / (_smooth(images**2).sqrt() + 0.05)).squeeze(1)


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """Means over 9 × 9 pixels."""
    padded = functional.pad(images, (4, 4, 4, 4), mode="replicate")
    return functional.avg_pool2d(functional.avg_pool2d(padded, (9, 1), 1), (1, 9), 1)


def similarity(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How alike residuals (N, SIDE, SIDE) and (M, SIDE, SIDE) are: their correlation at the best shift in time, times
    the root of the fraction of columns that overlap there; or at the best circular shift, if that is more.

    Returns:
        similarity (N, M): 1 for copies, up to 0.87 for windows that share three quarters, about 0.1 for windows apart;
        and the shift (N, M) in pixels, positive where `a` is later.
    """
    spectra = [torch.fft.rfft(x, 2 * SIDE).permute(2, 0, 1) for x in (a, b)]
    shifts = torch.arange(-FARTHEST, FARTHEST + 1)
    k, later = shifts.abs(), shifts > 0
    scales = []  # of a and b, for each shift: one over the root of their energy in the columns that overlap
    for energy, from_k in zip((x.square().sum(1).T for x in (a, b)), (~later, later), strict=True):
        after, before = energy.flip(0).cumsum(0).flip(0)[k], energy.cumsum(0).flip(0)[k]
        scales.append(torch.where(from_k[:, None], after, before).clamp_min(1e-6).rsqrt())
    scales[0] *= (1 - k[:, None] / SIDE) ** 0.5
    whole = [x.square().sum((1, 2)).clamp_min(1e-6).rsqrt() for x in (a, b)]
    scores, best = [], []
    for rows in torch.arange(len(a)).split(64):
        # products[-k]: sum over the columns of `a` times those of `b`, where `a` is k columns later
        products = torch.fft.irfft(spectra[0][:, rows] @ spectra[1].mH, 2 * SIDE, dim=0)
        circular, place = (products[:SIDE] + products[SIDE:]).max(0)
        circular *= whole[0][rows, None] * whole[1]
        linear, at = (products[-shifts] * scales[0][:, rows, None] * scales[1][:, None]).max(0)
        scores.append(torch.maximum(linear, circular))
        best.append(torch.where(linear >= circular, shifts[at], (SIDE // 2 - place) % SIDE - SIDE // 2))
    return torch.cat(scores), torch.cat(best)


@dataclass(frozen=True)
class Levels:
    """Reference values of the similarity of a window and its most similar one."""

    apart: float  # median, if all of them show other columns
    apart_high: float  # 95 % quantile, if all of them show other columns
    neighbours: float  # median over all windows of the user; 1 where windows share too little to be seen

    @property
    def shared(self) -> float:
        """Similarity above which two windows share columns."""
        return max(self.apart + SHARED * (self.neighbours - self.apart), self.apart_high)


def levels(same: torch.Tensor, other: torch.Tensor, best_other: torch.Tensor, best: torch.Tensor) -> Levels:
    """Levels from the similarities of windows of a user (same), of different users, who share nothing (other), and of
    windows to the most similar one of another user's (best_other) and of their own user's (best), all flat.

    Windows of a user are more alike than those of different users. The lower half of their similarities, without those
    as high as neighbours', gives place and scale.
    """
    neighbours = float(best.median())
    same = same[same <= (float(best_other.median()) + neighbours) / 2]
    low, middle = (np.quantile(some, (0.1, 0.5)) for some in (same, other))
    scale = (low[1] - low[0]) / max(middle[1] - middle[0], 1e-6)
    apart, high = (float(low[1] + scale * (np.quantile(best_other, q) - middle[1])) for q in (0.5, 0.95))
    return Levels(apart, high, neighbours if neighbours > high else 1.0)


@dataclass(frozen=True)
class Nearness:
    """How alike each test window and the most similar training window of its user are."""

    test: WindowSet
    train: WindowSet  # the most similar window of each test window
    similarity: torch.Tensor  # (N,)
    levels: Levels

    @property
    def near(self) -> torch.Tensor:
        """Which test windows (N,) share columns with a training window."""
        return self.similarity > self.levels.shared


def nearness(parts: dict[str, WindowSet]) -> Nearness | None:
    """How near test windows are to training windows of their user; None where there is one user only."""
    both = concatenate(*(parts[part] for part in PARTS))
    own, labels, generator, found = residuals(both), both.labels, torch.Generator().manual_seed(0), []
    is_train, is_test = torch.zeros(2, len(both), dtype=torch.bool)
    is_train[: len(parts["train"])], is_test[len(both) - len(parts["test"]) :] = True, True
    for user in labels[is_test].unique().tolist():
        mine, others = (labels == user).nonzero()[:, 0], (labels != user).nonzero()[:, 0]
        train, test = mine[is_train[mine]], mine[is_test[mine]]
        others = others[torch.randperm(len(others), generator=generator)[: len(train)]]
        if len(train) and len(others):
            score, other = similarity(own[test], own[mine])[0], similarity(own[test], own[others])[0]
            score[test[:, None] == mine] = -1.0
            same = score[:, is_train[mine]]
            nearest, column = same.max(1)
            found.append((test, train[column], nearest, same.flatten(), other.flatten(), other.amax(1), score.amax(1)))
    if not found:
        return None
    test, train, nearest, *measured = (torch.cat(some) for some in zip(*found, strict=True))
    return Nearness(both.select(test), both.select(train), nearest, levels(*measured))


@dataclass(frozen=True)
class Neighbours:
    """Windows of a set that look alike, and whether those are the consecutive ones."""

    copies: list[tuple[str, str]]  # paths of two windows that are nearly the same image
    levels: Levels | None  # None where there is one user only, or too few windows
    shared: float | None  # fraction of consecutive windows that share columns; None: every recording is one window
    gap: int | None  # difference of numbers from which on windows share nothing; None: consecutive ones do not share

    @property
    def ordered(self) -> bool:
        """False where windows share columns, but not those with consecutive numbers."""
        return not self.levels or self.levels.neighbours == 1 or (self.shared or 0.0) > IN_ORDER


def neighbours(windows: WindowSet) -> Neighbours:
    """Compare all windows of each user with each other."""
    own, whole, generator = residuals(windows), residuals(windows, whole=True), torch.Generator().manual_seed(0)
    copies, found, following = [], [], []
    for user in windows.labels.unique().tolist():
        mine, others = (windows.labels == user).nonzero()[:, 0], (windows.labels != user).nonzero()[:, 0]
        score, shift = similarity(own[mine], own[mine])
        score.fill_diagonal_(-1.0)
        files = [windows.files[row] for row in mine.tolist()]
        # a copy that is shifted against the user's mean is like the window before the mean is taken away
        same = torch.maximum(score, similarity(whole[mine], whole[mine])[0]).fill_diagonal_(-1.0) > COPY
        copies += [(files[i].path, files[j].path) for i, j in same.triu().nonzero().tolist()]
        score[same] = -1.0
        for i, j in pairwise(range(len(files))):  # a set is ordered by condition, recording and number
            a, b = files[i], files[j]
            if (a.condition, a.recording) == (b.condition, b.recording) and b.number > a.number:
                following.append((float(score[j, i]), abs(int(shift[j, i])), b.number - a.number))
        others = others[torch.randperm(len(others), generator=generator)[: len(mine)]]
        if len(mine) > 1 and len(others):
            other = similarity(own[mine[:: -(-len(mine) // ROWS)]], own[others])[0]
            same = score[~torch.eye(len(mine), dtype=torch.bool)]
            found.append((same, other.flatten(), other.amax(1), score.amax(1)))
    usual = levels(*(torch.cat(some) for some in zip(*found, strict=True))) if len(windows) >= LEAST and found else None
    shared = [(shift, apart) for score, shift, apart in following if usual and score > usual.shared and shift]
    fraction = len(shared) / len(following) if following else None
    hop = float(np.median([shift / apart for shift, apart in shared])) if shared else 0.0
    # a cut is off by a column at times: 4.1 steps in a window are 4
    gap = math.ceil(SIDE / hop - 0.3) if hop and fraction > IN_ORDER else None
    return Neighbours(copies, usual, fraction, gap)


def overlap(parts: dict[str, WindowSet], *, gap: int = 4) -> dict:
    """How far the parts "train", "val" and "test" leak: by window numbers, which share nothing from a difference of
    `gap` on, and by the images, whatever the numbers are.

    Returns:
        dict with "min_distance", the smallest difference of window numbers between parts, within recordings (None: no
        recording is shared); "test_windows"; "test_share_overlapping", the fraction of test windows closer than `gap`
        to a training window by their numbers; and "test_share_near", the fraction that share columns with one by the
        images (None: there is one user).
    """
    numbers = [_number_distance(parts[a].files, parts[b].files) for a, b in (PARTS[:2], PARTS[1:], PARTS[::2])]
    smallest = min((float(pairs.min()) for pairs in numbers if pairs.numel()), default=torch.inf)
    measured = nearness(parts)
    return {
        "min_distance": int(smallest) if smallest < torch.inf else None,
        "test_windows": len(parts["test"]),
        "test_share_overlapping": float((numbers[2] < gap).any(0).float().mean()),
        "test_share_near": float(measured.near.float().mean()) if measured else None,
    }


def _number_distance(a: Sequence[WindowFile], b: Sequence[WindowFile]) -> torch.Tensor:
    """Differences (len(a), len(b)) of window numbers; infinite between recordings."""
    files = pd.DataFrame([*a, *b])
    recording = torch.tensor(files.groupby(["user", "condition", "recording"]).ngroup().to_numpy())
    number = torch.tensor(files["number"].to_numpy(float))  # exact for numbers that are time stamps, too
    apart = (number[: len(a), None] - number[len(a) :]).abs()
    return apart.masked_fill(recording[: len(a), None] != recording[len(a) :], torch.inf)
