"""The plot inside exported figures: borders, axes, titles and colour bars, found over a set of pictures."""

import numpy as np

_LEAST = 8  # rows and columns of a plot


def parse_crop(text: str) -> tuple[int, int, int, int] | None:
    """The box of "left,top,right,bottom", or None for "none" and "auto"; ValueError for anything else."""
    if text in ("none", "auto"):
        return None
    left, top, right, bottom = (int(part) for part in text.split(","))
    if min(left, top) < 0 or right - left < _LEAST or bottom - top < _LEAST:
        raise ValueError(text)
    return left, top, right, bottom


def find_plot(pictures: np.ndarray, *, lossy: bool) -> tuple[tuple[int, int, int, int], bool] | None:
    """Where the plot is in pictures (N, H, W, C) uint8 of one layout: its box (left, top, right, bottom), and whether
    that is certain; None where it fills the pictures.

    A line of pixels at an edge is outside the plot if it is the same in nearly all pictures: mostly the colour of that
    edge (margin, with labels or a title that may vary), or another constant line (frame, colour bar). Edge rows in the
    plot's own background colour stay. Where columns on both sides are of it, there is a border, but its end is not
    certain.
    """
    usual = np.median(pictures, axis=0).astype(np.int16)
    near = lambda colour: np.abs(usual - colour) <= tolerance
    # Luma and chroma of a JPEG waver beside an edge; colours of other formats are exact.
    tolerance = (24 if pictures.shape[-1] == 1 else np.array([24, 40, 40])) if lossy else 2
    fixed = np.mean([(np.abs(picture - usual) <= tolerance).all(-1) for picture in pictures], axis=0) >= 0.9
    height, width = fixed.shape
    middle = pictures[:, height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None]
    ground = near(_mode(middle)).all(-1) & fixed

    box = [0, 0, width, height]  # left, top, right, bottom
    lines = {0: np.s_[:, 0], 1: np.s_[0, :], 2: np.s_[:, -1], 3: np.s_[-1, :]}
    edges = {side: _mode(usual[line][None]) for side, line in lines.items()}
    margins = {side: near(colour).all(-1) & fixed for side, colour in edges.items()}
    own = {side: (np.abs(middle - colour) <= tolerance).all(-1).mean() > 0.03 for side, colour in edges.items()}

    def outside(side: int) -> bool:
        left, top, right, bottom = box
        at = {0: left, 1: top, 2: right - 1, 3: bottom - 1}[side]
        line = np.s_[top:bottom, at] if side in (0, 2) else np.s_[at, left:right]
        margin, constant = margins[side][line].mean(), fixed[line].mean()
        if (fixed & ~ground)[line].mean() >= 0.8:
            return True
        if own[side]:
            return side in sides and margin >= 0.995
        return (margin >= 0.5 and constant >= 0.7) or (side in (0, 2) and constant >= 0.97)

    def peel() -> None:
        moved = True
        while moved and box[2] - box[0] > _LEAST and box[3] - box[1] > _LEAST:
            moved = False
            for side, step in ((0, 1), (2, -1), (1, 1), (3, -1)):
                if outside(side):
                    box[side] += step
                    moved = True

    sides = (0, 2)
    peel()
    soft = [side for side in (0, 2) if own[side] and box[side] != (0, 0, width, height)[side]]
    if len(soft) == 1:  # one edge in the background's colour can be the plot's own
        box, sides = [0, 0, width, height], ()
        peel()
    elif soft:
        sides = (0, 1, 2, 3)
        peel()
    if box == [0, 0, width, height] or box[2] - box[0] <= _LEAST or box[3] - box[1] <= _LEAST:
        return None
    return tuple(box), len(soft) < 2


def describe_border(box: tuple[int, int, int, int], width: int, height: int) -> str:
    """Such as "3 rows at the top, 10 columns at the left"."""
    left, top, right, bottom = box
    sides = ((top, "row", "top"), (height - bottom, "row", "bottom"), (left, "column", "left"))
    sides += ((width - right, "column", "right"),)
    return ", ".join(f"{n} {line}{'s' if n > 1 else ''} at the {side}" for n, line, side in sides if n)


def _mode(pictures: np.ndarray) -> np.ndarray:
    """The most frequent colour (C,), as the median of its neighbourhood of 8 levels."""
    colours = pictures.reshape(-1, pictures.shape[-1]).astype(np.int64)
    codes = (colours >> 3) @ (32 ** np.arange(colours.shape[1]))
    values, counts = np.unique(codes, return_counts=True)
    return np.median(colours[codes == values[counts.argmax()]], axis=0).astype(np.int16)
