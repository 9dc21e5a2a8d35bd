"""Checks of windows by content, not by name: identical files, images that overlap across the parts of a split, and
windows that weights were trained on."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mdlib.data.files import Scan, WindowFile, scan
from mdlib.data.overlap import SIDE, Neighbours, nearness, neighbours
from mdlib.data.reading import hashes
from mdlib.data.splits import NO_PATH, PARTS, STARTS, apply_split, make_split, read_split, write_folders, write_split
from mdlib.data.windows import WindowSet, load_windows
from mdlib.utils import DataError, read_json

LEAK = 0.1  # fraction of test windows that share columns with a training window, from which on a split is refused
COPY = "restore it, or make its folder again"  # what to do about a damaged record
SIMULATED = "simulated with seed "  # in place of the contents of pretrained weights' many windows
FEWEST = 3  # such windows at least: with few test windows, one may look alike by chance


def data_fingerprint(found: dict[str, str]) -> str:
    """16 hex digits over paths and contents: the same for a folder that was moved or copied."""
    return hashlib.sha256("\n".join(f"{path} {found[path]}" for path in sorted(found)).encode()).hexdigest()[:16]


def check_identical(files: Sequence[WindowFile], found: dict[str, str], split: dict | None = None) -> list[tuple]:
    """Pairs of paths of identical files; DataError if two are of different users, or in different parts of `split`
    or of a folder that is split into train, val and test."""
    part_of = {f.path: f.part for f in files}
    if split:  # spare windows train the classifiers of more real data
        part_of = dict.fromkeys(split.get("spare", ()), "train")
        part_of |= {path: part for part in PARTS for path in split[part]}
    first: dict[str, WindowFile] = {}
    same = []
    for file in files:
        other = first.setdefault(found[file.path], file)
        if other is file:
            continue
        same.append((other.path, file.path))
        if other.user != file.user:
            raise DataError(f"{other.path} and {file.path} are identical files of two users: remove the wrong one")
        parts = {part_of.get(one.path) for one in (other, file)} - {None, ""}
        if len(parts) > 1:
            raise DataError(
                f"{other.path} and {file.path} are identical files in {' and '.join(sorted(parts))}: remove one of them"
            )
    return same


def check_split(windows: WindowSet, split: dict, found: dict[str, str] | None = None) -> dict:
    """The split with the contents of its windows, under "hashes". `windows`: all of the data folder, at SIDE
    pixels or more; found: their `hashes`, where these are known.

    Raises:
        DataError: the split does not fit (see `apply_split`), was made for windows of other contents, has identical
            files in two parts, or its test windows share columns with training windows by their images.
    """
    found = found or hashes(windows.root, windows.paths)
    for path, content in split.get("hashes", {}).items():
        if found.get(path, content) != content:
            raise DataError(f"{windows.root}: {path} is not the image that the split was made for: make a new split")
    check_identical(windows.files, found, split)
    train = [*split["train"], *split.get("spare", ())]  # the spare ones train classifiers of more real data
    check_nearness(apply_split(windows, {**split, "train": train}))
    listed = {path for part in (*PARTS, "spare", "dropped") for path in split.get(part, ())}
    return {**split, "hashes": {path: content for path, content in found.items() if path in listed}}


def split_folder(root: str | Path, out: str | Path, reading: dict, folders: str | Path = "", **options) -> dict:
    """Split a data folder, check the split and write it to the file `out`; returns the split.

    Args:
        reading: options of `load_windows`.
        folders: where to write the windows as well, see `write_folders`; "": nowhere.
        options: of `make_split`.

    Raises:
        DataError: see `make_split`, `check_split` and `write_folders`.
    """
    windows = load_windows(root, size=SIDE, **reading)
    split = {**check_split(windows, make_split(windows, **options)), "reading": reading}
    if folders:
        write_folders(windows, split, folders)
    write_split(split, out)
    return split


def check_nearness(parts: dict[str, WindowSet]) -> None:
    """DataError if test windows share columns with training windows by their images."""
    measured = nearness(parts)
    if measured and FEWEST <= (number := int(measured.near.sum())) > LEAK * len(measured.near):
        row = int(measured.similarity.argmax())
        pair = f"{measured.test.paths[row]} and {measured.train.paths[row]}"
        raise DataError(
            f"{number} of {len(measured.near)} test windows show the same steps as a training window, such as {pair}: "
            "the file names do not give the order in time, or there are altered copies; give another order, a split "
            "by recording and time, or remove the copies"
        )


def seen_of_test(path: str | Path, split: dict, data: str | Path) -> int:
    """How many of the split's test windows in `data` the weights at `path` were trained on or selected by."""
    return len(_contents(split, ["test"], data) & seen(path))


def seen_beyond(path: str | Path, split: dict, data: str | Path) -> int:
    """How many windows outside the split's train and val in `data` the weights at `path` have seen, without those of
    simulated people that are listed by their seed."""
    others = seen(path) - _contents(split, ["train", "val"], data)
    return sum(not content.startswith(SIMULATED) for content in others)


def seen_people(path: str | Path, data: str | Path) -> bool:
    """Whether the weights at `path` were pretrained on the simulated people of `data`: user k of a seed is the same
    person in every simulation."""
    notes = [folder / "simulation.json" for folder in (Path(data), Path(data).parent)]  # or a condition's folder
    return any(SIMULATED + str(read_json(note, COPY)["seed"]) in seen(path) for note in notes if note.is_file())


def seen(path: str | Path) -> set[str]:
    """Contents (hashes) of the windows that weights or generated windows at `path` were trained on or selected by: by
    the record in their folder, or of the run in whose folder they lie and of the runs that it started from."""
    path, found = Path(path).resolve(), set()
    for folder in (path, *path.parents[:2]):  # RUN/codec, RUN/generated, RUN/pipeline or RUN/pipeline/prior
        for name in ("generation.json", "model_index.json", "weights.json"):
            if (folder / name).is_file():
                found.update(read_json(folder / name, COPY).get("trained_on") or ())
        if folder != path and (folder / "run.json").exists() and (folder / "split.json").exists():
            stored = read_json(folder / "run.json", COPY)
            settings = stored.get("settings", {})
            found.update(*(seen(settings[key]) for key in STARTS if settings.get(key, "") not in NO_PATH))
            found.update(stored.get("pretrained", {}).get("trained_on", ()))
            return found | _contents(read_split(folder / "split.json"), ["train", "val"], settings.get("data", ""))
    return found


def _contents(split: dict, parts: Iterable[str], data: str | Path) -> set[str]:
    """Hashes of a split's windows: those in the split or, for a file that lacks them, those of the files in `data`."""
    paths = [path for part in parts for path in split[part]]
    known = split.get("hashes", {})
    if unknown := [path for path in paths if path not in known and (Path(data) / path).is_file()]:
        known = {**known, **hashes(data, unknown)}
    return {known[path] for path in paths if path in known}


# ---- all checks of a folder


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found in a data folder."""

    root: str
    scan: Scan
    windows: WindowSet | None = None  # at SIDE pixels; None where they cannot be read
    identical: list[tuple[str, str]] = field(default_factory=list)  # paths of the same file twice, of one user
    alike: Neighbours | None = None
    split: dict | None = None  # by the folder's own parts, or else by recording and time
    problems: list[str] = field(default_factory=list)  # one line each; none: ready to train on


def inspect(root: str | Path, *, order: str = "number", **reading) -> Inspection:
    """Check a data folder as `run`, `split` and `validate` do, without stopping at the first problem.

    Args:
        order: of windows in time, see `find_windows`.
        reading: options of `load_windows`.

    Raises:
        DataError: no windows are found at all.
    """
    found = scan(root, order=order)
    contents, problems, identical = hashes(root, (file.path for file in found.files)), [], []
    windows = alike = split = None
    try:
        identical = check_identical(found.files, contents)
    except DataError as error:
        problems.append(str(error))
    try:
        with warnings.catch_warnings(action="ignore"):  # they are among the notes and what is ignored
            windows = load_windows(root, size=SIDE, order=order, **reading)
        alike = neighbours(windows)
    except DataError as error:
        problems.append(str(error))
    else:
        try:
            split = check_split(windows, make_split(windows), contents)
        except DataError as error:
            problems.append(str(error))
        if not alike.ordered:
            problems.append(
                f"{root}: windows overlap others, but not those with the next number: the file names do not give the "
                f"order in time; give another --order"
            )
    return Inspection(str(root), found, windows, identical, alike, split, list(dict.fromkeys(problems)))
