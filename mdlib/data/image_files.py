"""One image file: its header, its pixels as intensity or colours of 8 bits, and the window it becomes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mdlib.data.colormaps import colormap_distance, invert_colormap
from mdlib.utils import DataError, count

MOST_PIXELS = 16_000_000  # of a file: ten times a full-screen figure
_GREY, _ALPHA = {"1", "L", "LA"}, {"LA", "PA", "RGBA", "RGBa"}
_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I": 32, "F": 32}  # of a channel; other modes have 8
_MODES = {*_GREY, *_ALPHA, *_BITS, "P", "RGB", "RGBX", "YCbCr"}


class Head(NamedTuple):
    """What a file's header says."""

    size: tuple[int, int]  # width, height
    bits: int  # of a channel; above 8 it is grey
    lossy: bool  # a format that blurs colours


@dataclass(frozen=True)
class Reader:
    """How every file of a set becomes a window."""

    size: int  # of the windows
    colormap: str  # "none": RGB; "auto": not known yet
    scale: tuple[float, float] | None = None  # values mapped to 0 and 255, for more than 8 bits
    box: tuple[int, int, int, int] | None = None  # the part that is read: left, top, right, bottom

    def pixels(self, path: Path) -> tuple[np.ndarray, str]:
        """Pixels of a file as uint8 (of more bits without a scale), and their mode: "L" (H, W), "A" (H, W) where the
        image is in the transparency, "RGB" or, of most JPEGs, "YCbCr" (H, W, 3)."""
        array, mode, alpha = _decode(path, self.box, rgb=self.colormap == "none")
        if self.scale:
            low, high = self.scale
            array = np.round(np.clip((array.astype(np.float64) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        if alpha is not None:
            if not alpha.any() or np.ptp(array[alpha > 0], axis=0).max() <= 2:  # one colour wherever it shows
                return alpha, "A"
            if ((alpha > 0) & (alpha < 255)).mean() > 0.02:
                raise DataError(f"{path}: colours and transparency both vary; export it without transparency")
            array = (array.T * (alpha.T >= 128)).T  # on black
        return array, mode

    def window(self, path: Path) -> tuple[np.ndarray, str, float]:
        """A window, uint8 (C, size, size), the mode of its file, and its mean distance to the map's colours."""
        (pixels, mode), distance = self.pixels(path), 0.0
        if self.colormap != "none" and pixels.ndim == 3:
            distance = colormap_distance(pixels[::8, ::8], self.colormap, mode=mode)  # enough pixels for a mean
        return self.reduced(pixels, mode), mode, distance

    def reduced(self, pixels: np.ndarray, mode: str = "RGB") -> np.ndarray:
        """The window, uint8 (C, size, size), of the pixels of a file, uint8 (H, W) or (H, W, 3)."""
        if self.colormap == "none":
            image = Image.fromarray(pixels).convert("RGB")
        elif pixels.ndim == 2:
            image = Image.fromarray(255 - pixels if self.colormap == "grey_r" else pixels)
        else:
            image = Image.fromarray(invert_colormap(pixels, self.colormap, mode=mode))
        method = Image.Resampling.BOX if self.size <= min(image.size) else Image.Resampling.BILINEAR
        array = np.asarray(image.resize((self.size, self.size), method)).reshape(self.size, self.size, -1)
        return np.moveaxis(array, -1, 0)


def for_each(function: Callable, items: Sequence) -> list:
    """The results of all items, computed in threads; or the first DataError with the number of others."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(function, item) for item in items]
    if errors := [error for job in jobs if isinstance(error := job.exception(), DataError)]:
        more = f" (and {count(len(errors) - 1, 'more file')} with errors)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")
    return [job.result() for job in jobs]


def read_head(path: Path) -> Head:
    """The header of a file; DataError if it is no image, or one of a kind that cannot be read as a window."""
    with decodable(path), Image.open(path) as image:
        mode, (width, height), frames = image.mode, image.size, getattr(image, "n_frames", 1)
        lossy = image.format in ("JPEG", "MPO", "WEBP")
    if width * height > MOST_PIXELS:
        raise DataError(f"{path}: {width}x{height}, more than {MOST_PIXELS // 10**6} million pixels; export it smaller")
    if frames > 1:
        raise DataError(f"{path}: {frames} images in one file (an animation?); export each as a PNG")
    if mode not in _MODES:
        raise DataError(f"{path}: colour mode {mode}; export it as RGB or grey")
    return Head((width, height), _BITS.get(mode, 8), lossy)


@contextmanager
def decodable(path: Path):
    """Raise DataError for whatever goes wrong inside while a file is read."""
    try:
        yield
    except Exception as error:  # there are many ways to be damaged, and one remedy
        reason = (str(error) or type(error).__name__).replace(str(path), "it").splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}); delete it or export it again") from error


def _decode(path: Path, box: tuple | None, *, rgb: bool) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Pixels as stored, (H, W) or (H, W, 3), their mode ("L", "RGB" or "YCbCr"), and alpha (H, W) where there is
    transparency. rgb: all as RGB but grey of many bits; else JPEGs as YCbCr, whose luma is what was stored and is
    clipped on the way to RGB."""
    with decodable(path), Image.open(path) as image:
        if image.format == "JPEG" and image.mode == "RGB" and not rgb and image.info.get("adobe_transform") != 0:
            image.draft("YCbCr", image.size)
        image = image.crop(box)
        if _BITS.get(image.mode, 8) > 8:
            if not np.isfinite(array := np.asarray(image)).all():
                raise ValueError("it has pixels that are no finite numbers")
            return array, "L", None
        grey, alpha = image.mode in _GREY and not rgb, None
        if image.mode in _ALPHA or "transparency" in image.info:
            image = image.convert("LA" if grey else "RGBA")
            alpha = np.asarray(image.getchannel("A"))
        if rgb or image.mode != "YCbCr":
            image = image.convert("L" if grey else "RGB")
        return np.asarray(image), image.mode, None if alpha is None or alpha.min() == 255 else alpha
