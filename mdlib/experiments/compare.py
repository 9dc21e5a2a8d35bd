"""All systems on one split with one budget, and the page that sets them side by side.

Every system gets a run folder of its own in `out`, and a second call goes on where the first one stopped. What a run's
report does not hold is measured here: how quality grows with training time, how fast windows are drawn, and sizes.
"""

import inspect
import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate.utils import release_memory
from safetensors.torch import load_file

from mdlib import __version__
from mdlib.data.splits import PARTS, read_split
from mdlib.data.windows import DataError, WindowSet, find_windows, to_uint8
from mdlib.evaluation.augmentation_study import Arms, real_only_classifiers, unseen_classifiers
from mdlib.evaluation.evidence import Protocol
from mdlib.evaluation.fidelity import distances
from mdlib.evaluation.protocol import identity
from mdlib.experiments.execute import check_parameters, execute
from mdlib.experiments.run import Run, open_run, versions
from mdlib.experiments.terms import claim
from mdlib.pipeline import MicroDopplerPipeline, load_pipeline
from mdlib.reports import comparison
from mdlib.reports.report import gather, load_generated
from mdlib.systems import SYSTEMS, get_system
from mdlib.training.fit import read_history
from mdlib.utils import bar, whole_file

WITHOUT_END = 1_000_000  # optimizer steps that only the time ends
TIMED = 32  # windows of the batch whose drawing is timed
CURVE_WINDOWS = 10  # windows a user drawn from each snapshot
SECTIONS = ("reconstruction", "codebook", "identity", "augmentation", "fidelity", "memorisation", "physics", "verdict")
# Parameters that `compare` itself sets, or cannot compare, and what to do instead.
NOT_HERE = {
    "images_per_user": "say it as an option of compare",
    "classifiers": "compare keeps them itself",
    "joint_steps": "it changes the codec under the prior's snapshots",
}
NOT_UNDER_A_BUDGET = {key: "the budget of time decides" for key in ("codec_steps", "prior_steps", "max_minutes")}


def compare(
    data: str | Path,
    out: str | Path,
    systems: str = "all",
    preset: str = "demo",
    budget_minutes: float = 0.0,
    images_per_user: int = 0,
    parameters: dict | None = None,
) -> dict:
    """Train and judge systems on the same split, and write comparison.json and comparison.html after each of them.

    Args:
        data: folder of ID_k/ folders.
        out: folder of the comparison; a run folder a system in it. Systems that were measured there before stay on the
            page.
        systems: names with commas between, or "all".
        budget_minutes: training time of each system, half for the codec and half for the prior, whatever steps they
            make in it; 0 takes the preset's steps. Teacher, encoding and judging come on top.
        images_per_user: windows each system draws; 0 takes the most that any system draws with this preset.
        parameters: of any notebook, the same for every system.

    Returns:
        what comparison.json holds; a system that failed is there with its error.

    Raises:
        DataError: an unknown system, preset or parameter, a budget below 0, no windows in `data`, or `out` holds a
            comparison on other terms.
    """
    names, out = _names(systems), Path(out)
    terms = _terms(names, str(data), preset, budget_minutes, images_per_user, parameters or {})
    find_windows(data)
    claim(out, terms, "a comparison")
    found = {name: measure(open_run(out / name), terms) for name in SYSTEMS if _is_measured(out / name)}
    ruler = None
    for number, name in enumerate(names, 1):
        print(f"{name}: {number} of {len(names)}", flush=True)
        try:
            execute(str(out / name), _parameters(terms, out), data=str(data), system=name, preset=preset)
            run = open_run(out / name)
            _check_split(run, out, [other for other in found if other != name])
            ruler = ruler or Ruler(run, out / "classifiers", **_chosen(terms, ("evaluation_steps", "seeds")))
            found[name] = measure(run, terms, ruler)
        except Exception as error:  # whatever stops one system, the others are not lost with it
            told = " ".join(str(error).split()) or type(error).__name__
            print(f"{name}: {told}", flush=True)
            found[name] = {"error": told}
        result = _result(terms, {name: found[name] for name in SYSTEMS if name in found})
        comparison.write(result, _windows(out, result["systems"]), out)
    return result


def _names(systems: str) -> list[str]:
    names = list(SYSTEMS) if systems == "all" else [name.strip() for name in systems.split(",") if name.strip()]
    for name in names:
        get_system(name)
    if not names:
        raise DataError("name systems with commas between, or all")
    return list(dict.fromkeys(names))


def _terms(names: list[str], data: str, preset: str, minutes: float, images: int, parameters: dict) -> dict:
    """What is the same for all."""
    if minutes < 0 or images < 0:
        raise DataError(f"budget_minutes and images_per_user must be 0 or more, got {minutes} and {images}")
    common = [key for key in get_system(names[0]).presets if all(key in get_system(name).presets for name in names)]
    if preset not in common:
        raise DataError(f"{preset!r} is no preset of all these systems: choose one of {', '.join(common)}")
    for key, instead in (NOT_HERE | (NOT_UNDER_A_BUDGET if minutes else {})).items():
        if key in parameters:
            raise DataError(f"{key} is no parameter of a comparison: {instead}")
    if not isinstance(parameters.get("prior_options", {}), dict):
        raise DataError(f"prior_options must be a dictionary, got {parameters['prior_options']!r}")
    for name in names:
        check_parameters(name, parameters)
    return {
        "data": str(Path(data).resolve()),
        "preset": preset,
        "budget_minutes": minutes,
        "images_per_user": images or max(_images_per_user(preset)),
        "parameters": parameters,
    }


def _images_per_user(preset: str) -> list[int]:
    """Of every system, named or not, so that another may join later."""
    return [system.presets[preset].images_per_user for system in SYSTEMS.values() if preset in system.presets]


def _parameters(terms: dict, out: Path) -> dict:
    """The notebooks' parameters for a system on these terms."""
    images, given = terms["images_per_user"], terms["parameters"]
    wanted = {
        "images_per_user": images,
        "counts": [n for n in (images // 9, images // 3) if n],
        "classifiers": str((out / "judges").resolve()),
        **given,
        "prior_options": {"snapshots": True, **given.get("prior_options", {})},
    }
    if terms["budget_minutes"]:
        half = terms["budget_minutes"] / 2
        wanted |= {"codec_steps": WITHOUT_END, "prior_steps": WITHOUT_END, "max_minutes": half}
    return wanted


def _chosen(terms: dict, names) -> dict:
    """Those of the given parameters among `names` that are set; 0 and "" leave the preset's."""
    return {name: value for name, value in terms["parameters"].items() if name in names and value}


def _check_split(run: Run, out: Path, others: list[str]) -> None:
    for name in others:
        path = out / name / "split.json"
        if path.exists() and any(read_split(path)[part] != run.split[part] for part in PARTS):
            raise DataError(f"{run.path / 'split.json'} and {path} differ: delete the run folder made from other data")


# Measured here ---------------------------------------------------------------------------------------------------


class Ruler:
    """Judges of one split, trained at first use, that measure any pipeline trained on it alike."""

    def __init__(self, run: Run, folder: str | Path | None = None, **changes):
        """folder: of the judges, see `validate.evaluate`; changes: of the preset's protocol."""
        self.windows, self.split, self.folder = run.windows, run.split, folder
        self.protocol = Protocol(**{**run.preset.validation, **changes})
        self.judges: list | None = None

    def quality(self, generated: WindowSet) -> dict:
        """identity (share of windows in which the judges see the right user) and fd_ratio of generated windows."""
        evidence = gather(self.windows, self.split, generated)
        if self.judges is None:
            with bar(self.protocol.seeds, "judges of the curves", unit="judge") as progress:
                self.judges = unseen_classifiers(evidence, self.protocol, progress, self.folder)
            self.arms = Arms(real_only_classifiers(evidence, self.protocol, self.folder), {}, 0.0)
        return {
            "identity": identity(evidence, self.judges)["accuracy"]["value"],
            "fd_ratio": distances(evidence, self.arms)["fd_ratio"]["value"],
        }


def _is_measured(folder: Path) -> bool:
    """Whether what is measured here belongs to the run's report."""
    report, kept = folder / "report.json", folder / "measured.json"
    return report.exists() and kept.exists() and kept.stat().st_mtime >= report.stat().st_mtime


def measure(run: Run, terms: dict, ruler: Ruler | None = None) -> dict:
    """What the comparison says of a finished run; ruler: where `_is_measured` is false."""
    kept = run.path / "measured.json"
    if not _is_measured(run.path):
        pipeline = load_pipeline(run.path / "pipeline")
        sampling = _chosen(terms, inspect.signature(pipeline.prior.sample).parameters)  # as notebook 05 drew
        pipeline.register_to_config(sampling={**pipeline.config.sampling, **sampling})
        here = {"sampling": sampling_speed(pipeline), "parameters": sizes(pipeline)}
        here["curve"] = curve(run, pipeline, ruler)
        release_memory(pipeline)  # the next system trains in another process, on the same GPU
        with whole_file(kept) as path:
            path.write_text(json.dumps(here, indent=1) + "\n")
    sections = json.loads((run.path / "report.json").read_text())
    return {
        **{section: sections[section] for section in SECTIONS},
        **json.loads(kept.read_text()),
        "training": training(run),
        "resources": resources(run),
    }


def training(run: Run) -> dict:
    """Minutes and optimizer steps of codec and prior."""
    found = {}
    for part in ("codec", "prior"):
        last = read_history(run.path / part)[-1]
        found |= {f"{part}_minutes": last["seconds"] / 60, f"{part}_steps": int(last["step"])}
    return found


def resources(run: Run) -> dict:
    """Wall time of all notebooks and the largest memory of the training ones and of generation (None where it is not
    known), with the device: of the sitting that finished each notebook."""
    steps = json.loads((run.path / "run.json").read_text())["steps"]
    peaks = [step["peak_memory_gb"] for name, step in steps.items() if name[:2] in ("02", "03", "04")]
    return {
        "wall_minutes": sum(step["seconds"] for step in steps.values()) / 60,
        "training_memory_gb": None if None in peaks else max(peaks),
        "generation_memory_gb": steps["05_generate"]["peak_memory_gb"],
        "device": steps["05_generate"]["device"],
    }


def sizes(pipeline: MicroDopplerPipeline) -> dict:
    """Parameters of codec and prior."""
    models = {"codec": pipeline.codec, "prior": pipeline.prior}
    return {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}


def sampling_speed(pipeline: MicroDopplerPipeline, rounds: int = 3) -> dict:
    """Seconds a window, decoding included, the quickest of `rounds` batches; and the network calls of a batch."""
    users = pipeline.config.users
    plan = [pipeline.plan([users[n % len(users)]], 1, seed=n)[0] for n in range(TIMED)]
    calls, seconds = 0, []

    def count(*_):
        nonlocal calls
        calls += 1

    blocks = next(part for part in pipeline.prior.modules() if isinstance(part, torch.nn.ModuleList))
    hook = blocks[0].register_forward_hook(count)  # a network call passes its first block once
    for _ in range(rounds):
        started = time.perf_counter()
        list(pipeline.stream(plan, TIMED))
        seconds.append(time.perf_counter() - started)
    hook.remove()
    return {"seconds_per_window": min(seconds) / TIMED, "network_calls": calls // rounds, "batch": TIMED}


def curve(run: Run, pipeline: MicroDopplerPipeline, ruler: Ruler) -> list[dict]:
    """Quality of windows drawn from the prior as it was on the way, and from the pipeline's at the end, against the
    training time until then, that of the codec included."""
    codec_seconds = read_history(run.path / "codec")[-1]["seconds"]
    history = {int(row["step"]): row["seconds"] for row in read_history(run.path / "prior")}
    final = {name: tensor.clone() for name, tensor in pipeline.prior.state_dict().items()}
    snapshots = {int(path.stem): path for path in (run.path / "prior" / "snapshots").glob("*.safetensors")}
    last, points = max(history), []
    for step in sorted({last, *(snapshots.keys() & history.keys())}):
        pipeline.prior.load_state_dict(final if step == last else load_file(snapshots[step]))
        quality = ruler.quality(drawn(pipeline, ruler.windows))
        points.append({"step": step, "minutes": (codec_seconds + history[step]) / 60, **quality})
    pipeline.prior.load_state_dict(final)
    return points


def drawn(pipeline: MicroDopplerPipeline, real: WindowSet, per_user: int = CURVE_WINDOWS, seed: int = 1) -> WindowSet:
    """Windows of every user straight from the pipeline, without a way over files."""
    made = pipeline(list(pipeline.config.users), per_user, seed, output_type="pt")
    labels = torch.tensor([real.users.index(user) for user in made.users])
    files = tuple(replace(real.files[0], user=user) for user in made.users)
    return replace(real, images=to_uint8(made.images), labels=labels, files=files)


def _result(terms: dict, found: dict) -> dict:
    return {
        "mdlib": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "terms": {**terms, "data": Path(terms["data"]).name},
        "versions": versions(),
        "conclusions": comparison.conclusions(found, terms["budget_minutes"]),
        "systems": found,
    }


def _windows(out: Path, found: dict) -> dict[str, WindowSet]:
    """Real test windows and those of each measured system, for a look."""
    sets: dict[str, WindowSet] = {}
    for name in (name for name, figures in found.items() if "error" not in figures):
        run = open_run(out / name)
        if not (run.path / "generated").exists():
            continue
        sets.setdefault("real", run.parts["test"])
        sets[name] = load_generated(run.path / "generated", run.windows)
    return sets
