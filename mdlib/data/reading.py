"""Read images as intensity or RGB, all of one size and one colour map; what was read is cached."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mdlib.data.colormaps import (
    COLORMAP_TOLERANCE,
    LEAST_SKEW,
    colormap_distance,
    invert_colormap,
    level_skew,
    nearest_colormap,
    recognise_colormap,
    upside_up,
)
from mdlib.data.crop import describe_border, find_plot, parse_crop
from mdlib.data.files import WindowFile
from mdlib.data.pictures import Kind, file_facts, read_head, read_pixels, survey
from mdlib.utils import DataError, count, whole_file

_CACHE_VERSION = 3  # raise it when the same files would be read differently


@dataclass(frozen=True)
class Reading:
    """How the image files of a set were read."""

    colormap: str  # a name of `colormap_table`; "none" for RGB as it is
    fit: float  # mean distance of the pixels to the map's colours, in levels of 255; 0 for grey files and RGB
    sizes: tuple[str, ...]  # of the files on disk, width x height in pixels: ("256x256",)
    shape: tuple[int, int]  # height and width in pixels of what was read: the files, or the plots cropped from them
    bits: int  # of a channel on disk: 1, 8, 16 or 32
    crop: tuple[int, int, int, int] | None  # the box read: left, top, right, bottom in pixels; None: all of it
    notes: tuple[str, ...]  # what a user should know, one line each; () for an ordinary set


def read_images(
    root: Path, files: Sequence[WindowFile], size: int, colormap: str, crop: str = "none"
) -> tuple[torch.Tensor, Reading]:
    """uint8 images (N, C, size, size) and how they were read, from the cache where these files were read before."""
    cache = _cache_file(root, files, {"version": _CACHE_VERSION, "size": size, "colormap": colormap, "crop": crop})
    return _read_cache(cache) or _write_cache(cache, *_read_files(root, files, size, colormap, crop))


def _read_files(root: Path, files: Sequence[WindowFile], size: int, colormap: str, crop: str):
    """uint8 (N, C, size, size), and how they were read."""
    paths = [root / file.path for file in files]
    heads = _each(read_head, paths)
    for file, head in zip(files, heads, strict=True):
        for what, one, first in (("pixels", head.size, heads[0].size), ("bits", (head.bits,), (heads[0].bits,))):
            if one != first and (what == "pixels" or head.wide or heads[0].wide):
                one, first = ("x".join(map(str, value)) for value in (one, first))
                raise DataError(
                    f"{root}: images differ in size, {files[0].path} has {first} {what} and {file.path} {one}; "
                    "export them alike"
                )
    head, notes = heads[0], []
    wide, deep = head.wide, any(one.bits == 16 and not one.wide for one in heads)
    some = sorted(range(len(files)), key=lambda i: (i * 0.6180339887) % 1)[: _sample_size(head.size)]  # spread out
    some = sorted(some)

    def kind_of(box):
        if not (wide or deep or any(one.alpha for one in heads)):
            return Kind()
        return survey(paths, _each(lambda path: file_facts(path, box), paths), wide, deep)

    kind = kind_of(None)
    rgb = colormap == "none" or len({one.lossy for one in heads}) > 1
    sample, modes = zip(*_each(lambda path: read_pixels(path, kind, rgb=rgb), [paths[i] for i in some]), strict=True)
    box = _plot(root, files, sample, crop, head, kind)
    if box:
        kind = kind_of(box) if kind.scale else kind
        cut = np.s_[box[1] : box[3], box[0] : box[2]]
        sample = (
            [read_pixels(paths[i], kind, rgb=rgb)[0][cut] for i in some] if kind.scale else [x[cut] for x in sample]
        )
        notes.append(
            f"cropped to columns {box[0]} to {box[2]} and rows {box[1]} to {box[3]} of {_by(head.size)} pixels"
        )
    if kind.scale:
        low, high = (f"{value:g}" for value in kind.scale)
        notes.append(f"grey of {head.bits} bits: {low} to {high}, the range of the whole set, are read as 0 to 255")
    notes += {
        "intensity": ["the pictures are in the files' transparency: it is read as intensity"],
        "black": ["partly transparent pictures are read as if on black"],
        "ignored": ["the pictures are transparent all over, which is ignored"],
    }.get(kind.alpha, [])

    detected, own = colormap == "auto", (root / "generation.json").exists()
    if detected:
        colormap = _detect(root, files, some, sample, modes, own)
    results = _each(lambda path: _read_window(path, kind, box, size, colormap), paths)
    images, maps, distances = zip(*results, strict=True)
    images, odd = np.stack(images), []
    if colormap != "none":
        # Fine structure in a JPEG is off the map in every image; something drawn on top, in few.
        usual = max(10, 1.5 * float(np.median(distances)))
        odd = [i for i, distance in enumerate(distances) if distance > usual]
        grey = colormap.removesuffix("_r") == "grey"
        for i in range(len(files)) if detected else ():
            other = "grey" if maps[i] == "grey" and not grey else ""
            if i in odd:
                pixels, mode = read_pixels(paths[i], kind)
                name, distance = nearest_colormap(_cut(pixels, box)[::8, ::8], mode=mode)
                other = name if distance < 0.5 * distances[i] and name != colormap.removesuffix("_r") else ""
            if not (other or own) and level_skew(images[i]) < -LEAST_SKEW:
                other = colormap.removesuffix("_r") + "_r" * (not colormap.endswith("_r"))
            if other:
                raise DataError(
                    f"{paths[i]}: drawn with {other}, other images with {colormap}; use one map or channels=3"
                )
        far = COLORMAP_TOLERANCE.get(colormap, 26.0)
        if not detected and np.median(distances) > far:
            message = (
                f"the colours are not those of {colormap}, on average they are {np.median(distances):.0f} levels off"
            )
            notes.append(f"{message}: is colormap={colormap} right?")
    if odd:
        message = f"{count(len(odd), 'image')} with colours that {colormap} lacks"
        names = ", ".join(files[i].path for i in odd[:3])
        notes.append(f"{message} ({names}): axes, a tool bar or a caption in the picture?")
    if colormap != "none":
        notes += _few_levels(images[some], head.bits)
    left, top, right, bottom = box or (0, 0, *head.size)
    fit = round(float(np.mean(distances)), 2)
    about = Reading(colormap, fit, (_by(head.size),), (bottom - top, right - left), head.bits, box, tuple(notes))
    return torch.from_numpy(np.ascontiguousarray(images)), about


def _each(function, items: Sequence) -> list:
    """The results of all items, or the first DataError with the number of others."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(function, item) for item in items]
    errors = [error for job in jobs if isinstance(error := job.exception(), DataError)]
    if errors:
        more = f" (and {count(len(errors) - 1, 'more file')} with errors)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    return [job.result() for job in jobs]


def _sample_size(size: tuple[int, int]) -> int:
    """Images on which a set's border and map are decided: enough of them, in memory at once."""
    return min(32, max(4, 16_000_000 // (size[0] * size[1])))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _cut(pixels: np.ndarray, box: tuple | None) -> np.ndarray:
    return pixels[box[1] : box[3], box[0] : box[2]] if box else pixels


def _stack(sample: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures as (N, H, W, C), grey ones among coloured ones with three channels."""
    ndim = max(x.ndim for x in sample)
    if ndim == 2:
        return np.stack(sample)[..., None]
    return np.stack([x if x.ndim == 3 else np.repeat(x[..., None], 3, axis=-1) for x in sample])


def _plot(root, files, sample, crop: str, head, kind: Kind) -> tuple[int, int, int, int] | None:
    """The box to read; DataError where the images have a border that was not asked to be cut."""
    (width, height), whole = head.size, f"crop=0,0,{head.size[0]},{head.size[1]} keeps it"
    try:
        box = parse_crop(crop)
    except ValueError as error:
        raise DataError(f"crop={crop!r}: choose none, auto, or left,top,right,bottom in pixels") from error
    if box:
        if box[2] > width or box[3] > height:
            raise DataError(f"crop={crop}: outside of the images, which have {width}x{height} pixels; choose less")
        return box if box != (0, 0, width, height) else None
    found = find_plot(_stack(sample), lossy=head.lossy) if len(sample) > 1 else None
    if found is None:
        for user in sorted({file.user for file in files}):  # one user's exported in another way
            own = [root / file.path for file in files if file.user == user]
            own = own[:: max(1, len(own) // 6)][:6]
            if len(own) > 3 and (
                found := find_plot(_stack(_each(lambda path: read_pixels(path, kind)[0], own)), lossy=head.lossy)
            ):
                border = describe_border(found[0], width, height)
                raise DataError(
                    f"{root}: the images of ID_{user} have a border of {border}, others not; export them alike"
                )
        return None
    border = f"{root}: the images have a border of {describe_border(found[0], width, height)} (axes, title or margin?)"
    if crop == "none":
        raise DataError(f"{border}: crop them, or give crop=auto; {whole}")
    if not found[1]:
        raise DataError(f"{border} in the colour of the background: give crop=left,top,right,bottom in pixels; {whole}")
    return found[0]


def _detect(root, files, some, sample, modes, own: bool) -> str:
    """The colour map of a set, from a sample. own: windows that this suite generated, which it colours upside up."""
    if len(set(modes)) > 1:
        at = next(i for i, mode in zip(some, modes, strict=True) if (mode == "L") != (modes[0] == "L"))
        first, other = ("grey" if mode == "L" else "colours" for mode in (modes[0], "L" if modes[0] != "L" else "RGB"))
        raise DataError(
            f"{root / files[at].path}: drawn with {other}, other images with {first}; use one map or channels=3"
        )
    pictures = np.stack(sample)
    try:
        colormap = "grey" if modes[0] == "L" else recognise_colormap(pictures, mode=modes[0])
        if own:
            return colormap
        levels = pictures if modes[0] == "L" else invert_colormap(pictures, colormap, mode=modes[0])
        return upside_up(levels, colormap)
    except DataError as error:
        raise DataError(f"{root / files[some[0]].path}: {error}") from error


def _few_levels(images: np.ndarray, bits: int) -> list[str]:
    """A note on intensities that use little of the range."""
    levels, (low, high) = len(np.unique(images)), np.percentile(images, (0.1, 99.9))
    if levels < 24:
        return [f"only {levels} levels of intensity, {images.min()} to {images.max()}; export with more if you can"]
    if high - low < 64:
        return [f"intensities of {low:.0f} to {high:.0f} only, of 0 to 255; they are not rescaled"]
    return []


def _read_window(path: Path, kind: Kind, box: tuple | None, size: int, colormap: str) -> tuple[np.ndarray, str, float]:
    """uint8 (C, size, size), the map ("grey" of a grey file), and the distance to its colours in levels."""
    pixels, mode = read_pixels(path, kind, rgb=colormap == "none")
    pixels, distance = _cut(pixels, box), 0.0
    if colormap == "none":
        image = Image.fromarray(pixels).convert("RGB")
    elif mode == "L":
        image = Image.fromarray(255 - pixels if colormap == "grey_r" else pixels)
    else:
        # Every 8th pixel is enough for a mean.
        distance = colormap_distance(pixels[::8, ::8], colormap, mode=mode)
        image = Image.fromarray(invert_colormap(pixels, colormap, mode=mode))
    shrink = size <= min(image.size)
    small = image.resize((size, size), Image.Resampling.BOX if shrink else Image.Resampling.BILINEAR)
    array = np.moveaxis(np.asarray(small).reshape(size, size, -1), -1, 0)
    return array, "grey" if mode == "L" else colormap, distance


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


def _read_cache(path: Path) -> tuple[torch.Tensor, Reading] | None:
    """Images and how they were read, or None where the file is missing or damaged (a zip file holds checksums)."""
    try:
        with np.load(path) as file:
            about = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(str(file["about"])).items()}
            return torch.from_numpy(file["images"]), Reading(**about)
    except Exception:  # there are many ways to be damaged, and one remedy
        return None


def _write_cache(path: Path, images: torch.Tensor, about: Reading) -> tuple[torch.Tensor, Reading]:
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images.numpy(), about=json.dumps(asdict(about)))
    except OSError as error:
        message = f"{path.parent}: cannot cache images there ({error}); point MDLIB_CACHE to another folder"
        warnings.warn(message, stacklevel=3)
    return images, about
