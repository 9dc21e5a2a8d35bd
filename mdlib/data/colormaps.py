"""Colour maps: from intensity to RGB and back, also where JPEG has blurred the colours, and which map a set shows.

Names: `COLORMAPS`, those of matplotlib, and each of them with `_r` for the reversed map. `jet` is MATLAB's `jet(256)`:
matplotlib's map of that name differs from it by up to 9 of 255 levels of intensity. `parula` and `viridis` are
interpolated between stops, to 3 levels and 1 level of intensity.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.stats import skew

from mdlib.utils import DataError

COLORMAPS = ("jet", "parula", "viridis", "grey")

# Evenly spaced RGB stops, two hex digits a channel.
_STOPS = {
    "parula": (
        "3e26a84332cb4741e54852f44563fd3875fe2e87f72797eb20a5e312b1d602bac324c1ae37c89757cc7a81cc59abc739"
        "d1bf27f0ba36fec338fad62df5e924f9fb15"
    ),
    "viridis": (
        "44015446085c471063481769481d6f482475472a7a46307e453781433d844142873f48893d4e8a3a538b38598c355e8d"
        "33638d31688e2e6d8e2c718e2a768e297b8e27808e25848e23898e218e8d20928c1f978b1e9c891fa18821a58524aa83"
        "28ae802eb37c35b7793dbc7446c06f50c46a5ac86465cb5e70cf577cd25089d54895d840a2da37b0dd2fbddf26cae11f"
        "d8e219e5e419f1e51dfde725"
    ),
}

# RGB to Y, Cb, Cr less their offsets (ITU-T T.871, the JFIF colour space).
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
# JPEG 4:2:0 keeps luma at every pixel and chroma at every fourth, so luma decides and chroma only separates the
# branches of the map. 4 is the middle of a flat optimum (3 to 5).
_SCALE = np.array([4.0, 1.0, 1.0])
# Mean distance (levels of YCbCr) up to which pictures count as drawn with a map. Fine jet structure in a JPEG 4:2:0
# comes to 15 at 256 pixels, 20 at 32; hsv, the nearest foreign map, to 31. Grey has no chroma to blur: magma is 21
# away.
COLORMAP_TOLERANCE = {"jet": 26.0, "parula": 26.0, "viridis": 26.0, "grey": 8.0}
# The same between the means of 8 x 8 pixels, which JPEG keeps, and those of the nearest colours: the right map comes to
# 1 to 3 (fine jet structure: 5), the nearest wrong one to 5 (grey beside bone), mostly above 10.
_BLOCK, _BLOCK_TOLERANCE = 8, {"jet": 8.0, "parula": 8.0, "viridis": 8.0, "grey": 3.0}
_OTHER_TOLERANCE = 5.0
# The skewness of windows reduced to 16 x 16 is 0.8 to 2 whatever the noise floor: mostly background, and some of it far
# above. It is the opposite where a map is read upside down.
LEAST_SKEW = 0.3
_GREYS = {"gray": "grey", "gist_gray": "grey", "gist_grey": "grey"}
_GREYS |= {name: "grey_r" for name in ("binary", "gist_yarg", "gist_yerg")}


@lru_cache
def colormap_table(name: str) -> np.ndarray:
    """The colour map as a uint8 table (256, 3); row i is the colour of intensity i. ValueError: no such map."""
    if name.endswith("_r"):
        return colormap_table(name[:-2])[::-1]
    if name == "grey":
        table = np.repeat(np.arange(256)[:, None], 3, axis=1)
    elif name == "jet":
        table = 255 * np.clip(1.5 - np.abs(np.arange(1, 257)[:, None] / 64 - np.array([3, 2, 1])), 0, 1)
    elif name in _STOPS:
        stops = np.frombuffer(bytes.fromhex(_STOPS[name]), np.uint8).reshape(-1, 3)
        at = np.linspace(0, len(stops) - 1, 256)
        table = np.stack([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
    else:
        # Only where a map needs it: importing matplotlib takes half a second, and jet comes without.
        from matplotlib import colormaps

        if name not in colormaps:
            raise ValueError(f"unknown colour map {name!r}; choose {', '.join(COLORMAPS)}, or a name of matplotlib")
        table = 255 * colormaps[name](np.arange(256) / 255)[:, :3]  # twilight has 510 entries
    table = np.round(table).astype(np.uint8)
    table.setflags(write=False)
    return table


def colorize(images: torch.Tensor | np.ndarray, colormap: str) -> np.ndarray:
    """Colour images (H, W) or (B, 1, H, W), uint8 in 0…255 or floating point in [−1, 1]: uint8 (…, H, W, 3). With
    `colormap="none"` RGB images (B, 3, H, W) are reordered and rescaled."""
    array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8:
        array = np.clip(np.round((array.astype(np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    channels = 3 if colormap == "none" else 1
    if array.ndim == 4 and array.shape[1] == channels:
        array = np.moveaxis(array, 1, -1)
        return array if colormap == "none" else colormap_table(colormap)[array[..., 0]]
    if array.ndim == 2 and channels == 1:
        return colormap_table(colormap)[array]
    raise ValueError(f"cannot colour images of shape {array.shape} with colour map {colormap!r}")


def invert_colormap(pixels: np.ndarray, colormap: str, *, mode: str = "RGB") -> np.ndarray:
    """Intensity uint8 (...) of coloured pixels uint8 (..., 3): nearest colour of the map, luma weighted above chroma.

    Exact on pixels that the map itself coloured (viridis: to one level, as two of its 8-bit colours repeat). On
    simulated jet spectrograms saved as JPEG 4:2:0, quality 75, the RMS error is 2.9 of 255. mode: "RGB" or "YCbCr"; a
    JPEG decoder's own YCbCr is better, because its RGB has been clipped.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.shape[-1:] != (3,):
        raise ValueError(f"expected uint8 pixels (..., 3), got {pixels.dtype} {pixels.shape}")
    tree, known = _inverse(colormap, mode)
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), -1, 0)
    code = red << 16 | green << 8 | blue
    value = known[code]
    if not value.all():
        new = np.unique(code[value == 0])
        points = _to_ycbcr(np.stack([new >> 16, new >> 8 & 255, new & 255], axis=-1).astype(np.uint8), mode)
        known[new] = 1 + tree.query(points * _SCALE)[1]
        value = known[code]
    return (value - 1).astype(np.uint8)


def nearest_colormap(pixels: np.ndarray, *, mode: str = "RGB") -> tuple[str, float]:
    """The map of `COLORMAPS` that pixels (uint8 (..., 3)) look drawn with, and their mean distance to its colours in
    levels: above the map's `COLORMAP_TOLERANCE` they were drawn with none of them."""
    distances = {name: colormap_distance(pixels, name, mode=mode) for name in sorted(COLORMAPS)}
    best = min(distances, key=distances.get)
    return best, distances[best]


def colormap_distance(pixels: np.ndarray, colormap: str, *, mode: str = "RGB") -> float:
    """Mean distance in levels of pixels (uint8 (..., 3)) to the map's colours."""
    nearest = colormap_table(colormap)[invert_colormap(pixels, colormap, mode=mode)]
    return float(np.linalg.norm(_to_ycbcr(pixels, mode) - _to_ycbcr(nearest, "RGB"), axis=-1).mean())


def recognise_colormap(pictures: np.ndarray, *, mode: str = "RGB") -> str:
    """The map, upside up, that pictures (uint8 (N, H, W, 3)) of one set are drawn with. Which end of the map is the
    background is decided by `level_skew`.

    Raises:
        DataError: none fits, several fit and differ, or the ends of the map cannot be told apart.
    """
    points = _blocks(_to_ycbcr(pictures, mode))
    some = points.reshape(-1, 3)[:: max(1, points.size // 3 // 4000)]
    fits = {name: _fit(name, points) for name in COLORMAPS}
    exact = [name for name, (block, _, span) in fits.items() if block < 0.5 and span > 150]
    if not exact:  # else no other map can show so many of these colours
        from matplotlib import colormaps

        others = [
            name
            for name in colormaps
            if not name.endswith("_r")
            and colormaps[name].N >= 100
            and name not in ("viridis", "grey", "flag", "prism", *_GREYS)
        ]
        pixel = {name: _trees(name)[0].query(some * _SCALE)[0].mean() for name in others}
        fits |= {name: _fit(name, points) for name in sorted(pixel, key=pixel.get)[:8]}
    fits = {name: fit for name, fit in fits.items() if fit[0] <= _BLOCK_TOLERANCE.get(name, _OTHER_TOLERANCE)}
    if not fits:
        raise DataError(
            f"drawn with none of the colour maps {', '.join(COLORMAPS)} or matplotlib's; give colormap=... to take the "
            "nearest colours, or channels=3 for RGB"
        )
    least = min(block for block, _, _ in fits.values())
    near = {name: fit for name, fit in fits.items() if fit[0] <= 1.25 * least + 0.3}
    widest = max(span for _, _, span in near.values())  # autumn is also a part of jet, read as few levels
    wide = [name for name in near if near[name][2] > 0.85 * widest]
    best = min(wide, key=lambda name: (name not in COLORMAPS, near[name][0]))
    for name in wide if best not in COLORMAPS else ():
        if abs(_correlation(near[best][1], near[name][1])) < 0.98:
            raise DataError(f"drawn with {best} or {name}, which differ too little to tell; give colormap=...")
    blur = np.linalg.norm(points - _trees(best)[1][near[best][1]], axis=-1).mean()
    if _repeats(best, min(25.0, 4 + 12 * blur)):
        raise DataError(
            f"drawn with {best}, which shows different levels in one colour; export with another colour map"
        )
    return best


def upside_up(images: np.ndarray, colormap: str) -> str:
    """`colormap` or its reverse, `colormap`_r, whichever puts the background of a spectrogram at the low end. images:
    levels (N, H, W) according to `colormap`. DataError where neither is clear."""
    score = level_skew(images)
    if abs(score) < LEAST_SKEW:
        raise DataError(
            f"drawn with {colormap} or {colormap}_r: neither end is clearly the background; give colormap={colormap} "
            f"or colormap={colormap}_r"
        )
    return colormap if score > 0 else f"{colormap}_r"


def level_skew(images: np.ndarray) -> float:
    """Skewness of the levels of images (N, H, W), reduced to 16 x 16, where speckle is averaged out; 0 if all equal."""
    n, height, width = images.shape
    rows, columns = (np.linspace(0, side, min(16, side) + 1).astype(int)[:-1] for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(images.astype(np.float64), rows, axis=1), columns, axis=2)
    sizes = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    means = (sums / sizes).ravel()
    return float(skew(means)) if means.std() > 1e-6 else 0.0


def _fit(name: str, points: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Distance between the means of blocks (B, P, 3) and those of their nearest colours, the levels (B, P), and the
    span of the levels."""
    tree, colours = _trees(name)
    levels = tree.query(points * _SCALE)[1]
    block = np.linalg.norm(points.mean(1) - colours[levels].mean(1), axis=-1).mean()
    low, high = np.percentile(levels, (0.5, 99.5))
    return float(block), levels, float(high - low)


@lru_cache
def _trees(name: str) -> tuple[cKDTree, np.ndarray]:
    colours = _to_ycbcr(colormap_table(name), "RGB")
    return cKDTree(colours * _SCALE), colours


def _repeats(name: str, distance: float) -> bool:
    """Whether levels far apart have colours nearer than `distance`."""
    colours = _trees(name)[1]
    between = np.linalg.norm(colours[:, None] - colours, axis=-1)
    return bool((between[np.abs(np.subtract.outer(np.arange(256), np.arange(256))) > 64] < distance).any())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(1e-9, np.sqrt((a * a).sum() * (b * b).sum())))


def _blocks(points: np.ndarray, most: int = 400) -> np.ndarray:
    """Blocks (B, P, C) of neighbouring pixels from pictures (N, H, W, C), spread over all of them."""
    n, height, width, channels = points.shape
    side = min(_BLOCK, height, width)
    rows, columns = height // side, width // side
    cut = points[:, : rows * side, : columns * side].reshape(n, rows, side, columns, side, channels)
    blocks = cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)
    return blocks[np.random.default_rng(0).permutation(len(blocks))[:most]]


def _to_ycbcr(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Float (..., 3) luma and centred chroma."""
    if mode == "YCbCr":
        return pixels.astype(np.float32) - np.array([0, 128, 128], np.float32)
    if mode == "RGB":
        return pixels.astype(np.float32) @ _YCBCR.T.astype(np.float32)
    raise ValueError(f"unknown pixel mode {mode!r}; choose RGB or YCbCr")


@lru_cache
def _inverse(colormap: str, mode: str) -> tuple[cKDTree, np.ndarray]:
    """A tree of the map's colours, and the intensity + 1 of each of the 2²⁴ colours, 0 where it was not needed yet.
    Memory is taken where the table is used; threads may fill it at the same time: they write the same values."""
    return cKDTree(_to_ycbcr(colormap_table(colormap), "RGB") * _SCALE), np.zeros(1 << 24, np.uint16)
