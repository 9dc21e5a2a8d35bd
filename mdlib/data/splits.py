"""Split windows by recording and time, so that no windows of different parts overlap."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mdlib.data.files import WindowFile, by
from mdlib.data.windows import WindowSet
from mdlib.utils import DataError, atomic_file, count

PARTS = ("train", "val", "test")
STARTS = ("init", "codec_start", "prior_start")  # a run's settings that name weights to start from
FOUND = ("auto", "attached", "shipped")  # values of init by which mdlib finds the weights
NO_PATH = ("", "none", *FOUND)  # values of STARTS that are no path

_SHORTEST_IN_GAPS = 8  # two gaps drop up to 2 (gap - 1) windows: a shorter recording would lose a fifth of itself


def make_split(
    windows: WindowSet | Sequence[WindowFile],
    *,
    val: float = 0.15,
    test: float = 0.25,
    gap: int = 4,
    windows_per_user: int | None = None,
    unrecorded: dict[str, Sequence[int]] | None = None,
    fold: int = 0,
) -> dict:
    """Split by recording and time: in each recording train, then val, then test, in blocks of time.

    Windows between the parts are dropped; the cuts move to where the numbers have gaps anyway, so that few are.
    Recordings too short for that (fewer than 8 gaps) are joined end to end, per user and condition, and split as one.
    Files in folders named train, val and test keep these parts; windows of val and test closer than `gap` to another
    part are dropped.

    Args:
        val, test: fractions of the windows that go to val and to test.
        gap: smallest difference of window numbers between parts: a window of four steps that advances by one shares
            nothing with the one four numbers later.
        windows_per_user: number of training windows per user, evenly spaced over all of the user's; val and test do
            not depend on it.
        unrecorded: condition → users whose windows in it all go to test, as if never recorded, so that generated
            windows can be compared with real ones.
        fold: of cross-validation, 0 to `folds(test)` − 1: the timeline of each recording is rotated by `fold` test
            blocks before it is cut. Over all folds nearly every window is tested once.

    Returns:
        dict with the lists of paths "train", "val", "test", "spare" (training windows that `windows_per_user` leaves
        out) and "dropped" (next to another part), "gap", "windows_per_user", "unrecorded", "fold" and "users".

    Raises:
        DataError: a user has too few windows, or an argument is out of range.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise DataError(f"val={val}, test={test}: both must be positive and their sum below 1")
    if gap < 1:
        raise DataError(f"gap={gap}: it must be at least 1")
    if not 0 <= fold < folds(test):
        raise DataError(f"fold={fold}: with test={test} there are folds 0 to {folds(test) - 1}")
    every = windows.files if isinstance(windows, WindowSet) else windows
    excluded = {(user, condition) for condition, some in (unrecorded or {}).items() for user in some}
    for user, condition in sorted(excluded - {(f.user, f.condition) for f in every}):
        raise DataError(f"unrecorded: there are no windows of ID_{user} in condition {condition!r}")
    given = any(f.part for f in every)
    if given and (fold or excluded):
        raise DataError("folds and unrecorded need windows that are not yet split into folders train, val and test")
    parts: dict[str, list[WindowFile]] = {part: [] for part in (*PARTS, "dropped", "spare")}
    users = {some[0].user: some for some in by(every, "user")}
    for user, files in users.items():
        usable = [f for f in files if (user, f.condition) not in excluded]
        mine = _parts_of_folders(files, gap) if given else _split_user(usable, val, test, gap, fold)
        mine["test"] = [f for f in files if (user, f.condition) in excluded] + mine["test"]
        if not all(mine[part] for part in PARTS):
            if given:
                empty = next(part for part in PARTS if not mine[part])
                raise DataError(
                    f"user ID_{user} has no window in {empty}/ that is {gap} or more from the other parts: give a "
                    "split file with --split (-p split=FILE), or put all windows into one folder of users"
                )
            where, needed = (f" in fold {fold}", 3 * gap) if fold else ("", 2 * gap + 1)
            raise DataError(
                f"user ID_{user} has {count(len(usable), 'window')}, too few for train, val and test {gap} apart"
                f"{where}: {needed} in a row are needed, add windows or leave the user out"
            )
        if windows_per_user is not None:
            mine["train"], mine["spare"] = _thinned(mine["train"], windows_per_user, user)
        for part, some in mine.items():
            parts[part] += some
    if gone := sorted({f.condition for f in parts["spare"]} - {f.condition for f in parts["train"]}):
        raise DataError(
            f"windows_per_user={windows_per_user} leaves no training window of {', '.join(gone)}: choose more, or take "
            "a folder of one condition"
        )
    return {
        **{part: [f.path for f in files] for part, files in parts.items()},
        "gap": gap,
        "windows_per_user": windows_per_user,
        "unrecorded": unrecorded or {},
        "fold": fold,
        "users": list(users),
    }


def folds(test: float = 0.25) -> int:
    """Number of folds with nearly disjoint test sets: blocks of the fraction `test` that fit into a recording."""
    return int(1 / test + 1e-9)


def _split_user(files: list[WindowFile], val: float, test: float, gap: int, fold: int) -> dict[str, list[WindowFile]]:
    """Train, val, test and dropped of one user's files. For a fold the first test blocks of a timeline follow its end,
    `gap` away; what would share steps over the new start is dropped. A timeline too short to cut is all train."""
    mine: dict[str, list[WindowFile]] = {part: [] for part in (*PARTS, "dropped")}
    for timeline, numbers in _timelines(files, gap):
        turned, lost = round(fold * test * len(timeline)), []
        order, times = timeline, numbers
        if turned:
            start = int(np.searchsorted(numbers, numbers[turned - 1] + gap))
            order, lost = timeline[start:] + timeline[:turned], timeline[turned:start]
            times = np.concatenate([numbers[start:], numbers[:turned] + numbers[-1] + gap - numbers[0]])
        cut = _cut(order, times, val, test, gap)
        if cut is None:
            mine["train"] += timeline
            continue
        for part, some in zip(mine, (*cut[:3], lost + cut[3]), strict=True):
            mine[part] += some
    return mine


def _parts_of_folders(files: list[WindowFile], gap: int) -> dict[str, list[WindowFile]]:
    """Train, val, test and dropped of one user's files, by the folders they lie in."""
    mine: dict[str, list[WindowFile]] = {part: [] for part in (*PARTS, "dropped")}
    taken: dict[tuple[str, str], list[int]] = {}  # numbers in the parts before, by recording
    for part in PARTS:
        some = [f for f in files if (f.part or "train") == part]
        for f in some:
            near = any(abs(f.number - number) < gap for number in taken.get((f.condition, f.recording), ()))
            mine["dropped" if near else part].append(f)
        for f in mine[part]:
            taken.setdefault((f.condition, f.recording), []).append(f.number)
    return mine


def _timelines(files: Sequence[WindowFile], gap: int) -> Iterator[tuple[list[WindowFile], np.ndarray]]:
    """Windows in time order with their numbers: long recordings; a condition's short ones, end to end."""
    for of_condition in by(files, "condition"):
        joined: list[WindowFile] = []
        numbers: list[int] = []
        for recording in by(of_condition, "recording"):
            recording = sorted(recording, key=lambda f: f.number)
            if len(recording) >= _SHORTEST_IN_GAPS * gap:
                yield recording, np.array([f.number for f in recording])
                continue
            # Recordings share nothing: one starts `gap` after the last, so that a cut between them drops no window.
            shift = numbers[-1] + gap - recording[0].number if numbers else 0
            joined += recording
            numbers += [f.number + shift for f in recording]
        if joined:
            yield joined, np.array(numbers)


def _cut(files: list[WindowFile], numbers: np.ndarray, val: float, test: float, gap: int) -> tuple[list, ...] | None:
    """Train, val, test, dropped: the two cuts that drop few windows and stay near the fractions asked for; None where
    no three parts fit in."""
    n = len(files)
    # If the left part ends before window i, the right one resumes at the first window `gap` after window i-1.
    resume = np.searchsorted(numbers, np.concatenate([numbers[:1] - gap, numbers]) + gap)
    fractions = np.array([[1 - val - test], [val], [test]])
    best = (np.inf, n, n)
    for train_end in range(1, n):
        val_end = np.arange(resume[train_end] + 1, n)
        val_end = val_end[resume[val_end] < n]
        if not len(val_end):
            break
        sizes = np.stack([np.full(len(val_end), train_end), val_end - resume[train_end], n - resume[val_end]])
        used = sizes.sum(0)
        # Dropping a window weighs as much as two in the wrong part (each counts twice: here too many, there too few).
        cost = np.abs(sizes - fractions * used).sum(0) + 4 * (n - used)
        best = min(best, (cost.min(), train_end, int(val_end[cost.argmin()])))
    cost, train_end, val_end = best
    if cost == np.inf:
        return None
    val_start, test_start = resume[train_end], resume[val_end]
    dropped = files[train_end:val_start] + files[val_end:test_start]
    return files[:train_end], files[val_start:val_end], files[test_start:], dropped


def _thinned(files: list[WindowFile], n: int, user: int) -> tuple[list[WindowFile], list[WindowFile]]:
    """`n` evenly spaced files, and the others."""
    if not 1 <= n <= len(files):
        raise DataError(
            f"user ID_{user} has {count(len(files), 'training window')}, windows_per_user={n} is not possible: "
            f"choose 1 to {len(files)}"
        )
    rows = set(np.linspace(0, len(files) - 1, n).round().astype(int).tolist())
    return [f for row, f in enumerate(files) if row in rows], [f for row, f in enumerate(files) if row not in rows]


def write_split(split: dict, path: str | Path) -> None:
    """Write a split as JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")


def write_folders(windows: WindowSet, split: dict, out: str | Path) -> None:
    """Copy the windows of a split to `out`/train, val and test, named by their numbers, with a line in split_info.txt.

    Read as a data folder, `out` is that split again: windows beyond windows_per_user and those dropped in the gaps are
    not copied.

    Raises:
        DataError: `out` lies in the data folder, or holds something.
    """
    out, root = Path(out).resolve(), Path(windows.root).resolve()
    if out.is_relative_to(root) or (out.exists() and any(out.iterdir())):
        raise DataError(f"{out} is not empty, or lies in {root}: give a new folder outside of it")
    files = {file.path: file for file in windows.files}
    for part in PARTS:
        for file in map(files.__getitem__, split[part]):
            name = f"window_{file.number:05d}{Path(file.path).suffix}"
            target = out / part / file.condition / f"ID_{file.user}" / file.recording / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file.path, target)
    (out / "split_info.txt").write_text(f"{root.name}, {split_summary(split)}, gap {split['gap']}\n", encoding="utf-8")


def read_split(path: str | Path) -> dict:
    """Read and check a split file; lists "train", "val", "test" of paths relative to the data folder are enough."""
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
    """The parts "train", "val" and "test" of a set, in the order of the set.

    Raises:
        DataError: the split lists a window that the set lacks, or no training window of a user.
    """
    parts = {part: _part(windows, split, part) for part in PARTS}
    for label in sorted(set(windows.labels.tolist()) - set(parts["train"].labels.tolist())):
        raise DataError(f"the split has no training window of user ID_{windows.users[label]}; every user needs some")
    return parts


def spare_windows(windows: WindowSet, split: dict) -> WindowSet | None:
    """Windows of the training part's time that `windows_per_user` left out, or None."""
    return _part(windows, split, "spare") if split.get("spare") else None


def _part(windows: WindowSet, split: dict, part: str) -> WindowSet:
    row_of = {path: row for row, path in enumerate(windows.paths)}
    for path in split[part]:
        if path not in row_of:
            raise DataError(f"{windows.root}: no {path}, listed in the split's {part}; make a new split")
    return windows.select(sorted(row_of[path] for path in split[part]))


def describe_training(split: dict) -> str:
    """How a split's training windows were chosen, in words."""
    each = split.get("windows_per_user")
    return f"{each} per user, evenly spaced" if each else "all training windows of the split"


def split_summary(split: dict) -> str:
    """One line that accounts for all windows of a split."""
    sizes = {part: len(split.get(part, ())) for part in (*PARTS, "spare", "dropped")}
    parts = ", ".join(f"{sizes[part]} {part}" for part in PARTS)
    return (
        f"{sum(sizes.values())} windows: {parts}, {sizes['spare']} spare (beyond windows_per_user), "
        f"{sizes['dropped']} dropped (in the gaps between parts)"
    )
