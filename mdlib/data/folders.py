"""The layout of a data folder: which images belong to which user, condition and part, and which are not read."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdlib.utils import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "jfif", "bmp", "tif", "tiff", "webp")

# Below the folder of a user these count as images that cannot be read.
_OTHER_EXTENSIONS = frozenset(
    "npy npz mat gif svg heic heif avif jp2 tga pgm ppm pnm exr hdr dng psd eps h5 hdf5".split()
)
_JUNK = frozenset(["__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"])
_WORDS = "id|user|usr|subject|subj|sub|person|pers|people|participant|volunteer|patient|human|walker|tester|target"
_USER = re.compile(rf"\s*({_WORDS}|用户|受试者|志愿者|被试|人员|人|[psu]|)[\s_.#-]*(\d+)\s*", re.IGNORECASE)
_LIKE_A_USER = re.compile(rf"\s*(?:(?:{_WORDS}|[psu])[\s_.#-]*)?\d", re.IGNORECASE)
_PART = re.compile(
    r"(?:(train(?:ing)?|训练)|(val(?:id(?:ation)?)?|dev(?:elopment)?|验证)|(test(?:ing)?|测试))"
    r"(?:[\s_-]?(?:set|data|dataset|split|part|images?|imgs?|windows?)|集)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class UserImage:
    """One image below the folder of a user."""

    path: str  # relative to the data folder, with forward slashes
    folder: str  # of the user
    user: int
    condition: str
    part: str  # train, val, test or ""
    name: str  # path below the user's folder, without the part and the extension

    @property
    def pool(self) -> tuple[int, str, str]:
        return self.user, self.condition, self.part


def user_images(root: Path) -> tuple[list[UserImage], list[tuple[str, int, str]]]:
    """The images below folders of users, and (path, number of images, reason) of what is not read.

    Raises:
        DataError: the folder cannot be read, holds generated windows among others, two folders of one user, or users
            inside and outside of train, val and test.
    """
    failed: list[tuple] = []
    tree = list(_walk(root, failed))
    ignored: Counter[tuple[str, str]] = Counter()
    for parts, reason in failed:
        if not parts:
            raise DataError(f"{root}: cannot be read ({reason}); give a folder that you may read")
        ignored["/".join(parts) + "/", f"cannot be read, {reason}"] = 0
    worded = any(match and len(match[1]) > 1 for parts, _ in tree for match in map(_USER.fullmatch, parts[-1:]))
    images: list[UserImage] = []
    strays: list[tuple[tuple[str, ...], str]] = []
    users: dict[str, None] = {}
    holding: set[str] = set()
    for parts, names in tree:
        if parts and "generation.json" in names:
            folder = root.joinpath(*parts)
            raise DataError(f"{folder}: generated windows inside a folder of real ones; move them out of {root}")
        places = _user_places(parts, worded)
        folder = "/".join(parts[: places[0] + 1]) if len(places) == 1 else ""
        users.setdefault(folder)
        for name in names:
            extension, path = name.rpartition(".")[2].lower(), "/".join((*parts, name))
            if extension not in IMAGE_EXTENSIONS:
                if folder and extension in _OTHER_EXTENSIONS:
                    ignored[f"*.{extension}", "not a kind of image that is read"] += 1
            elif not os.path.isfile(root / path):
                ignored[path, "a broken link"] += 1
            elif any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in path):
                shown = path if not parts else "/".join(parts) + "/"
                ignored[shown.encode("unicode_escape").decode(), "control or undecodable characters in the name"] += 1
            elif folder:
                images.append(_image(parts, name, places[0], folder))
            else:
                strays.append((parts, name))
            if extension in IMAGE_EXTENSIONS:
                holding.update(_folders_of(path))
    used = {folder for image in images for folder in _folders_of(image.path)}
    for parts, name in strays:
        ignored[_stray(parts, name, used, worded)] += 1
    ignored.update({(f"{folder}/", "no images"): 0 for folder in users if folder and folder not in holding})
    return _checked(root, images), [(path, n, reason) for (path, reason), n in ignored.items()]


def holds_users(folder: Path, *, anywhere: bool = False) -> bool:
    """Whether there are folders of users with images in `folder`, or anywhere below it."""
    return any(
        any(map(_USER.fullmatch, parts if anywhere else parts[:1]))
        and any(name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for name in names)
        for parts, names in _walk(folder, [], within=None if anywhere else _USER)
    )


def is_part(name: str) -> bool:
    """Whether a folder of that name is a part of a split: train, val, test and the like."""
    return bool(_PART.fullmatch(name))


def _walk(
    root: Path,
    failed: list,
    parts: tuple[str, ...] = (),
    above: frozenset[str] = frozenset(),
    within: re.Pattern | None = None,
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Folders below `root` (the first ones named like `within`) as parts of their paths, with the names of their files.
    Links that lead back are not followed; (parts, reason) of folders that cannot be read is added to `failed`."""
    folder = root.joinpath(*parts)
    if (real := os.path.realpath(folder)) in above:
        return
    try:
        with os.scandir(folder) as entries:
            kinds = sorted((entry.name, entry.is_dir()) for entry in entries if _visible(entry.name))
    except OSError as error:
        failed.append((parts, error.strerror or "unknown error"))
        return
    yield parts, [name for name, is_folder in kinds if not is_folder]
    for name, is_folder in kinds:
        if is_folder and (parts or not within or within.fullmatch(name)):
            yield from _walk(root, failed, (*parts, name), above | {real}, within)


def _folders_of(path: str) -> list[str]:
    """The folders that a path lies in."""
    return [path[: slash.start()] for slash in re.finditer("/", path)]


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _JUNK


def _user_places(parts: tuple[str, ...], worded: bool) -> list[int]:
    """Which part of a path is the user's folder: ID_3 and the like before P3 and 3, and the outer of two of a kind. Two
    places where that decides nothing. A long number alone is a year or a date where other folders have words."""
    found = []
    for place, name in enumerate(parts):
        match = _USER.fullmatch(name)
        if match and (match[1] or not worded or len(match[2]) < 4):
            found.append((match[1].lower() in ("", "p", "s", "u"), match[1].lower(), place))
    best = [(word, place) for weak, word, place in found if weak == min(found)[0]]
    return [place for n, (word, place) in enumerate(best) if word not in {other for other, _ in best[:n]}]


def _image(parts: tuple[str, ...], name: str, place: int, folder: str) -> UserImage:
    part = next((p for p, one in enumerate(parts) if is_part(one)), len(parts))
    which = "" if part == len(parts) else ("train", "val", "test")[_PART.fullmatch(parts[part]).lastindex - 1]
    above = "/".join(one for p, one in enumerate(parts[:place]) if p != part)
    below = [one for p, one in enumerate(parts) if p > place and p != part]
    user = int(_USER.fullmatch(parts[place])[2])
    return UserImage("/".join((*parts, name)), folder, user, above, which, "/".join((*below, name.rpartition(".")[0])))


def _stray(parts: tuple[str, ...], name: str, used: set[str], worded: bool) -> tuple[str, str]:
    """Path and reason for an image that is of no user."""
    if places := _user_places(parts, worded):
        either = " or ".join(parts[place] for place in places)
        return "/".join(parts[: places[-1] + 1]), f"the user is either {either}"
    for n, one in enumerate(parts, 1):
        if _LIKE_A_USER.match(one):
            return "/".join(parts[:n]), "not a user folder name"
    for n in range(1, len(parts) + 1):
        if "/".join(parts[:n]) not in used:
            return "/".join(parts[:n]) + "/", "outside a user folder"
    return "/".join((*parts, f"*.{name.rpartition('.')[2]}")), "outside a user folder"


def _checked(root: Path, images: list[UserImage]) -> list[UserImage]:
    """The images, without a part where there is only one, which splits nothing."""
    folders: dict[tuple, str] = {}
    for image in images:
        if (first := folders.setdefault(image.pool, image.folder)) != image.folder:
            both = f"{root / first} and {root / image.folder}"
            raise DataError(f"{both}: both are user {image.user}; merge or rename one of them")
    if len(parts := {image.part for image in images}) < 2:
        return [UserImage(i.path, i.folder, i.user, i.condition, "", i.name) for i in images]
    if "" in parts:
        inside, outside = (next(i.path for i in images if bool(i.part) == split) for split in (True, False))
        raise DataError(
            f"{root}: {inside} is in a folder train, val or test and {outside} is not; put all users below such "
            "folders, or rename them"
        )
    return images
