"""How few real windows are enough? A run for each number of training windows per user, and the gain of each."""

import re
from pathlib import Path

import pandas as pd

from mdlib.data.files import find_windows
from mdlib.data.splits import PARTS, make_split, read_split, write_split
from mdlib.data.splits import folds as number_of_folds
from mdlib.evaluation.augmentation_study import Outcomes, compared, joined
from mdlib.evaluation.protocol import verdict
from mdlib.experiments.compare import check_series, claim_folder, read_report, saved_settings, shared_classifiers, stamp
from mdlib.experiments.execute import execute, locked
from mdlib.experiments.run import check_starts, resolve_preset
from mdlib.experiments.settings import order_of, read_record
from mdlib.reports.report import write_study
from mdlib.utils import DataError

FOLDS = number_of_folds()
EXCLUDED = dict.fromkeys(("split", "windows_per_user", "unrecorded", "classifiers"), "the study makes the splits")
SECTIONS = ("augmentation", "identity", "fidelity", "memorisation", "verdict")


def study(
    data: str | Path,
    out: str | Path,
    system: str = "vae-diffusion",
    preset: str = "auto",
    counts: tuple[int, ...] = (5, 10, 20, 50),
    folds: int = 1,
    parameters: dict | None = None,
) -> dict:
    """Train, generate and evaluate for each number of training windows; write study.json and study.html after each.

    The generator is trained on exactly those windows, evenly spaced; validation and test windows are the same for all
    numbers. Several folds repeat this with other test windows (`make_split`); accuracies and gains are then over the
    test windows of all folds, other metrics are means over folds. A second call continues where the first one stopped
    and may add numbers and folds.

    Args:
        data: folder of ID_k/ folders.
        out: folder of the study; a run folder for each number in it.
        counts: training windows per user.
        folds: how many of the 4 folds of cross-validation; the first is the split of an ordinary run.
        parameters: of any notebook, the same for every number.

    Returns:
        The content of study.json.
    """
    out, given = Path(out), parameters or {}
    preset = resolve_preset(preset, saved_settings(out))
    check_series("a study", [system], preset, given, EXCLUDED)
    if not counts or any(not isinstance(count, int) or count < 1 for count in counts):
        raise DataError(f"counts must be whole numbers of 1 or more, got {list(counts)}")
    if not isinstance(folds, int) or not 1 <= folds <= FOLDS:
        raise DataError(f"folds must be a whole number from 1 to {FOLDS}, got {folds}")
    files, counts = find_windows(data, order=order_of(given.get("reading", {}))), sorted(set(counts))
    splits = {(k, fold): make_split(files, windows_per_user=k, fold=fold) for fold in range(folds) for k in counts}
    for split in splits.values():
        check_starts({**given, "data": str(data)}, split)
    settings = claim_folder(out, "a study", data=data, system=system, preset=preset, parameters=given)
    for count, fold, path in _runs(out, "split.json"):
        found, now = read_split(path), make_split(files, windows_per_user=count, fold=fold)
        if any(found[part] != now[part] for part in PARTS):
            raise DataError(f"{path.parent} was trained on other windows than the data holds now: choose another --out")
    with locked(out):
        for (k, fold), split in splits.items():
            print(f"{k} training windows per user, fold {fold + 1} of {folds}", flush=True)
            run = out / (f"windows-{k}-fold-{fold}" if fold else f"windows-{k}")
            # The run knows its split by that name, wherever the study lies now.
            file = read_record(run)["settings"].get("split")
            if not file:
                file = str(out / f"{run.name.replace('windows', 'split')}.json")
                write_split(split, file)
            wanted = {**given, "split": file, **shared_classifiers(run)}
            execute(run, wanted, data=str(data), system=system, preset=preset)
            result = {**stamp(settings), "rows": _rows(out)}
            write_study(result, out)
    return result


def _runs(out: Path, what: str) -> list[tuple[int, int, Path]]:
    """Count, fold and the file `what` of every run of the study that has it."""
    found = [(re.fullmatch(r"windows-(\d+)(?:-fold-(\d+))?", path.parent.name), path) for path in out.glob(f"*/{what}")]
    return sorted((int(name[1]), int(name[2] or 0), path) for name, path in found if name)


def _rows(out: Path) -> list[dict]:
    """What was measured in `out` so far, by rising number of windows."""
    reports: dict[int, list[dict]] = {}
    for count, _, path in _runs(out, "report.json"):
        reports.setdefault(count, []).append(read_report(path.parent))
    return [{"windows_per_user": count, **_row(of_folds)} for count, of_folds in reports.items()]


def _row(reports: list[dict]) -> dict:
    """The sections of one fold's report, or of several together: accuracies and gains over the test windows of all
    folds, the folds' mean of other metrics."""
    if len(reports) == 1:
        return {"folds": 1, **{section: reports[0][section] for section in SECTIONS}}
    of_folds = [report["augmentation"] for report in reports]
    outcomes = joined([Outcomes.from_json(report["outcomes"]) for report in reports])
    per_user = sum(one["real_windows_per_user"] for one in of_folds) / len(of_folds)
    augmentation = {
        **compared(outcomes, per_user, "not every fold has spare real windows", of_folds[0]["num_users"]),
        "folds": len(reports),
        "gain_per_fold": [one["gain"]["value"] for one in of_folds],
    }
    row = {section: _means([report[section] for report in reports]) for section in SECTIONS[1:-1]}
    row["verdict"] = verdict(augmentation, copied=row["memorisation"]["copies"]["value"])
    return {"folds": len(reports), "augmentation": augmentation, **row}


def _means(sections: list[dict]) -> dict:
    """The folds' mean of every metric that all of them have, and of the numbers in it but for intervals; n of each
    fold. A metric that one fold did not measure stays not measured, with that fold's reason."""
    found = {}
    for name in sections[0]:
        metrics = [section.get(name) for section in sections]
        if not all(isinstance(metric, dict) and "value" in metric for metric in metrics):
            continue
        missing = [metric for metric in metrics if not isinstance(metric["value"], int | float)]
        means = pd.DataFrame(metrics).drop(columns="n", errors="ignore").select_dtypes("number").dropna(axis=1).mean()
        found[name] = missing[0] if missing else {**means, "n_per_fold": [metric.get("n") for metric in metrics]}
    return found
