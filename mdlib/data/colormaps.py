"""Colour maps: from intensity to RGB and back, also where JPEG has blurred the colours, and which map a set shows.

Names: `COLORMAPS`, those of matplotlib, and each of them with `_r` for the reversed map. `jet` is MATLAB's `jet(256)`:
matplotlib's map of that name differs from it by up to 9 of 255 levels of intensity. `parula` is interpolated between
stops, to 3 levels.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.spatial import cKDTree

from mdlib.utils import DataError

COLORMAPS = ("jet", "parula", "viridis", "grey")

# Evenly spaced RGB stops, two hex digits a channel.
_PARULA = (
    "3e26a84332cb4741e54852f44563fd3875fe2e87f72797eb20a5e312b1d602bac324c1ae37c89757cc7a81cc59abc739d1bf27f0ba36fec338fa"
    "d62df5e924f9fb15"
)

# RGB to Y, Cb, Cr less their offsets (ITU-T T.871, the JFIF colour space).
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
# JPEG 4:2:0 keeps luma at every pixel and chroma at every fourth, so luma decides and chroma only separates the
# branches of the map. 4 is the middle of a flat optimum (3 to 5).
_SCALE = np.array([4.0, 1.0, 1.0])
# Mean distance (levels of YCbCr) up to which images count as drawn with a map. Fine jet structure in a JPEG 4:2:0
# comes to 15 at 256 pixels, 20 at 32; hsv, the nearest foreign map, to 31. Grey has no chroma to blur: magma is 21
# away.
COLORMAP_TOLERANCE = {"jet": 26.0, "parula": 26.0, "viridis": 26.0, "grey": 8.0}
# The same between the means of 8 x 8 pixels, which JPEG keeps, and those of the nearest colours: the right map comes to
# 1 to 3 (fine jet structure: 5), the nearest wrong one to 5 (grey and bone), mostly above 10.
_BLOCK_TOLERANCE = {"jet": 8.0, "parula": 8.0, "viridis": 8.0, "grey": 3.0}
# The skewness of windows reduced to 16 x 16 is 0.8 to 2 whatever the noise floor: mostly background, and some of it far
# above. It is the opposite where a map is read upside down.
LEAST_SKEW = 0.3


@lru_cache
def colormap_table(name: str) -> np.ndarray:
    """The colour map as a uint8 table (256, 3); row i is the colour of intensity i. DataError: no such map."""
    if name.endswith("_r"):
        return colormap_table(name[:-2])[::-1]
    if name == "grey":
        table = np.repeat(np.arange(256)[:, None], 3, axis=1)
    elif name == "jet":
        table = 255 * np.clip(1.5 - np.abs(np.arange(1, 257)[:, None] / 64 - np.array([3, 2, 1])), 0, 1)
    elif name == "parula":
        stops = np.frombuffer(bytes.fromhex(_PARULA), np.uint8).reshape(-1, 3)
        at = np.linspace(0, len(stops) - 1, 256)
        table = np.stack([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
    else:
        # Only where a map needs it: importing matplotlib takes half a second, and jet comes without.
        from matplotlib import colormaps

        if name not in colormaps:
            raise DataError(f"colormap={name!r}: choose {', '.join(COLORMAPS)}, a name of matplotlib, or auto")
        table = 255 * colormaps[name](np.arange(256) / 255)[:, :3]  # twilight has 510 entries
    table = np.round(table).astype(np.uint8)
    table.setflags(write=False)
    return table


def colorize(image: np.ndarray, colormap: str) -> np.ndarray:
    """Colour intensities uint8 (…): uint8 (…, 3)."""
    return colormap_table(colormap)[image]


def invert_colormap(pixels: np.ndarray, colormap: str, *, mode: str = "RGB") -> np.ndarray:
    """Intensity uint8 (...) of coloured pixels uint8 (..., 3): nearest colour of the map, luma weighted above chroma.

    Exact on pixels that the map itself coloured (viridis: to one level, as two of its 8-bit colours repeat). On
    simulated jet spectrograms saved as JPEG 4:2:0, quality 75, the RMS error is 2.9 of 255. mode: "RGB" or "YCbCr"; a
    JPEG decoder's own YCbCr is better, because its RGB has been clipped.
    """
    known = _known(colormap, mode)
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), -1, 0)
    code = red << 16 | green << 8 | blue
    if (new := np.unique(code[known[code] == 0])).size:
        points = _to_ycbcr(np.stack([new >> 16, new >> 8 & 255, new & 255], axis=-1).astype(np.uint8), mode)
        known[new] = 1 + _colours(colormap)[0].query(points * _SCALE)[1]
    return (known[code] - 1).astype(np.uint8)


def colormap_distance(pixels: np.ndarray, colormap: str, *, mode: str = "RGB") -> float:
    """Mean distance in levels of pixels (uint8 (..., 3)) to the map's colours."""
    nearest = _colours(colormap)[1][invert_colormap(pixels, colormap, mode=mode)]
    return float(np.linalg.norm(_to_ycbcr(pixels, mode) - nearest, axis=-1).mean())


def nearest_colormap(pixels: np.ndarray, *, mode: str = "RGB") -> tuple[str, float]:
    """The map of `COLORMAPS` that pixels (uint8 (..., 3)) look drawn with, and their `colormap_distance`: above the
    map's `COLORMAP_TOLERANCE` they were drawn with none of them."""
    distances = {name: colormap_distance(pixels, name, mode=mode) for name in sorted(COLORMAPS)}
    best = min(distances, key=distances.get)
    return best, distances[best]


def recognise_colormap(images: np.ndarray, *, mode: str = "RGB") -> str:
    """The map, not reversed, that images (uint8 (N, H, W, 3)) of one set are drawn with; DataError if none fits,
    several fit and differ, or the map shows different levels in one colour."""
    points = _to_ycbcr(_blocks(images), mode)
    fits = {name: _Fit(name, points) for name in COLORMAPS}
    # No other map can show so many colours of one of these exactly.
    if not any(fit.distance < 0.5 and fit.span > 150 for fit in fits.values()):
        fits |= {name: _Fit(name, points) for name in _maps_of_matplotlib(points)}
    best = _best([fit for fit in fits.values() if fit.distance <= _BLOCK_TOLERANCE.get(fit.name, 5.0)])
    (_, colours), (i, j) = _colours(best.name), np.triu_indices(256, 65)  # levels far apart
    blur = np.linalg.norm(points - colours[best.levels], axis=-1).mean()
    if np.linalg.norm(colours[i] - colours[j], axis=-1).min() < min(25.0, 4 + 12 * blur):
        raise DataError(
            f"drawn with {best.name}, which shows different levels in one colour; export with another colour map"
        )
    return best.name


def orient_colormap(images: np.ndarray, colormap: str) -> str:
    """`colormap` or its reverse, `colormap`_r, whichever puts the background of a spectrogram at the low end. images:
    levels (N, H, W) according to `colormap`. DataError if neither is clear."""
    score = level_skew(images)
    if abs(score) < LEAST_SKEW:
        either = f"{colormap} or {colormap}_r: neither end is clearly the background"
        raise DataError(f"drawn with {either}; give colormap={colormap} or colormap={colormap}_r")
    return colormap if score > 0 else f"{colormap}_r"


def level_skew(images: np.ndarray) -> float:
    """Skewness of the levels of images (N, H, W), reduced to 16 x 16, where speckle is averaged out; 0 if all equal."""
    means = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(images).double(), 16)
    return float(((means - means.mean()) ** 3).mean() / max(means.std(correction=0), 1e-6) ** 3)


class _Fit:
    """How the map `name` fits blocks of points (B, P, 3)."""

    def __init__(self, name: str, points: np.ndarray):
        tree, colours = _colours(name)
        self.name, self.levels = name, tree.query(points * _SCALE)[1]
        # Between the means of the blocks and those of the nearest colours.
        self.distance = np.linalg.norm(points.mean(1) - colours[self.levels].mean(1), axis=-1).mean()
        self.span = np.ptp(np.percentile(self.levels, (0.5, 99.5)))


def _maps_of_matplotlib(points: np.ndarray, most: int = 8) -> list[str]:
    """The maps of matplotlib nearest to points (B, P, 3), without other names of grey and without stripes."""
    from matplotlib import colormaps

    skipped = {*COLORMAPS, "gray", "gist_gray", "gist_grey", "binary", "gist_yarg", "gist_yerg", "flag", "prism"}
    names = [name for name in {*colormaps} - skipped if colormaps[name].N >= 100 and not name.endswith("_r")]
    some = points.reshape(-1, 3)[::7] * _SCALE
    return sorted(names, key=lambda name: (_colours(name)[0].query(some)[0].mean(), name))[:most]


def _best(fits: list[_Fit]) -> _Fit:
    """The best fit; DataError if there is none, or another one as good that gives other levels."""
    if not fits:
        raise DataError(
            f"drawn with none of the colour maps {', '.join(COLORMAPS)} or matplotlib's; give colormap=... to take the "
            "nearest colours, or channels=3 for RGB"
        )
    most = 1.25 * min(fit.distance for fit in fits) + 0.3
    near = [fit for fit in fits if fit.distance <= most]
    widest = max(fit.span for fit in near)  # autumn is also a part of jet, read as few levels
    near = [fit for fit in near if fit.span >= 0.85 * widest]
    best = min(near, key=lambda fit: (fit.name not in COLORMAPS, fit.distance))
    for fit in near if best.name not in COLORMAPS else ():
        if abs(np.corrcoef(best.levels.ravel(), fit.levels.ravel())[0, 1]) < 0.98:
            raise DataError(f"drawn with {best.name} or {fit.name}, which differ too little to tell; give colormap=...")
    return best


def _blocks(images: np.ndarray, n: int = 400) -> np.ndarray:
    """Blocks (n, P, C) of neighbouring pixels, at random places of images (N, H, W, C)."""
    count, height, width, channels = images.shape
    side = min(8, height, width)  # as in a JPEG
    corners = np.random.default_rng(0).integers(0, (count, height // side, width // side), (n, 3)) * (1, side, side)
    return np.stack([images[i, y : y + side, x : x + side].reshape(-1, channels) for i, y, x in corners])


def _to_ycbcr(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Float (..., 3) luma and centred chroma."""
    pixels = pixels.astype(np.float32)
    return pixels - np.float32([0, 128, 128]) if mode == "YCbCr" else pixels @ _YCBCR.T.astype(np.float32)


@lru_cache
def _colours(name: str) -> tuple[cKDTree, np.ndarray]:
    """The colours of a map: a tree of them, with luma weighted, and Y, Cb, Cr (256, 3)."""
    colours = _to_ycbcr(colormap_table(name), "RGB")
    return cKDTree(colours * _SCALE), colours


@lru_cache
def _known(colormap: str, mode: str) -> np.ndarray:
    """The intensity + 1 of each of the 2²⁴ colours, 0 where it was not needed yet. Memory is taken where the table is
    used; threads may fill it at the same time: they write the same values."""
    return np.zeros(1 << 24, np.uint16)
