"""Windows on disk: folders of users and conditions, recordings and window numbers."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from mdlib.utils import DataError, count

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg")
_USER_FOLDER = re.compile(r"ID[_-]?(\d+)", re.IGNORECASE)
# A prefix that names the user (its number is never the window's), text, the last number, text.
_FILE_STEM = re.compile(r"(?>((?:ID[_-]?\d+)?))(.*?)(\d+)(\D*)", re.IGNORECASE)


@dataclass(frozen=True)
class WindowFile:
    """One spectrogram image on disk."""

    path: str  # relative to the data folder, with forward slashes
    user: int  # the k of ID_k
    condition: str  # folder above ID_k; "" where there is none
    recording: str  # file stem without the window number
    number: int  # window number in time
    part: str = ""  # "train", "val" or "test" where the file lies in a folder of that name


def find_windows(root: str | Path, *, min_users: int = 2) -> list[WindowFile]:
    """List the images below `root/ID_k/` and `root/<condition>/ID_k/`, by user, condition, recording and window number.

    The window number is the last number in the file name. Files of a folder in which one has no number are numbered in
    file order, with a warning. Hidden files and folders are skipped.

    Raises:
        DataError: the folder does not look like that, holds a window or user twice, or fewer than `min_users` users.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds ID_1, ID_2, ...")
    conditions = [d for d in _visible(root) if d.is_dir() and not _USER_FOLDER.fullmatch(d.name)]
    for folder in conditions:
        if (folder / "generation.json").exists():
            raise DataError(f"{folder}: generated windows inside a folder of real ones; move them out of {root}")
    files: list[WindowFile] = []
    for level in (root, *conditions):
        folders: dict[int, Path] = {}
        for folder in _visible(level):
            match = _USER_FOLDER.fullmatch(folder.name)
            if not match or not folder.is_dir():
                continue
            user = int(match[1])
            if user in folders:
                raise DataError(f"{folders[user]} and {folder}: both are user {user}; merge or rename one of them")
            folders[user] = folder
            files += _folder_windows(folder, root, user, "" if level == root else level.name)
    users = {f.user for f in files}
    if not users:
        raise DataError(f"{root}: no user folders in it; give the folder that holds ID_1, ID_2, ...")
    if len(users) < min_users:
        raise DataError(
            f"{root}: {count(len(users), 'user')} only (ID_{min(users)}), {min_users} are needed; add user folders"
        )
    return sorted(files, key=lambda f: (f.user, f.condition, f.recording, f.number))


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
    """Whether there are ID_k folders in `folder`."""
    return any(_USER_FOLDER.fullmatch(path.name) and path.is_dir() for path in folder.iterdir())


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _folder_windows(folder: Path, root: Path, user: int, condition: str) -> list[WindowFile]:
    entries = [p for p in _visible(folder) if p.is_file()]
    paths = [p for p in entries if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
    if not paths:
        found = ", ".join(sorted({p.suffix or p.name for p in entries})) or "nothing"
        wanted = ", ".join(IMAGE_EXTENSIONS)
        raise DataError(f"{folder}: no {wanted} images, found {found}; add images or remove the folder")
    matches = [_FILE_STEM.fullmatch(p.stem) for p in paths]
    if all(matches):
        keys = [(m[1] + m[2] + m[4], int(m[3])) for m in matches]
    else:
        warnings.warn(f"{folder}: file names without a window number are numbered in file order", stacklevel=3)
        keys = [("", i) for i in range(len(paths))]
    seen: dict[tuple[str, int], Path] = {}
    for key, path in zip(keys, paths, strict=True):
        if key in seen:
            raise DataError(f"{seen[key]} and {path.name}: the same window twice; remove one of them")
        seen[key] = path
    return [WindowFile(path.relative_to(root).as_posix(), user, condition, *key) for key, path in seen.items()]
