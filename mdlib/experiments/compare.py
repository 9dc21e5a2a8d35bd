"""Train systems on one split with one budget and compare them; also what a comparison and a study share.

Every system has a run folder in `out`; a second call continues where the first one stopped. Measured here is what the
report of a run lacks: sampling speed, sizes and cost.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from timeit import repeat

from accelerate.utils import release_memory

from mdlib import __version__
from mdlib.data.files import find_windows
from mdlib.data.splits import PARTS
from mdlib.experiments.execute import execute, locked
from mdlib.experiments.run import Run, open_run, resolve_preset, versions
from mdlib.experiments.settings import RunSettings, check_names, order_of, read_record, settings_of
from mdlib.pipeline import load_pipeline
from mdlib.reports.report import conclusions, load_generated, write_comparison
from mdlib.systems import SYSTEMS, get_preset
from mdlib.utils import DataError, atomic_file, read_history, read_json

UNLIMITED = 1_000_000  # optimizer steps that only the time limit ends
TIMED = 32  # windows of the batch whose sampling is timed
SECTIONS = ("reconstruction", "codebook", "identity", "augmentation", "fidelity", "memorisation", "physics", "verdict")
# Parameters that `compare` sets, and what to do instead.
EXCLUDED = {"images_per_user": "give --images-per-user", "classifiers": "compare shares them between the systems"}
EXCLUDED_BY_BUDGET = dict.fromkeys(("codec_steps", "prior_steps", "max_minutes"), "the time budget decides")


def compare(
    data: str | Path,
    out: str | Path,
    systems: str = "all",
    preset: str = "auto",
    budget_minutes: float = 0.0,
    images_per_user: int = 0,
    parameters: dict | None = None,
) -> dict:
    """Train and evaluate systems on the same split; write comparison.json and comparison.html after each of them.

    Args:
        data: folder of ID_k/ folders.
        out: folder of the comparison. Systems that were measured there before stay in it.
        systems: names separated by commas, or "all".
        budget_minutes: training time of each system, half for the codec and half for the prior; 0 trains for the
            preset's steps. Teacher, encoding and evaluation come on top.
        images_per_user: windows that each system generates; 0 takes those of the runs in `out`, or else the most that
            the preset of one of the systems generates.
        parameters: of any notebook, the same for every system; without init all train from scratch.

    Returns:
        The content of comparison.json; a system that failed is in it with its error.
    """
    out, given, half = Path(out), parameters or {}, budget_minutes / 2
    names = [*SYSTEMS] if systems == "all" else [*dict.fromkeys(filter(None, map(str.strip, systems.split(","))))]
    if not names:
        raise DataError("give systems separated by commas, or all")
    if budget_minutes < 0 or images_per_user < 0:
        raise DataError(
            f"budget_minutes and images_per_user must be 0 or more, got {budget_minutes} and {images_per_user}"
        )
    preset = resolve_preset(preset, saved_settings(out))
    check_series("a comparison", names, preset, given, EXCLUDED | (EXCLUDED_BY_BUDGET if half else {}))
    find_windows(data, order=order_of(given.get("reading", {})))
    default = saved_settings(out).get("images_per_user") or max(get_preset(n, preset).images_per_user for n in names)
    images = images_per_user or default
    own = {"budget_minutes": budget_minutes, "images_per_user": images, "parameters": given}
    about = claim_folder(out, "a comparison", data=data, preset=preset, **own)
    # From scratch, unless init is given: pretrained weights do not come with every system.
    wanted = {"images_per_user": images, "counts": [n for n in (images // 9, images // 3) if n], "init": "none"} | given
    wanted |= {"codec_steps": UNLIMITED, "prior_steps": UNLIMITED, "max_minutes": half} if half else {}
    runs: dict[str, Run] = {}
    found: dict[str, dict] = {}

    def add(name: str) -> None:
        run = open_run(out / name)
        for other in runs.values():
            if any(other.split[part] != run.split[part] for part in PARTS):
                paths = " and ".join(str(one.path / "split.json") for one in (run, other))
                raise DataError(f"{paths} differ: delete the outdated run folder")
        runs[name], found[name] = run, _measure(run, given)

    with locked(out):
        for name in SYSTEMS:
            if (out / name / "report.json").exists():
                add(name)
        for number, name in enumerate(names, 1):
            print(f"{name}: {number} of {len(names)}", flush=True)
            try:
                execute(out / name, wanted | shared_classifiers(out / name), data=str(data), system=name, preset=preset)
                add(name)
            except Exception as error:  # one system's failure must not lose the others
                found[name] = {"error": " ".join(str(error).split()) or type(error).__name__}
                print(f"{name}: {found[name]['error']}", flush=True)
            metrics = {name: found[name] for name in SYSTEMS if name in found}
            measured = [runs[name] for name in metrics if "error" not in metrics[name]]
            windows = {"real": measured[0].parts["test"]} if measured else {}
            windows |= {run.path.name: load_generated(run.path / "generated", run.windows) for run in measured}
            result = {**stamp(about), "versions": versions(), "conclusions": conclusions(metrics), "systems": metrics}
            write_comparison(result, windows, out)
    return result


def _measure(run: Run, parameters: dict) -> dict:
    """What the comparison holds of a finished run. measured.json keeps speed and sizes, which are measured once.

    `training`: minutes and optimizer steps of codec and prior; `resources`: wall time of all notebooks, peak memory
    in GB (None: unknown) and device. A notebook that was interrupted counts from its last start.
    """
    file, steps = run.path / "measured.json", read_record(run.path)["steps"]
    if not file.exists():
        pipeline = load_pipeline(run.path / "pipeline")
        users, chosen = pipeline.config.users, parameters.get("sampling", {})  # as in notebook 05
        rows = pipeline.plan(users, TIMED, 0, pipeline.config.conditions[:1])[:: len(users)]
        seconds = min(repeat(lambda: [*pipeline.stream(rows, TIMED, **chosen)], number=1, repeat=3)) / TIMED
        sizes = {part: getattr(pipeline, part).num_parameters() for part in ("codec", "prior")}
        release_memory(pipeline)  # the next system trains in another process, on the same GPU
        with atomic_file(file) as path:
            path.write_text(json.dumps({"sampling": {"seconds_per_window": seconds}, "parameters": sizes}) + "\n")
    peaks = [step["peak_memory_gb"] for name, step in steps.items() if name[:2] in ("02", "03", "04")]
    resources = {
        "wall_minutes": sum(step["seconds"] for step in steps.values()) / 60,
        "training_memory_gb": None if None in peaks else max(peaks),
        "generation_memory_gb": steps["05_generate"]["peak_memory_gb"],
        "device": steps["05_generate"]["device"],
    }
    training = {}
    for part in ("codec", "prior"):
        untrained = part == "codec" and run.finished_codec
        last = dict(seconds=0.0, step=0) if untrained else read_history(run.path / part)[-1]
        training |= {f"{part}_minutes": last["seconds"] / 60, f"{part}_steps": int(last["step"])}
    report = read_report(run.path)
    sections = {section: report[section] for section in SECTIONS}
    return {**sections, **read_json(file, "delete it"), "training": training, "resources": resources}


# ---- shared with a study: the runs of one folder


def check_series(what: str, systems: list[str], preset: str, parameters: dict, excluded: dict[str, str]) -> None:
    """DataError on a name, or a type of a setting, that cannot be used. excluded: parameters that `what` does not take,
    and why."""
    for key in parameters.keys() & excluded.keys():
        raise DataError(f"{key} is no parameter of {what}: {excluded[key]}")
    for system in systems:
        check_names(system, preset, parameters)
    RunSettings(**settings_of(parameters))


def claim_folder(out: Path, what: str, **settings) -> dict:
    """Write the settings of a comparison or study (`what`) to out/settings.json, and return them as they read back;
    DataError if `out` holds runs with other settings."""
    settings["data"] = str(Path(settings["data"]).resolve())
    settings = json.loads(json.dumps(settings))  # as it reads back: a tuple is a list
    before = saved_settings(out) or settings
    if not Path(before["data"]).is_dir():
        before["data"] = settings["data"]  # it has moved: each run checks that it holds the same windows
    pairs = [(key, before.get(key), value) for key, value in settings.items()]
    if changed := ", ".join(f"{key}: {old!r} is not {new!r}" for key, old, new in pairs if old != new):
        raise DataError(f"{out} holds {what} with other settings ({changed}): choose another --out or those settings")
    with atomic_file(out / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=1) + "\n")
    return settings


def saved_settings(out: Path) -> dict:
    """The settings of the runs in `out`; {} where there are none."""
    file = out / "settings.json"
    remedy = "restore it, or choose another --out"
    return read_json(file, remedy) if file.exists() and any(out.glob("*/run.json")) else {}


def read_report(run: Path) -> dict:
    """The report.json of a run's folder."""
    return read_json(run / "report.json", f"write it again: python -m mdlib run --out {run} --from 06")


def shared_classifiers(run: Path) -> dict:
    """The parameter of notebook 06 by which the runs of a folder share classifiers; {} where it is done already."""
    return {} if (run / "report.json").exists() else {"classifiers": str((run.parent / "classifiers").resolve())}


def stamp(settings: dict) -> dict:
    """What comparison.json and study.json start with: mdlib's version, the time and the settings."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"mdlib": __version__, "created": created, "settings": {**settings, "data": Path(settings["data"]).name}}
