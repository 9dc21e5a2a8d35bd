"""A series of runs in one folder, executed one after the other: the common part of a comparison and a study."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from mdlib import __version__
from mdlib.systems.machines import gpus, preset_for
from mdlib.utils import DataError, whole_file


def run_series(jobs: dict[str, Callable], settings: dict, collect: Callable, write: Callable) -> dict:
    """Call every job, and after each write what was measured so far; returns the last result.

    Args:
        jobs: title → function without arguments that executes one run, or skips what is done.
        settings: those of the series.
        collect: returns everything that was measured so far.
        write: writes a result, a dictionary with mdlib's version, the time, the settings and what `collect` returned.
    """
    result: dict = {}
    for title, job in jobs.items():
        print(title, flush=True)
        job()
        about = {"mdlib": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        result = {**about, "settings": {**settings, "data": Path(settings["data"]).name}, **collect()}
        write(result)
    return result


def shared_classifiers(run: Path) -> dict:
    """The parameter of notebook 06 by which the runs of a series share classifiers; {} where it is done already."""
    return {} if (run / "report.json").exists() else {"classifiers": str((run.parent / "classifiers").resolve())}


def saved_settings(out: Path) -> dict:
    """The settings of the runs in `out`; {} where there are none."""
    files = [out / "settings.json", out / "terms.json"]  # the second one: of mdlib 0.1
    found = next((path for path in files if path.exists()), None)
    return json.loads(found.read_text()) if found and any(out.glob("*/run.json")) else {}


def resolve_preset(out: Path, preset: str) -> str:
    """The name of the preset that "auto" stands for: that of the runs in `out`, or else the one for the GPUs here."""
    return preset if preset != "auto" else saved_settings(out).get("preset") or preset_for(gpus())


def claim_folder(out: Path, settings: dict, what: str) -> None:
    """Write out/settings.json; what: the folder holds, for the message.

    Raises:
        DataError: `out` holds runs with other settings.
    """
    settings = json.loads(json.dumps(settings))  # as it reads back: a tuple is a list
    before = saved_settings(out) or settings
    changed = [
        f"{key}: {before.get(key)!r} is not {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise DataError(
            f"{out} holds {what} with other settings ({', '.join(changed)}): choose another --out or those settings"
        )
    with whole_file(out / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=1) + "\n")
