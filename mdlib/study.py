"""How few real windows are enough? A run for each number of training windows a user, and what generated ones add."""

import html
import json
from datetime import UTC, datetime
from pathlib import Path

from mdlib import __version__, plot
from mdlib.data import DataError, find_windows
from mdlib.files import whole_file
from mdlib.report import embedded, page, table
from mdlib.run import check_parameters, execute
from mdlib.split import PARTS, make_split, read_split, write_split
from mdlib.systems import get_preset

NOT_HERE = ("split", "windows_per_user", "judges")
SECTIONS = ("augmentation", "identity", "fidelity", "memorisation", "verdict")
ARMS = ("real_only", "real_plus_generated", "generated_only", "real_unaugmented", "real_x2")


def study(
    data: str | Path,
    out: str | Path,
    system: str = "vae-diffusion",
    preset: str = "demo",
    counts: tuple[int, ...] = (5, 10, 20, 50),
    contiguous: bool = False,
    parameters: dict | None = None,
) -> dict:
    """Train, generate and judge once for each number of training windows; write study.json and study.html after each.

    The generator is trained anew on exactly those windows, validation and test windows are the same for all. A second
    call goes on where the first one stopped; other numbers may join later.

    Args:
        data: folder of ID_k/ folders.
        out: folder of the study; a run folder for each number in it.
        counts: training windows a user.
        contiguous: windows in a row, as of one short recording, instead of evenly spaced ones.
        parameters: of any notebook, the same for every number.

    Returns:
        what study.json holds.

    Raises:
        DataError: a user has too few windows for one of the numbers, a parameter that the study sets itself, or `out`
            holds a study of another kind.
    """
    out, given = Path(out), parameters or {}
    for key in given.keys() & set(NOT_HERE):
        raise DataError(f"{key} is no parameter of a study: it sets it itself")
    check_parameters(system, given)
    if not counts or any(not isinstance(count, int) or count < 1 for count in counts):
        raise DataError(f"counts must be whole numbers of 1 or more, got {list(counts)}")
    files = find_windows(data)
    splits = {k: make_split(files, windows_per_user=k, contiguous=contiguous) for k in sorted(set(counts))}
    get_preset(system, preset)
    terms = {"data": str(Path(data).resolve()), "system": system, "preset": preset, "contiguous": contiguous}
    terms["parameters"] = given
    _claim(out, terms)
    _check_splits(out, splits)
    for k, split in splits.items():
        print(f"{k} training windows a user", flush=True)
        wanted = {**given, "split": _split_of(out, k, split), "judges": str((out / "judges").resolve())}
        execute(str(_folder(out, k)), wanted, data=str(data), system=system, preset=preset)
        result = _result(out, terms)
        _write(result, out)
    return result


def _folder(out: Path, count: int) -> Path:
    return out / f"windows-{count}"


def _claim(out: Path, terms: dict) -> None:
    """Note the terms in `out`, or refuse other ones than those of the runs that are there."""
    note, terms = out / "terms.json", json.loads(json.dumps(terms))
    if note.exists() and json.loads(note.read_text()) != terms and any(out.glob("*/run.json")):
        raise DataError(f"{out} holds a study on other terms, see {note}: choose another --out or those terms")
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(note) as path:
        path.write_text(json.dumps(terms, indent=1) + "\n")


def _check_splits(out: Path, splits: dict[int, dict]) -> None:
    """DataError where a run in `out` was made from other windows than are in the data now."""
    now = next(iter(splits.values()))
    for path in out.glob("windows-*/split.json"):
        found, count = read_split(path), int(path.parent.name.removeprefix("windows-"))
        wanted = splits.get(count, {**now, "train": found["train"]})
        if any(found[part] != wanted[part] for part in PARTS):
            raise DataError(f"{path.parent} was made from other windows than are in the data now: choose another --out")


def _split_of(out: Path, count: int, split: dict) -> str:
    """The split file of a run: the one it knows, wherever the study lies now, or a new one."""
    record = _folder(out, count) / "run.json"
    if record.exists():
        return json.loads(record.read_text())["settings"]["split"]
    path = out / f"split-{count}.json"
    write_split(split, path)
    return str(path)


def _result(out: Path, terms: dict) -> dict:
    """Everything that was measured in `out` so far, by rising numbers of windows."""
    reports = {int(path.parent.name.removeprefix("windows-")): path for path in out.glob("windows-*/report.json")}
    rows = []
    for count, path in sorted(reports.items()):
        report = json.loads(path.read_text())
        rows.append({"windows_per_user": count, **{section: report[section] for section in SECTIONS}})
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "mdlib": __version__,
        "created": created,
        "terms": {**terms, "data": Path(terms["data"]).name},
        "rows": rows,
    }


def _write(result: dict, out: Path) -> None:
    with whole_file(out / "study.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with whole_file(out / "study.html") as path:
        path.write_text(_page(result), encoding="utf-8")


def _page(result: dict) -> str:
    rows, terms = result["rows"], result["terms"]
    how = "in a row" if terms["contiguous"] else "evenly spaced"
    parts = [
        "<h1>mdlib: how few real windows are enough?</h1>",
        f"<p class=verdict>{'<br>'.join(html.escape(row['verdict']['sentence']) for row in rows)}</p>",
        table([["", ""], *([key, str(value)] for key, value in terms.items())]),
        f"<p class=note>For each number the generator was trained anew on exactly those windows ({how}); validation "
        "and test windows are the same for all. real x2: twice as many real windows, the added ones evenly spaced in "
        "any case, with the same classical augmentation. The reports of the runs define the rest.</p>",
        embedded("accuracy", plot.to_png(plot.study(rows))),
        table([["real windows a user", *(str(row["windows_per_user"]) for row in rows)], *_figures(rows)]),
        f"<p class=note>mdlib {result['mdlib']}, {result['created']}. All figures are in study.json.</p>",
    ]
    return page("mdlib study", parts)


def _figures(rows: list[dict]) -> list[list[str]]:
    arms = [row["augmentation"] for row in rows]
    lines = [[f"{name.replace('_', ' ')}, %", *(_percent(arm[name]) for arm in arms)] for name in ARMS]
    for name in ("gain", "gain_over_x2"):
        lines.append([f"{name.replace('_', ' ')}, points", *(_points(arm[name]) for arm in arms)])
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
