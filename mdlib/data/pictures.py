"""One image file: its header, and its pixels as intensity or colours of 8 bits. What a set's files share (`Kind`), such
as the scale of 16-bit files or where transparency goes, is decided over the set by `survey`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mdlib.utils import DataError

MOST_PIXELS = 16_000_000  # of a file: ten times a full-screen figure
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_READ = {"1", "L", "P", "RGB", "RGBX", "YCbCr", *_ALPHA}


@dataclass(frozen=True)
class Head:
    """What a file's header says."""

    size: tuple[int, int]  # width, height
    bits: int  # of a channel
    wide: bool  # grey of more than 8 bits
    alpha: bool
    lossy: bool  # a format that blurs colours


@dataclass(frozen=True)
class Kind:
    """How the pixels of a set's files become 8 bits."""

    scale: tuple[float, float] | None = None  # what is 0 and what is 255, of grey files of more than 8 bits
    alpha: str = ""  # transparency: "" there is none, "intensity", "black" below the picture, "ignored"


def read_head(path: Path) -> Head:
    """The header of a file; DataError if it is no image, or one of a kind that cannot be read as a window."""
    try:
        if path.stat().st_size == 0:
            raise OSError("it is empty")
        with Image.open(path) as image:
            mode, (width, height), frames = image.mode, image.size, getattr(image, "n_frames", 1)
            lossy = image.format in ("JPEG", "MPO", "WEBP")
            alpha = mode in _ALPHA or "transparency" in image.info
            bits = {"1": 1, "I": 32, "F": 32}.get(mode, 16 if "16" in f"{mode}{[t[3] for t in image.tile]}" else 8)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: far more than {MOST_PIXELS // 10**6} million pixels; export it smaller") from error
    except Exception as error:  # there are many ways to be damaged, and one remedy
        raise _unreadable(path, error) from error
    if width * height > MOST_PIXELS:
        raise DataError(f"{path}: {width}x{height}, more than {MOST_PIXELS // 10**6} million pixels; export it smaller")
    if frames > 1:
        raise DataError(f"{path}: {frames} pictures in one file (an animation?); export each as a PNG")
    wide = mode in ("I", "F") or mode.startswith("I;16")
    if not wide and mode not in _READ:
        raise DataError(f"{path}: colour mode {mode}; export it as RGB or grey")
    return Head((width, height), bits, wide, alpha, lossy)


def survey(paths: Iterable[Path], facts: Iterable[tuple], wide: bool, deep: bool) -> Kind:
    """The kind of a set, from `file_facts` of its files."""
    lows, highs, visible_lows, visible_highs, alpha_lows, alpha_highs, partial = map(np.array, zip(*facts, strict=True))
    low, high = float(lows.min()), float(highs.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = next(path for path, *ends in zip(paths, lows, highs, strict=True) if not np.isfinite(ends).all())
        raise DataError(f"{bad}: pixels that are no finite numbers; replace them and export it again")
    if wide:
        if low == high:
            raise DataError(f"{next(iter(paths)).parent}: every pixel has the value {low:g}; export the images again")
        return Kind(scale=(0.0 if 0 <= low < 0.05 * high else low, high))
    if deep and high < 128:  # pillow keeps the upper 8 of 16 bits of colours
        raise DataError(
            f"{next(iter(paths))}: 16-bit colours of which less than half of the range is used; export 16-bit grey"
        )
    if alpha_lows.min() == 255:
        return Kind()
    if alpha_lows.min() == alpha_highs.max():
        return Kind(alpha="ignored")
    if (visible_highs.max(axis=0) - visible_lows.min(axis=0)).max() <= 2:
        return Kind(alpha="intensity")
    if (partial > 0.02).any():
        path = next(path for path, share in zip(paths, partial, strict=True) if share > 0.02)
        raise DataError(f"{path}: colours and transparency both vary; export it without transparency")
    return Kind(alpha="black")


def file_facts(path: Path, box: tuple | None) -> tuple:
    """Least and largest value; those of each channel where the picture shows; those of its alpha; the fraction of
    pixels that are partly transparent. box: the part of the picture that counts."""
    array, _, alpha = _decode(path, rgb=True)
    if box:
        array = array[box[1] : box[3], box[0] : box[2]]
    low, high = array.min(), array.max()  # NaN where there is one
    if alpha is None:
        return low, high, np.zeros(3), np.full(3, 255), 255, 255, 0.0
    shown = array[alpha > 0].reshape(-1, array.shape[-1] if array.ndim == 3 else 1)
    ends = (shown.min(0), shown.max(0)) if len(shown) else (np.full(1, 255), np.zeros(1))
    partial = float(((alpha > 0) & (alpha < 255)).mean())
    ends = [np.broadcast_to(end.astype(int), 3) for end in ends]
    return low, high, *ends, int(alpha.min()), int(alpha.max()), partial


def read_pixels(path: Path, kind: Kind, *, rgb: bool = False) -> tuple[np.ndarray, str]:
    """Pixels of a file as uint8, and their mode: "L" (H, W); "RGB" or, of most JPEGs, "YCbCr" (H, W, 3)."""
    array, mode, alpha = _decode(path, rgb=rgb or bool(kind.alpha))
    if kind.scale:
        low, high = kind.scale
        array = np.round(np.clip((array.astype(np.float64) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    if kind.alpha == "intensity":
        return np.full(array.shape[:2], 255, np.uint8) if alpha is None else alpha, "L"
    if kind.alpha == "black" and alpha is not None:
        array = np.round(array * (alpha if mode == "L" else alpha[..., None]) / 255.0).astype(np.uint8)
    return array, mode


def _decode(path: Path, *, rgb: bool) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Pixels as stored, (H, W) or (H, W, 3), their mode ("L", "RGB" or "YCbCr"), and alpha (H, W) where there is
    transparency. rgb: JPEGs as RGB; else as YCbCr, whose luma is what was stored and is clipped on the way to RGB."""
    try:
        with Image.open(path) as image:
            stores_rgb = image.info.get("adobe_transform") == 0
            if image.format == "JPEG" and image.mode == "RGB" and not (rgb or stores_rgb):
                image.draft("YCbCr", image.size)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                return np.asarray(image), "L", None
            alpha = None
            if image.mode in _ALPHA or "transparency" in image.info:
                image = image.convert("LA" if image.mode in ("LA", "La", "L", "1") else "RGBA")
                if (alpha := np.asarray(image.getchannel("A"))).min() == 255:
                    alpha = None
                image = image.convert("L" if image.mode == "LA" else "RGB")
            elif image.mode == "1":
                image = image.convert("L")
            elif image.mode not in ("L", "RGB", "YCbCr"):
                image = image.convert("RGB")
            return np.asarray(image), image.mode, alpha
    except Exception as error:  # see read_head
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).replace(str(path), "it").splitlines()[0]
    return DataError(f"{path}: cannot be read ({reason}); delete it or export it again")
