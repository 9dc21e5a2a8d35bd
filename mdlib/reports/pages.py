"""Pages by the jinja2 templates in `templates/`, and how metrics of a report are written on them. Pages open offline:
style and charts are part of the file."""

import base64
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mdlib.reports.charts import SECTIONS, describe
from mdlib.utils import atomic_file

COLUMNS = {  # what stands next to a metric, and the column's heading
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


def format_metric(metric: dict | float | str | list | None, unit: str = "", reference: bool = False) -> str:
    """A metric of report.json, or a bare value, with unit and 95 % interval: `+4.4 points [+1.0, +7.8]`; with
    `reference` followed by that of real windows, or by the ratio to it."""
    metric = metric if isinstance(metric, dict) else {"value": metric}
    if metric["value"] is None:
        return "–"
    unit = metric.get("unit", unit)
    text = f"{number(metric['value'], unit)} {'%' if unit == 'percent' else unit} {interval(metric, unit)}"
    if reference and metric.get("ratio") is not None:
        text += f" ({number(metric['ratio'])}× real)"
    elif reference and "real" in metric:
        text += f" (real {number(metric['real'], unit)})"
    return " ".join(text.split())


def interval(metric: dict, unit: str) -> str:
    return f"[{number(metric['ci95'], unit)}]" if metric.get("ci95") else ""


def table(section: str, metrics: dict) -> list[dict]:
    """A row for each measured metric of a report's section, in the page's order: `describe`, value and COLUMNS."""
    rows = []
    for name, metric in metrics.items():
        entry = metric if isinstance(metric, dict) else {"value": metric}
        if isinstance(metric, list) or entry["value"] is None:
            continue
        about = describe(section, name)
        unit = entry.get("unit", about["unit"])
        real = {"value": entry.get("real", entry.get("real_vs_real")), "ci95": entry.get("real_ci95")}
        row = {name: format_metric(entry.get(name), unit) for name in ("train", "common")}
        row |= {"value": format_metric(metric, unit), "real": format_metric(real, unit)}
        row |= {"ratio": format_metric(entry.get("ratio")), "n": format_metric(entry.get("n"))}
        own, of_real = (number(entry.get(f"user_correlation{suffix}")) for suffix in ("", "_real"))
        row["correlation"] = "–" if own == "–" else f"{own} ({of_real})"
        if between := entry.get("between"):
            about["help"] += f" Measured from {number(between[0])} to {number(between[1])}."
        rows.append(about | row)
    return sorted(rows, key=lambda row: row["place"])


def not_measured(report: dict) -> list[tuple[str, str, str]]:
    """Section, label and reason of every metric of a report that is null, in the page's order."""
    found = []
    for key, section in SECTIONS.items():
        for name, metric in report.get(key, {}).items():
            if metric is None:
                metric = {"value": None, "reason": "cannot be computed from these windows"}
            if isinstance(metric, dict) and metric["value"] is None:
                found.append((section["title"], describe(key, name)["label"], metric["reason"]))
    return found


def compared(section: str, names: list[str], reports: list[dict]) -> list[dict]:
    """A row for each of some metrics of a section: `describe`, and cells with the metric in each report."""
    rows = []
    for name in names:
        about = describe(section, name)
        cells = [format_metric(report[section].get(name), about["unit"], reference=True) for report in reports]
        if set(cells) != {"–"}:
            rows.append(about | {"cells": cells})
    return rows


def write_page(result: dict, out: str | Path, name: str, shown: dict, template: str = "", **content) -> None:
    """Write NAME.json, which holds `result`, and NAME.html by the `template` (default: of that name), which shows
    `result`, the charts `shown` by key and `content`, into `out`."""
    out = Path(out)
    with atomic_file(out / f"{name}.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options = dict(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates = Environment(loader=PackageLoader("mdlib.reports"), **options)
    templates.globals |= {one.__name__: one for one in (describe, format_metric, interval, table, compared)}
    images = {key: base64.b64encode(figure._repr_png_()).decode() for key, figure in shown.items()}
    page = templates.get_template(f"{template or name}.html").render(
        result=result, charts=images, name=name, columns=COLUMNS, sections=SECTIONS, **content
    )
    with atomic_file(out / f"{name}.html") as path:
        path.write_text(page.replace(" %", "&nbsp;%"), encoding="utf-8")
