"""Windows on disk: their users, conditions, recordings and window numbers, and a line on what is not read."""

import re
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mdlib.data.folders import UserImage, user_images
from mdlib.data.names import natural_key, parse_names
from mdlib.utils import DataError, count

ORDERS = ("number", "name", "time")

# Numbers as large as seconds since 1970, or that grow like this from window to window, are times or samples.
_LARGE, _FAST, _FAST_IN_FEW, _FEW = 10**8, 8, 1000, 12


@dataclass(frozen=True)
class WindowFile:
    """One spectrogram image on disk."""

    path: str  # relative to the data folder, with forward slashes
    user: int  # the k of ID_k
    condition: str  # folder above ID_k; "" where there is none
    recording: str  # path below ID_k without extension and window number
    number: int  # window number in time
    part: str = ""  # "train", "val" or "test" where the data folder is split into such folders


@dataclass(frozen=True)
class Scan:
    """The windows of a data folder, and the images in it that are none."""

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

    Raises:
        DataError: see `scan`; also where there are fewer than `min_users` users.
    """
    found = scan(root, order=order)
    users = {f.user for f in found.files}
    seen = f" ({found.summary()})" if found.ignored else ""
    if not users:
        raise DataError(f"{root}: no user folders in it{seen}; give the folder that holds ID_1, ID_2, ...")
    if len(users) < min_users:
        only = f"{count(len(users), 'user')} only (ID_{min(users)}), {min_users} are needed"
        raise DataError(f"{root}: {only}{seen}; add user folders")
    if found.ignored:
        warnings.warn(f"{root}: {found.summary()}", stacklevel=2)
    windows = Counter((f.user, f.condition) for f in found.files)
    sizes = Counter((f.user, f.condition, f.recording) for f in found.files)
    lone = [f.path for f in found.files if sizes[f.user, f.condition, f.recording] == 1 < windows[f.user, f.condition]]
    if lone:
        message = f"{count(len(lone), 'image')} with a name unlike the others, each a recording of one window"
        warnings.warn(f"{root}: {message} ({', '.join(lone[:3])})", stacklevel=2)
    return list(found.files)


def scan(root: str | Path, *, order: str = "number") -> Scan:
    """Find the windows below the folders of users: `root/ID_k/`, `root/<condition>/ID_k/`, `root/train/ID_k/`.

    ID_3, ID 3, id-03, user_5, Sub01, P12 and 7 are names of users' folders. Folders below them are recordings. Folders
    such as train, val and test are the parts of a split. The window number is the number in a name that varies within a
    user's folder and counts the windows; a time, or a number that grows by eight or more from window to window, is
    replaced by the position in its recording. Hidden files and what systems leave behind (`__MACOSX`, `Thumbs.db`) are
    skipped.

    Args:
        root: the data folder.
        order: "number" takes the numbers in the names; "name" and "time" (of the last change) number the windows of
            each folder in that order.

    Raises:
        DataError: there is no such folder, it holds generated windows among others, a window or a user twice, users
            inside and outside of train, val and test, or names without window numbers.
    """
    root = Path(root)
    if order not in ORDERS:
        raise DataError(f"order={order!r}: choose {', '.join(ORDERS)}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds ID_1, ID_2, ...")
    images, ignored = user_images(root)
    numbers = _numbers(root, images) if order == "number" else _ranks(root, images, order)
    files = [WindowFile(i.path, i.user, i.condition, *numbers[i.path], i.part) for i in images]
    files.sort(key=lambda f: (f.user, f.condition, f.recording, f.number))
    return Scan(tuple(files), len(images) + sum(n for _, n, _ in ignored), tuple(ignored))


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


def _numbers(root: Path, images: Sequence[UserImage]) -> dict[str, tuple[str, int]]:
    """Recording and window number of each path by the names. DataError where most images would be recordings of their
    own, or a window is there twice."""
    parsed = parse_names([i.name for i in images], [i.pool for i in images])
    recordings: dict[tuple, list] = defaultdict(list)
    for image, (recording, number) in zip(images, parsed, strict=True):
        key = number if isinstance(number, tuple) else () if number is None else (number,)
        recordings[image.user, image.condition, recording].append((key, isinstance(number, int), image))
    pools = Counter(i.pool for i in images)
    several = [found for found in recordings.values() if any(pools[image.pool] > 1 for *_, image in found)]
    lone = [found for found in several if len(found) == 1]
    if 2 * len(lone) > len(several):
        example = lone[0][0][2].path
        raise DataError(
            f"{root}: no window numbers in names such as {example}: {len(lone)} of {len(several)} recordings "
            "would have one window; choose order name or time (--order name, -p order=name), or rename the files"
        )
    found, doubled = {}, []
    for (_, _, recording), windows in recordings.items():
        sizes = Counter(image.part for *_, image in windows)
        repeated = len(windows) - len({key for key, *_ in windows})
        # Numbers that repeat from part to part start again in each: parts are then recordings of their own.
        restart = len(sizes) > 1 and repeated and 2 * repeated >= len(windows) - max(sizes.values())
        for part in sizes if restart else [None]:
            some = sorted((w for w in windows if part in (None, w[2].part)), key=lambda w: (w[0], len(w[2].path)))
            doubled += [(a[2].path, b[2].path) for a, b in pairwise(some) if a[0] == b[0]]
            counts = all(counts for _, counts, _ in some) and not _fast([key[0] for key, *_ in some])
            for place, (key, _, image) in enumerate(some):
                name = f"{part}/{recording}" if part else recording
                found[image.path] = name, key[0] if counts else place
    if doubled:
        more = f" (and {count(len(doubled) - 1, 'more pair')})" if len(doubled) > 1 else ""
        first, second = map(root.joinpath, doubled[0])
        other = second.name if first.parent == second.parent else second
        raise DataError(
            f"{first} and {other}: the same window twice by their names{more}; delete or rename one of them"
        )
    return found


def _fast(numbers: Sequence[int]) -> bool:
    """Whether sorted numbers are too large or grow too fast to count windows."""
    steps = [b - a for a, b in pairwise(numbers)]
    fast = _FAST if len(numbers) >= _FEW else _FAST_IN_FEW
    return numbers[0] >= _LARGE or (bool(steps) and statistics.median(steps) >= fast)


def _ranks(root: Path, images: Sequence[UserImage], order: str) -> dict[str, tuple[str, int]]:
    """Folder below the user and position in it of each path, by name, or by time of the last change. By time the parts
    of a split share their recordings."""
    folders: dict[tuple, list[UserImage]] = defaultdict(list)
    times = {}
    for image in images:
        folder = image.name.rpartition("/")[0]
        if order == "time":
            times[image.path] = (root / image.path).stat().st_mtime_ns
            folders[image.user, image.condition, folder].append(image)
        else:
            folders[image.user, image.condition, f"{image.part}/{folder}".strip("/")].append(image)
    if times and 2 * len(set(times.values())) < len(times):
        raise DataError(
            f"{root}: order=time, but the {len(times)} images have {len(set(times.values()))} different times of the "
            "last change, as after copying; choose order=name, or restore the times"
        )
    found = {}
    for (_, _, folder), some in folders.items():
        some.sort(key=lambda i: (times.get(i.path, 0), natural_key(i.name), i.path))
        found |= {image.path: (folder, place) for place, image in enumerate(some)}
    return found
