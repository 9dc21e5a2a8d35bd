"""The data set: find windows on disk, read them as intensity, one label map."""

import hashlib
import json
import os
import re
import statistics
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mdlib.data.colormaps import COLORMAP_TOLERANCE, COLORMAPS, invert_colormap, nearest_colormap
from mdlib.utils import DataError, whole_file

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg")

_CACHE_VERSION = 1  # raise it when the same files would be read differently
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


def count(n: int, what: str) -> str:
    """Such as "1 window", "2 windows"."""
    return f"{n} {what}" + ("" if n == 1 else "s")


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


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0…255 to float32 [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floating point [−1, 1] to uint8 0…255, rounded; values beyond the range are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class WindowSet:
    """Windows in memory, with the label map. A selection has the label map of the whole."""

    images: torch.Tensor  # uint8 (N, C, size, size): C = 1 intensity, C = 3 RGB
    labels: torch.Tensor  # long (N,), index into `users`
    users: tuple[int, ...]  # users[label] = the k of ID_k; the null label is len(users)
    files: tuple[WindowFile, ...]
    colormap: str  # of the files on disk; "none" for C = 3
    root: str

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The folders above ID_k, by name; ("",) where there are none."""
        return tuple(sorted({f.condition for f in self.files}))

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(f.path for f in self.files)

    def condition_labels(self, conditions: Sequence[str]) -> torch.Tensor:
        """The condition of each window as its place in `conditions`, long (N,)."""
        if unknown := sorted(set(self.conditions) - set(conditions)):
            raise DataError(f"no training window shows condition {', '.join(unknown)}: add some, or leave it out")
        return torch.tensor([conditions.index(f.condition) for f in self.files])

    def float(self, index=None) -> torch.Tensor:
        """Images, or those of `index` (slice, list, tensor), as float32 (B, C, H, W) in [−1, 1]."""
        return to_float(self.images if index is None else self.images[index])

    def select(self, index) -> "WindowSet":
        """The windows of `index`: a slice, positions (list or tensor), or a boolean tensor (N,)."""
        positions = torch.arange(len(self))[index]
        files = tuple(self.files[i] for i in positions.tolist())
        return replace(self, images=self.images[positions], labels=self.labels[positions], files=files)

    def of_user(self, user: int) -> "WindowSet":
        """The windows of ID_`user`."""
        if user not in self.users:
            raise DataError(f"{self.root}: no user ID_{user}; there are {', '.join(map(str, self.users))}")
        return self.select(self.labels == self.users.index(user))


def load_windows(
    root: str | Path,
    *,
    size: int = 64,
    channels: int = 1,
    colormap: str = "auto",
    users: Sequence[int] | None = None,
) -> WindowSet:
    """Read a data folder (layout: see `find_windows`) into one uint8 tensor.

    Coloured images are converted back to intensity, then reduced to `size` × `size` by averaging; grey images are
    intensity already. The result is cached in `$MDLIB_CACHE` (default `~/.cache/mdlib`), keyed by the files' contents
    and these options.

    Args:
        size: side of the windows, pixels.
        channels: 1 for intensity, 3 for RGB as it is.
        colormap: jet, parula, viridis or grey; auto detects it. Unused with 3 channels.
        users: label map to use, e.g. the real set's for generated images; default: the users found.

    Raises:
        DataError: see `find_windows`; also images that are unreadable or of different sizes or colour maps.
    """
    if channels not in (1, 3):
        raise DataError(f"channels={channels}: choose 1 (intensity) or 3 (RGB)")
    if channels == 1 and colormap not in ("auto", *COLORMAPS):
        raise DataError(f"colormap={colormap!r}: choose auto, {', '.join(COLORMAPS)}")
    root = Path(root)
    files = find_windows(root, min_users=2 if users is None else 1)
    users = tuple(sorted({f.user for f in files}) if users is None else users)
    if unknown := {f.user for f in files} - set(users):
        raise DataError(f"{root}: ID_{min(unknown)} is not among the users {', '.join(map(str, users))}")
    colormap = colormap if channels == 1 else "none"

    cache = _cache_file(root, files, {"version": _CACHE_VERSION, "size": size, "colormap": colormap})
    images, colormap = _read_cache(cache) or _write_cache(cache, *_read_images(root, files, size, colormap))
    labels = torch.tensor([users.index(f.user) for f in files])
    return WindowSet(images, labels, users, tuple(files), colormap, str(root))


def _read_images(root: Path, files: Sequence[WindowFile], size: int, colormap: str) -> tuple[torch.Tensor, str]:
    """uint8 (N, C, size, size), and the colour map."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_read_window, root / f.path, size, colormap) for f in files]
    errors = [error for job in jobs if isinstance(error := job.exception(), DataError)]
    if errors:
        more = f" (and {count(len(errors) - 1, 'more file')} with errors)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    images, sizes, maps, distances = zip(*(job.result() for job in jobs), strict=True)
    colormap = statistics.mode(maps)
    if all(distance > COLORMAP_TOLERANCE.get(name, 0) for name, distance in zip(maps, distances, strict=True)):
        raise DataError(
            f"{root / files[0].path}: drawn with none of the colour maps {', '.join(COLORMAPS)}; "
            "give colormap=... to take the nearest colours, or channels=3 for RGB"
        )
    for file, one, name in zip(files, sizes, maps, strict=True):
        if name != colormap:
            raise DataError(
                f"{root / file.path}: drawn with {name}, other images with {colormap}; use one map or channels=3"
            )
        if one != sizes[0]:
            raise DataError(
                f"{root}: images differ in size, {files[0].path} has {sizes[0]} pixels and {file.path} {one}; "
                "export them alike"
            )
    # Fine structure in a JPEG is off the map in every image; something drawn on top, in few.
    usual = max(10, 1.5 * float(np.median(distances)))
    if odd := [file.path for file, distance in zip(files, distances, strict=True) if distance > usual]:
        message = f"{count(len(odd), 'image')} with colours that {colormap} lacks ({', '.join(odd[:3])})"
        warnings.warn(f"{root}: {message}: axes, a tool bar or a caption in the picture?", stacklevel=3)
    return torch.from_numpy(np.ascontiguousarray(np.stack(images))), colormap


def _read_window(path: Path, size: int, colormap: str) -> tuple[np.ndarray, str, str, float]:
    """uint8 (C, size, size), the size on disk, the colour map, and the distance to a detected one in levels."""
    pixels, mode = _read_pixels(path, as_rgb=colormap == "none")
    distance = 0.0
    if colormap == "auto":  # every 8th pixel is enough for a mean
        colormap, distance = ("grey", 0.0) if mode == "L" else nearest_colormap(pixels[::8, ::8], mode=mode)
    if colormap == "none":
        image = Image.fromarray(pixels).convert("RGB")
    else:
        image = Image.fromarray(pixels if mode == "L" else invert_colormap(pixels, colormap, mode=mode))
    shrink = size <= min(image.size)
    small = image.resize((size, size), Image.Resampling.BOX if shrink else Image.Resampling.BILINEAR)
    array = np.moveaxis(np.asarray(small).reshape(size, size, -1), -1, 0)
    return array, "{}x{}".format(*image.size), colormap, distance


def _read_pixels(path: Path, *, as_rgb: bool = False) -> tuple[np.ndarray, str]:
    """Pixels of a file as uint8, and their mode: "L" (H, W); "RGB" or, of most JPEGs, "YCbCr" (H, W, 3)."""
    try:
        with Image.open(path) as image:
            stores_rgb = image.info.get("adobe_transform") == 0
            if image.format == "JPEG" and image.mode == "RGB" and not (as_rgb or stores_rgb):
                image.draft("YCbCr", image.size)  # the luma as stored; on the way to RGB it is clipped
            if image.mode.startswith("I;16"):
                return (np.asarray(image) >> 8).astype(np.uint8), "L"
            if image.mode in ("1", "LA"):
                image = image.convert("L")
            elif image.mode not in ("L", "RGB", "YCbCr"):
                image = image.convert("RGB")
            return np.asarray(image), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it").splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}); delete it or export it again") from error


def _cache_file(root: Path, files: Sequence[WindowFile], options: dict) -> Path:
    """The file that caches these files read with these options, named by the contents."""

    def line(file: WindowFile) -> str:
        try:
            content = (root / file.path).read_bytes()
        except OSError as error:
            raise DataError(f"{root / file.path}: cannot be read ({error.strerror}); check it") from error
        return f"{file.path}\0{len(content)}\0{hashlib.sha256(content).hexdigest()}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = [json.dumps(options, sort_keys=True), *pool.map(line, files)]
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Path(os.environ.get("MDLIB_CACHE") or Path.home() / ".cache" / "mdlib") / f"{key}.npz"


def _read_cache(path: Path) -> tuple[torch.Tensor, str] | None:
    """Images and colour map, or None where the file is missing or damaged (a zip file holds checksums)."""
    try:
        with np.load(path) as file:
            return torch.from_numpy(file["images"]), str(file["colormap"])
    except Exception:  # there are many ways to be damaged, and one remedy
        return None


def _write_cache(path: Path, images: torch.Tensor, colormap: str) -> tuple[torch.Tensor, str]:
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images.numpy(), colormap=colormap)
    except OSError as error:
        message = f"{path.parent}: cannot cache images there ({error}); point MDLIB_CACHE to another folder"
        warnings.warn(message, stacklevel=3)
    return images, colormap
