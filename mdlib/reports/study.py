"""study.json and study.html: how few real windows are enough?"""

from pathlib import Path

from mdlib.reports import charts, pages


def write_study(result: dict, out: str | Path) -> None:
    """Write study.json and study.html into `out`. result: settings, and rows (windows_per_user, folds and sections of a
    report, verdict among them), with mdlib and created."""
    counts = {row["windows_per_user"]: row for row in result["rows"]}
    pages.write(result, Path(out), "study", {"study": charts.study(result["rows"])}, counts=counts)
