"""Windows on disk: their users, conditions, recordings and window numbers, and a line on what is not read."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path

from mdlib.data.names import parse_names
from mdlib.utils import DataError, count

_IMAGE = re.compile(r"[^.].*\.(png|jpe?g|jfif|bmp|tiff?|webp)", re.IGNORECASE | re.DOTALL)  # not hidden
_JUNK = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found")
# ID_3, ID 3, id-03, user_5, subject7, person9, Sub01, P12, S3, or a plain number of at most three digits.
_USER = re.compile(r"(id|user|subject|person|sub|用户|受试者|[ps]|(?=\d{1,3}$))[\s_-]*(\d+)", re.IGNORECASE)
# train, Training, valid, test_set, val images.
_PART = re.compile(r"(train|val|dev|test|eval)(?:ing|id|idation|uation)?(?:[\s_-]?(?:set|data|images?))?", re.I)
_UNWRITABLE = re.compile(r"[\x00-\x1f\ud800-\udfff]")  # control characters, and bytes that are no text
_RECORDING = ("user", "condition", "recording")
_PLACE = attrgetter(*_RECORDING, "number")
UNKNOWN = -1  # the user of windows in plain folders


@dataclass(frozen=True)
class WindowFile:
    """One spectrogram image on disk."""

    path: str  # relative to the data folder, with forward slashes
    user: int  # the k of ID_k, or UNKNOWN
    condition: str  # folder above ID_k; "" where there is none
    recording: str  # path below ID_k without extension and window number
    number: int  # window number in time
    part: str = ""  # "train", "val" or "test" where the data folder is split into such folders


@dataclass(frozen=True)
class Scan:
    """The windows of a data folder, and the ignored images."""

    files: tuple[WindowFile, ...]  # by user, condition, recording and window number
    found: int  # images in the folder
    ignored: tuple[tuple[str, int, str], ...]  # path relative to the folder, number of images, reason

    def summary(self) -> str:
        """One line that accounts for all images."""
        shown = [f"{path} ({count(n, 'image')}: {reason})" for path, n, reason in self.ignored[:8]]
        if rest := self.ignored[8:]:
            shown.append(f"{len(rest)} more ({count(sum(n for _, n, _ in rest), 'image')})")
        line = f"{count(self.found, 'image')} found, {len(self.files)} used"
        return f"{line}; ignored: {', '.join(shown)}" if shown else line


def find_windows(root: str | Path, *, min_users: int = 2, order: str = "number") -> list[WindowFile]:
    """List the images of a data folder by user, condition, recording and window number, see `scan`.

    Warns in one line about images that are not read, and about names that do not fit the numbering of the others.
    `min_users=0` takes plain folders, see `scan`, and names without window numbers too.

    Raises:
        DataError: see `scan`; also fewer than `min_users` users, or names without window numbers.
    """
    found = scan(root, order=order, plain=not min_users)
    users = sorted({f.user for f in found.files})
    seen = f" ({found.summary()})" if found.ignored else ""
    if not users and not min_users:
        raise DataError(f"{root}: no images in it{seen}; give a folder of windows")
    if not users:
        raise DataError(f"{root}: no user folders in it{seen}; give the folder that holds ID_1, ID_2, ...")
    if len(users) < min_users:
        raise DataError(f"{root}: {count(len(users), 'user')} only (ID_{users[0]}){seen}; give {min_users} or more")
    alone = [some for some in by(found.files, "user", "condition") if len(some) == 1]
    recordings = by(found.files, *_RECORDING)
    lone = [some[0].path for some in recordings if len(some) == 1 and some not in alone]
    if min_users and order == "number" and 2 * len(lone) > len(recordings) - len(alone):
        raise DataError(
            f"{root}: no window numbers in names such as {lone[0]}: {len(lone)} of {len(recordings)} recordings "
            "would have one window; choose order name or time (order=name; --order name; in a run -p "
            """'reading={"order": "name"}'), or rename the files"""
        )
    if found.ignored:
        warnings.warn(f"{root}: {found.summary()}", stacklevel=2)
    if lone:
        message = f"{count(len(lone), 'image')} with an unusual name, each read as a recording of one window"
        warnings.warn(f"{root}: {message} ({', '.join(lone[:3])})", stacklevel=2)
    return list(found.files)


def scan(root: str | Path, *, order: str = "number", plain: bool = False) -> Scan:
    """Find the windows below the folders of users: `root/ID_k/`, `root/<condition>/ID_k/`, `root/train/ID_k/`.

    ID_3, ID 3, user_5, Sub01, P12 and 7 are folders of users; folders below them are recordings. The window number is
    the number in a name that varies, see `mdlib.data.names`. Hidden files and folders such as `__MACOSX` are skipped.

    Args:
        order: "number" takes the numbers in the names; "name" and "time" (of the last change) count in each folder.
        plain: take a folder without folders of users as well, as windows of the user UNKNOWN. Folders in it are
            recordings; the windows directly in it have theirs by their names.

    Raises:
        DataError: there is no such folder, it holds generated windows among others, or a window or a user twice.
    """
    root = Path(root)
    if order not in ("number", "name", "time"):
        raise DataError(f"order={order!r}: choose number, name, time")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds ID_1, ID_2, ...")
    if inside := next(root.glob("*/**/generation.json"), None):
        raise DataError(f"{inside.parent}: generated windows inside a folder of real ones; move them out of {root}")
    files, ignored = _files(root)
    if plain and not files:
        files, ignored = _files(root, plain=True)
    if order == "number":
        by_folder = lambda f: f.user == UNKNOWN and "/" in f.path
        named = _numbered([f for f in files if not by_folder(f)])
        files = named + _ranked(root, [f for f in files if by_folder(f)], "name")
    else:
        files = _ranked(root, files, order)
    files = sorted(files, key=_PLACE)
    if twins := [f"{root / a.path} and {root / b.path}" for a, b in pairwise(files) if _PLACE(a) == _PLACE(b)]:
        more = f" (and {count(len(twins) - 1, 'more pair')})" if len(twins) > 1 else ""
        raise DataError(f"{twins[0]}: both names mean the same window{more}; delete or rename one of them")
    return Scan(tuple(files), len(files) + ignored.total(), tuple((p, n, why) for (p, why), n in ignored.items()))


def parse_users(text: str) -> list[int]:
    """User ids from text such as "1,2,5-8", in the order given, each once."""
    users: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", item.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise DataError(f"users {text!r}: cannot read {item.strip()!r}; write user ids like 1,2,5-8")
        users += range(first, last + 1)
    return list(dict.fromkeys(users))


def holds_users(folder: Path) -> bool:
    """Whether there are folders of users with images in `folder`."""
    return any(any(_images(child)) for child in folder.iterdir() if child.is_dir() and _USER.fullmatch(child.name))


def part_of(folder: str) -> str:
    """The part of a split that a folder of this name holds: "train", "val" or "test", or ""."""
    part = match[1].lower() if (match := _PART.fullmatch(folder)) else ""
    return {"dev": "val", "eval": "test"}.get(part, part)


def _images(root: Path) -> Iterator[Path]:
    """The images in and below `root` that are not hidden. A folder that links lead to again is skipped."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); change its permissions or move it")

    seen = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(n for n in folders if real not in seen and n[0] != "." and n.lower() not in _JUNK)
        yield from (Path(folder, name) for name in sorted(names) if real not in seen and _IMAGE.fullmatch(name))
        seen.add(real)


def _files(root: Path, plain: bool = False) -> tuple[list[WindowFile], Counter[tuple[str, str]]]:
    """The images of users, or with `plain` of no user, not numbered yet, and the numbers of other images by (path,
    reason)."""
    files, ignored, folders = [], Counter(), {}
    for path in _images(root):
        parts = path.relative_to(root).parts
        user_at = _user_place(parts[:-1])
        odd = _UNWRITABLE.search(str(path)) or not path.is_file()
        if plain and not odd:
            files.append(WindowFile("/".join(parts), UNKNOWN, "", "/".join((*parts[:-1], path.stem)), 0))
            continue
        if odd or user_at < 0:
            reason = "a broken link, or control characters in the name" if odd else "not in one user folder like ID_3"
            ignored[_UNWRITABLE.sub("?", f"{'/'.join(parts[:-1]) or '.'}/"), reason] += 1
            continue
        file, own = _unnumbered(parts, user_at), root.joinpath(*parts[: user_at + 1])
        if (other := folders.setdefault((file.user, file.condition, file.part), own)) != own:
            raise DataError(f"{other} and {own}: both are user {file.user}; merge or rename one of them")
        files.append(file)
    split = {f.part for f in files}
    return [replace(f, part=f.part if len(split) > 1 else "") for f in files], ignored


def _user_place(parts: Sequence[str]) -> int:
    """Which folder of a path is the user's: the one with the longest word (ID_3 before P3 before 3). -1: none."""
    words = [len(match[1]) if (match := _USER.fullmatch(name)) else -1 for name in parts]
    longest = max(words, default=-1)
    return words.index(longest) if words.count(longest) == 1 and longest >= 0 else -1


def _unnumbered(parts: Sequence[str], user_at: int) -> WindowFile:
    """The image with the path `parts`; its recording is the whole name below the user's folder."""
    above, below = parts[:user_at], parts[user_at + 1 : -1]
    part = next(filter(None, map(part_of, (*above, *below))), "")
    condition, recording = ("/".join(name for name in some if not part_of(name)) for some in (above, below))
    stem = f"{recording}/{Path(parts[-1]).stem}".lstrip("/")
    return WindowFile("/".join(parts), int(_USER.fullmatch(parts[user_at])[2]), condition, stem, 0, part)


def by(files: Iterable[WindowFile], *fields: str) -> list[list[WindowFile]]:
    """Lists of the files that have the same values of the fields."""
    key = attrgetter(*fields)
    return [list(some) for _, some in groupby(sorted(files, key=key), key)]


def _numbered(files: Sequence[WindowFile]) -> list[WindowFile]:
    """The files with recordings and window numbers by their names."""
    numbered: list[WindowFile] = []
    for some in by(files, "user", "condition"):
        parsed = parse_names([f.recording for f in some])
        numbered += [replace(f, recording=r, number=n) for f, (r, n) in zip(some, parsed, strict=True)]
    return [file for some in by(numbered, *_RECORDING) for file in _parts_apart(some)]


def _parts_apart(files: list[WindowFile]) -> list[WindowFile]:
    """The files of a recording. If the numbers start again in each part, the parts are recordings of their own."""
    sizes = Counter(f.part for f in files)
    repeated = len(files) - len({f.number for f in files})
    if len(sizes) > 1 and 2 * repeated >= len(files) - max(sizes.values()):
        return [replace(f, recording=f"{f.part}/{f.recording}") for f in files]
    return files


def _ranked(root: Path, files: Sequence[WindowFile], order: str) -> list[WindowFile]:
    """The files with their folders as recordings, numbered by name (w2 before w10) or by time of the last change."""
    times = {f.path: (root / f.path).stat().st_mtime_ns if order == "time" else 0 for f in files}
    if order == "time" and 2 * len(set(times.values())) < len(times):
        different = f"{len(times)} images have {len(set(times.values()))} different times of the last change"
        raise DataError(f"{root}: order=time, but {different}, as after copying; choose order=name")
    names = {f.path: re.sub(r"\d+", lambda digits: digits[0].zfill(20), f.recording) for f in files}
    files = sorted(files, key=lambda f: (times[f.path], names[f.path], f.path))
    folders = [replace(f, recording=f.recording.rpartition("/")[0]) for f in files]
    return [replace(f, number=n) for some in by(folders, *_RECORDING) for n, f in enumerate(some)]
