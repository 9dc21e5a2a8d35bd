"""The result of `inspect` as a table and a contact sheet."""

from collections import Counter
from pathlib import Path

from mdlib.data.checks import Inspection, inspect
from mdlib.data.splits import split_summary
from mdlib.data.windows import WindowSet
from mdlib.reports import plots
from mdlib.utils import count

SHOWN = 4  # windows of a user on the sheet


def inspect_folder(root: str | Path, out: str | Path, **options) -> list[str]:
    """Check a data folder, print the table and draw the contact sheet into the file `out`; returns the problems.

    options: of `mdlib.data.checks.inspect`.
    """
    found = inspect(root, **options)
    if found.windows:
        sheet(found.windows).savefig(out)
        print(f"{out}\n")
    print(table(found))
    return found.problems


def table(found: Inspection) -> str:
    """Users, recordings and windows; how the images are read; files twice, near copies and overlap; what is wrong."""
    rows = [("user", "windows", "recordings", "conditions")]
    for user in sorted({file.user for file in found.scan.files}):
        mine = [file for file in found.scan.files if file.user == user]
        conditions = Counter(file.condition or "–" for file in mine)
        recordings = {(file.part, file.condition, file.recording) for file in mine}
        names = ", ".join(f"{name} {number}" if len(conditions) > 1 else name for name, number in conditions.items())
        rows.append((f"ID_{user}", str(len(mine)), str(len(recordings)), names))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"{found.root}: {found.scan.summary()}"]
    lines += [*_reading(found.windows), *_copies(found), *_overlap(found)]
    if found.split:
        how = "the folder's own parts" if any(file.part for file in found.scan.files) else "recording and time"
        lines.append(f"split by {how}: {split_summary(found.split)}")
    lines.append("")
    return "\n".join(lines + (found.problems or ["ready"]))


def _reading(windows: WindowSet | None) -> list[str]:
    if not windows:
        return []
    about = windows.about
    fit = f" (mean distance {about.fit:.1f} of 255 levels)" if about.fit else ""
    crop = f", cropped to {about.crop}" if about.crop else ""
    line = f"{about.size} pixels, {about.bits} bit, colour map {about.colormap}{fit}{crop}"
    return [line, *about.notes]


def _copies(found: Inspection) -> list[str]:
    lines, pairs = [], found.alike.copies if found.alike else []
    near = [pair for pair in pairs if pair not in found.identical]
    for name, some in (("identical files", found.identical), ("near copies", near)):
        example = f", such as {' and '.join(some[0])}" if some else ""
        lines.append(f"{name}: {count(len(some), 'pair') if some else 'none'}{example}")
    return lines


def _overlap(found: Inspection) -> list[str]:
    alike = found.alike
    if not alike or not alike.levels:
        return []
    if alike.levels.neighbours == 1:
        return ["overlap: windows show different steps"]
    if not alike.gap:
        return ["overlap: windows share steps, but not with the next one"]
    return [f"overlap: consecutive windows share steps; {alike.gap} numbers apart they share nothing (gap {alike.gap})"]


def sheet(windows: WindowSet) -> plots.Figure:
    """Contact sheet: one row per user, up to four windows of each, evenly spaced."""
    return plots.image_rows([("", plots.strip(windows, user, SHOWN, f"ID_{user}")) for user in windows.users])
