"""The run folder, and papermill over the notebooks.

A run folder remembers what it is (run.json), so a notebook needs only its path, and a second call goes on where the
first one stopped.
"""

import inspect
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image
from traitlets.config import Config

from mdlib import __version__
from mdlib.data.splits import STARTS, apply_split, describe_training, make_split, read_split, seen_of_test, write_split
from mdlib.data.windows import DataError, WindowSet, find_windows, load_windows
from mdlib.experiments.kaggle_session import gpus, preset_for
from mdlib.models.foundation import load_foundation
from mdlib.models.perceptual import load_lpips
from mdlib.systems.presets import Preset
from mdlib.systems.registry import get_preset, get_system, make_codec, make_prior, start_codec, start_prior
from mdlib.training.distributed import check_batch, processes, python_path
from mdlib.training.fit import precision
from mdlib.training.joint import JointFineTuning
from mdlib.utils import whole_file

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
# What a notebook makes; running it anew starts by removing this.
PRODUCTS = {
    "01": (),
    "02": ("codec", "split.json"),
    "03": ("prior", "pipeline"),
    "04": ("prior", "pipeline", "samples/denoising.png"),
    "05": ("generated", "samples/contact_sheet.png"),
    "06": ("report.json", "report.html"),
}


@dataclass(frozen=True)
class Run:
    """One run folder. `settings`: what `open_run` was given."""

    path: Path
    settings: dict

    @cached_property
    def preset(self) -> Preset:
        """The preset with this run's changes."""
        changes = inspect.signature(get_preset).parameters.keys() & self.settings.keys() - {"system"}
        return get_preset(self.settings["system"], self.settings["preset"], **{k: self.settings[k] for k in changes})

    @cached_property
    def windows(self) -> WindowSet:
        """All real windows at the preset's size."""
        options = {key: self.settings[key] for key in ("channels", "colormap")}
        return load_windows(self.settings["data"], size=self.preset.image_size, **options)

    @cached_property
    def split(self) -> dict:
        """The run's split: read from split.json, which is made (or copied from the user's file) at first use."""
        path = self.path / "split.json"
        if not path.exists():
            given, per_user = self.settings["split"], self.preset.windows_per_user
            options = dict(windows_per_user=per_user or None, unrecorded=self.settings["unrecorded"])
            split = read_split(given) if given else make_split(self.windows, **options)
            apply_split(self.windows, split)  # a split that does not fit is refused before it is kept
            write_split(split, path)
        return read_split(path)

    @cached_property
    def parts(self) -> dict[str, WindowSet]:
        """train, val and test."""
        return apply_split(self.windows, self.split)

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        """What the training windows' people carry: the prior learns these, by this order."""
        return self.parts["train"].conditions

    def labels(self, windows: WindowSet) -> tuple[torch.Tensor, ...]:
        """What a prior is conditioned on: the user of each window (N,) and, where there are several, its condition."""
        if len(self.conditions) == 1:
            return (windows.labels,)
        return windows.labels, windows.condition_labels(self.conditions)

    @property
    def output_size(self) -> int:
        """The longer side in pixels of the windows on disk: height and width of the generated ones."""
        with Image.open(Path(self.settings["data"]) / self.windows.files[0].path) as image:
            return max(image.size)

    def about(self) -> dict:
        """What a reader of the report should know of this run."""
        record = _read(self.path)
        times = {name: f"{step['seconds']:.0f} s" for name, step in record["steps"].items()}
        told = ("system", "preset", "seed")
        return {
            **{key: self.settings[key] for key in told},
            "data": Path(self.settings["data"]).name,
            "training windows are": describe_training(self.split),
            "device": device_name(),
            "time": ", ".join(f"{name} {seconds}" for name, seconds in times.items()),
        }

    def start_codec(self, codec: torch.nn.Module) -> None:
        """Give a new codec the weights to start from, where the settings name any."""
        if self.settings["init"]:
            start_codec(codec, Path(self.settings["init"]) / "codec", other_users=True)
        elif self.settings["codec_start"]:
            start_codec(codec, self.settings["codec_start"])

    def start_prior(self, prior: torch.nn.Module) -> None:
        """Give a new prior the weights to start from, where the settings name any."""
        if self.settings["init"]:
            start_prior(prior, Path(self.settings["init"]) / "prior", other_users=True)
        elif self.settings["prior_start"]:
            start_prior(prior, self.settings["prior_start"])

    def expect(self, notebook: str) -> None:
        """DataError where `notebook` is none of this run's system."""
        system = self.settings["system"]
        if notebook not in get_system(system).notebooks:
            raise DataError(f"{notebook} is no notebook of system {system}: {', '.join(get_system(system).notebooks)}")

    def done(self, notebook: str, started: float) -> None:
        """Note in run.json that `notebook`, begun at time.monotonic() `started`, is done."""
        record = _read(self.path)
        seconds = round(time.monotonic() - started, 1)
        record["steps"][notebook] = {
            "seconds": seconds,
            "device": device_name(),
            "peak_memory_gb": peak_memory_gb(),
        }
        _write(self.path, record)


def settings(parameters: dict) -> dict:
    """Those of a notebook's parameters (its `globals()`) that shape a run: keyword arguments of `open_run`."""
    return {key: parameters[key] for key in open_run.__kwdefaults__ if key in parameters}


def open_run(
    out: str | Path,
    *,
    data: str = "",
    system: str = "vqvae-transformer",
    preset: str = "demo",
    split: str = "",
    windows_per_user: int = 0,
    unrecorded: dict = {},  # noqa: B006
    variants: int = -1,
    codec: str = "",
    codec_steps: int = 0,
    prior_steps: int = 0,
    codec_options: dict = {},  # noqa: B006
    prior_options: dict = {},  # noqa: B006
    perceptual_weight: float = 0.0,
    foundation: str = "",
    user_codec: bool = False,
    codec_start: str = "",
    prior_start: str = "",
    init: str = "",
    joint_steps: int = 0,
    classifier_steps: int = 0,
    channels: int = 1,
    colormap: str = "auto",
    seed: int = 0,
) -> Run:
    """Start a run folder, or go on with one.

    Args:
        out: the folder; where it holds a run and `data` is empty, that run's settings stand.
        data: folder of ID_k/ folders.
        system, preset: names of `mdlib.systems.registry`; preset "auto" is the one for the GPUs here, or demo.
        split: a split file of your own; "" makes one by recording and time.
        windows_per_user: training windows kept a user; 0 keeps what the preset says, -1 keeps all.
        unrecorded: condition → users whose windows in it go to the test, as if never recorded, see `make_split`.
        variants, codec, codec_steps, prior_steps, codec_options, prior_options, perceptual_weight, foundation,
            user_codec: changes of the preset, see `systems.get_preset`; -1, "", 0, {} and False keep the preset's.
        codec_start, prior_start: weights to start from, see `systems.start_codec` and `systems.start_prior`.
        init: pipeline/ folder of a run of this system on other people (simulated ones, say) to start codec and prior
            from; users get new embeddings.
        joint_steps: optimizer steps of codec and prior together at the end; 0 does without.
        classifier_steps: optimizer steps of a user classifier for classifier guidance; 0 does without.
        channels, colormap: how images are read, see `mdlib.data.windows.load_windows`.
        seed: of weights, data order and noise.

    Raises:
        DataError: `out` holds a run of other settings, there is no run and no data, or a setting cannot be used.
    """
    settings = {key: value for key, value in locals().items() if key != "out"}
    out = Path(out)
    for key in ("data", "split", "codec_start", "prior_start", "init"):
        settings[key] = str(Path(settings[key]).resolve()) if settings[key] else ""
    if settings["foundation"] and Path(settings["foundation"]).exists():
        settings["foundation"] = str(Path(settings["foundation"]).resolve())
    settings = json.loads(json.dumps(settings))  # as they read back: a tuple is a list
    kept = {**open_run.__kwdefaults__, **_read(out)["settings"]} if (out / "run.json").exists() else {}
    if settings["preset"] == "auto":
        settings["preset"] = kept.get("preset") or preset_for(gpus())
    if kept:
        changed = [key for key in settings if kept[key] != settings[key]] if data else []
        if not changed:
            return Run(out, kept)
        if _anything_made(out):
            told = ", ".join(f"{key}: {kept[key]!r} is not {settings[key]!r}" for key in changed)
            raise DataError(f"{out} holds a run with other settings ({told}): choose another --out or those settings")
    if not data:
        raise DataError(f"{out} holds no run yet: give the folder of your windows as data")
    run = Run(out, settings)
    _check(run)  # what cannot be used is told before anything is written
    out.mkdir(parents=True, exist_ok=True)
    _write(out, {"mdlib": __version__, "settings": settings, "versions": versions(), "steps": {}})
    return run


def _check(run: Run) -> None:
    for key, default in open_run.__kwdefaults__.items():
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(run.settings[key], wanted):
            raise DataError(f"{key} must be of type {type(default).__name__}, got {run.settings[key]!r}")
    if run.settings["init"]:
        if run.settings["codec_start"] or run.settings["prior_start"]:
            raise DataError("init starts both codec and prior: leave codec_start and prior_start empty")
        if not (Path(run.settings["init"]) / "model_index.json").exists():
            raise DataError(f"init: {run.settings['init']} holds no pipeline: give the pipeline/ folder of a run")
        _check_kind(Path(run.settings["init"]) / "prior", get_system(run.settings["system"]).prior)
    files = find_windows(run.settings["data"])
    preset = _preset(run, len({file.user for file in files}), len({file.condition for file in files}))
    if unrecorded := run.settings["unrecorded"]:
        if run.settings["split"]:
            raise DataError("unrecorded shapes the split that is made: leave it out with a split file of your own")
        if not all(isinstance(users, list) for users in unrecorded.values()):
            raise DataError(f'unrecorded names users by condition, {{"backpack": [1, 2]}}, got {unrecorded}')
        make_split(files, unrecorded=unrecorded)
    for training in (preset.codec_training, preset.prior_training):
        check_batch(training.batch_size)
        try:
            precision(training.mixed_precision)
        except ValueError as error:
            raise DataError(
                f"preset {run.settings['preset']!r}: {error}; demo and demo-long train in float32"
            ) from error
    if preset.foundation not in ("none", "classifier"):
        load_foundation(preset.foundation)
    if preset.codec.get("perceptual_weight"):
        load_lpips(preset.codec.get("perceptual_net", "squeeze"))
    split = read_split(run.settings["split"]) if run.settings["split"] else None
    if any(run.settings[key] for key in STARTS):
        check_starts(run.settings, split or make_split(files, unrecorded=unrecorded))


def check_starts(settings: dict, split: dict) -> None:
    """DataError where weights that a run is to start from have seen test windows of its split."""
    for key in STARTS:
        if settings.get(key) and (seen := seen_of_test(settings[key], split, settings["data"])):
            raise DataError(
                f"{key}: {settings[key]} was trained on {seen} of the windows that are the test here: take weights of "
                "other people, or of the same split"
            )


def _check_kind(folder: Path, wanted: type) -> None:
    """DataError where the model in `folder` is of another class: its weights' names and shapes may fit all the same."""
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name != wanted.__name__:
        raise DataError(f"init: {folder} holds a {name}, this system's prior is a {wanted.__name__}: take its own run")


def _preset(run: Run, users: int, conditions: int) -> Preset:
    """The run's preset, after its models were built without memory: sizes that do not fit each other, and weights that
    do not fit them, are told now, not after an hour of training."""
    try:
        preset = run.preset
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # weights meet no memory here
            codec = make_codec(preset, run.settings["channels"], users, foundation_width=8)
            prior = make_prior(run.settings["system"], preset, codec, users, conditions)
            run.start_codec(codec)
            run.start_prior(prior)
        if run.settings["joint_steps"]:
            JointFineTuning(codec, prior)
        if run.settings["classifier_steps"] and prior.consumes == "tokens":
            raise DataError("classifier_steps: a classifier guides a prior over latents, and this one is over tokens")
    except TypeError as error:
        raise DataError(f"codec_options or prior_options: {error}") from error
    return preset


def _anything_made(out: Path) -> bool:
    return any((out / product).exists() for products in PRODUCTS.values() for product in products)


def execute(out: str, parameters: dict, first: str = "", last: str = "", **said: str) -> Path:
    """Run the system's notebooks with papermill, output relayed as it comes; returns the path of the run folder.

    Notebooks that are done are skipped. `first` and `last` are notebook numbers ("03"); naming `first` runs anew from
    there on: what the later notebooks made is removed, because it came from what is made anew.

    Args:
        parameters: of any notebook.
        said: data, system and preset; what is not said is the run's, or else `open_run`'s default.

    Raises:
        DataError: an unknown system, preset, notebook number or parameter, or what a notebook stopped with.
    """
    before = _read(Path(out))["settings"] if (Path(out) / "run.json").exists() else {}
    said = {key: value for key, value in said.items() if value}
    system = get_system({**open_run.__kwdefaults__, **before, **said}["system"])
    known = {name: _parameters(name) for name in system.notebooks}
    _check_parameters(parameters, known)
    names = _chosen(system.notebooks, first, last)
    typed = {key: value for key, value in {**parameters, **said}.items() if key in open_run.__kwdefaults__}
    run = open_run(out, **{**before, **typed})
    if first:
        _forget(run.path, [name for name in system.notebooks if name[:2] >= first])
    common = {**parameters, **run.settings, "out": str(run.path.resolve())}
    for name in names:
        if name in _read(run.path)["steps"]:
            print(f"{name}: done already (--from {name[:2]} runs it anew)", flush=True)
            continue
        _execute_one(name, run.path, {key: value for key, value in common.items() if key in known[name]})
    return run.path


def check_parameters(system: str, parameters: dict) -> None:
    """DataError where no notebook of `system` has one of the parameters."""
    _check_parameters(parameters, {name: _parameters(name) for name in get_system(system).notebooks})


def _check_parameters(parameters: dict, known: dict[str, dict]) -> None:
    allowed = set().union(*known.values()) - {"system", "preset", "data", "out"}
    for key in parameters:
        if key not in allowed:
            raise DataError(f"no notebook has a parameter {key!r}; there are {', '.join(sorted(allowed))}")


def _execute_one(name: str, out: Path, values: dict) -> None:
    import papermill

    print(f"{name}: starts", flush=True)
    started = time.monotonic()
    target = out / "notebooks" / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    with _environment(MDLIB_BATCH="1", PYTHONPATH=python_path()), _private_sockets() as config:
        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                target,
                parameters=values,
                kernel_name="python3",
                progress_bar=False,
                config=config,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
        except papermill.PapermillExecutionError as error:
            cause = " ".join(str(error.evalue).split())
            raise DataError(f"{name} stopped: {error.ename}: {cause} (see {target})") from error
        except RuntimeError as error:  # nbclient's DeadKernelError is one
            raise DataError(
                f"{name} stopped: {error}: most likely memory ran out; take a smaller preset, or give the command again"
            ) from error
    if name not in _read(out)["steps"]:
        raise DataError(f"{name} stopped at the end of its time: give the command again and it goes on (see {target})")
    print(f"{name}: done in {time.monotonic() - started:.0f} s", flush=True)


@contextmanager
def _private_sockets():
    """Kernel sockets in a folder of our own where the system has such: nobody on the network can listen, and two runs
    started in one folder do not meet."""
    if os.name != "posix":
        yield Config()
        return
    with tempfile.TemporaryDirectory(prefix="mdlib-") as folder:
        yield Config(KernelManager={"transport": "ipc", "ip": str(Path(folder) / "kernel")})


def _chosen(names: tuple[str, ...], first: str, last: str) -> list[str]:
    """Notebooks from number `first` to `last`, both included."""
    numbers = [name[:2] for name in names]
    for number in (first, last):
        if number and number not in numbers:
            raise DataError(f"this system has no notebook {number!r}: choose among {', '.join(numbers)}")
    return [name for name in names if (first or "00") <= name[:2] <= (last or "99")]


def _parameters(name: str) -> dict:
    import papermill

    return papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")


def _forget(out: Path, names: list[str]) -> None:
    """Remove the note that the named notebooks are done, and what they made."""
    record = _read(out)
    for name in names:
        record["steps"].pop(name, None)
    _write(out, record)
    for name in names:
        for product in PRODUCTS[name[:2]]:
            path = out / product
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def _environment(**variables: str):
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _read(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def _write(out: Path, record: dict) -> None:
    with whole_file(out / "run.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Python, platform and the packages that decide a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def device_name() -> str:
    if torch.cuda.is_available():
        return f"{processes()} × {torch.cuda.get_device_name()}" if processes() > 1 else torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def peak_memory_gb() -> float | None:
    """Largest resident memory of this process, or of the GPU where one is used, in GB (10⁹ bytes); None if unknown."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
