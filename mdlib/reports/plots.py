"""Every figure. The only file that imports matplotlib; functions take tensors or plain data and return a Figure."""

from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import seaborn
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mdlib.data.colormaps import colorize
from mdlib.data.windows import WindowSet, to_uint8
from mdlib.reports.pages import describe

INK, ACCENT, SECOND, THIRD = "#1f2933", "#2463a4", "#c4572e", "#5f8f4e"
DPI = 120
HEADLINE = ("real_only", "real_plus_generated", "real_x2")  # what the top of a report shows, as far as it was measured
COLOURS = {"generated_only": SECOND, "real_plus_generated": ACCENT, "resnet18_real_plus_generated": ACCENT}


# ---- shared helpers


class Picture(Figure):
    """A figure that a notebook shows: outside pyplot's list it would be known there by its text alone."""

    def _repr_png_(self) -> bytes:
        return to_png(self)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, list]:
    """A figure outside pyplot's global list, so that notebooks show it once and batch runs do not keep it; its axes."""
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for axis in axes:
        _style(axis)
    return figure, axes


def _style(axis, x: str = "", y: str = "", title: str = "", legend: bool | str = False) -> None:
    """The look of every axis with data; legend: True or a place."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8)
    axis.set_xlabel(x, fontsize=8, color=INK)
    axis.set_ylabel(y, fontsize=8, color=INK)
    axis.set_title(title, fontsize=8, color=INK)
    if legend:
        axis.legend(fontsize=7, frameon=False, loc=legend if isinstance(legend, str) else "best")


def _zero(axis) -> None:
    axis.axhline(0, color=INK, linewidth=0.7, linestyle=":")


def _show(axis, image: np.ndarray | None, title: str = "", **options) -> None:
    """An image on an axis without ticks or frame; None leaves it empty."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if image is not None:
        axis.imshow(image, interpolation="nearest", **options)
        axis.set_title(title, fontsize=8, color=INK)


def _pictures(lines: list[tuple[str, list]], side: float = 1.3) -> Figure:
    """Rows of images: a row's name, and the (image, title) in it; the image may be None."""
    columns = max(len(images) for _, images in lines)
    figure, axes = _figure(side * columns + 0.3, (side + 0.15) * len(lines) + 0.1, len(lines), columns)
    for place, (name, images) in enumerate(lines):
        row = axes[place * columns : (place + 1) * columns]
        for axis, (image, title) in zip(row, images + [(None, "")] * (columns - len(images)), strict=True):
            _show(axis, image, title)
        row[0].set_ylabel(name, fontsize=8, color=INK)
    return figure


def _spaced(windows: WindowSet, each: int) -> list[np.ndarray]:
    """`each` windows, or as many as there are, evenly spaced, as RGB."""
    rows = np.linspace(0, len(windows) - 1, min(each, len(windows))).round().astype(int)
    return [picture(windows.images[row], windows.colormap) for row in rows]


def _line(axis, places, figures: list[dict], colour, label: str) -> None:
    """A line through figures of the report, in percent, with their intervals."""
    values, ends = (100 * np.array([one[what] for one in figures]) for what in ("value", "ci95"))
    spread = [values - ends[:, 0], ends[:, 1] - values]
    axis.errorbar(places, values, spread, fmt="o-", color=colour, markersize=3, linewidth=1, label=label)


def _counts(axis, counts) -> None:
    """A logarithmic x axis that names these counts."""
    axis.set_xscale("log")
    axis.set_xticks(counts, [f"{count:g}" for count in counts])
    axis.minorticks_off()


def _colours(count: int) -> list:
    return seaborn.color_palette("colorblind", count)


def picture(image: torch.Tensor, colormap: str) -> np.ndarray:
    """One image (C, H, W), uint8 or float in [−1, 1], as RGB (H, W, 3)."""
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    if len(image) == 3:
        return image.permute(1, 2, 0).numpy()
    return colorize(image[0], "jet" if colormap == "none" else colormap)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI)


def to_png(*figures: Figure) -> bytes:
    """Figures as PNG bytes, one below the other."""
    pages = []
    for figure in figures:
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        pages.append(buffer)
    if len(pages) == 1:
        return pages[0].getvalue()
    pictures = [np.array(Image.open(page).convert("RGB")) for page in pages]
    width = max(one.shape[1] for one in pictures)
    padded = [np.pad(one, ((0, 0), (0, width - one.shape[1]), (0, 0)), constant_values=255) for one in pictures]
    buffer = BytesIO()
    Image.fromarray(np.concatenate(padded)).save(buffer, format="PNG")
    return buffer.getvalue()


# ---- windows


def windows(
    images: torch.Tensor | list[torch.Tensor], titles: list[str] | None = None, colormap: str = "jet", columns: int = 8
) -> Figure:
    """A grid of windows (N, C, H, W): Doppler up, time to the right."""
    titles = titles or [""] * len(images)
    every = [(picture(image, colormap), title) for image, title in zip(images, titles, strict=True)]
    return _pictures([("", every[start : start + columns]) for start in range(0, len(every), columns)])


def sheet(folder: str | Path, rows: list[dict]) -> Figure:
    """The first ten windows on disk of each user, a row a user. rows: of a manifest, `path` (within `folder`) and
    `user` in each."""
    lines, counts = [], Counter(row["user"] for row in rows)
    for user, every in counts.items():
        images = []
        for row in [row for row in rows if row["user"] == user][:10]:
            with Image.open(Path(folder) / row["path"]) as image:
                images.append((np.array(image.convert("RGB")), ""))
        lines.append((f"ID_{user}" + (f", 10 of {every}" if every > 10 else ""), images))
    return _pictures(lines)


def real_and_generated(real: WindowSet, generated: WindowSet, users: list[int] | None = None, each: int = 4) -> Figure:
    """Contact sheet: a row a user, real windows on the left, generated ones on the right."""
    lines = []
    for user in real.users[:8] if users is None else users:
        images = []
        for part, name in ((real, "real"), (generated, "generated")):
            shown = _spaced(part.of_user(user), each)
            images += [(image, "" if place else name) for place, image in enumerate(shown)]
            images += [(None, "")] * (each - len(shown))
        lines.append((f"ID_{user}", images))
    return _pictures(lines, 1.2)


def side_by_side(sets: dict[str, WindowSet], users: int = 2, each: int = 4) -> Figure:
    """A row a set, `each` windows of the first `users` users in it."""
    lines = []
    for name, part in sets.items():
        images = []
        for user in part.users[:users]:
            shown = _spaced(part.of_user(user), each)
            images += [(image, "" if place else f"ID_{user}") for place, image in enumerate(shown)]
            images += [(None, "")] * (each - len(shown))
        lines.append((name, images))
    return _pictures(lines, 1.2)


def reconstructions(real: torch.Tensor, decoded: torch.Tensor, colormap: str = "jet") -> Figure:
    """Windows (N, C, H, W) above their codec round trips, and the absolute difference below."""
    difference = (decoded - real).abs().mean(1).clamp(0, 1).numpy()
    lines = [
        (name, [picture(one, colormap) for one in part]) for name, part in (("real", real), ("round trip", decoded))
    ]
    lines.append(("|difference|", list(colormaps["magma"](difference)[..., :3])))
    return _pictures([(name, [(image, "") for image in images]) for name, images in lines])


def user_view(real: WindowSet, generated: WindowSet, nearest: WindowSet | None = None, ratios=()) -> Figure:
    """Windows of one user: real ones, generated ones, and below each of those the training window nearest to it.

    ratios: distance to `nearest`, for each generated window, over that of real unseen windows: 1 where a generated
    window is as new as a real one, well below where it is copied.
    """
    rows = [("real", real, [""] * len(real))]
    rows.append(("generated", generated, [str(place) for place in range(1, len(generated) + 1)]))
    if nearest is not None:
        rows.append(("nearest training", nearest, [f"distance {ratio:.2f}" for ratio in ratios]))
    lines = [
        (name, [(picture(image, part.colormap), title) for image, title in zip(part.images, titles, strict=True)])
        for name, part, titles in rows
    ]
    figure = _pictures(lines, 1.5)
    figure.suptitle(f"ID_{generated.files[0].user} {generated.files[0].condition}".strip(), fontsize=9, color=INK)
    return figure


# ---- codec and training


def history(rows: list[dict], keys: list[tuple[str, ...]]) -> Figure:
    """Training curves over optimizer steps: one panel for each tuple of keys of the history's rows."""
    figure, axes = _figure(3.4 * len(keys), 2.5, 1, len(keys))
    for axis, names in zip(axes, keys, strict=True):
        for name, colour in zip(names, (ACCENT, SECOND, THIRD), strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = {"marker": "o", "markersize": 3} if len(points) < 20 else {}  # one point alone shows, too
            axis.plot(*zip(*points, strict=True), color=colour, label=name.replace("_", " "), **style)
        _style(axis, "optimizer step", legend=True)
    return figure


def latent_statistics(latents: torch.Tensor) -> Figure:
    """Normalised latents (N, D, h, w): each channel's histogram on N(0, 1), and its deviation, which should be 1."""
    channels = latents.detach().float().cpu().transpose(0, 1).flatten(1).numpy()
    figure, (left, right) = _figure(7.5, 2.6, 1, 2)
    edges = np.linspace(-5, 5, 61)
    for values in channels:
        left.hist(values.clip(-5, 5), edges, density=True, histtype="step", color=ACCENT, alpha=0.5, linewidth=0.8)
    left.plot(edges, np.exp(-(edges**2) / 2) / (2 * np.pi) ** 0.5, color=INK, linestyle=":")
    _style(left, "normalised latent, a line a channel (dotted: N(0, 1))")
    right.bar(np.arange(len(channels)), channels.std(1), color=ACCENT)
    right.axhline(1, color=INK, linewidth=0.7, linestyle=":")
    _style(right, "channel", "standard deviation")
    return figure


def code_usage(counts: np.ndarray | list[int]) -> Figure:
    """How often each code is used: by index, and sorted on a log axis; red marks unused codes."""
    counts = np.asarray(counts)
    used = counts > 0
    figure, (left, right) = _figure(7.5, 2.6, 1, 2)
    left.bar(np.arange(len(counts)), counts, width=1.0, color=ACCENT)
    left.plot(np.flatnonzero(~used), np.zeros((~used).sum()), "|", color=SECOND, markersize=8)
    _style(left, "code", "times used")
    right.semilogy(np.sort(counts[used])[::-1], color=ACCENT)
    right.axhline(counts.sum() / len(counts), color=INK, linewidth=0.7, linestyle=":")
    _style(right, f"rank ({used.sum()} of {len(counts)} codes used)", "times used (dotted: uniform)")
    return figure


def user_codes(counts: torch.Tensor, users: tuple[int, ...]) -> Figure:
    """Counts (num_users, num_codes) as each user's fraction of a code, over the mean user's: what is distinctive."""
    fraction = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    ratio = (fraction / fraction.mean(0).clamp_min(1e-9)).clamp(0.25, 4).log2()
    ratio = ratio[:, counts.sum(0).argsort(descending=True)].numpy()
    bar = {"label": "log2 of use over mean use"}
    return _heatmap(
        ratio, users, (8, 0.14 * len(users) + 1.2), "codes, most used first", center=0, cmap="vlag", cbar_kws=bar
    )


def confusion(fraction: list[list[float]], users: tuple[int, ...] | list[int]) -> Figure:
    """Fraction (n, n) of windows of the row's user in which the classifiers named the column's."""
    size = (0.16 * len(users) + 2.4, 0.15 * len(users) + 2.0)
    options = dict(cmap="rocket_r", vmin=0, vmax=1, xticklabels=[f"ID_{user}" for user in users])
    return _heatmap(np.asarray(fraction), users, size, "named by the classifiers", "generated for", **options)


def _heatmap(values: np.ndarray, users, size: tuple, x: str, y: str = "", **options) -> Figure:
    """A heat map with a row a user."""
    figure, (axis,) = _figure(*size)
    names = [f"ID_{user}" for user in users]
    seaborn.heatmap(values, ax=axis, **{"xticklabels": False, "yticklabels": names, **options})
    _style(axis, x, y)
    axis.tick_params(labelsize=6)
    return figure


def tile(patch: torch.Tensor, colormap: str, height: int = 36) -> bytes:
    """A code's patch (C, r, c) as a PNG `height` pixels high, every pixel of it a block."""
    small = Image.fromarray(picture(patch, colormap))
    buffer = BytesIO()
    size = round(small.width * height / small.height), height
    small.resize(size, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def code_tiles(book, codes: list[int], columns: int = 16) -> Figure:
    """What codes decode to, each below its index and how often it is used. book: a `Codebook`."""
    shown = [(picture(book.decoded[code], book.windows.colormap), f"{code}\n×{book.times[code]}") for code in codes]
    return _pictures([("", shown[start : start + columns]) for start in range(0, len(shown), columns)], 0.62)


def code_card(book, code: int) -> Figure:
    """One code: what it decodes to and stands for, its cells in the grid, who uses it, and windows with it marked.

    book: of `mdlib.evaluation.codec_quality.survey`.
    """
    windows, times, users = book.windows, int(book.times[code]), book.windows.users
    figure = Picture(figsize=(9.0, 3.7), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.15))
    panels = [("decodes to", book.decoded[code])] + ([("stands for, on average", book.real[code])] if times else [])
    for column, (title, patch) in enumerate(panels):
        _show(figure.add_subplot(grid[0, column]), picture(patch, windows.colormap), title)
    places = book.places(code).numpy()
    _show(figure.add_subplot(grid[0, 2]), places, "occurs in these cells", cmap="magma", aspect="auto", vmin=0)
    axis, rates = figure.add_subplot(grid[0, 3:]), book.rates[:, code].numpy()
    axis.bar(np.arange(len(users)), np.nan_to_num(rates), color=ACCENT)
    axis.axhline(np.nanmean(rates), color=INK, linewidth=0.7, linestyle=":")
    axis.set_xticks(np.arange(len(users)), [str(user) for user in users])
    _style(axis, title="times in a window of user … (dotted: mean)")
    axis.tick_params(labelsize=6)
    for column, row in enumerate(book.windows_with(code)):
        axis, image = figure.add_subplot(grid[1, column]), picture(windows.images[row], windows.colormap)
        _show(axis, image, f"ID_{windows.files[row].user}")
        cells = book.tokens[row] == code  # a white frame around each
        high, wide = (whole / part for whole, part in zip(image.shape[:2], cells.shape, strict=True))
        for y, x in cells.nonzero().tolist():
            corner = (x * wide - 0.5, y * high - 0.5)
            axis.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor="white", linewidth=1.2))
    use = f"used {times} times" if times else "not used"
    figure.suptitle(f"code {code}: {use} in {len(windows)} windows", fontsize=9, color=INK)
    return figure


# ---- the report


def accuracies(augmentation: dict, names: tuple[str, ...] = ()) -> Figure:
    """Accuracy of classifiers that differ in their training windows: a dot a seed, the bar its 95 % interval, dotted
    chance. names: which of them; all where none is given."""
    order = ("real_only", "real_plus_generated", "real_x2", "generated_only", "real_unaugmented")
    every = [*order, *(name for name in augmentation if name not in order)]
    known = [name for name, entry in augmentation.items() if isinstance(entry, dict) and "per_seed" in entry]
    shown = [name for name in names or every if name in known]
    figure, (axis,) = _figure(6.4, 0.4 * len(shown) + 0.9)
    for row, name in enumerate(shown):
        entry, colour = augmentation[name], COLOURS.get(name, INK)
        axis.plot(
            100 * np.array(entry["ci95"]), [row] * 2, color=colour, linewidth=9, alpha=0.25, solid_capstyle="butt"
        )
        axis.plot(100 * np.array(entry["per_seed"]), [row] * len(entry["per_seed"]), "o", color=colour, markersize=4)
    axis.axvline(100 / max(1, len(augmentation["per_user"])), color=INK, linewidth=0.7, linestyle=":")
    axis.set_yticks(range(len(shown)), [describe("augmentation", name)["label"] for name in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    _style(axis, "accuracy on unseen windows, % (dotted: chance)")
    return figure


def gain_curves(augmentation: dict) -> Figure:
    """The gain, in points, against generated windows a user, and against the fraction of them that filters retain."""
    panels = [("windows_per_user", {"all": augmentation["gain_by_windows"]}, "generated windows a user")]
    filters: dict[str, list[dict]] = {}
    for row in augmentation["gain_by_selection"]:
        filters.setdefault(row["by"], []).append(row)
    if filters:
        panels.append(("kept", filters, "fraction that a filter retains"))
    figure, axes = _figure(4.0 * len(panels), 2.6, 1, len(panels), sharey=True)
    for axis, (key, lines, title) in zip(axes, panels, strict=True):
        _zero(axis)
        for (name, rows), colour in zip(lines.items(), _colours(len(lines)), strict=True):
            _line(axis, [row[key] for row in rows], rows, colour, name)
        _style(axis, title, "" if axis is not axes[0] else "gain, points", legend=len(lines) > 1)
    return figure


def roc(curves: list[dict]) -> Figure:
    """Verification: true against false acceptance of generated and of real probes, shaded their 95 % intervals; curves:
    of the report."""
    figure, (axis,) = _figure(3.6, 3.2)
    axis.plot([0, 1], [1, 0], color=INK, linewidth=0.7, linestyle=":")  # equal error rates lie here
    for curve, colour in zip(curves, (ACCENT, INK), strict=True):
        axis.plot(curve["false"], curve["true"], color=colour, label=curve["probes"])
        axis.fill_between(curve["false"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    _style(axis, "impostors accepted", "genuine accepted", legend=True)
    return figure


def neighbourhoods(points: list[dict]) -> Figure:
    """The report's map of windows: a colour a user, filled where generated, hollow where real."""
    figure, (axis,) = _figure(5.0, 3.6)
    users = sorted({point["user"] for point in points})
    for user, colour in zip(users, _colours(len(users)), strict=True):
        for generated in (False, True):
            mine = [
                (point["x"], point["y"]) for point in points if (point["user"], point["generated"]) == (user, generated)
            ]
            face, label = (colour, f"ID_{user}") if generated else ("none", None)
            axis.plot(
                *np.array(mine).reshape(-1, 2).T, "o", color=colour, markerfacecolor=face, markersize=4, label=label
            )
    _style(axis, title="filled: generated, hollow: real")
    axis.set(xticks=[], yticks=[])
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def user_means(physics: dict) -> Figure:
    """A panel a metric, a dot a user: mean over generated windows against mean over unseen real ones, and equality."""
    panels = {name: one for name, one in physics.items() if "generated_means" in one}
    columns = min(4, len(panels))
    figure, axes = _figure(2.2 * columns, 2.3 * -(-len(panels) // columns), -(-len(panels) // columns), columns)
    for axis, (name, one) in zip(axes, panels.items(), strict=False):
        pairs = zip(one["unseen_means"], one["generated_means"], strict=True)
        points = np.array([pair for pair in pairs if None not in pair])
        ends = [points.min(), points.max()]
        axis.plot(ends, ends, color=INK, linewidth=0.7, linestyle=":")
        axis.plot(*points.T, "o", color=ACCENT, markersize=3.5, alpha=0.7)
        _style(axis, f"real {one['unit']}".strip(), "generated", name.replace("_", " "))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def user_spreads(physics: dict, users: list[int], names: tuple[str, ...], most: int = 8) -> Figure:
    """A panel a metric, for each of some users a box over the unseen real windows and one over the generated ones:
    middle half, median, and from the 5th to the 95th percentile."""
    chosen = np.linspace(0, len(users) - 1, min(most, len(users))).round().astype(int)
    columns = min(2, len(names))
    figure, axes = _figure(4.4 * columns, 2.2 * -(-len(names) // columns), -(-len(names) // columns), columns)
    for axis, name in zip(axes, names, strict=False):
        for shift, part, colour in ((-0.18, "unseen", INK), (0.18, "generated", ACCENT)):
            spreads = [(place + shift, physics[name][f"{part}_spread"][row]) for place, row in enumerate(chosen)]
            spreads = [(place, spread) for place, spread in spreads if spread]
            keys, line = ("whislo", "q1", "med", "q3", "whishi"), {"color": colour, "linewidth": 0.8}
            styles = dict(boxprops=line, whiskerprops=line, medianprops=line | {"linewidth": 1.6})
            boxes = [dict(zip(keys, spread, strict=True)) for _, spread in spreads]
            places = [place for place, _ in spreads]
            axis.bxp(boxes, places, widths=0.28, manage_ticks=False, showfliers=False, showcaps=False, **styles)
        axis.set_xticks(range(len(chosen)), [f"ID_{users[row]}" for row in chosen])
        _style(axis, title=f"{name.replace('_', ' ')}, {physics[name]['unit']}".rstrip(", "))
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("dark: real, blue: generated", fontsize=7)
    return figure


# ---- comparison and study


def study(rows: list[dict]) -> Figure:
    """Accuracy on unseen windows against real training windows a user; rows: of study.json. Hollow: 2× real data."""
    figure, (axis,) = _figure(5.8, 3.4)
    counts = np.array([row["windows_per_user"] for row in rows])
    lines = (("real_only", INK), ("real_plus_generated", ACCENT), ("generated_only", SECOND))
    for place, (name, colour) in enumerate(lines):
        figures = [row["augmentation"][name] for row in rows]
        _line(axis, counts * 1.03 ** (place - 1), figures, colour, describe("augmentation", name)["label"])
    doubled = [(2 * row["windows_per_user"], row["augmentation"]["real_x2"]["value"]) for row in rows]
    doubled = np.array([pair for pair in doubled if pair[1] is not None]).reshape(-1, 2)
    axis.plot(doubled[:, 0], 100 * doubled[:, 1], "o", color=INK, markerfacecolor="none", label="2× real data")
    _counts(axis, counts)
    _style(axis, "real windows a user", "accuracy on unseen windows, %", legend="lower right")  # accuracy rises
    return figure


def learning(systems: dict[str, dict]) -> Figure:
    """Identity and Fréchet ratio against training time, a line a system; systems: the comparison's figures."""
    figure, axes = _figure(8.4, 3.0, 1, 2)
    titles = {"identity": "generated windows recognised, %", "fd_ratio": "Fréchet distance relative to real"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for (name, figures), colour in zip(systems.items(), _colours(len(systems)), strict=True):
            scale = 100 if key == "identity" else 1
            points = [(point["minutes"], scale * point[key]) for point in figures["curve"] if point[key] is not None]
            axis.plot(*np.array(points).reshape(-1, 2).T, "o-", color=colour, markersize=3, linewidth=1, label=name)
        _style(axis, "training time, min", title, legend=axis is axes[0])
    own = next(iter(systems.values()))["identity"]["classifier_accuracy"]["value"]
    axes[0].axhline(100 * own, color=INK, linewidth=0.7, linestyle=":")
    return figure


def gains(systems: dict[str, dict]) -> Figure:
    """The gain, in points, against generated windows a user; systems: the comparison's figures."""
    figure, (axis,) = _figure(6.4, 3.0)
    _zero(axis)
    every: set[int] = set()
    for place, ((name, figures), colour) in enumerate(zip(systems.items(), _colours(len(systems)), strict=True)):
        rows = figures["augmentation"]["gain_by_windows"]
        counts = np.array([row["windows_per_user"] for row in rows])
        every |= {round(count) for count in counts}
        _line(axis, counts * 1.04 ** (place - len(systems) / 2), rows, colour, name)
    _counts(axis, sorted(every))
    _style(axis, "generated windows a user", "gain, points", legend=True)
    return figure
