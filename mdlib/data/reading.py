"""Read images as intensity or RGB, all of one size and one colour map; what was read is cached."""

import hashlib
import json
import os
import statistics
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mdlib.data.colormaps import COLORMAP_TOLERANCE, COLORMAPS, invert_colormap, nearest_colormap
from mdlib.data.files import WindowFile
from mdlib.utils import DataError, count, whole_file

_CACHE_VERSION = 1  # raise it when the same files would be read differently


def read_images(root: Path, files: Sequence[WindowFile], size: int, colormap: str) -> tuple[torch.Tensor, str]:
    """uint8 images (N, C, size, size) and their colour map, from the cache where these files were read before."""
    cache = _cache_file(root, files, {"version": _CACHE_VERSION, "size": size, "colormap": colormap})
    return _read_cache(cache) or _write_cache(cache, *_read_files(root, files, size, colormap))


def _read_files(root: Path, files: Sequence[WindowFile], size: int, colormap: str) -> tuple[torch.Tensor, str]:
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
