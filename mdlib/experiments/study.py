"""How few real windows are enough? A run for each number of training windows a user, and what generated ones add."""

import html
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from mdlib import __version__
from mdlib.data.splits import PARTS, make_split, read_split, write_split
from mdlib.data.splits import folds as number_of_folds
from mdlib.data.windows import DataError, find_windows
from mdlib.evaluation.outcomes import Outcomes, compared, joined
from mdlib.evaluation.protocol import verdict
from mdlib.experiments.run import check_parameters, check_starts, execute
from mdlib.experiments.terms import claim
from mdlib.reports import plots
from mdlib.reports.report import embedded, page, table
from mdlib.systems.registry import get_preset
from mdlib.utils import whole_file

FOLDS = number_of_folds()
NOT_HERE = ("split", "windows_per_user", "classifiers")
SECTIONS = ("augmentation", "identity", "fidelity", "memorisation", "verdict")
ARMS = ("real_only", "real_plus_generated", "generated_only", "real_unaugmented", "real_x2")


def study(
    data: str | Path,
    out: str | Path,
    system: str = "vae-diffusion",
    preset: str = "demo",
    counts: tuple[int, ...] = (5, 10, 20, 50),
    folds: int = 1,
    parameters: dict | None = None,
) -> dict:
    """Train, generate and judge once for each number of training windows; write study.json and study.html after each.

    The generator is trained anew on exactly those windows, validation and test windows are the same for all. With
    several folds all of it happens once a fold, each with other windows for the test (`make_split`); accuracies and
    gains are then those of all folds' test windows together, other figures the folds' mean. A second call goes on where
    the first one stopped; other numbers and further folds may join later.

    Args:
        data: folder of ID_k/ folders.
        out: folder of the study; a run folder for each number in it.
        counts: training windows a user.
        folds: how many of the 4 folds of cross-validation; the first is the split that every run makes.
        parameters: of any notebook, the same for every number.

    Returns:
        what study.json holds.

    Raises:
        DataError: a user has too few windows for one of the numbers, a parameter that the study sets itself, `out`
            holds a study of another kind, or weights to start from have seen a fold's test windows.
    """
    out, given = Path(out), parameters or {}
    for key in given.keys() & set(NOT_HERE):
        raise DataError(f"{key} is no parameter of a study: it sets it itself")
    check_parameters(system, given)
    if not counts or any(not isinstance(count, int) or count < 1 for count in counts):
        raise DataError(f"counts must be whole numbers of 1 or more, got {list(counts)}")
    if not isinstance(folds, int) or not 1 <= folds <= FOLDS:
        raise DataError(f"folds must be a whole number from 1 to {FOLDS}, got {folds}")
    if folds > 1 and given.get("rival"):
        raise DataError("rival is of one split, and folds have several: leave one of them out")
    files = find_windows(data)
    splits = {
        (k, fold): make_split(files, windows_per_user=k, fold=fold)
        for fold in range(folds)
        for k in sorted(set(counts))
    }
    for split in splits.values():
        check_starts({**given, "data": str(data)}, split)
    get_preset(system, preset)
    terms = {"data": str(Path(data).resolve()), "system": system, "preset": preset}
    terms["parameters"] = given
    claim(out, terms, "a study")
    _check_splits(out, splits)
    for (k, fold), split in splits.items():
        print(f"{k} training windows a user" + (f", fold {fold + 1} of {folds}" if folds > 1 else ""), flush=True)
        name = _name(k, fold)
        wanted = {**given, "split": _split_of(out, name, split), "classifiers": str((out / "judges").resolve())}
        run = out / f"windows-{name}"
        anew = "06" if folds > 1 and _judged_without_outcomes(run) else ""
        execute(str(run), wanted, anew, data=str(data), system=system, preset=preset)
        result = _result(out, terms)
        _write(result, out)
    return result


def _name(count: int, fold: int) -> str:
    """What tells a run and its split from the others' in the study's folder."""
    return f"{count}-fold-{fold}" if fold else str(count)


def _judged_without_outcomes(run: Path) -> bool:
    """Whether a run was judged by a version of mdlib whose reports cannot be read together."""
    report = run / "report.json"
    return report.exists() and "users" not in json.loads(report.read_text()).get("outcomes", {})


def _runs(out: Path, what: str) -> list[tuple[int, int, Path]]:
    """Count, fold and the file `what` of every run of the study that has it."""
    found = [(re.fullmatch(r"windows-(\d+)(?:-fold-(\d+))?", path.parent.name), path) for path in out.glob(f"*/{what}")]
    return sorted((int(name[1]), int(name[2] or 0), path) for name, path in found if name)


def _check_splits(out: Path, splits: dict[tuple[int, int], dict]) -> None:
    """DataError where a run in `out` was made from other windows than are in the data now."""
    now = {fold: split for (_, fold), split in splits.items()}
    for count, fold, path in _runs(out, "split.json"):
        if fold not in now:
            continue
        found = read_split(path)
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
    for count, _, path in _runs(out, "report.json"):
        reports.setdefault(count, []).append(json.loads(path.read_text()))
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
    augmentation = {
        **compared(outcomes, per_user, "not every fold has spare real windows"),
        "folds": len(reports),
        "gain_per_fold": [one["gain"]["value"] for one in every],
    }
    means = {section: _means([report[section] for report in reports]) for section in SECTIONS[1:-1]}
    copied = means["memorisation"]["copies"]["value"]
    return {
        "folds": len(reports),
        "augmentation": augmentation,
        **means,
        "verdict": verdict(augmentation, copied=copied),
    }


def _means(sections: list[dict]) -> dict:
    """The folds' mean of every figure that all of them have, with what stands beside it (of real windows, say), but for
    intervals; n of each fold."""
    found = {}
    for name, one in sections[0].items():
        of_folds = [section.get(name) for section in sections]
        if not all(isinstance(figure, dict) and "value" in figure for figure in of_folds):
            continue
        unknown = [figure for figure in of_folds if not isinstance(figure["value"], int | float)]
        if unknown:
            found[name] = unknown[0]
            continue
        numbers = [key for key, value in one.items() if isinstance(value, int | float) and key != "n"]
        shared = [key for key in numbers if all(isinstance(figure.get(key), int | float) for figure in of_folds)]
        means = {key: sum(figure[key] for figure in of_folds) / len(of_folds) for key in shared}
        found[name] = means | {"n_per_fold": [figure.get("n") for figure in of_folds]}
    return found


def _write(result: dict, out: Path) -> None:
    with whole_file(out / "study.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with whole_file(out / "study.html") as path:
        path.write_text(_page(result), encoding="utf-8")


def _page(result: dict) -> str:
    rows, terms = result["rows"], result["terms"]
    parts = [
        "<h1>mdlib: how few real windows are enough?</h1>",
        f"<p class=verdict>{'<br>'.join(html.escape(row['verdict']['sentence']) for row in rows)}</p>",
        table([[key, str(value)] for key, value in terms.items()]),
        "<p class=note>For each number the generator was trained anew on exactly those windows; validation "
        "and test windows are the same for all numbers of a fold. real x2: twice as many real windows, the added ones "
        "evenly spaced in any case, with the same classical augmentation. Folds: each has its own quarter of every "
        "recording for the test and its own generators; accuracies and gains are of all folds' test windows together, "
        "the other figures are the folds' mean. Intervals redraw test windows and the classifiers' seeds, not "
        "generators: how much another one may change is seen from fold to fold. The reports of the runs define the "
        "rest.</p>",
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
        told = [", ".join(f"{100 * gain:+.1f}" for gain in arm.get("gain_per_fold", ())) or "–" for arm in arms]
        lines.append(["gain fold by fold, points", *told])
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
