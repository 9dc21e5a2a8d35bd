"""What a report is made from: real and generated windows, which of them may be compared, how figures are written."""

from dataclasses import dataclass

import numpy as np
import torch

from mdlib.data.windows import DataError, WindowSet
from mdlib.evaluation import metrics

# Sets that are compared: generated windows against unseen real ones; one half of the unseen against the other; and the
# generator's training windows against the unseen, which is what a perfect copier would get.
COMPARED = {"value": ("generated", "unseen"), "real_vs_real": ("first", "second"), "train": ("train", "unseen")}

REFERENCES = ("auto", "resnet18", "none")


@dataclass(frozen=True)
class Protocol:
    """How much work the evaluation does; what it does is fixed."""

    evaluation_steps: int = 400  # optimizer steps of each judge and each classifier
    seeds: int = 3  # judges, and classifiers an arm
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5)  # of generated windows in a batch; validation windows choose
    counts: tuple[int, ...] | None = None  # generated windows a user with which the gain is measured too, besides all;
    # None: as many as real ones, and 2, 5 and 10 times as many
    keep: tuple[float, ...] = ()  # shares of generated windows, the surest first, with which the gain is measured too
    multiples: tuple[int, ...] = (2,)  # times as many real windows, where spare ones are at hand: the yardstick
    reference: str = "auto"  # or resnet18, none: a second classifier beside the small one; auto: on a GPU

    def __post_init__(self):
        if self.seeds < 1:
            raise DataError(f"seeds must be 1 or more, got {self.seeds}")
        counts = self.counts or ()
        if any(not isinstance(n, int) or n < 1 for n in counts) or len(set(counts)) < len(counts):
            raise DataError(f"counts must be different whole numbers of 1 or more, got {list(counts)}")
        if any(not 0 < share < 1 for share in self.keep):
            raise DataError(f"keep must be shares between 0 and 1, got {list(self.keep)}")
        if any(not isinstance(n, int) or n < 2 for n in self.multiples):
            raise DataError(f"multiples must be whole numbers of 2 or more, got {list(self.multiples)}")
        if self.reference not in REFERENCES:
            raise DataError(f"reference must be one of {', '.join(REFERENCES)}, got {self.reference!r}")


@dataclass(frozen=True)
class Evidence:
    """What a report is made from: one image size, one label map.

    train: what the generator was trained on; val chose its checkpoints; test was kept for the end.
    generated: windows of the same users; codec: the pipeline's, or None when only folders are at hand.
    spare: more real windows from the time of the training windows, which the generator was not trained on; they may
    share steps with training windows. The arms real_x2 … alone are trained on them.

    Raises:
        DataError: a conditional codec of another number of users.
    """

    train: WindowSet
    val: WindowSet
    test: WindowSet
    generated: WindowSet
    gap: int
    codec: torch.nn.Module | None = None
    spare: WindowSet | None = None

    def __post_init__(self):
        codec, users = self.codec, self.train.num_users
        if codec is not None and codec.conditional and codec.config.num_users != users:
            raise DataError(f"the codec was trained with {codec.config.num_users} users, these windows have {users}")


def time_blocks(windows: WindowSet, gap: int) -> np.ndarray:
    """Block id (N,) of each window: `gap` consecutive windows of a recording are one."""
    block, used = np.zeros(len(windows), dtype=int), 0
    for rows in by_recording(windows):
        times = np.array([windows.files[row].number for row in rows])
        _, place = np.unique((times - times.min()) // gap, return_inverse=True)
        block[rows] = used + place
        used += place.max() + 1
    return block


def chance_blocks(windows: WindowSet, gap: int) -> np.ndarray:
    """Block id (N,) of each window for intervals: stretches of three gaps. Neighbouring blocks share steps, so blocks
    must be long against the overlap (Künsch 1989): of one gap 95 % intervals held the truth 87 to 92 times in a hundred
    where windows overlap by three quarters, of three gaps 92 to 96."""
    return time_blocks(windows, 3 * gap)


def halves(windows: WindowSet, gap: int) -> list[list[int]]:
    """Rows of two halves of real windows that share no step: every other stretch of 2·gap windows of each recording,
    without the windows at a stretch's beginning that reach into the other half."""
    stretch, chosen = time_blocks(windows, 2 * gap), [[], []]
    for rows in by_recording(windows):
        last = [-np.inf, -np.inf]  # time of the last window each half took
        for row in rows:
            half, time = stretch[row] % 2, windows.files[row].number
            if time - last[1 - half] >= gap:
                chosen[half].append(int(row))
                last[half] = time
    return chosen


def by_recording(windows: WindowSet) -> list[np.ndarray]:
    """Rows of each recording, in time order."""
    groups: dict[tuple, list[int]] = {}
    for row, file in enumerate(windows.files):
        groups.setdefault((file.user, file.condition, file.recording), []).append(row)
    return [np.array(sorted(rows, key=lambda row: windows.files[row].number)) for rows in groups.values()]


def concatenate(first: WindowSet, second: WindowSet) -> WindowSet:
    return WindowSet(
        images=torch.cat([first.images, second.images]),
        labels=torch.cat([first.labels, second.labels]),
        users=first.users,
        files=first.files + second.files,
        colormap=first.colormap,
        root=first.root,
    )


def first_of_each(windows: WindowSet, count: int) -> WindowSet:
    """`count` windows of each user, from the user's conditions in turn."""
    queues: dict[tuple, list[int]] = {}
    for row, (label, file) in enumerate(zip(windows.labels.tolist(), windows.files, strict=True)):
        queues.setdefault((label, file.condition), []).append(row)
    in_turn = sorted((label, place, row) for (label, _), rows in queues.items() for place, row in enumerate(rows))
    taken = [[row for label, _, row in in_turn if label == user][:count] for user in range(windows.num_users)]
    return windows.select(sorted(row for rows in taken for row in rows))


def compared_sets(evidence: Evidence) -> tuple[dict[str, WindowSet], dict[str, list[int]]]:
    """The sets of COMPARED by name, and the halves' rows of the unseen one."""
    unseen = concatenate(evidence.val, evidence.test)
    rows = dict(zip(("first", "second"), halves(unseen, evidence.gap), strict=True))
    sets = {"generated": evidence.generated, "unseen": unseen, "train": evidence.train}
    return sets | {name: unseen.select(half) for name, half in rows.items()}, rows


def alike(sets: dict[str, WindowSet], seed: int) -> dict[str, torch.Tensor]:
    """Rows drawn from each set: of each user as many as the set that has fewest of that user."""
    least = torch.stack([torch.bincount(part.labels, minlength=part.num_users) for part in sets.values()]).min(0).values
    rows = {}
    for place, (name, part) in enumerate(sets.items()):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(1000 * place + seed))
        rows[name] = torch.cat([order[part.labels[order] == user][:k] for user, k in enumerate(least.tolist())])
    return rows


def figure(value: float, n: int, ci95: list[float] | None = None) -> dict:
    return {"value": value, "n": n} | ({"ci95": ci95} if ci95 else {})


def absent(reason: str) -> dict:
    """A figure that could not be measured."""
    return {"value": None, "reason": reason}


def missing(*names: str, reason: str) -> dict:
    return {name: absent(reason) for name in names}


def over_users(values: np.ndarray) -> dict:
    """The mean of a value a user, with an interval that redraws users where there are three or more; n: users."""
    draws = metrics.block_bootstrap(values, np.arange(len(values)))
    return figure(float(values.mean()), len(values), metrics.interval(draws) if len(values) > 2 else None)


def scored(correct: np.ndarray, blocks: np.ndarray) -> dict:
    """Mean of an arm's correctness (seeds, N), with an interval that redraws seeds and blocks of windows: of both there
    might have been others."""
    draws = metrics.paired_bootstrap(correct[None], blocks)[:, 0]
    return figure(float(correct.mean()), correct.shape[1], metrics.interval(draws))


def bootstrapped(values: np.ndarray, blocks: np.ndarray) -> dict:
    """Mean of a per-window value, with its block-bootstrap interval."""
    return figure(float(values.mean()), len(values), metrics.interval(metrics.block_bootstrap(values, blocks)))
