"""Train systems on one split with one budget, and compare them; and what a comparison shares with a study.

Every system has a run folder in `out`; a second call continues where the first one stopped. Measured here is what the
report of a run lacks: quality against training time, sampling speed, and sizes.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import release_memory
from safetensors.torch import load_file

from mdlib import __version__
from mdlib.data.files import find_windows
from mdlib.data.splits import PARTS, read_split
from mdlib.data.windows import WindowSet, to_uint8
from mdlib.evaluation.augmentation_study import Arms, real_only_classifiers, unseen_classifiers
from mdlib.evaluation.evidence import Protocol
from mdlib.evaluation.fidelity import distances
from mdlib.evaluation.protocol import identity
from mdlib.experiments.execute import execute
from mdlib.experiments.run import Run, open_run, versions
from mdlib.experiments.settings import check_names, read_record
from mdlib.pipeline import MicroDopplerPipeline, load_pipeline
from mdlib.reports.report import conclusions, gather, load_generated, write_comparison
from mdlib.systems import SYSTEMS, get_preset
from mdlib.systems.system import gpus, preset_for
from mdlib.training.fit import read_history
from mdlib.utils import DataError, bar, whole_file

UNLIMITED = 1_000_000  # optimizer steps that only the time limit ends
TIMED = 32  # windows of the batch whose sampling is timed
CURVE_WINDOWS = 10  # windows per user sampled from each snapshot
SECTIONS = ("reconstruction", "codebook", "identity", "augmentation", "fidelity", "memorisation", "physics", "verdict")
# Parameters that `compare` sets or cannot compare, and what to do instead.
EXCLUDED = {
    "images_per_user": "give --images-per-user",
    "classifiers": "compare shares them between the systems",
    "joint_steps": "it changes the codec under the prior's snapshots",
}
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
        images_per_user: windows that each system generates; 0 takes the most that any system's preset generates.
        parameters: of any notebook, the same for every system.

    Returns:
        The content of comparison.json; a system that failed is in it with its error.
    """
    out, given = Path(out), parameters or {}
    names = [*SYSTEMS] if systems == "all" else [*dict.fromkeys(filter(None, map(str.strip, systems.split(","))))]
    preset = resolve_preset(out, preset)
    _check(names, preset, budget_minutes, images_per_user, given)
    find_windows(data, order=given.get("order", "number"))
    settings = {
        "data": str(Path(data).resolve()),
        "preset": preset,
        "budget_minutes": budget_minutes,
        "images_per_user": images_per_user or _images_per_user(preset),
        "parameters": given,
    }
    claim_folder(out, settings, "a comparison")
    wanted = _parameters(settings)
    found = {name: measure(open_run(out / name), settings) for name in SYSTEMS if _is_measured(out / name)}

    def run_system(name: str) -> None:
        try:
            own = wanted | shared_classifiers(out / name)
            execute(str(out / name), own, data=str(data), system=name, preset=preset)
            run = open_run(out / name)
            for other in (out / one / "split.json" for one in found.keys() - {name}):
                if other.exists() and any(read_split(other)[part] != run.split[part] for part in PARTS):
                    raise DataError(f"{out / name / 'split.json'} and {other} differ: delete the outdated run folder")
            found[name] = measure(run, settings)
        except Exception as error:  # one system's failure must not lose the others
            found[name] = {"error": " ".join(str(error).split()) or type(error).__name__}
            print(f"{name}: {found[name]['error']}", flush=True)

    def write(about: dict) -> dict:
        measured = {name: found[name] for name in SYSTEMS if name in found}
        result = {**about, "versions": versions(), "conclusions": conclusions(measured), "systems": measured}
        write_comparison(result, _windows(out, result), out)
        return result

    jobs = {f"{name}: {n} of {len(names)}": partial(run_system, name) for n, name in enumerate(names, 1)}
    return run_series(jobs, settings, write)


def _check(names: list[str], preset: str, minutes: float, images: int, parameters: dict) -> None:
    if not names:
        raise DataError("give systems separated by commas, or all")
    if minutes < 0 or images < 0:
        raise DataError(f"budget_minutes and images_per_user must be 0 or more, got {minutes} and {images}")
    for key, instead in (EXCLUDED | (EXCLUDED_BY_BUDGET if minutes else {})).items():
        if key in parameters:
            raise DataError(f"{key} is no parameter of a comparison: {instead}")
    if not isinstance(parameters.get("prior_options", {}), dict):
        raise DataError(f"prior_options must be a dictionary, got {parameters['prior_options']!r}")
    for name in names:
        check_names(name, preset, parameters)


def _images_per_user(preset: str) -> int:
    """The most windows per user that any system generates with the preset, so that another system may join later."""
    found = []
    for name in SYSTEMS:
        with suppress(DataError):  # a size of some systems only
            found.append(get_preset(name, preset).images_per_user)
    return max(found)


def _parameters(settings: dict) -> dict:
    """The notebooks' parameters for a run with these settings."""
    images, given, half = settings["images_per_user"], settings["parameters"], settings["budget_minutes"] / 2
    wanted = {"images_per_user": images, "counts": [n for n in (images // 9, images // 3) if n], **given}
    wanted["prior_options"] = {"snapshots": True, **given.get("prior_options", {})}
    return wanted | ({"codec_steps": UNLIMITED, "prior_steps": UNLIMITED, "max_minutes": half} if half else {})


def _chosen(settings: dict, names) -> dict:
    """The given parameters among `names`; 0 and "" leave the preset's value."""
    return {name: value for name, value in settings["parameters"].items() if name in names and value}


def _windows(out: Path, result: dict) -> dict[str, WindowSet]:
    """ "real" test windows and the generated ones of each measured system."""
    sets: dict[str, WindowSet] = {}
    for name, figures in result["systems"].items():
        if "error" not in figures and (out / name / "generated").exists():
            run = open_run(out / name)
            sets.setdefault("real", run.parts["test"])
            sets[name] = load_generated(run.path / "generated", run.windows)
    return sets


def _is_measured(folder: Path) -> bool:
    """Whether measured.json is there and not older than the run's report."""
    report, measured = folder / "report.json", folder / "measured.json"
    return report.exists() and measured.exists() and measured.stat().st_mtime >= report.stat().st_mtime


def measure(run: Run, settings: dict) -> dict:
    """What the comparison holds of a finished run; measured.json keeps what is measured here."""
    file = run.path / "measured.json"
    if not _is_measured(run.path):
        pipeline = load_pipeline(run.path / "pipeline")
        sampling = _chosen(settings, run.system.sampling_options())  # as in notebook 05
        pipeline.register_to_config(sampling={**pipeline.config.sampling, **sampling})
        found = {
            "sampling": sampling_speed(pipeline),
            "parameters": {part: getattr(pipeline, part).num_parameters() for part in ("codec", "prior")},
            "curve": curve(run, pipeline, _chosen(settings, ("evaluation_steps", "seeds"))),
        }
        release_memory(pipeline)  # the next system trains in another process, on the same GPU
        with whole_file(file) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")
    report = json.loads((run.path / "report.json").read_text())
    return {**{section: report[section] for section in SECTIONS}, **json.loads(file.read_text()), **costs(run)}


def costs(run: Run) -> dict:
    """`training`: minutes and optimizer steps of codec and prior; `resources`: wall time of all notebooks, peak memory
    in GB (None: unknown) and device. A notebook that was interrupted counts from its last start."""
    steps = read_record(run.path)["steps"]
    peaks = [step["peak_memory_gb"] for name, step in steps.items() if name[:2] in ("02", "03", "04")]
    generation, training = steps["05_generate"], {}
    resources = {
        "wall_minutes": sum(step["seconds"] for step in steps.values()) / 60,
        "training_memory_gb": None if None in peaks else max(peaks),
        "generation_memory_gb": generation["peak_memory_gb"],
        "device": generation["device"],
    }
    for part in ("codec", "prior"):
        last = read_history(run.path / part)[-1]
        training |= {f"{part}_minutes": last["seconds"] / 60, f"{part}_steps": int(last["step"])}
    return {"training": training, "resources": resources}


def sampling_speed(pipeline: MicroDopplerPipeline, rounds: int = 3) -> dict:
    """Seconds per window, decoding included, in the fastest of `rounds` batches; and network calls per batch."""
    users = pipeline.config.users
    plan = [pipeline.plan([users[n % len(users)]], 1, seed=n)[0] for n in range(TIMED)]
    calls, seconds = [], []
    blocks = next(part for part in pipeline.prior.modules() if isinstance(part, torch.nn.ModuleList))
    hook = blocks[0].register_forward_hook(lambda *_: calls.append(1))  # once per network call
    for _ in range(rounds):
        started = time.perf_counter()
        list(pipeline.stream(plan, TIMED))
        seconds.append(time.perf_counter() - started)
    hook.remove()
    return {"seconds_per_window": min(seconds) / TIMED, "network_calls": len(calls) // rounds, "batch": TIMED}


def curve(run: Run, pipeline: MicroDopplerPipeline, changes: dict) -> list[dict]:
    """Quality of windows sampled from the prior's snapshots, and last from the pipeline's prior, against the training
    time in minutes, that of the codec included. changes: of the preset's `Protocol`."""
    codec_seconds = read_history(run.path / "codec")[-1]["seconds"]
    history = {int(row["step"]): row["seconds"] for row in read_history(run.path / "prior")}
    final = {name: tensor.clone() for name, tensor in pipeline.prior.state_dict().items()}
    snapshots = {int(path.stem): path for path in (run.path / "prior" / "snapshots").glob("*.safetensors")}
    last, points = max(history), []
    for step in sorted({last, *(snapshots.keys() & history.keys())}):
        pipeline.prior.load_state_dict(final if step == last else load_file(snapshots[step]))
        found = quality(run, sample_windows(pipeline, run.windows), run.path.parent / "classifiers", **changes)
        points.append({"step": step, "minutes": (codec_seconds + history[step]) / 60, **found})
    pipeline.prior.load_state_dict(final)
    return points


def sample_windows(
    pipeline: MicroDopplerPipeline, real: WindowSet, per_user: int = CURVE_WINDOWS, seed: int = 1
) -> WindowSet:
    """Generate windows of every user, without writing files."""
    generated = pipeline(list(pipeline.config.users), per_user, seed, output_type="pt")
    labels = torch.tensor([real.users.index(user) for user in generated.users])
    files = tuple(replace(real.files[0], user=user) for user in generated.users)
    return replace(real, images=to_uint8(generated.images), labels=labels, files=files)


def quality(run: Run, generated: WindowSet, folder: Path, **changes) -> dict:
    """identity (fraction of generated windows that are classified as their user) and fd_ratio.

    folder: caches the classifiers, so that they are trained once for a split; changes: of the preset's `Protocol`.
    """
    protocol = Protocol(**{**run.preset.validation, **changes})
    evidence = gather(run.windows, run.split, generated)
    with bar(protocol.seeds, "classifiers of the curve", unit="classifier") as progress:
        classifiers = unseen_classifiers(evidence, protocol, progress, folder)
    arms = Arms(real_only_classifiers(evidence, protocol, folder), {}, 0.0)
    return {
        "identity": identity(evidence, classifiers)["accuracy"]["value"],
        "fd_ratio": distances(evidence, arms)["fd_ratio"]["value"],
    }


# ---- shared with a study: runs in one folder, executed one after the other


def run_series(jobs: dict[str, Callable], settings: dict, write: Callable[[dict], dict]) -> dict:
    """Call every job, and after each write what was measured so far; returns the last result.

    Args:
        jobs: title → function without arguments that executes one run, or skips what is done.
        settings: those of the series.
        write: completes a result (mdlib's version, the time, the settings) by what was measured, and writes it.
    """
    result: dict = {}
    for title, job in jobs.items():
        print(title, flush=True)
        job()
        about = {"mdlib": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        result = write({**about, "settings": {**settings, "data": Path(settings["data"]).name}})
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
    """Write out/settings.json; DataError where `out` holds runs with other settings. what: the folder holds."""
    settings = json.loads(json.dumps(settings))  # as it reads back: a tuple is a list
    before = saved_settings(out) or settings
    pairs = [(key, before.get(key), value) for key, value in settings.items()]
    if changed := ", ".join(f"{key}: {old!r} is not {new!r}" for key, old, new in pairs if old != new):
        raise DataError(f"{out} holds {what} with other settings ({changed}): choose another --out or those settings")
    with whole_file(out / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=1) + "\n")
