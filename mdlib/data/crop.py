"""The plot inside exported figures: borders, axes, titles and colour bars, found over a set of images.

A box is (left, top, right, bottom) in pixels; its sides are numbered in this order.
"""

import numpy as np

from mdlib.utils import DataError, count

_LEAST = 8  # rows and columns of a plot


def parse_crop(text: str, width: int, height: int) -> tuple[int, int, int, int]:
    """The box of "left,top,right,bottom" in images of width x height pixels."""
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError as error:
        raise DataError(f"crop={text!r}: choose none, auto, or left,top,right,bottom in pixels") from error
    if not (0 <= left <= right - _LEAST <= width - _LEAST and 0 <= top <= bottom - _LEAST <= height - _LEAST):
        raise DataError(f"crop={text}: outside of the images, which have {width}x{height} pixels; choose less")
    return left, top, right, bottom


def find_plot(images: np.ndarray, *, lossy: bool) -> tuple[tuple[int, int, int, int], bool] | None:
    """The box of the plot in images of one layout, uint8 (N, H, W) or (N, H, W, C), and whether it is certain; None
    where the plot fills the images. lossy: from a format that blurs colours.

    Rows and columns at the edges are removed while they are outside the plot. Those in the plot's own background colour
    can belong to it: only if there are some on both sides, there is a border, and its end is not certain.
    """
    layout = _Layout(images.reshape(*images.shape[:3], -1), lossy)
    box = layout.shrink(layout.whole, background=False)
    inner = layout.shrink(box, background=True)
    certain = not (inner[0] > box[0] and inner[2] < box[2])
    left, top, right, bottom = box = box if certain else inner
    found = box != layout.whole and right - left > _LEAST and bottom - top > _LEAST
    return (box, certain) if found else None


def describe_border(box: tuple[int, int, int, int], width: int, height: int) -> str:
    """Such as "3 rows at the top, 10 columns at the left"."""
    left, top, right, bottom = box
    sides = {"top": top, "bottom": height - bottom, "left": left, "right": width - right}
    lines = {"top": "row", "bottom": "row", "left": "column", "right": "column"}
    return ", ".join(f"{count(n, lines[side])} at the {side}" for side, n in sides.items() if n)


class _Layout:
    """What the images (N, H, W, C) of a set have in common, as masks (H, W)."""

    def __init__(self, images: np.ndarray, lossy: bool):
        # Luma and chroma of a JPEG waver near an edge; colours of other formats are exact.
        tolerance = np.array([24, 40, 40])[: images.shape[-1]] if lossy else 2
        usual = np.median(images, axis=0).astype(np.int16)
        same = lambda image, colour: (np.abs(image - colour) <= tolerance).all(-1)
        height, width = usual.shape[:2]
        self.whole = (0, 0, width, height)
        self.fixed = np.mean([same(image, usual) for image in images], axis=0) >= 0.9  # in nearly all images
        middle = images[:, height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None]
        self.background = self.fixed & same(usual, _most_frequent(middle))
        edges = [_most_frequent(_line(usual, self.whole, side)) for side in range(4)]
        self.margins = [self.fixed & same(usual, colour) for colour in edges]
        self.shared = [same(middle, colour).mean() > 0.03 for colour in edges]  # colours that the plot shows, too

    def shrink(self, box: tuple, *, background: bool) -> tuple[int, int, int, int]:
        """`box` without the rows and columns outside the plot. background: nor those in its background colour."""
        box, before = list(box), None
        while box != before and box[2] - box[0] > _LEAST and box[3] - box[1] > _LEAST:
            before = box.copy()
            for side, step in ((0, 1), (2, -1), (1, 1), (3, -1)):
                box[side] += step * self.is_outside(box, side, background)
        return tuple(box)

    def is_outside(self, box: list[int], side: int, background: bool) -> bool:
        """Whether the line at a side of the box is outside the plot: the same in nearly all images, and mostly in the
        colour of that edge (a margin, with labels or a title that may vary) or of another one (frame, colour bar)."""
        fixed, margin = _line(self.fixed, box, side), _line(self.margins[side], box, side).mean()
        if (fixed & ~_line(self.background, box, side)).mean() >= 0.8:
            return True
        if self.shared[side]:
            return background and margin >= 0.995
        return (margin >= 0.5 and fixed.mean() >= 0.7) or (side in (0, 2) and fixed.mean() >= 0.97)


def _line(array: np.ndarray, box: tuple | list, side: int) -> np.ndarray:
    """The row or column of an array (H, W, ...) at a side of the box."""
    inside = array[box[1] : box[3], box[0] : box[2]]
    return (inside[:, 0], inside[0], inside[:, -1], inside[-1])[side]


def _most_frequent(colours: np.ndarray) -> np.ndarray:
    """The most frequent colour (C,) of an array (..., C), as the median of its neighbourhood of 8 levels."""
    colours = colours.reshape(-1, colours.shape[-1]).astype(np.int64)
    codes = (colours >> 3) @ (32 ** np.arange(colours.shape[1]))
    values, counts = np.unique(codes, return_counts=True)
    return np.median(colours[codes == values[counts.argmax()]], axis=0).astype(np.int16)
