"""How few real windows are enough? A run for each number of training windows a user, and what generated ones add."""

import html
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from mdlib import __version__, plot
from mdlib.data import DataError, find_windows
from mdlib.evidence import figure
from mdlib.files import whole_file
from mdlib.outcomes import Outcomes, compared, joined
from mdlib.report import embedded, page, table
from mdlib.run import check_parameters, execute
from mdlib.split import PARTS, make_split, read_split, write_split
from mdlib.systems import get_preset
from mdlib.validate import verdict

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
    folds: int = 1,
    parameters: dict | None = None,
) -> dict:
    """Train, generate and judge once for each number of training windows; write study.json and study.html after each.

    The generator is trained anew on exactly those windows, validation and test windows are the same for all. With
    several folds all of it happens once a fold, each with other windows for the test (`make_split`), and the figures
    are those of all folds' test windows together. A second call goes on where the first one stopped; other numbers and
    further folds may join later.

    Args:
        data: folder of ID_k/ folders.
        out: folder of the study; a run folder for each number in it.
        counts: training windows a user.
        contiguous: windows in a row, as of one short recording, instead of evenly spaced ones.
        folds: how many folds of cross-validation, 1 to 4; one is the split that every run makes.
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
    if not isinstance(folds, int) or folds < 1:
        raise DataError(f"folds must be a whole number of 1 or more, got {folds}")
    files = find_windows(data)
    splits = {
        (k, fold): make_split(files, windows_per_user=k, contiguous=contiguous, fold=fold)
        for k in sorted(set(counts))
        for fold in range(folds)
    }
    get_preset(system, preset)
    terms = {"data": str(Path(data).resolve()), "system": system, "preset": preset, "contiguous": contiguous}
    terms["parameters"] = given
    _claim(out, terms)
    _check_splits(out, splits)
    for (k, fold), split in splits.items():
        print(f"{k} training windows a user" + (f", fold {fold + 1} of {folds}" if folds > 1 else ""), flush=True)
        name = _name(k, fold)
        wanted = {**given, "split": _split_of(out, name, split), "judges": str((out / "judges").resolve())}
        execute(str(out / f"windows-{name}"), wanted, data=str(data), system=system, preset=preset)
        result = _result(out, terms)
        _write(result, out)
    return result


def _name(count: int, fold: int) -> str:
    """What tells a run and its split from the others' in the study's folder."""
    return f"{count}-fold-{fold}" if fold else str(count)


def _count_and_fold(run: Path) -> tuple[int, int]:
    count, fold = re.fullmatch(r"windows-(\d+)(?:-fold-(\d+))?", run.name).groups()
    return int(count), int(fold or 0)


def _claim(out: Path, terms: dict) -> None:
    """Note the terms in `out`, or refuse other ones than those of the runs that are there."""
    note, terms = out / "terms.json", json.loads(json.dumps(terms))
    if note.exists() and json.loads(note.read_text()) != terms and any(out.glob("*/run.json")):
        raise DataError(f"{out} holds a study on other terms, see {note}: choose another --out or those terms")
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(note) as path:
        path.write_text(json.dumps(terms, indent=1) + "\n")


def _check_splits(out: Path, splits: dict[tuple[int, int], dict]) -> None:
    """DataError where a run in `out` was made from other windows than are in the data now."""
    now = {fold: split for (_, fold), split in splits.items()}
    for path in out.glob("windows-*/split.json"):
        found, (count, fold) = read_split(path), _count_and_fold(path.parent)
        if fold not in now:
            continue
        wanted = splits.get((count, fold), {**now[fold], "train": found["train"]})
        if any(found[part] != wanted[part] for part in PARTS):
            raise DataError(f"{path.parent} was made from other windows than are in the data now: choose another --out")


def _split_of(out: Path, name: str, split: dict) -> str:
    """The split file of a run: the one it knows, wherever the study lies now, or a new one."""
    record = out / f"windows-{name}" / "run.json"
    if record.exists():
        return json.loads(record.read_text())["settings"]["split"]
    path = out / f"split-{name}.json"
    write_split(split, path)
    return str(path)


def _result(out: Path, terms: dict) -> dict:
    """Everything that was measured in `out` so far, by rising numbers of windows."""
    reports: dict[int, list[dict]] = {}
    for path in sorted(out.glob("windows-*/report.json"), key=lambda path: _count_and_fold(path.parent)):
        reports.setdefault(_count_and_fold(path.parent)[0], []).append(json.loads(path.read_text()))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "mdlib": __version__,
        "created": created,
        "terms": {**terms, "data": Path(terms["data"]).name},
        "rows": [{"windows_per_user": count, **_row(of_folds)} for count, of_folds in reports.items()],
    }


def _row(reports: list[dict]) -> dict:
    """The sections of one fold's report, or of several as one: accuracies and gains over all folds' test windows, of
    the other figures the folds' mean."""
    if len(reports) == 1:
        return {"folds": 1, **{section: reports[0][section] for section in SECTIONS}}
    every = [report["augmentation"] for report in reports]
    outcomes = joined([Outcomes.from_json(report["outcomes"]) for report in reports])
    per_user = sum(one["real_windows_per_user"] for one in every) / len(every)
    augmentation = compared(outcomes, per_user, "not every fold has spare real windows") | {"folds": len(reports)}
    leak = max(report["split"]["test_share_overlapping"] for report in reports)
    means = {section: _means([report[section] for report in reports]) for section in SECTIONS[1:-1]}
    return {
        "folds": len(reports),
        "augmentation": augmentation,
        **means,
        "verdict": verdict(augmentation, leak),
    }


def _means(sections: list[dict]) -> dict:
    """The mean of every figure that all of the folds' sections have."""
    found = {}
    for name, one in sections[0].items():
        if not isinstance(one, dict) or "value" not in one:
            continue
        values = [section[name]["value"] for section in sections]
        known = all(isinstance(value, int | float) for value in values)
        found[name] = (
            figure(sum(values) / len(values), sum(section[name].get("n", 0) for section in sections)) if known else one
        )
    return found


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
        "any case, with the same classical augmentation. Folds: each with its own quarter of every recording for the "
        "test and its own generators; accuracies and gains are of all folds' test windows together, the other figures "
        "are the folds' mean. The reports of the runs define the rest.</p>",
        embedded("accuracy", plot.to_png(plot.study(rows))),
        table([["real windows a user", *(str(row["windows_per_user"]) for row in rows)], *_figures(rows)]),
        f"<p class=note>mdlib {result['mdlib']}, {result['created']}. All figures are in study.json.</p>",
    ]
    return page("mdlib study", parts)


def _figures(rows: list[dict]) -> list[list[str]]:
    arms = [row["augmentation"] for row in rows]
    lines = [["folds", *(str(row["folds"]) for row in rows)]]
    lines += [[f"{name.replace('_', ' ')}, %", *(_percent(arm[name]) for arm in arms)] for name in ARMS]
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
