"""Colour maps: from intensity to RGB and back, also where JPEG has blurred the colours.

`jet` is MATLAB's `jet(256)`: matplotlib's map of that name differs from it by up to 9 of 255 levels of intensity.
`parula` and `viridis` are interpolated between stops, to 3 levels and 1 level of intensity.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.spatial import cKDTree

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


@lru_cache
def colormap_table(name: str) -> np.ndarray:
    """The colour map as a uint8 table (256, 3); row i is the colour of intensity i."""
    if name == "grey":
        table = np.repeat(np.arange(256)[:, None], 3, axis=1)
    elif name == "jet":
        table = 255 * np.clip(1.5 - np.abs(np.arange(1, 257)[:, None] / 64 - np.array([3, 2, 1])), 0, 1)
    elif name in _STOPS:
        stops = np.frombuffer(bytes.fromhex(_STOPS[name]), np.uint8).reshape(-1, 3)
        at = np.linspace(0, len(stops) - 1, 256)
        table = np.stack([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
    else:
        raise ValueError(f"unknown colour map {name!r}; choose one of {', '.join(COLORMAPS)}")
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
    """The map that pixels (uint8 (..., 3)) look drawn with, and their mean distance to its colours in levels: above the
    map's `COLORMAP_TOLERANCE` they were drawn with none of the maps."""
    points, distances = _to_ycbcr(pixels, mode), {}
    for name in sorted(COLORMAPS):
        nearest = colormap_table(name)[invert_colormap(pixels, name, mode=mode)]
        distances[name] = float(np.linalg.norm(points - _to_ycbcr(nearest, "RGB"), axis=-1).mean())
    best = min(distances, key=distances.get)
    return best, distances[best]


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
