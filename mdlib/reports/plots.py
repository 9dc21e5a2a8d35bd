"""The look of every figure, and figures of windows, codes and training. The only file that imports matplotlib;
functions take tensors or plain data and return a Figure."""

from collections import Counter
from functools import cache
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

import numpy as np
import seaborn
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle
from pandas import DataFrame
from PIL import Image, ImageOps

from mdlib.data.colormaps import colorize
from mdlib.data.windows import WindowSet, to_uint8
from mdlib.evaluation.metrics import nearest_train

INK, ACCENT, SECOND, THIRD = "#1f2933", "#2463a4", "#c4572e", "#5f8f4e"
DOTTED = {"color": INK, "linewidth": 0.7, "linestyle": ":"}
DPI = 120
SHEET_ROWS = 100  # of a contact sheet, each of ten windows


class NotebookFigure(Figure):
    """A figure that a notebook shows as an image although pyplot does not know it."""

    def __init__(self, **options):
        super().__init__(dpi=DPI, layout="constrained", **options)

    def _repr_png_(self) -> bytes:
        return to_png(self)


def new_figure(width: float, height: float, panels: int = 1, columns: int = 12, **options) -> tuple[Figure, list]:
    """A figure outside pyplot's global list, so that notebooks show it once and batch runs free it, and its axes:
    `panels` of this size in inches, at most `columns` in a row."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    size = round(width * columns, 6), round(height * rows, 6)  # else rounding errors take away a pixel
    figure = NotebookFigure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes[:panels]


def style(axis, x: str = "", y: str = "", title: str = "", legend: bool | str = False) -> None:
    """The look of every axis with data; legend: True or a place."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8)
    axis.set_xlabel(x, fontsize=8, color=INK)
    axis.set_ylabel(y, fontsize=8, color=INK)
    axis.set_title(title, fontsize=8, color=INK)
    if legend:
        axis.legend(fontsize=7, frameon=False, loc=legend if isinstance(legend, str) else "best")


def coloured(lines: dict) -> list[tuple]:
    """Name, value and a colour of its own for each item."""
    return list(zip(lines, lines.values(), seaborn.color_palette("colorblind", len(lines)), strict=True))


@cache
def fonts(text: str) -> list[str] | None:
    """Families that together draw a text: matplotlib's own and, for characters that it lacks, such as Chinese ones, an
    installed one. None where no font has them."""
    lacks = lambda path: {character for character in text if not get_font(path).get_char_index(ord(character))}
    missing = lacks(findfont(FontProperties()))
    if not missing:
        return ["sans-serif"]
    for font in fontManager.ttflist:
        # A font of last resort draws a box for everything; the list may name fonts that were removed.
        if "LastResort" not in font.fname and Path(font.fname).exists() and not missing & lacks(font.fname):
            return ["sans-serif", font.name]
    return None


def _show(axis, image: np.ndarray | None, title: str = "", **options) -> None:
    """An image on an axis without ticks or frame; None leaves it empty."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if image is not None:
        axis.imshow(image, interpolation="nearest", **options)
        axis.set_title(title, fontsize=8, color=INK)


def image_rows(lines: list[tuple[str, list]], side: float = 1.3) -> Figure:
    """Rows of images: a row's name, and the (image, title) in it; the image may be None."""
    columns, rows = max(len(images) for _, images in lines), len(lines)
    figure, axes = new_figure(side + 0.3 / columns, side + 0.15 + 0.1 / rows, rows * columns, columns)
    for place, (name, images) in enumerate(lines):
        row = axes[place * columns : (place + 1) * columns]
        for axis, (image, title) in zip_longest(row, images, fillvalue=(None, "")):
            _show(axis, image, title)
        row[0].set_ylabel(name, fontsize=8, color=INK)
    return figure


def strip(windows: WindowSet, user: int, each: int, title: str) -> list[tuple]:
    """`each` (image, title) of a user's windows, evenly spaced, the first one titled; None where there are fewer."""
    mine = windows.of_user(user)
    rows = np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(int)
    shown = [as_rgb(mine.images[row], mine.colormap) for row in rows] + [None] * (each - len(rows))
    return list(zip(shown, [title] + [""] * (each - 1), strict=True))


def as_rgb(image: torch.Tensor, colormap: str) -> np.ndarray:
    """One image (C, H, W), uint8 or float in [−1, 1], as RGB (H, W, 3)."""
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    if len(image) == 3:
        return image.permute(1, 2, 0).numpy()
    return colorize(image[0].numpy(), "jet" if colormap == "none" else colormap)


def to_png(*figures: Figure) -> bytes:
    """Figures as PNG bytes, one below the other."""
    images = []
    for figure in figures:
        figure.savefig(buffer := BytesIO())
        images.append(Image.open(buffer).convert("RGB"))
    page = Image.new("RGB", (max(one.width for one in images), sum(one.height for one in images)), "white")
    for place, image in enumerate(images):
        page.paste(image, (0, sum(one.height for one in images[:place])))
    page.save(buffer := BytesIO(), format="PNG")
    return buffer.getvalue()


def windows(images, titles=None, colormap: str = "jet", columns: int = 8, side: float = 1.3) -> Figure:
    """A grid of windows (N, C, H, W) or a list of them, each `side` inches wide: Doppler up, time to the right."""
    titles = titles or [""] * len(images)
    every = [(as_rgb(image, colormap), title) for image, title in zip(images, titles, strict=True)]
    return image_rows([("", every[start : start + columns]) for start in range(0, len(every), columns)], side)


def contact_sheet(folder: str | Path, rows: list[dict]) -> Figure:
    """The windows on disk of each user, ten in a row; of very many a user's first ones, as its name says. rows: of the
    manifest in `folder`."""
    users, strips, names = Counter(row["user"] for row in rows), [], {}
    most = 10 * max(1, SHEET_ROWS // len(users))
    for user, every in users.items():
        names[len(strips)] = f"ID_{user}" + (f", {most} of {every}" if every > most else "")
        paths = [Path(folder) / row["path"] for row in rows if row["user"] == user][:most]
        for start in range(0, len(paths), 10):
            strip = Image.new("RGB", (1600, 165), "white")
            for place, path in enumerate(paths[start : start + 10]):
                strip.paste(ImageOps.contain(Image.open(path).convert("RGB"), (155, 155)), (160 * place, 0))
            strips.append(np.array(strip))
    figure, (axis,) = new_figure(14, 1.4 * len(strips) + 0.1)
    _show(axis, np.vstack(strips))
    axis.set_yticks([165 * row + 78 for row in names], names.values(), fontsize=8, color=INK)
    axis.tick_params(length=0)
    return figure


def real_and_generated(real: WindowSet, generated: WindowSet, users: list[int] | None = None, each: int = 4) -> Figure:
    """Contact sheet: one row per user, real windows on the left, generated ones on the right; by default of the first
    eight users with generated windows."""
    users = users or [user for user in real.users if len(generated.of_user(user))][:8]
    some = lambda user: strip(real, user, each, "real") + strip(generated, user, each, "generated")
    return image_rows([(f"ID_{user}", some(user)) for user in users], 1.2)


def side_by_side(sets: dict[str, WindowSet], users: int = 2, each: int = 4) -> Figure:
    """A row a set, `each` windows of the first `users` users in it."""
    some = lambda part: [strip(part, user, each, f"ID_{user}") for user in part.users[:users]]
    return image_rows([(name, sum(some(part), [])) for name, part in sets.items()], 1.2)


def reconstructions(real: torch.Tensor, decoded: torch.Tensor, colormap: str = "jet") -> Figure:
    """Windows (N, C, H, W) above their codec round trips, and the absolute difference below."""
    lines = {name: [as_rgb(one, colormap) for one in some] for name, some in (("real", real), ("round trip", decoded))}
    lines["|difference|"] = colormaps["magma"]((decoded - real).abs().mean(1).clamp(0, 1).numpy())[..., :3]
    return image_rows([(name, [(image, "") for image in images]) for name, images in lines.items()])


def user_view(real: WindowSet, generated: WindowSet, train: WindowSet, usual: float, stand_in: str) -> Figure:
    """Windows of one user: real ones, generated ones, and below each of those the training window nearest to it.

    Args:
        usual: distance of real unseen windows to training windows; relative to it a copy's is well below 1.
        stand_in: replaces a condition's name that no installed font can draw.
    """
    distance, rows = nearest_train(generated, train)
    some = lambda part, titles: list(zip([as_rgb(one, part.colormap) for one in part.images], titles, strict=True))
    lines = [("real", some(real, [""] * len(real)))]
    lines.append(("generated", some(generated, [str(place + 1) for place in range(len(generated))])))
    lines.append(("nearest training", some(train.select(rows), [f"distance {one:.2f}" for one in distance / usual])))
    figure = image_rows(lines, 1.5)
    user, condition = generated.files[0].user, generated.files[0].condition
    title = f"ID_{user} {condition if fonts(condition) else stand_in}".strip()
    figure.suptitle(title, fontsize=9, color=INK, fontfamily=fonts(condition))
    return figure


def neighbourhoods(points: list[dict]) -> Figure:
    """The report's map of windows: a colour a user, dots where generated, crosses where real."""
    figure, (axis,) = new_figure(5.6, 3.6)
    kinds = ("real", "generated")
    rows = [{**point, "user": f"ID_{point['user']}", "": kinds[point["generated"]]} for point in points]
    looks = dict(style="", markers={"generated": "o", "real": "X"}, hue="user", palette="colorblind", s=28)
    seaborn.scatterplot(DataFrame(rows), x="x", y="y", ax=axis, **looks)
    style(axis)
    axis.set(xticks=[], yticks=[])
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def history(rows: list[dict]) -> Figure:
    """Training curves over optimizer steps: one panel per metric with a held-out value, and the learning rate."""
    keys = [(name, f"held_out_{name}") for name in rows[-1] if f"held_out_{name}" in rows[-1]] + [("learning_rate",)]
    figure, axes = new_figure(3.4, 2.5, len(keys), 4)
    for axis, names in zip(axes, keys, strict=True):
        for name, colour in zip(names, (ACCENT, SECOND, THIRD), strict=False):
            steps, values = zip(*((row["step"], row[name]) for row in rows if name in row), strict=True)
            marker = "o" if len(steps) < 20 else ""  # one point alone shows, too
            axis.plot(steps, values, f"{marker}-", markersize=3, color=colour, label=name.replace("_", " "))
        style(axis, "optimizer step", legend=True)
    return figure


def latent_statistics(latents: torch.Tensor) -> Figure:
    """Normalised latents (N, D, h, w): each channel's histogram on N(0, 1), and its deviation, which should be 1."""
    channels = latents.detach().float().cpu().transpose(0, 1).flatten(1).numpy()
    figure, (left, right) = new_figure(3.75, 2.6, 2)
    edges = np.linspace(-5, 5, 61)
    for values in channels:
        left.hist(values.clip(-5, 5), edges, density=True, histtype="step", color=ACCENT, alpha=0.5, linewidth=0.8)
    left.plot(edges, np.exp(-(edges**2) / 2) / (2 * np.pi) ** 0.5, color=INK, linestyle=":")
    style(left, "normalised latent, one line per channel (dotted: N(0, 1))")
    right.bar(np.arange(len(channels)), channels.std(1), color=ACCENT)
    right.axhline(1, **DOTTED)
    style(right, "channel", "standard deviation")
    return figure


def code_usage(counts: np.ndarray | list[int]) -> Figure:
    """How often each code is used: by index, and sorted on a log axis; red marks unused codes."""
    counts = np.asarray(counts)
    used = counts > 0
    figure, (left, right) = new_figure(3.75, 2.6, 2)
    left.bar(np.arange(len(counts)), counts, width=1.0, color=ACCENT)
    left.plot(np.flatnonzero(~used), np.zeros((~used).sum()), "|", color=SECOND, markersize=8)
    style(left, "code", "times used")
    right.semilogy(np.sort(counts[used])[::-1], color=ACCENT)
    right.axhline(counts.sum() / len(counts), **DOTTED)
    style(right, f"rank ({used.sum()} of {len(counts)} codes used)", "times used (dotted: uniform)")
    return figure


def user_codes(counts: torch.Tensor, users: tuple[int, ...]) -> Figure:
    """Counts (num_users, num_codes) as each user's fraction of a code, over the mean user's: what is distinctive."""
    fraction = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    ratio = (fraction / fraction.mean(0).clamp_min(1e-9)).clamp(0.25, 4).log2()
    ratio = ratio[:, counts.sum(0).argsort(descending=True)].numpy()
    looks = dict(center=0, cmap="vlag", cbar_kws={"label": "log2 of use over mean use"})
    return heatmap(ratio, users, (8, 0.14 * len(users) + 1.2), "codes, most used first", **looks)


def heatmap(values: np.ndarray, users, size: tuple, x: str, y: str = "", **options) -> Figure:
    """A heat map with one row per user."""
    figure, (axis,) = new_figure(*size)
    names = [f"ID_{user}" for user in users]
    seaborn.heatmap(values, ax=axis, **{"xticklabels": False, "yticklabels": names, **options})
    style(axis, x, y)
    axis.tick_params(labelsize=6)
    axis.tick_params(axis="y", rotation=0)
    axis.collections[0].colorbar.ax.tick_params(labelsize=6)
    return figure


def code_tiles(book, times: torch.Tensor, number: int, page: int = 1) -> Figure:
    """A page of `number` codes of a `Codebook`, most used first by their times (K,): what each decodes to, below its
    index and how often it is used."""
    codes = times.argsort(descending=True, stable=True)[number * (page - 1) : number * page].tolist()
    titles = [f"{code}\n×{times[code]}" for code in codes]
    return windows(book.decoded[codes], titles, book.windows.colormap, 16, 0.62)


def code_card(book, code: int) -> Figure:
    """One code of a `Codebook`: what it decodes to and stands for, its cells, who uses it, windows with it marked."""
    windows, times, users = book.windows, int(book.times[code]), book.windows.users
    figure = NotebookFigure(figsize=(9.0, 3.7))
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.15))
    panels = [("decodes to", book.decoded[code])] + ([("stands for, on average", book.real[code])] if times else [])
    for column, (title, patch) in enumerate(panels):
        _show(figure.add_subplot(grid[0, column]), as_rgb(patch, windows.colormap), title)
    places = (book.tokens == code).double().mean(0).numpy()
    _show(figure.add_subplot(grid[0, 2]), places, "occurs in these cells", cmap="magma", aspect="auto", vmin=0)
    axis, rates = figure.add_subplot(grid[0, 3:]), book.rates[:, code].numpy()
    axis.bar(np.arange(len(users)), np.nan_to_num(rates), color=ACCENT)
    axis.axhline(np.nanmean(rates), **DOTTED)
    axis.set_xticks(np.arange(len(users)), [str(user) for user in users])
    style(axis, title="uses per window, by user (dotted: mean)")
    axis.tick_params(labelsize=6)
    for column, row in enumerate(book.windows_with(code)):
        axis, image = figure.add_subplot(grid[1, column]), as_rgb(windows.images[row], windows.colormap)
        _show(axis, image, f"ID_{windows.files[row].user}")
        cells = book.tokens[row] == code  # a white frame around each
        high, wide = (whole / part for whole, part in zip(image.shape[:2], cells.shape, strict=True))
        for y, x in cells.nonzero().tolist():
            corner = (x * wide - 0.5, y * high - 0.5)
            axis.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor="white", linewidth=1.2))
    use = f"used {times} times" if times else "not used"
    figure.suptitle(f"code {code}: {use} in {len(windows)} windows", fontsize=9, color=INK)
    return figure
