"""A study as study.json, and as a page that opens offline."""

import html
import json
from pathlib import Path

from mdlib.reports import plots
from mdlib.reports.report import embedded, page, table
from mdlib.utils import whole_file

ARMS = ("real_only", "real_plus_generated", "generated_only", "real_unaugmented", "real_x2")


def write_study(result: dict, out: Path) -> None:
    """Write study.json and study.html."""
    with whole_file(out / "study.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with whole_file(out / "study.html") as path:
        path.write_text(_page(result), encoding="utf-8")


def _page(result: dict) -> str:
    rows, settings = result["rows"], result["settings"]
    parts = [
        "<h1>mdlib: how few real windows are enough?</h1>",
        f"<p class=verdict>{'<br>'.join(html.escape(row['verdict']['sentence']) for row in rows)}</p>",
        table([[key, str(value)] for key, value in settings.items()]),
        "<p class=note>For each number the generator was trained from scratch on exactly those windows, evenly spaced; "
        "validation and test windows are the same for all numbers of a fold. real x2: 2× real data, the added windows "
        "evenly spaced too, with the same classical augmentation. Each fold tests on its own quarter of each recording "
        "and has its own generators; accuracies and gains are over all folds' test windows, the other figures are "
        "the folds' mean. Intervals resample test windows and the classifiers' seeds, not generators: how much these "
        "vary is seen from fold to fold. The reports of the runs define the rest.</p>",
        embedded("accuracy", plots.to_png(plots.study(rows))),
        table(_figures(rows), ["real windows a user", *(str(row["windows_per_user"]) for row in rows)]),
        f"<p class=note>mdlib {result['mdlib']}, {result['created']}. All figures are in study.json.</p>",
    ]
    return page("mdlib study", parts)


def _figures(rows: list[dict]) -> list[list[str]]:
    arms = [row["augmentation"] for row in rows]
    lines = [["folds", *(str(row["folds"]) for row in rows)]]
    lines += [[f"{name.replace('_', ' ')}, %", *(_percent(arm[name]) for arm in arms)] for name in ARMS]
    for name in ("gain", "gain_over_x2"):
        lines.append([f"{name.replace('_', ' ')}, points", *(_points(arm[name]) for arm in arms)])
    if any(row["folds"] > 1 for row in rows):
        gains = [", ".join(f"{100 * gain:+.1f}" for gain in arm.get("gain_per_fold", ())) or "–" for arm in arms]
        lines.append(["gain fold by fold, points", *gains])
    lines.append(["equivalent real windows", *(_number(arm["equivalent_real_windows"]) for arm in arms)])
    lines.append(["identity of generated windows, %", *(_percent(row["identity"]["accuracy"]) for row in rows)])
    lines.append(
        ["Fréchet distance over that of real windows", *(_number(row["fidelity"]["fd_ratio"]) for row in rows)]
    )
    lines.append(["copies, % (1 expected)", *(_percent(row["memorisation"]["copies"]) for row in rows)])
    return lines


def _percent(figure: dict) -> str:
    return "–" if figure["value"] is None else f"{100 * figure['value']:.1f}"


def _number(figure: dict) -> str:
    return "–" if figure["value"] is None else f"{figure['value']:.3g}"


def _points(figure: dict) -> str:
    if figure["value"] is None:
        return "–"
    low, high = figure["ci95"]
    return f"{100 * figure['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
