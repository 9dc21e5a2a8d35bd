"""Every figure. The only file that imports matplotlib; functions take tensors or plain data and return a Figure."""

from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import seaborn
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mdlib.data.colormaps import colorize
from mdlib.data.windows import WindowSet, to_uint8

INK, ACCENT, SECOND, THIRD = "#1f2933", "#2463a4", "#c4572e", "#5f8f4e"


class Picture(Figure):
    """A figure that a notebook shows: outside pyplot's list it would be known there by its text alone."""

    def _repr_png_(self) -> bytes:
        return to_png(self)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """A figure outside pyplot's global list, so that notebooks show it once and batch runs do not keep it."""
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8)
    return figure, axes


def picture(image: torch.Tensor, colormap: str) -> np.ndarray:
    """One image (C, H, W), uint8 or float in [−1, 1], as RGB (H, W, 3)."""
    image = image if image.dtype == torch.uint8 else to_uint8(image)
    if len(image) == 3:
        return image.permute(1, 2, 0).numpy()
    return colorize(image[0], "jet" if colormap == "none" else colormap)


def windows(
    images: torch.Tensor | list[torch.Tensor], titles: list[str] | None = None, colormap: str = "jet", columns: int = 8
) -> Figure:
    """A grid of windows (N, C, H, W): Doppler up, time to the right."""
    rows = -(-len(images) // columns)
    figure, axes = _figure(1.35 * min(columns, len(images)) + 0.2, 1.5 * rows + 0.2, rows, min(columns, len(images)))
    for number, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if number < len(images):
            axis.imshow(picture(images[number], colormap), interpolation="nearest")
            if titles:
                axis.set_title(titles[number], fontsize=8, color=INK)
    return figure


def sheet(folder: str | Path, rows: list[dict]) -> Figure:
    """The first ten windows on disk of each user, a row a user. rows: of a manifest, `path` (within `folder`) and
    `user` in each."""
    columns = min(10, max(Counter(row["user"] for row in rows).values()))
    blank = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    images, titles = [], []
    for user in dict.fromkeys(row["user"] for row in rows):
        paths = [Path(folder) / row["path"] for row in rows if row["user"] == user]
        mine = [_read(path) for path in paths[:columns]]
        images += mine + [blank] * (columns - len(mine))
        titles += [f"ID_{user}"] + [""] * (columns - 1)
    return windows(images, titles, "none", columns)


def _read(path: Path) -> torch.Tensor:
    """An image file as uint8 (3, H, W)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)


def real_beside_generated(
    real: WindowSet, generated: WindowSet, users: list[int] | None = None, each: int = 4
) -> Figure:
    """Contact sheet: a row a user, real windows on the left, generated ones on the right."""
    users = list(real.users[:8]) if users is None else users
    figure, axes = _figure(1.2 * (2 * each + 0.4), 1.25 * len(users) + 0.4, len(users), 2 * each)
    for row, user in zip(axes, users, strict=True):
        for side, (part, name) in enumerate(((real, "real"), (generated, "generated"))):
            mine = part.of_user(user)
            chosen = np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(int)
            for column in range(each):
                axis = row[side * each + column]
                axis.set_axis_off()
                if column < len(chosen):
                    axis.imshow(picture(mine.images[chosen[column]], real.colormap), interpolation="nearest")
            row[side * each].set_title(f"ID_{user} {name}", fontsize=8, color=INK, loc="left")
    return figure


def reconstructions(real: torch.Tensor, decoded: torch.Tensor, colormap: str = "jet") -> Figure:
    """Windows (N, C, H, W) above their codec round trips, and the absolute difference below."""
    n = len(real)
    figure, axes = _figure(1.3 * n + 0.6, 4.2, 3, n)
    difference = (decoded - real).abs()
    for column in range(n):
        axes[0, column].imshow(picture(real[column], colormap), interpolation="nearest")
        axes[1, column].imshow(picture(decoded[column], colormap), interpolation="nearest")
        axes[2, column].imshow(
            difference[column].mean(0).numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest"
        )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("real", "round trip", "|difference|"), strict=True):
        axis.set_ylabel(name, fontsize=8, color=INK)
    return figure


def history(rows: list[dict], keys: list[tuple[str, ...]]) -> Figure:
    """Training curves over optimizer steps: one panel for each tuple of keys of the history's rows."""
    figure, axes = _figure(3.4 * len(keys), 2.5, 1, len(keys))
    for axis, names in zip(axes[0], keys, strict=True):
        for name, colour in zip(names, (ACCENT, SECOND, THIRD), strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = {"marker": "o", "markersize": 3} if len(points) < 20 else {}  # one point alone shows, too
            axis.plot(*zip(*points, strict=True), color=colour, label=name.replace("_", " "), **style)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    return figure


def code_usage(counts: np.ndarray | list[int]) -> Figure:
    """How often each code is used: by index, and sorted on a log axis; red marks codes nobody used."""
    counts = np.asarray(counts)
    used = counts > 0
    figure, axes = _figure(7.5, 2.6, 1, 2)
    left, right = axes[0]
    left.bar(np.arange(len(counts)), counts, width=1.0, color=ACCENT)
    left.plot(np.flatnonzero(~used), np.zeros((~used).sum()), "|", color=SECOND, markersize=8)
    left.set_xlabel("code", fontsize=8)
    left.set_ylabel("times used", fontsize=8)
    right.semilogy(np.sort(counts[used])[::-1], color=ACCENT)
    right.axhline(counts.sum() / len(counts), color=INK, linewidth=0.7, linestyle=":")
    right.set_xlabel(f"rank ({used.sum()} of {len(counts)} codes used)", fontsize=8)
    right.set_ylabel("times used (dotted: uniform)", fontsize=8)
    return figure


def tile(patch: torch.Tensor, colormap: str, height: int = 36) -> bytes:
    """A code's patch (C, r, c) as a PNG `height` pixels high, every pixel of it a block."""
    small = Image.fromarray(picture(patch, colormap))
    buffer = BytesIO()
    scale = height / small.height
    small.resize((round(small.width * scale), height), Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def code_tiles(book, codes: list[int], columns: int = 16) -> Figure:
    """What codes decode to, each below its index and how often it is used. book: a `Codebook`."""
    rows = -(-len(codes) // columns)
    figure, axes = _figure(0.62 * columns, 0.85 * rows, rows, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, code in zip(axes.flat, codes, strict=False):
        axis.imshow(picture(book.decoded[code], book.windows.colormap), interpolation="nearest")
        axis.set_title(f"{code}\n×{book.times[code]}", fontsize=7, color=INK)
    return figure


def code_card(book, code: int) -> Figure:
    """One code: what it decodes to and stands for, its cells in the grid, who uses it, and windows with it marked.

    book: of `mdlib.evaluation.codebook.survey`.
    """
    windows, times = book.windows, int(book.times[code])
    figure = Picture(figsize=(9.0, 3.7), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.15))
    panels = [("decodes to", book.decoded[code])] + ([("stands for, on average", book.real[code])] if times else [])
    for column, (title, patch) in enumerate(panels):
        axis = _bare(figure.add_subplot(grid[0, column]), title)
        axis.imshow(picture(patch, windows.colormap), interpolation="nearest")
    axis = _bare(figure.add_subplot(grid[0, 2]), "occurs in these cells")
    axis.imshow(book.places(code).numpy(), cmap="magma", aspect="auto", vmin=0, interpolation="nearest")
    _per_user(figure.add_subplot(grid[0, 3:]), book.rates[:, code].numpy(), windows.users)
    for column, row in enumerate(book.windows_with(code)):
        axis = _bare(figure.add_subplot(grid[1, column]), f"ID_{windows.files[row].user}")
        axis.imshow(picture(windows.images[row], windows.colormap), interpolation="nearest")
        _mark(axis, book.tokens[row] == code, windows.images.shape[-2:])
    told = f"used {times} times" if times else "not used"
    figure.suptitle(f"code {code}: {told} in {len(windows)} windows", fontsize=9, color=INK)
    return figure


def _bare(axis, title: str):
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=8, color=INK)
    return axis


def _per_user(axis, times: np.ndarray, users: tuple[int, ...]) -> None:
    axis.bar(np.arange(len(users)), np.nan_to_num(times), color=ACCENT)
    axis.axhline(np.nanmean(times), color=INK, linewidth=0.7, linestyle=":")
    axis.set_xticks(np.arange(len(users)), [str(user) for user in users])
    axis.tick_params(colors=INK, labelsize=6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("times in a window of user … (dotted: mean)", fontsize=8, color=INK)


def _mark(axis, cells: torch.Tensor, size: tuple[int, int]) -> None:
    """A white frame around each chosen cell (h, w) of an image of size (H, W)."""
    high, wide = (whole / part for whole, part in zip(size, cells.shape, strict=True))
    for row, column in cells.nonzero().tolist():
        corner = (column * wide - 0.5, row * high - 0.5)
        axis.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor="white", linewidth=1.2))


def user_view(real: WindowSet, generated: WindowSet, nearest: WindowSet | None = None, ratios=()) -> Figure:
    """Windows of one user: real ones, generated ones, and below each of those the training window nearest to it.

    ratios: distance to `nearest`, for each generated window, over that of real unseen windows: 1 where a generated
    window is as new as a real one, well below where it is copied.
    """
    rows = [("real", real, [""] * len(real))]
    rows.append(("generated", generated, [str(number) for number in range(1, len(generated) + 1)]))
    if nearest is not None:
        rows.append(("nearest training", nearest, [f"distance {ratio:.2f}" for ratio in ratios]))
    columns = max(len(part) for _, part, _ in rows)
    figure, axes = _figure(1.5 * columns + 0.4, 1.6 * len(rows) + 0.2, len(rows), columns)
    figure.suptitle(f"ID_{generated.files[0].user} {generated.files[0].condition}".strip(), fontsize=9, color=INK)
    for axis in axes.flat:
        _bare(axis, "")
    for line, (name, part, titles) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=8, color=INK)
        for axis, image, title in zip(line, part.images, titles, strict=False):
            axis.imshow(picture(image, part.colormap), interpolation="nearest")
            axis.set_title(title, fontsize=8, color=INK)
    return figure


def latent_statistics(latents: torch.Tensor) -> Figure:
    """Normalised latents (N, D, h, w): each channel's histogram on N(0, 1), and each channel's deviation beside 1."""
    channels = latents.detach().float().cpu().transpose(0, 1).flatten(1).numpy()
    figure, axes = _figure(7.5, 2.6, 1, 2)
    left, right = axes[0]
    edges = np.linspace(-5, 5, 61)
    for values in channels:
        left.hist(values.clip(-5, 5), edges, density=True, histtype="step", color=ACCENT, alpha=0.5, linewidth=0.8)
    left.plot(edges, np.exp(-(edges**2) / 2) / (2 * np.pi) ** 0.5, color=INK, linestyle=":")
    left.set_xlabel("normalised latent, a line a channel (dotted: N(0, 1))", fontsize=8)
    right.bar(np.arange(len(channels)), channels.std(1), color=ACCENT)
    right.axhline(1, color=INK, linewidth=0.7, linestyle=":")
    right.set_xlabel("channel", fontsize=8)
    right.set_ylabel("standard deviation", fontsize=8)
    return figure


def user_codes(counts: torch.Tensor, users: tuple[int, ...]) -> Figure:
    """Counts (num_users, num_codes) as each user's share of a code, over the mean user's: what is distinctive."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    ratio = (share / share.mean(0).clamp_min(1e-9)).clamp(0.25, 4).log2()
    order = counts.sum(0).argsort(descending=True)
    figure, axes = _figure(8, 0.14 * len(users) + 1.2)
    seaborn.heatmap(
        ratio[:, order].numpy(),
        ax=axes[0, 0],
        cmap="vlag",
        center=0,
        xticklabels=False,
        yticklabels=[f"ID_{user}" for user in users],
        cbar_kws={"label": "log2 of use over mean use"},
    )
    axes[0, 0].set_xlabel("codes, most used first", fontsize=8)
    axes[0, 0].tick_params(axis="y", labelsize=6)
    return figure


def confusion(share: list[list[float]], users: tuple[int, ...] | list[int]) -> Figure:
    """Share (n, n) of windows of the row's user that the judges gave to the column's."""
    names = [f"{user}" for user in users]
    figure, axes = _figure(0.16 * len(users) + 2.2, 0.15 * len(users) + 1.8)
    seaborn.heatmap(
        np.asarray(share),
        ax=axes[0, 0],
        cmap="rocket_r",
        vmin=0,
        vmax=1,
        xticklabels=names,
        yticklabels=names,
    )
    axes[0, 0].set_xlabel("named by the judges", fontsize=8)
    axes[0, 0].set_ylabel("generated for", fontsize=8)
    axes[0, 0].tick_params(labelsize=6)
    return figure


def arms(augmentation: dict) -> Figure:
    """Accuracy of the arms of the augmentation study, a dot a seed, the bar its 95 % interval."""
    colours = {"generated_only": SECOND, "real_plus_generated": ACCENT, "resnet18_real_plus_generated": ACCENT}
    order = ("generated_only", "real_unaugmented", "real_only", "real_plus_generated")
    more = [name for name in augmentation if name.startswith(("real_x", "resnet18_")) and name not in order]
    names = [*order, *(name for name in more if "per_seed" in augmentation[name])]
    figure, axes = _figure(5.2, 0.4 * len(names) + 0.9)
    axis = axes[0, 0]
    for row, name in enumerate(names):
        colour = colours.get(name, INK)
        arm = augmentation[name]
        axis.plot(
            [100 * edge for edge in arm["ci95"]],
            [row, row],
            color=colour,
            linewidth=5,
            alpha=0.25,
            solid_capstyle="butt",
        )
        axis.plot(
            [100 * value for value in arm["per_seed"]],
            [row] * len(arm["per_seed"]),
            "o",
            color=colour,
            markersize=4,
        )
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("accuracy on unseen windows, %", fontsize=8)
    return figure


def study(rows: list[dict]) -> Figure:
    """Accuracy on unseen windows against real training windows a user; rows: of study.json. Hollow: twice as many."""
    figure, axes = _figure(5.4, 3.2)
    axis = axes[0, 0]
    counts = np.array([row["windows_per_user"] for row in rows])
    for place, (name, colour) in enumerate(
        (("real_only", INK), ("real_plus_generated", ACCENT), ("generated_only", SECOND))
    ):
        found = [row["augmentation"][name] for row in rows]
        _percentages(axis, counts * 1.03 ** (place - 1), found, colour, name.replace("_", " "))
    doubled = [row for row in rows if row["augmentation"]["real_x2"]["value"] is not None]
    more = [100 * row["augmentation"]["real_x2"]["value"] for row in doubled]
    axis.plot([2 * row["windows_per_user"] for row in doubled], more, "o", color=INK, markerfacecolor="none")
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("real windows a user", fontsize=8)
    axis.set_ylabel("accuracy on unseen windows, %", fontsize=8)
    axis.legend(fontsize=7, frameon=False, loc="lower right")  # accuracy rises with windows
    return figure


def neighbourhoods(points: list[dict]) -> Figure:
    """The report's map of windows: a colour a user, filled where generated, hollow where real."""
    figure, axes = _figure(4.6, 3.6)
    axis = axes[0, 0]
    users = sorted({point["user"] for point in points})
    for user, colour in zip(users, _colours(len(users)), strict=True):
        for generated in (False, True):
            mine = [point for point in points if point["user"] == user and point["generated"] == generated]
            x, y = ([point[key] for point in mine] for key in ("x", "y"))
            face, label = (colour, f"ID_{user}") if generated else ("none", None)
            axis.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=4, label=label)
    axis.set(xticks=[], yticks=[])
    axis.set_title("filled: generated, hollow: real", fontsize=8, color=INK)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def gain_curves(augmentation: dict) -> Figure:
    """The gain, in points, against generated windows a user, and against the share of them that filters keep."""
    panels = [("windows_per_user", {"all": augmentation["gain_by_windows"]}, "generated windows a user")]
    filters = dict.fromkeys(row["by"] for row in augmentation["gain_by_selection"])
    for name in filters:
        filters[name] = [row for row in augmentation["gain_by_selection"] if row["by"] == name]
    if filters:
        panels.append(("kept", filters, "share that a filter keeps"))
    figure, axes = _figure(3.6 * len(panels), 2.6, 1, len(panels), sharey=True)
    for axis, (key, lines, title) in zip(axes[0], panels, strict=True):
        axis.axhline(0, color=INK, linewidth=0.7, linestyle=":")
        for (name, rows), colour in zip(lines.items(), _colours(len(lines)), strict=True):
            _percentages(axis, [row[key] for row in rows], rows, colour, name)
        axis.set_xlabel(title, fontsize=8)
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel("gain, points", fontsize=8)
    return figure


def roc(curves: list[dict]) -> Figure:
    """Verification: true against false acceptance of generated and of real probes, shaded their 95 % intervals; curves:
    of the report."""
    figure, axes = _figure(3.2, 3.0)
    axis = axes[0, 0]
    axis.plot([0, 1], [1, 0], color=INK, linewidth=0.7, linestyle=":")  # equal error rates lie here
    for curve, colour in zip(curves, (ACCENT, INK), strict=True):
        axis.plot(curve["false"], curve["true"], color=colour, label=curve["probes"])
        axis.fill_between(curve["false"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel("impostors accepted", fontsize=8)
    axis.set_ylabel("genuine accepted", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    return figure


def learning(systems: dict[str, dict]) -> Figure:
    """Identity and Fréchet ratio against training time, a line a system; systems: the comparison's figures."""
    figure, axes = _figure(8.4, 3.0, 1, 2)
    for axis, key, title in zip(
        axes[0], ("identity", "fd_ratio"), ("identity of generated windows", "Fréchet distance over real"), strict=True
    ):
        for (name, figures), colour in zip(systems.items(), _colours(len(systems)), strict=True):
            points = [point for point in figures["curve"] if point[key] is not None]
            minutes, values = ([point[name] for point in points] for name in ("minutes", key))
            axis.plot(minutes, values, "o-", color=colour, markersize=3, linewidth=1, label=name)
        axis.set_xlabel("training time, min", fontsize=8)
        axis.set_ylabel(title, fontsize=8)
    own = next(iter(systems.values()))["identity"]["classifier_accuracy"]["value"]
    axes[0, 0].axhline(own, color=INK, linewidth=0.7, linestyle=":")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def gains(systems: dict[str, dict]) -> Figure:
    """The gain, in points, against generated windows a user; systems: the comparison's figures."""
    figure, axes = _figure(6.4, 3.0)
    axis = axes[0, 0]
    axis.axhline(0, color=INK, linewidth=0.7, linestyle=":")
    for place, ((name, figures), colour) in enumerate(zip(systems.items(), _colours(len(systems)), strict=True)):
        rows = figures["augmentation"]["gain_by_windows"]
        counts = np.array([row["windows_per_user"] for row in rows]) * 1.04 ** (place - len(systems) / 2)
        _percentages(axis, counts, rows, colour, name)
    axis.set_xscale("log")
    ticks = sorted({round(row["windows_per_user"]) for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("generated windows a user", fontsize=8)
    axis.set_ylabel("gain, points", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    return figure


def side_by_side(sets: dict[str, WindowSet], users: int = 2, each: int = 4) -> Figure:
    """A row a set, `each` windows of the first `users` users in it."""
    figure, axes = _figure(1.2 * users * each + 1.4, 1.25 * len(sets) + 0.4, len(sets), users * each)
    for row, (name, part) in zip(axes, sets.items(), strict=True):
        for place, user in enumerate(part.users[:users]):
            mine = part.of_user(user)
            chosen = np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(int)
            for column in range(each):
                axis = row[place * each + column]
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if column < len(chosen):
                    axis.imshow(picture(mine.images[chosen[column]], part.colormap), interpolation="nearest")
            row[place * each].set_title(f"ID_{user}", fontsize=8, color=INK, loc="left")
        row[0].set_ylabel(name, fontsize=8, color=INK)
    return figure


def _percentages(axis, places, figures: list[dict], colour, label: str) -> None:
    """A line through figures of the report, in percent, with their intervals."""
    values, ends = (100 * np.array([one[what] for one in figures]) for what in ("value", "ci95"))
    spread = [values - ends[:, 0], ends[:, 1] - values]
    axis.errorbar(places, values, spread, fmt="o-", color=colour, markersize=3, linewidth=1, label=label)


def _colours(count: int) -> list:
    return seaborn.color_palette("colorblind", count)


def user_means(physics: dict) -> Figure:
    """A panel a metric, a dot a user: mean over generated windows against mean over unseen real ones, and equality."""
    panels = {name: one for name, one in physics.items() if "generated_means" in one}
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(2.2 * columns, 2.3 * rows, rows, columns)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, one) in zip(axes.flat, panels.items(), strict=False):
        pairs = zip(one["unseen_means"], one["generated_means"], strict=True)
        points = np.array([pair for pair in pairs if None not in pair])
        ends = [points.min(), points.max()]
        axis.plot(ends, ends, color=INK, linewidth=0.7, linestyle=":")
        axis.plot(*points.T, "o", color=ACCENT, markersize=3.5, alpha=0.7)
        axis.set_title(name.replace("_", " "), fontsize=8, color=INK)
        axis.set_xlabel(f"real {one['unit']}".strip(), fontsize=7)
        axis.set_ylabel("generated", fontsize=7)
        axis.tick_params(labelsize=6)
    return figure


def user_spreads(physics: dict, users: list[int], names: tuple[str, ...], most: int = 8) -> Figure:
    """A panel a metric, for each of some users a box over the unseen real windows and one over the generated ones:
    middle half, median, and from the 5th to the 95th percentile."""
    chosen = np.linspace(0, len(users) - 1, min(most, len(users))).round().astype(int)
    columns = min(2, len(names))
    figure, axes = _figure(4.4 * columns, 2.2 * -(-len(names) // columns), -(-len(names) // columns), columns)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for shift, part, colour in ((-0.18, "unseen", INK), (0.18, "generated", ACCENT)):
            found = [(place, physics[name][f"{part}_spread"][row]) for place, row in enumerate(chosen)]
            _boxes(axis, [(place + shift, spread) for place, spread in found if spread], colour)
        axis.set_xticks(range(len(chosen)), [f"ID_{users[row]}" for row in chosen], fontsize=7)
        axis.set_title(f"{name.replace('_', ' ')}, {physics[name]['unit']}".rstrip(", "), fontsize=8, color=INK)
        axis.tick_params(axis="y", labelsize=6)
    axes[0, 0].set_ylabel("black: real, blue: generated", fontsize=7)
    return figure


def _boxes(axis, spreads: list[tuple[float, list[float]]], colour) -> None:
    """Boxes at places from percentiles 5, 25, 50, 75 and 95."""
    keys = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [dict(zip(keys, spread, strict=True)) for _, spread in spreads]
    line = {"color": colour, "linewidth": 0.8}
    own = dict(boxprops=line, whiskerprops=line, medianprops=line | {"linewidth": 1.6})
    places = [place for place, _ in spreads]
    axis.bxp(boxes, places, widths=0.28, manage_ticks=False, showfliers=False, showcaps=False, **own)


def save(figure: Figure, path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=110)


def to_png(*figures: Figure) -> bytes:
    """Figures as PNG bytes, one below the other, for a page that opens offline."""
    pages = []
    for figure in figures:
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        pages.append(buffer)
    if len(pages) == 1:
        return pages[0].getvalue()
    pictures = [Image.open(page).convert("RGB") for page in pages]
    whole = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), "white")
    for place, one in enumerate(pictures):
        whole.paste(one, (0, sum(above.height for above in pictures[:place])))
    buffer = BytesIO()
    whole.save(buffer, format="PNG")
    return buffer.getvalue()
