"""The run folder. It holds its settings (run.json), so a notebook needs only its path."""

import platform
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import torch

from mdlib import __version__
from mdlib.data.checks import check_identical, check_split, data_fingerprint, seen, seen_of_test, seen_people
from mdlib.data.files import find_windows
from mdlib.data.overlap import SIDE
from mdlib.data.reading import hashes
from mdlib.data.splits import (
    FOUND,
    NO_PATH,
    STARTS,
    apply_split,
    describe_training,
    make_split,
    read_split,
    write_split,
)
from mdlib.data.windows import WindowSet, load_windows
from mdlib.experiments.settings import RunSettings, defaults, order_of, read_record, write_record
from mdlib.models.pretrained import fits, load_foundation, load_lpips, pretrained_weights
from mdlib.systems import Preset, System, attach_losses, get_preset, get_system, make_codec, make_prior, start
from mdlib.systems.system import check_same, gpus, preset_for
from mdlib.training.distributed import check_batch, processes
from mdlib.training.latents import JointFineTuning
from mdlib.training.state import precision
from mdlib.utils import DataError, count, peak_memory_gb, read_json, readable

# What a notebook writes, as patterns; it is removed before the notebook runs again.
PRODUCTS = {
    "01": (),
    "02": ("codec", "split.json", "samples/codec-*.png"),
    "03": ("prior", "pipeline", "samples/prior-*.png"),
    "04": ("prior", "pipeline", "samples/prior-*.png", "samples/denoising.png"),
    "05": ("generated", "samples/contact_sheet.png", "measured.json"),
    "06": ("report.json", "report.html", "identifier"),
}


@dataclass(frozen=True)
class Run:
    """One run folder. `settings`: the fields of RunSettings."""

    path: Path
    settings: dict

    @property
    def system(self) -> System:
        return get_system(self.settings["system"])

    @cached_property
    def preset(self) -> Preset:
        """The preset with this run's changes."""
        changes = signature(get_preset).parameters.keys() & self.settings.keys() - {"system"}
        return get_preset(self.settings["system"], self.settings["preset"], **{k: self.settings[k] for k in changes})

    @property
    def init(self) -> Path | None:
        """The folder of the pretrained weights; None: the models train from scratch."""
        name = self.settings["init"]
        if name not in FOUND:
            return None if name == "none" else Path(name)
        if not (folder := pretrained_weights(self.settings["system"]).get(name)):
            raise DataError(f"{self.path} starts from weights that are no longer {name}: attach or restore them")
        return folder

    @property
    def finished_codec(self) -> Path | None:
        """The folder of another run's codec that this run uses as it is; None: the run trains its own."""
        return Path(self.settings["codec_start"]) if self.settings["codec_steps"] == -1 else None

    @property
    def ends_with_best(self) -> bool:
        """Whether the prior ends with its best weights on held-out windows, not with those of its last step."""
        return self.preset.prior_training.keep_best and not self.settings["joint_steps"]

    @property
    def reading(self) -> dict:
        """How windows are read: options of `load_windows`."""
        return {**{key: self.settings[key] for key in ("channels", "colormap")}, **self.settings["reading"]}

    @cached_property
    def windows(self) -> WindowSet:
        """All real windows at the preset's size; DataError if they are not those that the run began with."""
        windows = load_windows(self.settings["data"], size=self.preset.image_size, **self.reading)
        known = read_record(self.path).get("data_fingerprint")
        if known and known != data_fingerprint(found := hashes(windows.root, windows.paths)):
            split = read_split(self.path / "split.json") if (self.path / "split.json").exists() else {}
            changed = [path for path, content in split.get("hashes", {}).items() if found.get(path) != content]
            which = f"{changed[0]} and {len(changed) - 1} more changed" if changed else "files were added or changed"
            raise DataError(
                f"{windows.root} no longer holds the windows that {self.path} began with ({which}): restore them, or "
                "choose another --out"
            )
        return windows

    @cached_property
    def split(self) -> dict:
        """The content of split.json, which is written at first use: the user's split file, or a new split."""
        path = self.path / "split.json"
        if not path.exists():
            given, per_user = self.settings["split"], self.preset.windows_per_user
            options = dict(windows_per_user=per_user or None, unrecorded=self.settings["unrecorded"])
            split = read_split(given) if given else make_split(self.windows, **options)
            size = max(SIDE, self.preset.image_size)
            large = load_windows(self.settings["data"], size=size, **self.reading)
            split = check_split(large, split)  # a split that does not fit or leaks raises
            parts = apply_split(large, split)
            parts["val"].condition_labels(parts["train"].conditions)  # raises if training lacks one of them
            write_split({**split, "reading": self.reading}, path)
        with readable(path, "delete it: it is written again from the same windows"):
            return read_split(path)

    @cached_property
    def parts(self) -> dict[str, WindowSet]:
        """train, val and test."""
        return apply_split(self.windows, self.split)

    @property
    def trained_on(self) -> list[str]:
        """Contents of the windows that the run's models see in training, those of its initial weights among them."""
        return sorted(seen(self.path / "pipeline"))

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        """The conditions of the training windows, in the order of the prior's condition labels."""
        return self.parts["train"].conditions

    def labels(self, windows: WindowSet) -> tuple[torch.Tensor, ...]:
        """What a prior is conditioned on: the user of each window (N,) and, where there are several, its condition."""
        if len(self.conditions) == 1:
            return (windows.labels,)
        return windows.labels, windows.condition_labels(self.conditions)

    @property
    def output_size(self) -> int | list[int]:
        """Size in pixels of the windows as read from disk and of the generated ones: the side, or [height, width]."""
        height, width = self.windows.about.shape
        return height if height == width else [height, width]

    def about(self) -> dict:
        """What a report says of its run."""
        record, starts = read_record(self.path), [self.settings[key] for key in STARTS]
        card, named = record.get("pretrained"), ", ".join(start for start in starts if start not in ("", "none"))
        named += ", used as it is" if self.finished_codec else ""
        origin = f"pretrained on {card['people']} simulated people ({named})" if card else f"from {named or 'scratch'}"
        return {
            **{key: self.settings[key] for key in ("system", "preset", "seed")},
            "data": Path(self.settings["data"]).name,
            "training windows": describe_training(self.split),
            "initial weights": origin,
            "device": device_name(),
            "time": ", ".join(f"{name} {step['seconds']:.0f} s" for name, step in record["steps"].items()),
        }

    def start(self, part: str, model: torch.nn.Module) -> None:
        """Initialise a new codec or prior (`part`) from the weights in the settings."""
        if self.init:
            start(model, self.init / part, other_users=True)
        elif source := self.settings[f"{part}_start"]:
            start(model, source)

    def expect(self, notebook: str) -> None:
        """DataError if `notebook` is not one of this run's system."""
        if notebook not in self.system.notebooks:
            known = ", ".join(self.system.notebooks)
            raise DataError(f"{self.path}: {notebook} is not a notebook of {self.system.name}: {known}")

    def done(self, notebook: str, started: float) -> None:
        """Note in run.json that `notebook`, started at time.monotonic() `started`, is done."""
        record = read_record(self.path)
        seconds = round(time.monotonic() - started, 1)
        elsewhere = processes() > 1 and notebook[:2] in ("02", "03", "04")  # other processes trained
        memory = None if elsewhere else peak_memory_gb()
        record["steps"][notebook] = dict(seconds=seconds, device=device_name(), peak_memory_gb=memory)
        write_record(self.path, record)


def open_run(out: str | Path, **given) -> Run:
    """Start a run folder, or continue the run in it.

    Args:
        out: the folder.
        given: fields of `RunSettings`. For an existing run `data` may be left out: its settings then apply, and a
            setting that is given all the same has to agree with them. DataError if it does not, or cannot be used.
    """
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    out, wanted = Path(out).absolute(), RunSettings(**given).to_dict()
    for key in ("data", "split", "foundation", *STARTS):
        if wanted[key] not in NO_PATH and (key != "foundation" or Path(wanted[key]).exists()):
            wanted[key] = str(Path(wanted[key]).resolve())
    record = read_record(out)
    stored = defaults() | record["settings"] if record["settings"] else {}
    wanted["preset"] = resolve_preset(wanted["preset"], stored)
    if stored:
        wanted["init"] = stored["init"] if wanted["init"] == "auto" else wanted["init"]
        stored["data"] = _found_again(out, record, wanted["data"] or stored["data"])
        relevant = wanted if wanted["data"] else {k: v for k, v in wanted.items() if v != defaults()[k]}
        changed = [key for key in relevant if stored[key] != wanted[key]]
        if not changed:
            return Run(out, stored)
        if any(any(out.glob(product)) for products in PRODUCTS.values() for product in products):
            differences = ", ".join(f"{key} was {stored[key]!r}, not {wanted[key]!r}" for key in changed)
            advice = "choose another --out or the earlier settings"
            if set(changed) <= {"codec_steps", "prior_steps"}:
                options = " ".join(f"-p {key}={wanted[key]}" for key in changed)
                command = f"python -m mdlib run --out {out} {options} --extend"
                advice = f"to train it further, {command}; else choose another --out"
            raise DataError(f"{out} holds a run with other settings ({differences}): {advice}")
        wanted = {**stored, **relevant}
    if not wanted["data"]:
        raise DataError(f"{out} holds no run: correct --out, or start a run with --data FOLDER_OF_WINDOWS")
    found = wanted["init"] in FOUND
    run = Run(out, wanted | {"init": "none"} if found else wanted)
    contents = _check(run)  # before anything is written
    run = Run(out, wanted | {"init": find_init(run)}) if found else run
    out.mkdir(parents=True, exist_ok=True)
    record = {"mdlib": __version__, "settings": run.settings, "data_fingerprint": data_fingerprint(contents)}
    if run.init and (card := run.init / "weights.json").exists():
        record["pretrained"] = read_json(card, "copy the folder again")
    write_record(out, record | {"versions": versions(), "steps": {}})
    return run


def find_init(run: Run) -> str:
    """What init "auto" stands for in a run: "attached" or "shipped" pretrained weights whose sizes fit, or else "none",
    with a line that says why."""
    settings = run.settings
    places = pretrained_weights(settings["system"])
    if not places or settings["codec_start"] or settings["prior_start"]:
        return "none"
    with torch.device("meta"):
        codec = make_codec(run.preset, settings["channels"])
        prior = make_prior(settings["system"], run.preset, codec, 1)
    for place, folder in places.items():
        if seen_people(folder, settings["data"]):
            reason = f"were trained on the simulated people in {settings['data']}"
        elif not fits(codec, folder / "codec") or not fits(prior, folder / "prior"):
            reason = "have other sizes"
        else:
            return place
        print(f"init=auto: codec and prior train from scratch, the {place} weights {reason}", flush=True)
    return "none"


def resolve_preset(preset: str, stored: dict) -> str:
    """The preset's name; "auto" is that of stored settings, or else the one for the GPUs here."""
    return preset if preset != "auto" else stored.get("preset") or preset_for(gpus())


def _found_again(out: Path, record: dict, data: str) -> str:
    """The data folder of a run: the stored one, or `data` if it holds the same windows (run.json is then updated).
    DataError if the folder is missing."""
    known, before = record.get("data_fingerprint"), record["settings"]["data"]
    if not Path(data).is_dir():
        raise DataError(f"{out}: its windows are no longer in {data}: give their new place with --data")
    if data == before or not known:
        return before
    files = find_windows(data, order=order_of(record["settings"].get("reading", {})))
    if data_fingerprint(hashes(data, (file.path for file in files))) != known:
        return before
    record["settings"]["data"] = data
    write_record(out, record)
    return data


def _check(run: Run) -> dict[str, str]:
    """The contents of the windows; DataError if a setting cannot be used. The models are built and initialised on
    the meta device: sizes and weights that do not fit raise now, not after an hour of training."""
    settings, files = run.settings, find_windows(run.settings["data"], order=order_of(run.settings["reading"]))
    contents = hashes(settings["data"], (file.path for file in files))
    check_identical(files, contents)
    init, split, unrecorded = (settings[key] for key in ("init", "split", "unrecorded"))
    if run.init:
        if settings["codec_start"] or settings["prior_start"]:
            raise DataError("init sets both codec and prior: leave codec_start and prior_start empty")
        if not (Path(init) / "model_index.json").exists():
            raise DataError(f"init: {init} holds no pipeline: give the pipeline/ folder of a run")
    sizes = (len({file.user for file in files}), len({file.condition for file in files}))
    try:
        preset = run.preset
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            codec = make_codec(preset, settings["channels"], sizes[0])
            attach_losses(codec, preset)
            prior = make_prior(settings["system"], preset, codec, *sizes)
            if not run.finished_codec:
                run.start("codec", codec)
            run.start("prior", prior)
    except TypeError as error:
        raise DataError(f"codec_options or prior_options: {error}") from error
    if run.finished_codec:
        if ignored := ", ".join(settings["codec_options"].keys() - codec.config.keys()):
            raise DataError(f"codec_steps=-1 trains no codec and would ignore {ignored} of codec_options: leave it out")
        known = seen(run.finished_codec) if codec.conditional else set(contents.values())
        if unknown := {file.user for file in files} - {file.user for file in files if contents[file.path] in known}:
            users = ", ".join(f"ID_{user}" for user in sorted(unknown))
            raise DataError(f"codec_start: {run.finished_codec} is conditioned on users and was not trained on {users}")
        check_same(codec, run.finished_codec)
    if settings["joint_steps"]:
        JointFineTuning(codec, prior)
    if settings["classifier_steps"] and prior.consumes == "tokens":
        raise DataError("classifier_steps: a classifier guides a prior over latents, and this one is over tokens")
    for training in (preset.codec_training, preset.prior_training):
        check_batch(training.batch_size)
        try:
            precision(training.mixed_precision)
        except ValueError as error:
            message = f"preset {settings['preset']!r}: {error}; demo and demo-long train in float32"
            raise DataError(message) from error
    if not run.finished_codec:
        published_networks(preset)
    check_sampling(run, {})
    for key in ("unrecorded", "windows_per_user") if split else ():
        if settings[key]:
            raise DataError(f"{key} cannot be combined with a split file, which decides it: leave one of them out")
    if not all(isinstance(one, list) and all(isinstance(user, int) for user in one) for one in unrecorded.values()):
        raise DataError(f'unrecorded names users by condition, {{"backpack": [1, 2]}}, got {unrecorded}')
    check_starts(settings, read_split(split) if split else make_split(files, unrecorded=unrecorded))
    return contents


def check_sampling(run: Run, options: dict) -> None:
    """ValueError if the run's prior, trained or not, could not sample with these options and the preset's."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        codec = make_codec(run.preset, run.settings["channels"])
        prior = make_prior(run.settings["system"], run.preset, codec, 1)
    options = {key: value for key, value in {**run.preset.sampling, **options}.items() if key != "speckle"}
    if run.settings["classifier_steps"] and options.get("classifier_scale"):
        options["classifier"] = prior  # a stand-in for the run's: an empty batch calls none
    prior.sample(torch.empty(0, dtype=torch.long), **options)


def published_networks(preset: Preset) -> dict[str, torch.nn.Module]:
    """The published networks of the preset's codec losses, as arguments of `attach_losses`; OSError if weights are
    missing."""
    networks = {}
    if preset.losses.get("perceptual_weight"):
        networks["lpips"] = load_lpips(preset.losses.get("perceptual_net", "squeeze"))
    if preset.foundation not in ("none", "classifier"):
        networks["foundation"] = load_foundation(preset.foundation)
    return networks


def check_starts(settings: dict, split: dict) -> None:
    """DataError if initial weights have seen test windows of the split, or its simulated people."""
    for key in STARTS:
        if settings.get(key, "") in NO_PATH:
            continue
        if seen_people(settings[key], settings["data"]):
            raise DataError(
                f"{key}: {settings[key]} was trained on the simulated people in {settings['data']}: simulate others "
                "with another --seed"
            )
        if seen := seen_of_test(settings[key], split, settings["data"]):
            raise DataError(
                f"{key}: {settings[key]} was trained on {seen} of the test windows of this split: use weights from "
                "other people, or from the same split"
            )


def versions() -> dict[str, str]:
    """Python, platform and the packages that decide a result."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "numpy")}
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}


def device_name() -> str:
    if not torch.cuda.is_available():
        return f"CPU, {count(torch.get_num_threads(), 'thread')}"
    return f"{processes()} × {torch.cuda.get_device_name()}" if processes() > 1 else torch.cuda.get_device_name()
