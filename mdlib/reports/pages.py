"""Pages by the jinja2 templates in `templates/`, and how figures of a report are written on them. Pages open offline:
style and charts are part of the file."""

import base64
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mdlib.reports.charts import SECTIONS, describe
from mdlib.utils import whole_file

COLUMNS = {  # what stands next to a figure, and the column's heading
    "real": "Real windows",
    "train": "Training windows",
    "common": "Real, common conditions",
    "ratio": "Ratio to real",
    "correlation": "Correlation over users (real)",
    "n": "n",
}


def number(value: float | str | list | None, unit: str = "") -> str:
    """A value without its unit: fractions as percent or signed points, parameters as millions."""
    if value is None or isinstance(value, str):
        return value or "–"
    if isinstance(value, list):
        return ", ".join(number(one, unit) for one in value)
    if unit in ("percent", "points"):
        return f"{100 * value:{'+' if unit == 'points' else ''}.1f}"
    if unit == "million":
        return f"{value / 1e6:.3g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def written(figure: dict | float | str | list | None, unit: str = "", reference: bool = False) -> str:
    """A figure of report.json, or a bare value, with unit and 95 % interval: `+4.4 points [+1.0, +7.8]`; with
    `reference` followed by that of real windows, or by the ratio to it."""
    figure = figure if isinstance(figure, dict) else {"value": figure}
    if figure["value"] is None:
        return "–"
    unit = figure.get("unit", unit)
    text = f"{number(figure['value'], unit)} {'%' if unit == 'percent' else unit} {interval(figure, unit)}"
    if reference and figure.get("ratio") is not None:
        text += f" ({number(figure['ratio'])}× real)"
    elif reference and "real" in figure:
        text += f" (real {number(figure['real'], unit)})"
    return " ".join(text.split())


def interval(figure: dict, unit: str) -> str:
    return f"[{number(figure['ci95'], unit)}]" if figure.get("ci95") else ""


def table(section: str, figures: dict) -> list[dict]:
    """A row for each measured figure of a report's section, in the page's order: `describe`, value and COLUMNS."""
    rows = []
    for name, figure in figures.items():
        entry = figure if isinstance(figure, dict) else {"value": figure}
        if isinstance(figure, list) or entry["value"] is None:
            continue
        about = describe(section, name)
        unit = entry.get("unit", about["unit"])
        real = {"value": entry.get("real", entry.get("real_vs_real")), "ci95": entry.get("real_ci95")}
        row = {"value": written(figure, unit), "real": written(real, unit), "train": written(entry.get("train"), unit)}
        row["common"] = written(entry.get("common"), unit)
        row |= {"ratio": written(entry.get("ratio")), "n": written(entry.get("n"))}
        own, of_real = (number(entry.get(f"user_correlation{suffix}")) for suffix in ("", "_real"))
        row["correlation"] = "–" if own == "–" else f"{own} ({of_real})"
        if between := entry.get("between"):
            about["help"] += f" Measured from {number(between[0])} to {number(between[1])}."
        rows.append(about | row)
    return sorted(rows, key=lambda row: row["place"])


def not_measured(report: dict) -> list[tuple[str, str, str]]:
    """Section, label and reason of every figure of a report that is null, in the page's order."""
    found = []
    for key, section in SECTIONS.items():
        for name, figure in report.get(key, {}).items():
            if figure is None:
                figure = {"value": None, "reason": "cannot be computed from these windows"}
            if isinstance(figure, dict) and figure["value"] is None:
                found.append((section["title"], describe(key, name)["label"], figure["reason"]))
    return found


def compared(section: str, names: list[str], reports: list[dict]) -> list[dict]:
    """A row for each of some figures of a section: `describe`, and cells with the figure in each report."""
    rows = []
    for name in names:
        about = describe(section, name)
        cells = [written(report[section].get(name), about["unit"], reference=True) for report in reports]
        if set(cells) != {"–"}:
            rows.append(about | {"cells": cells})
    return rows


def write_page(result: dict, out: str | Path, name: str, shown: dict, template: str = "", **content) -> None:
    """Write NAME.json, which holds `result`, and NAME.html by the `template` (default: of that name), which shows
    `result`, the charts `shown` by key and `content`, into `out`."""
    out = Path(out)
    with whole_file(out / f"{name}.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options = dict(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates = Environment(loader=PackageLoader("mdlib.reports"), **options)
    templates.globals |= dict(describe=describe, written=written, interval=interval, table=table, compared=compared)
    pictures = {key: base64.b64encode(figure._repr_png_()).decode() for key, figure in shown.items()}
    page = templates.get_template(f"{template or name}.html").render(
        result=result, charts=pictures, name=name, columns=COLUMNS, sections=SECTIONS, **content
    )
    with whole_file(out / f"{name}.html") as path:
        path.write_text(page.replace(" %", "&nbsp;%"), encoding="utf-8")
