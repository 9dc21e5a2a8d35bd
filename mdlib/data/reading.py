"""Read images as intensity or RGB, all of one size and one colour map; what was read is cached."""

import ast
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mdlib.data import colormaps
from mdlib.data.crop import describe_border, find_plot, parse_crop
from mdlib.data.files import WindowFile
from mdlib.data.image_files import Head, Reader, decodable, for_each, read_head
from mdlib.utils import DataError, atomic_file, count

_CACHE_VERSION = 4  # raise it when the same files would be read differently


@dataclass(frozen=True)
class Reading:
    """How the image files of a set were read."""

    colormap: str  # a name of `colormap_table`; "none" for RGB as it is
    fit: float  # mean distance of the pixels to the map's colours, in levels of 255; 0 for grey files and RGB
    size: str  # of the files on disk, width x height in pixels: "256x256"
    shape: tuple[int, int]  # height and width in pixels of what was read: the files, or the plots cropped from them
    bits: int  # of a channel on disk: 1, 8, 16 or 32
    crop: tuple[int, int, int, int] | None  # the box read: left, top, right, bottom in pixels; None: all of it
    scale: tuple[float, float] | None  # values mapped to 0 and 255, for more than 8 bits
    notes: tuple[str, ...]  # what a user should know, one line each; () for an ordinary set


def read_images(
    root: Path, files: Sequence[WindowFile], size: int, colormap: str, crop: str = "none", scale: tuple | None = None
) -> tuple[torch.Tensor, Reading]:
    """uint8 images (N, C, size, size) and how they were read, from the cache where these files were read before."""
    options = {"version": _CACHE_VERSION, "size": size, "colormap": colormap, "crop": crop}
    options |= {"scale": scale} if scale else {}
    contents = [options, list(hashes(root, (file.path for file in files)).items())]
    key = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    cache = Path(os.environ.get("MDLIB_CACHE") or Path.home() / ".cache" / "mdlib") / f"{key}.npz"
    # Missing or damaged (a zip file holds checksums): there are many ways, and one remedy.
    with suppress(Exception), np.load(cache) as file:
        return torch.from_numpy(file["images"]), Reading(**ast.literal_eval(str(file["about"])))
    images, about = _read_files(root, files, Reader(size, colormap, scale), crop)
    try:
        with atomic_file(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=images.numpy(), about=repr(asdict(about)))
    except OSError as error:
        message = f"{cache.parent}: cannot cache images there ({error}); point MDLIB_CACHE to another folder"
        warnings.warn(message, stacklevel=2)
    return images, about


def _read_files(root: Path, files: Sequence[WindowFile], reader: Reader, crop: str):
    """uint8 images (N, C, size, size) and how they were read. What the files share is decided on a sample of them."""
    paths = [root / file.path for file in files]
    head = _common_head(root, files)
    width, height = head.size
    sample = _spread(paths, min(32, max(4, 16_000_000 // (width * height))))  # they are in memory at once
    colormap, reader = reader.colormap, replace(reader, scale=reader.scale if head.bits > 8 else None)
    box = _choose_box(root, files, sample, _with_scale(reader, sample, head.bits), head, crop)
    reader = _with_scale(replace(reader, box=box), paths, head.bits)
    reversible = not (root / "generation.json").exists()  # windows that this suite generated are not reversed
    if colormap == "auto":
        reader = replace(reader, colormap=_detect_colormap(sample, reader, reversible))

    images, modes, distances = zip(*for_each(reader.window, paths), strict=True)
    _check_modes(paths, modes)
    images, distances = np.ascontiguousarray(np.stack(images)), np.array(distances)
    # Fine structure in a JPEG is off the map in every image; something drawn on top, in few.
    odd = distances > max(10, 1.5 * np.median(distances))
    notes = _notes_on_pixels(reader, head, images, modes[0]) + _notes_on_colours(files, reader.colormap, distances, odd)
    if colormap == "auto":
        for path, image, distance in zip(paths, images, np.where(odd, distances, 0), strict=True):
            _check_colormap(path, image, distance, reader, reversible)
    left, top, right, bottom = reader.box or (0, 0, width, height)
    shape = (bottom - top, right - left)
    fit, of_files = round(float(distances.mean()), 1), f"{width}x{height}"
    about = Reading(reader.colormap, fit, of_files, shape, head.bits, reader.box, reader.scale, tuple(notes))
    return torch.from_numpy(images), about


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most `most` paths, evenly spread."""
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, most).astype(int))]


def _common_head(root: Path, files: Sequence[WindowFile]) -> Head:
    """The header of all files; DataError if they differ in size or bits."""
    heads = for_each(read_head, [root / file.path for file in files])
    forms = [f"{w}x{h} pixels" + f" of {bits} bits" * (bits > 8) for (w, h), bits, _ in heads]
    for file, form in zip(files, forms, strict=True):
        if form != forms[0]:
            first = f"{files[0].path} has {forms[0]}"
            raise DataError(
                f"{root}: images differ: {first} and {file.path} {form}; export all at one size and bit depth"
            )
    return heads[0]


def _read_sample(paths: Sequence[Path], reader: Reader) -> tuple[np.ndarray, str]:
    """Images (N, H, W) or (N, H, W, 3) of one mode, and the mode."""
    images, modes = zip(*for_each(reader.pixels, paths), strict=True)
    _check_modes(paths, modes)
    if len(set(modes)) > 1:  # JPEGs among others
        return _read_sample(paths, replace(reader, colormap="none"))
    return np.stack(images), modes[0]


def _check_modes(paths: Sequence[Path], modes: Sequence[str]) -> None:
    """Raise DataError if some files are grey and others have colours."""
    names = [{"L": "grey", "A": "transparency"}.get(mode, "colours") for mode in modes]
    for path, name in zip(paths, names, strict=True):
        if name != names[0]:
            raise DataError(f"{path}: drawn with {name}, other images with {names[0]}; use one map or channels=3")


def _with_scale(reader: Reader, paths: Sequence[Path], bits: int) -> Reader:
    """The reader with the scale of grey files of more than 8 bits: the least value (or 0) and the largest of them."""
    if bits <= 8 or reader.scale:
        return reader
    ends = for_each(lambda path: np.percentile(reader.pixels(path)[0], (0, 100)), paths)
    low, high = float(np.min(ends)), float(np.max(ends))
    if low == high:
        raise DataError(f"{paths[0].parent}: every pixel has the value {low:g}; export the images again")
    return replace(reader, scale=(0.0 if 0 <= low < 0.05 * high else low, high))


def _choose_box(root, files, sample: Sequence[Path], reader: Reader, head: Head, crop: str) -> tuple | None:
    """The box to read; DataError if the images have a border that was not asked to be cropped."""
    width, height = head.size
    if crop not in ("none", "auto"):
        box = parse_crop(crop, width, height)
        return None if box == (0, 0, width, height) else box
    if len(sample) == 1:
        if crop == "auto":
            raise DataError(f"{files[0].path}: crop=auto compares images, and this is the only one: give its box")
        return None
    found = find_plot(_read_sample(sample, reader)[0], lossy=head.lossy)
    if not found:
        return _check_users(root, files, reader, head)
    box, certain = found
    border = f"{root}: the images have a border of {describe_border(box, width, height)} (axes, title or margin?)"
    whole = f"crop=0,0,{width},{height} keeps it"
    if crop == "none":
        how = """give crop=auto (--crop auto; in a run -p 'reading={"crop": "auto"}')"""
        raise DataError(f"{border}: crop them, or {how}; {whole}")
    if not certain:
        raise DataError(f"{border} in the colour of the background: give crop=left,top,right,bottom in pixels; {whole}")
    return box


def _check_users(root: Path, files: Sequence[WindowFile], reader: Reader, head: Head) -> None:
    """Raise DataError if the images of one user have a border."""
    for user in sorted({file.user for file in files}):
        paths = _spread([root / file.path for file in files if file.user == user], 6)
        if len(paths) > 3 and (found := find_plot(_read_sample(paths, reader)[0], lossy=head.lossy)):
            border = describe_border(found[0], *head.size)
            raise DataError(f"{root}: the images of ID_{user} have a border of {border}, others none; export all alike")


def _detect_colormap(sample: Sequence[Path], reader: Reader, reversible: bool) -> str:
    """The colour map of a set, from a sample of its files."""
    images, mode = _read_sample(sample, reader)
    try:
        if images.ndim == 3:
            colormap, levels = "grey", images
        else:
            colormap = colormaps.recognise_colormap(images, mode=mode)
            levels = colormaps.invert_colormap(images, colormap, mode=mode)
        return colormaps.orient_colormap(levels, colormap) if reversible else colormap
    except DataError as error:
        raise DataError(f"{sample[0]}: {error}") from error


def _check_colormap(path: Path, image: np.ndarray, distance: float, reader: Reader, reversible: bool) -> None:
    """Raise DataError if an image is drawn with another map than its set: a much nearer one, or the reverse."""
    other, name = "", reader.colormap.removesuffix("_r")
    if distance:
        pixels, mode = reader.pixels(path)
        nearest, least = colormaps.nearest_colormap(pixels[::8, ::8], mode=mode)
        other = nearest if nearest != name and least < 0.5 * distance else ""
    if not other and reversible and colormaps.level_skew(image) < -colormaps.LEAST_SKEW:
        other = name if name != reader.colormap else f"{name}_r"
    if other:
        raise DataError(f"{path}: drawn with {other}, other images with {reader.colormap}; use one map or channels=3")


def _notes_on_pixels(reader: Reader, head: Head, images: np.ndarray, mode: str) -> list[str]:
    """What a user should know about the pixels."""
    notes, (width, height) = [], head.size
    if reader.box:
        columns, rows = (f"{reader.box[i]} to {reader.box[i + 2]}" for i in (0, 1))
        notes.append(f"cropped to columns {columns} and rows {rows} of {width}x{height} pixels")
    if reader.scale:
        values = "{:g} to {:g}".format(*reader.scale)
        notes.append(f"grey of {head.bits} bits: {values} are read as 0 to 255, in all images")
    if mode == "A":
        notes.append("the images are in the alpha channel, which is read as intensity")
    low, high = np.percentile(_spread(images, 32), (0.1, 99.9))
    if reader.colormap != "none" and high - low < 64:
        notes.append(f"intensities of {low:.0f} to {high:.0f} only, of 0 to 255; they are not rescaled")
    return notes


def _notes_on_colours(files, colormap: str, distances: np.ndarray, odd: np.ndarray) -> list[str]:
    """What a user should know about colours that are not the map's."""
    notes, usual = [], np.median(distances)
    if usual > colormaps.COLORMAP_TOLERANCE.get(colormap, 26.0):
        off = f"the colours are not those of {colormap}, on average they are {usual:.0f} levels off"
        notes.append(f"{off}: is colormap={colormap} right?")
    if odd.any():
        names = ", ".join(files[i].path for i in np.flatnonzero(odd)[:3])
        lacks = f"{count(int(odd.sum()), 'image')} with colours that {colormap} lacks ({names})"
        notes.append(f"{lacks}: leave them out if they show axes or a caption")
    return notes


def hashes(root: str | Path, paths: Iterable[str]) -> dict[str, str]:
    """16 hex digits over the bytes of each file; paths relative to `root`. DataError if one cannot be read."""
    paths = list(paths)
    return dict(zip(paths, for_each(_digest, [Path(root, path) for path in paths]), strict=True))


def _digest(path: Path) -> str:
    with decodable(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
