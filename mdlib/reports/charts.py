"""Names of metrics (`templates/metrics.toml`), and charts of a report, a comparison and a study: functions take metrics
of report.json and return a Figure."""

import re
import tomllib
from pathlib import Path

import numpy as np

from mdlib.reports.plots import ACCENT, DOTTED, INK, SECOND, THIRD, Figure, coloured, heatmap, new_figure, style

SECTIONS = tomllib.loads((Path(__file__).parent / "templates" / "metrics.toml").read_text(encoding="utf-8"))
CUES = {"": "", "higher": "↑ higher is better", "lower": "↓ lower is better"}
ARMS = ("real_only", "real_plus_generated", "real_x2")
HEADLINE = (*ARMS, *(f"pretrained_{name}" for name in ARMS))  # on top of a report, as far as they were measured
COLOURS = {"generated_only": SECOND} | {
    f"{kind}real_plus_generated": ACCENT for kind in ("", "pretrained_", "resnet18_")
}


def describe(section: str, name: str) -> dict:
    """A metric's label, unit, help, cue (what is good) and place on the page; a name that metrics.toml lacks is its own
    label."""
    about = {"label": name.replace("_", " "), "unit": "", "help": "", "cue": "", "place": 1000}
    for place, (pattern, entry) in enumerate(SECTIONS[section]["metrics"].items()):
        if found := re.fullmatch(pattern.replace("*", "(.+)"), name):
            label = entry["label"].format(*(part.replace("_", " ") for part in found.groups()))
            good = entry.get("good", "")
            return about | entry | {"label": label, "cue": CUES.get(good, f"≈ near {good}"), "place": place}
    return about


def line(axis, places, metrics: list[dict], colour, label: str) -> None:
    """A line through metrics of the report, in percent, with their intervals."""
    values, ends = (100 * np.array([one[what] for one in metrics]) for what in ("value", "ci95"))
    spread = [values - ends[:, 0], ends[:, 1] - values]
    axis.errorbar(places, values, spread, fmt="o-", color=colour, markersize=3, linewidth=1, label=label)


def by_counts(axis, lines: list[tuple], scale: str = "log") -> None:
    """Lines (name, rows, colour) through the metrics of rows against their windows_per_user, a little apart from each
    other, and an x axis that names these numbers."""
    for place, (name, rows, colour) in enumerate(lines):
        counts = np.array([row["windows_per_user"] for row in rows])
        line(axis, counts * 1.03 ** (place - (len(lines) - 1) / 2), rows, colour, name)
    counts = sorted({round(row["windows_per_user"]) for _, rows, _ in lines for row in rows})
    axis.set_xscale(scale)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()


def confusion(fraction: list[list[float]], users: tuple[int, ...] | list[int]) -> Figure:
    """Fraction (n, n) of windows of the row's user in which the classifiers named the column's."""
    size = (0.16 * len(users) + 2.4, 0.15 * len(users) + 2.0)
    options = dict(cmap="rocket_r", vmin=0, vmax=1, xticklabels=[f"ID_{user}" for user in users])
    return heatmap(np.asarray(fraction), users, size, "named by the classifiers", "generated for", **options)


def accuracies(augmentation: dict, names: tuple[str, ...] = ()) -> Figure:
    """Accuracy of classifiers that differ in their training windows (names; default: all): one dot per seed, a bar for
    the 95 % interval, a dotted line for chance."""
    every = [*HEADLINE, *(name for name in augmentation if name not in HEADLINE)]
    known = [name for name, entry in augmentation.items() if isinstance(entry, dict) and "per_seed" in entry]
    shown = [name for name in names or every if name in known]
    figure, (axis,) = new_figure(5.6, 0.4 * len(shown) + 0.9)
    for row, name in enumerate(shown):
        colour = COLOURS.get(name, INK)
        ends, seeds = (100 * np.array(augmentation[name][key]) for key in ("ci95", "per_seed"))
        axis.plot(ends, [row] * 2, color=colour, linewidth=9, alpha=0.25, solid_capstyle="butt")
        axis.plot(seeds, [row] * len(seeds), "o", color=colour, markersize=4)
    axis.axvline(100 / augmentation["num_users"], **DOTTED)
    axis.set_yticks(range(len(shown)), [describe("augmentation", name)["label"] for name in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    style(axis, "accuracy on test windows, % (dotted: chance)")
    return figure


def gain_curves(augmentation: dict) -> Figure:
    """The gain, in points, against generated windows per user."""
    figure, (axis,) = new_figure(4.0, 2.6)
    axis.axhline(0, **DOTTED)
    by_counts(axis, coloured({"all": augmentation["gain_by_windows"]}), "linear")
    style(axis, "generated windows per user", "gain, points")
    return figure


def roc(curves: list[dict]) -> Figure:
    """Verification: true against false acceptance of generated and of real probes, shaded their 95 % intervals."""
    figure, (axis,) = new_figure(3.6, 3.2)
    axis.plot([0, 1], [1, 0], **DOTTED)  # equal error rates lie here
    for curve, colour in zip(curves, (ACCENT, INK), strict=True):
        axis.plot(curve["false"], curve["true"], color=colour, label=curve["probes"])
        axis.fill_between(curve["false"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    style(axis, "impostors accepted", "genuine accepted", legend=True)
    return figure


def user_means(physics: dict) -> Figure:
    """One panel per metric, one dot per user: mean over generated windows against mean over unseen real ones."""
    shown = {name: one for name, one in physics.items() if "generated_means" in one}
    figure, axes = new_figure(2.2, 2.3, len(shown), 4)
    for axis, (name, one) in zip(axes, shown.items(), strict=True):
        pairs = zip(one["unseen_means"], one["generated_means"], strict=True)
        points = np.array([pair for pair in pairs if None not in pair])
        ends = [points.min(), points.max()]
        axis.plot(ends, ends, **DOTTED)
        axis.plot(*points.T, "o", color=ACCENT, markersize=3.5, alpha=0.7)
        style(axis, f"real, {one['unit']}".rstrip(", "), "generated", describe("physics", name)["label"])
    return figure


def user_spreads(physics: dict, users: list[int], names: tuple[str, ...]) -> Figure:
    """A panel a metric, for each of eight users a box over the unseen real windows and one over the generated ones:
    middle half, median, and from the 5th to the 95th percentile."""
    chosen = np.linspace(0, len(users) - 1, min(8, len(users))).round().astype(int)
    keys = ("whislo", "q1", "med", "q3", "whishi")
    figure, axes = new_figure(4.4, 2.2, len(names), 2)
    for axis, name in zip(axes, names, strict=True):
        for shift, part, colour in ((-0.18, "unseen", INK), (0.18, "generated", ACCENT)):
            spreads = {place + shift: physics[name][f"{part}_spread"][row] for place, row in enumerate(chosen)}
            boxes = {place: dict(zip(keys, spread, strict=True)) for place, spread in spreads.items() if spread}
            line = {"color": colour, "linewidth": 0.8}
            styles = dict(boxprops=line, whiskerprops=line, medianprops=line | {"linewidth": 1.6}, widths=0.28)
            hidden = dict(manage_ticks=False, showfliers=False, showcaps=False)
            axis.bxp(list(boxes.values()), list(boxes), **styles, **hidden)
        axis.set_xticks(range(len(chosen)), [f"ID_{users[row]}" for row in chosen])
        style(axis, title=f"{describe('physics', name)['label']}, {physics[name]['unit']}".rstrip(", "))
    figure.suptitle("dark: real, blue: generated", fontsize=8, color=INK)
    return figure


# ---- comparison and study


def study(rows: list[dict]) -> Figure:
    """Accuracy on test windows against real training windows per user; rows: of study.json. Hollow: 2× real data."""
    figure, (axis,) = new_figure(5.8, 3.4)
    known = [name for name in HEADLINE if not name.endswith("x2") and all(name in row["augmentation"] for row in rows)]
    lines = []
    for name, colour in zip(known, (INK, ACCENT, SECOND, THIRD), strict=False):
        metrics = [{**row["augmentation"][name], "windows_per_user": row["windows_per_user"]} for row in rows]
        lines.append((describe("augmentation", name)["label"], metrics, colour))
    by_counts(axis, lines)
    doubled = [(2 * row["windows_per_user"], row["augmentation"]["real_x2"]["value"]) for row in rows]
    doubled = np.array([pair for pair in doubled if pair[1] is not None]).reshape(-1, 2)
    axis.plot(doubled[:, 0], 100 * doubled[:, 1], "o", color=INK, markerfacecolor="none", label="2× real data")
    style(axis, "real windows per user", "accuracy on test windows, %", legend="lower right")  # accuracy rises
    return figure


def gains(systems: dict[str, dict]) -> Figure:
    """The gain, in points, against generated windows per user; systems: the comparison's metrics."""
    figure, (axis,) = new_figure(6.4, 3.0)
    axis.axhline(0, **DOTTED)
    by_counts(axis, coloured({name: one["augmentation"]["gain_by_windows"] for name, one in systems.items()}))
    style(axis, "generated windows per user", "gain, points", legend=True)
    return figure
