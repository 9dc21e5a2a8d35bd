"""Split windows by recording and time, so that overlapping neighbours never stand in two parts; measure the leak."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mdlib.data.windows import DataError, WindowFile, WindowSet, count, to_float
from mdlib.utils import whole_file

__all__ = [
    "PARTS",
    "STARTS",
    "apply_split",
    "chosen",
    "folds",
    "make_split",
    "measured_overlap",
    "overlap",
    "random_split",
    "read_split",
    "seen_of_test",
    "spare_windows",
    "write_split",
]

PARTS = ("train", "val", "test")
STARTS = ("init", "codec_start", "prior_start")  # a run's settings that name weights it begins with

# Two gaps drop up to 2 (gap - 1) windows: a recording of fewer than 8 gaps would lose a fifth of itself.
_SHORTEST_IN_GAPS = 8


# ---- making


def make_split(
    windows: WindowSet | Sequence[WindowFile],
    *,
    val: float = 0.15,
    test: float = 0.25,
    gap: int = 4,
    windows_per_user: int | None = None,
    contiguous: bool = False,
    unrecorded: dict[str, Sequence[int]] | None = None,
    fold: int = 0,
) -> dict:
    """Split by recording and time: in each recording train, then val, then test, in blocks of time.

    Windows of different parts of a recording have numbers at least `gap` apart: a window of four steps that advances by
    one shares nothing with the one four numbers later. Windows in between are dropped; the cuts move to where the
    numbers have gaps anyway, so that few are. Recordings too short for that (fewer than 8 gaps) are put end to end, per
    user and condition, and split as one.

    Args:
        windows: windows to split.
        val: share of the kept windows that goes to val.
        test: share that goes to test.
        gap: smallest difference of window numbers between parts.
        windows_per_user: keep this many training windows a user, evenly spaced over all of the user's; val and test
            stay as they are.
        contiguous: keep them in a row instead, from the middle of the user's longest stretch of training windows: what
            one short recording would have given.
        unrecorded: condition → users whose windows in it all go to test, as if there were none to train on: what a
            generator makes of them can then be compared with real ones.
        fold: of cross-validation, 0 to `folds(test)` − 1: the time of each recording that is split begins `fold` test
            blocks later, and what came before goes on behind its end. Over all folds nearly every window is in a test
            once; train may be two pieces.

    Returns:
        dict with the lists of paths ``train``, ``val``, ``test``, ``spare`` (training windows that `windows_per_user`
        leaves out) and ``dropped`` (next to another part), and the arguments.

    Raises:
        DataError: a user has too few windows, or an argument is out of range.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise DataError(f"val={val}, test={test}: both must be positive and their sum below 1")
    if gap < 1:
        raise DataError(f"gap={gap}: it must be at least 1")
    if not 0 <= fold < folds(test):
        raise DataError(f"fold={fold}: with test={test} there are folds 0 to {folds(test) - 1}")
    parts: dict[str, list[str]] = {part: [] for part in (*PARTS, "dropped", "spare")}
    users = _by(_files(windows), lambda f: f.user)
    away = {(condition, user) for condition, some in (unrecorded or {}).items() for user in some}
    if missing := away - {(f.condition, f.user) for f in _files(windows)}:
        condition, user = min(missing)
        raise DataError(f"unrecorded: there are no windows of ID_{user} in condition {condition!r}")
    for user, files in sorted(users.items()):
        mine: dict[str, list[WindowFile]] = {part: [] for part in parts}
        mine["test"] = [file for file in files if (file.condition, user) in away]
        files = [file for file in files if (file.condition, user) not in away]
        for timeline, numbers in _timelines(files, gap):
            for part, some in zip(
                (*PARTS, "dropped"), _cut_turned(timeline, numbers, val, test, gap, fold), strict=True
            ):
                mine[part] += some
        if not all(mine[part] for part in PARTS):
            raise DataError(
                f"user ID_{user} has {count(len(files), 'window')}, too few for train, val and test {gap} apart"
                f"{f' in fold {fold}' if fold else ''}: {3 * gap if fold else 2 * gap + 1} in a row are needed, add "
                "windows or leave the user out"
            )
        if windows_per_user is not None:
            every = mine["train"]
            mine["train"] = _few(every, windows_per_user, user, contiguous)
            mine["spare"] = [file for file in every if file not in mine["train"]]
        for part in parts:
            parts[part] += [f.path for f in mine[part]]
    if windows_per_user is not None:
        _check_conditions(_files(windows), parts, windows_per_user, contiguous)
    return {
        **parts,
        "gap": gap,
        "val_fraction": val,
        "test_fraction": test,
        "windows_per_user": windows_per_user,
        "contiguous": contiguous,
        "unrecorded": unrecorded or {},
        "fold": fold,
        "users": sorted(users),
    }


def folds(test: float = 0.25) -> int:
    """How many folds have tests that hardly meet: as many as blocks of the share `test` fit into a recording."""
    return int(1 / test + 1e-9)


def random_split(
    windows: WindowSet | Sequence[WindowFile], *, val: float = 0.15, test: float = 0.25, seed: int = 0
) -> dict:
    """Split each user's windows at random. LEAKS on overlapping windows: only for showing by how much."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[str]] = {part: [] for part in (*PARTS, "dropped")}
    users = _by(_files(windows), lambda f: f.user)
    for _, files in sorted(users.items()):
        order = [files[i].path for i in rng.permutation(len(files))]
        n_val, n_test = round(val * len(order)), round(test * len(order))
        parts["val"] += order[:n_val]
        parts["test"] += order[n_val : n_val + n_test]
        parts["train"] += order[n_val + n_test :]
    return {
        **parts,
        "gap": 0,
        "val_fraction": val,
        "test_fraction": test,
        "windows_per_user": None,
        "users": sorted(users),
        "random_seed": seed,
    }


def _files(windows: WindowSet | Sequence[WindowFile]) -> Sequence[WindowFile]:
    return windows.files if isinstance(windows, WindowSet) else windows


def _by(files: Iterable[WindowFile], key: Callable) -> dict:
    groups: dict = {}
    for file in files:
        groups.setdefault(key(file), []).append(file)
    return groups


def _timelines(files: Sequence[WindowFile], gap: int) -> Iterator[tuple[list[WindowFile], np.ndarray]]:
    """Windows in time order with their numbers: long recordings; a condition's short ones, end to end."""
    for _, of_condition in sorted(_by(files, lambda f: f.condition).items()):
        recordings = sorted(_by(of_condition, lambda f: f.recording).items())
        in_time = [sorted(recording, key=lambda f: f.number) for _, recording in recordings]
        joined: list[WindowFile] = []
        numbers: list[int] = []
        for recording in in_time:
            if len(recording) >= _SHORTEST_IN_GAPS * gap:
                yield recording, np.array([f.number for f in recording])
                continue
            # Recordings share nothing: one starts `gap` after the last, so that a cut between them drops no window.
            shift = numbers[-1] + gap - recording[0].number if numbers else 0
            joined += recording
            numbers += [f.number + shift for f in recording]
        if joined:
            yield joined, np.array(numbers)


def _cut_turned(
    files: list[WindowFile], numbers: np.ndarray, val: float, test: float, gap: int, fold: int
) -> tuple[list[WindowFile], list[WindowFile], list[WindowFile], list[WindowFile]]:
    """`_cut` of a timeline whose first `fold` test blocks were put behind its end, where they stay `gap` away; dropped
    too is what would share steps over the new beginning. A timeline that stays in one piece is not turned."""
    turned = round(fold * test * len(files))
    if not turned:
        return _cut(files, numbers, val, test, gap)
    start = int(np.searchsorted(numbers, numbers[turned - 1] + gap))
    order = np.concatenate([numbers[start:], numbers[:turned] + numbers[-1] + gap - numbers[0]])
    train, held, tested, dropped = _cut(files[start:] + files[:turned], order, val, test, gap)
    return (train, held, tested, files[turned:start] + dropped) if tested else (files, [], [], [])


def _cut(
    files: list[WindowFile], numbers: np.ndarray, val: float, test: float, gap: int
) -> tuple[list[WindowFile], list[WindowFile], list[WindowFile], list[WindowFile]]:
    """Train, val, test, dropped: the two cuts that drop few windows and stay near the shares asked for.

    All is train where no three parts fit in."""
    n = len(files)
    # If the left part ends before window i, the right one resumes at the first window `gap` after window i-1.
    resume = np.searchsorted(numbers, np.concatenate([numbers[:1] - gap, numbers]) + gap)
    shares = np.array([[1 - val - test], [val], [test]])
    best = (np.inf, n, n)
    for train_end in range(1, n):
        val_end = np.arange(resume[train_end] + 1, n)
        val_end = val_end[resume[val_end] < n]
        if not len(val_end):
            break
        sizes = np.stack([np.full(len(val_end), train_end), val_end - resume[train_end], n - resume[val_end]])
        kept = sizes.sum(0)
        # Dropping a window weighs as much as two in the wrong part (each counts twice: here too many, there too few).
        cost = np.abs(sizes - shares * kept).sum(0) + 4 * (n - kept)
        best = min(best, (cost.min(), train_end, int(val_end[cost.argmin()])))
    _, train_end, val_end = best
    val_start, test_start = resume[train_end], resume[val_end]
    dropped = files[train_end:val_start] + files[val_end:test_start]
    return files[:train_end], files[val_start:val_end], files[test_start:], dropped


def _few(files: list[WindowFile], n: int, user: int, contiguous: bool) -> list[WindowFile]:
    if not 1 <= n <= len(files):
        raise DataError(
            f"user ID_{user} has {count(len(files), 'training window')}, windows_per_user={n} cannot be kept: "
            f"choose 1 to {len(files)}"
        )
    if not contiguous:
        return [files[row] for row in np.linspace(0, len(files) - 1, n).round().astype(int)]
    longest = max(_in_a_row(files), key=len)
    if len(longest) < n:
        raise DataError(
            f"user ID_{user} has {count(len(longest), 'training window')} in a row, windows_per_user={n} cannot "
            f"be kept contiguous: choose 1 to {len(longest)}"
        )
    first = (len(longest) - n) // 2
    return longest[first : first + n]


def _check_conditions(files: Sequence[WindowFile], parts: dict, n: int, contiguous: bool) -> None:
    """DataError where thinning took the last training window of a condition that there was one of."""
    of = {file.path: file.condition for file in files}
    kept, left = ({of[path] for path in parts[part]} for part in ("train", "spare"))
    if gone := sorted(left - kept):
        how = "in a row " if contiguous else ""
        raise DataError(
            f"windows_per_user={n} {how}leaves no training window of {', '.join(gone)}: keep more, or take a folder of "
            "one condition"
        )


def _in_a_row(files: Sequence[WindowFile]) -> Iterator[list[WindowFile]]:
    """Windows of one recording in time order; a fold's training windows may begin twice."""
    for recording in _by(files, lambda f: (f.condition, f.recording)).values():
        numbers = np.array([f.number for f in recording])
        for rows in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) < 0) + 1):
            yield [recording[row] for row in rows]


# ---- files


def write_split(split: dict, path: str | Path) -> None:
    """Write a split as JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")


def read_split(path: str | Path) -> dict:
    """Read a split file; lists ``train``, ``val``, ``test`` of paths relative to the data folder are enough.

    Raises:
        DataError: no such file, not JSON, a part missing or empty, a window listed twice.
    """
    try:
        split = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file ({error})") from error
    seen: dict[str, str] = {}
    for part in (*PARTS, "spare"):
        paths = split.get(part) if isinstance(split, dict) else None
        if part == "spare" and not paths:
            continue  # may be left out
        if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
            raise DataError(f"{path}: {part!r} must be a list of image paths, relative to the data folder")
        split[part] = [os.path.normpath(p.replace("\\", "/")).replace("\\", "/") for p in paths]
        for p in split[part]:
            if p in seen:
                raise DataError(f"{path}: {p} is in {seen[p]} and in {part}; list every window once")
            seen[p] = part
    return split


def apply_split(windows: WindowSet, split: dict) -> dict[str, WindowSet]:
    """The parts ``train``, ``val`` and ``test`` of a set, in the order of the set.

    Raises:
        DataError: the split lists a window that the set lacks, or one twice, or no training window of a user.
    """
    position = {path: i for i, path in enumerate(windows.paths)}
    part_of = torch.full((len(windows),), -1)
    for k, part in enumerate(PARTS):
        for path in split[part]:
            if path not in position:
                raise DataError(f"{windows.root}: no {path}, listed in the split's {part}; make the split anew")
            if part_of[position[path]] >= 0:
                raise DataError(f"the split lists {path} twice; list every window once")
            part_of[position[path]] = k
    trained = set(windows.labels[part_of == 0].tolist())
    for label in set(windows.labels.tolist()) - trained:
        user = windows.users[label]
        raise DataError(f"the split has no training window of user ID_{user}; every user needs some")
    return {part: windows.select(part_of == k) for k, part in enumerate(PARTS)}


def spare_windows(windows: WindowSet, split: dict) -> WindowSet | None:
    """Windows of the training part's time that `windows_per_user` left out, or None.

    Raises:
        DataError: the split lists one that the set lacks.
    """
    position = {path: i for i, path in enumerate(windows.paths)}
    missing = [path for path in split.get("spare", ()) if path not in position]
    if missing:
        raise DataError(f"{windows.root}: no {missing[0]}, listed in the split's spare; make the split anew")
    rows = [position[path] for path in split.get("spare", ())]
    return windows.select(sorted(rows)) if rows else None


def chosen(split: dict) -> str:
    """How a split's training windows were chosen, in words."""
    if not split.get("windows_per_user"):
        return "all that the split gives to training"
    return f"{split['windows_per_user']} a user, {'in a row' if split.get('contiguous') else 'evenly spaced'}"


def split_summary(split: dict) -> str:
    """One line that accounts for all windows of a split."""
    sizes = {part: len(split.get(part, ())) for part in (*PARTS, "spare", "dropped")}
    parts = ", ".join(f"{sizes[part]} {part}" for part in PARTS)
    return (
        f"{sum(sizes.values())} windows: {parts}, {sizes['spare']} spare (beyond windows_per_user), "
        f"{sizes['dropped']} dropped (in the gaps between parts)"
    )


# ---- leak


def seen_of_test(path: str | Path, split: dict, data: str | Path = "") -> int:
    """How many of the split's test windows trained the weights at `path` (or chose among them): those in train and val
    of the run in whose folder they lie, and of the runs that this one started from. Runs on another data folder than
    `data` do not count."""
    return len(set(split["test"]) & _learned_from(Path(path).resolve(), str(Path(data).resolve()) if data else ""))


def seen_beyond(path: str | Path, split: dict, data: str | Path = "") -> int:
    """How many windows that are neither in train nor in val of the split trained the weights at `path` likewise."""
    learned = _learned_from(Path(path).resolve(), str(Path(data).resolve()) if data else "")
    return len(learned - {*split["train"], *split["val"]})


def _learned_from(path: Path, data: str) -> set[str]:
    """Windows of the data folder that weights have seen."""
    for folder in path.parents[:2]:  # RUN/codec, RUN/generated, RUN/pipeline or RUN/pipeline/prior
        if not (folder / "split.json").exists():
            continue
        record = folder / "run.json"
        settings = json.loads(record.read_text())["settings"] if record.exists() else {}
        earlier = [Path(settings[key]) for key in STARTS if settings.get(key)]
        seen = set().union(*(_learned_from(start, data) for start in earlier))
        if data and settings.get("data", data) != data:
            return seen
        other = read_split(folder / "split.json")
        return seen | {*other["train"], *other["val"]}
    return set()


def measured_overlap(windows: WindowSet, split: dict, *, gap: int = 4) -> dict:
    """How far a split leaks: counted from window numbers, and measured on the images.

    Args:
        windows: the set that was split.
        split: see `make_split`, `random_split`, `read_split`.
        gap: difference of window numbers from which windows share nothing.

    Returns:
        dict with
        ``min_distance``: smallest difference of window numbers between parts, within recordings (None: no recording is
        shared);
        ``test_windows``: their number;
        ``test_share_overlapping``: share of test windows closer than `gap` to a training window;
        ``nearest_train_ratio``: median distance of a test window to the nearest training window of its user, shifted by
        whole steps to where they agree best, over the same with training windows closer than `gap` left out. 1 = no
        leak, smaller = more (None: every training window is closer than `gap`).
    """
    return overlap(apply_split(windows, split), gap=gap)


def overlap(parts: dict[str, WindowSet], *, gap: int = 4) -> dict:
    """The same of the parts ``train``, ``val`` and ``test`` themselves."""
    train, test = parts["train"], parts["test"]
    numbers = [_number_distance(parts[a].files, parts[b].files) for a, b in (PARTS[:2], PARTS[1:], PARTS[::2])]
    smallest = min(float(pairs.min()) if pairs.numel() else float("inf") for pairs in numbers)
    near = _number_distance(test.files, train.files) < gap
    distance = _shifted_distance(test.images, train.images)
    distance[test.labels[:, None] != train.labels[None]] = torch.inf
    nearest, nearest_apart = distance.amin(1), distance.masked_fill(near, torch.inf).amin(1)
    known = nearest_apart.isfinite()
    ratio = float(nearest[known].median() / nearest_apart[known].median()) if known.any() else None
    return {
        "min_distance": int(smallest) if smallest < float("inf") else None,
        "test_windows": len(test),
        "test_share_overlapping": float(near.any(1).float().mean()),
        "nearest_train_ratio": ratio,
    }


def _number_distance(a: Sequence[WindowFile], b: Sequence[WindowFile]) -> torch.Tensor:
    """Differences (len(a), len(b)) of window numbers; infinite between recordings."""
    ids: dict[tuple, int] = {}
    recording_a, recording_b = (
        torch.tensor([ids.setdefault((f.user, f.condition, f.recording), len(ids)) for f in files]) for files in (a, b)
    )
    # float64 is exact for numbers that are time stamps, too.
    number_a, number_b = (torch.tensor([f.number for f in files], dtype=torch.float64) for files in (a, b))
    distance = (number_a[:, None] - number_b[None]).abs()
    return distance.masked_fill(recording_a[:, None] != recording_b[None], torch.inf)


def _shifted_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """RMS differences (len(a), len(b)) of uint8 images at 32 x 32 pixels where they overlap: the least over shifts in
    time by up to half a window, in quarters (one step)."""
    a, b = (torch.nn.functional.interpolate(to_float(images), size=(32, 32), mode="area") for images in (a, b))
    distances = []
    for cut in (0, 8, 16):
        ends = slice(cut, None), slice(None, 32 - cut)
        for of_a, of_b in (ends, ends[::-1]):
            x, y = a[..., of_a].flatten(1), b[..., of_b].flatten(1)
            distances.append(torch.cdist(x, y) / x.shape[1] ** 0.5)
    return torch.stack(distances).amin(0)
