"""The settings of a run, defined once: notebook 02, the command line, run.json and docs/options.md follow them."""

import ast
import json
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

from mdlib.data.files import find_windows
from mdlib.systems import SYSTEMS, System, get_system
from mdlib.utils import DataError, atomic_file, read_json

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


# The sampling options. Each system has some of them, with its own defaults.
SAMPLING = {
    "guidance_scale": "strength of guidance: above 1 more typical of the user; 1: no guidance",
    "guidance_interval": "apply guidance only between these times of denoising; 1 is pure noise, 0 the window",
    "temperature": "above 1: more varied; below 1: more typical; [0.8, 1.2]: rises over a user's windows",
    "top_k": "sample among this many of the likeliest tokens; 0: all",
    "top_p": "sample among the likeliest tokens of this total probability",
    "scheduler": "for diffusion: dpm++, ddim, pndm, ddpm; for vavae-dit: euler, heun",
    "sampler": "ancestral or mask_predict",
    "num_inference_steps": "steps from noise to the window",
    "timestep_shift": "below 1: more steps at high noise",
    "classifier_scale": "strength of classifier guidance; needs a run with classifier_steps",
    "use_cache": "store the keys and values of earlier tokens; false: slower, the same windows",
    "speckle": "add the speckle of training windows, which codecs remove; false: smooth windows",
}


def check_type(name: str, value, kind: type) -> None:
    """DataError if a parameter's value is of another type."""
    if not isinstance(value, {float: int | float, list: list | tuple}.get(kind, kind)):
        raise DataError(f"{name} must be of type {kind.__name__}, got {value!r}")


def _setting(default, help: str):
    value = dict(default_factory=type(default)) if isinstance(default, dict) else dict(default=default)
    return field(**value, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings that define a run, the same in all of its notebooks. Values of the wrong type raise DataError."""

    data: str = _setting(
        "", "folder of ID_k/ folders; empty: continue the run in `out`, or the data attached on Kaggle"
    )
    system: str = _setting("vqvae-transformer", "one of mdlib.systems.SYSTEMS")
    preset: str = _setting("auto", "auto (by the GPU), a size (smoke, demo, base), a machine (t4x2) or size@machine")
    split: str = _setting("", "a split file; empty: split by recording and time")
    windows_per_user: int = _setting(0, "training windows of each user; 0: the preset's, -1: all")
    variants: int = _setting(-1, "copies of each training window with recombined footsteps; -1: the preset's")
    unrecorded: dict = _setting({}, 'hold out these users\' windows in a condition for the test: {"backpack": [1, 2]}')
    codec: str = _setting("", "vq | kl | va; empty: the system's own")
    codec_steps: int = _setting(
        0, "optimizer steps of the codec; 0: the preset's, -1: none, codec_start is used as it is"
    )
    prior_steps: int = _setting(0, "optimizer steps of the prior; 0: the preset's")
    codec_options: dict = _setting({}, 'arguments of the codec or its training: {"batch_size": 16}')
    prior_options: dict = _setting({}, 'arguments of the prior or its training: {"ema_decay": 0.999}')
    foundation: str = _setting("", "what a VA-VAE is aligned with: none | classifier | a transformers vision model")
    user_codec: bool = _setting(False, "condition a VA-VAE on the user")
    codec_start: str = _setting("", "initial weights: a codec/ folder, a diffusers VQModel, or a published VA-VAE file")
    prior_start: str = _setting("", "initial weights: a pipeline's prior/, or a published LightningDiT file")
    init: str = _setting(
        "auto", "initial weights of codec and prior: auto (attached or shipped), none, or a pipeline/ folder"
    )
    joint_steps: int = _setting(
        0, "steps of joint training of codec (kl, va) and a prior over latents, at the end; 0: none"
    )
    classifier_steps: int = _setting(0, "steps of a user classifier that can guide a prior over latents; 0: none")
    channels: int = _setting(1, "1: intensity, the colour map inverted; 3: RGB as it is")
    colormap: str = _setting(
        "auto", "colour map: auto | jet | parula | viridis | grey | a matplotlib name; _r: reversed"
    )
    reading: dict = _setting(
        {}, 'for images with axes: {"crop": "auto"}; for file names without window numbers: {"order": "name"}'
    )
    seed: int = _setting(0, "random seed of weights, data order and noise")

    def __post_init__(self):
        for one in fields(self):
            check_type(one.name, getattr(self, one.name), one.type)
        least = dict.fromkeys(("prior_steps", "joint_steps", "classifier_steps", "seed"), 0)
        for name, low in (least | dict.fromkeys(("windows_per_user", "variants", "codec_steps"), -1)).items():
            if getattr(self, name) < low:
                raise DataError(f"{name} must be {low} or more, got {getattr(self, name)}")
        if self.codec_steps == -1:
            if not self.codec_start:
                raise DataError("codec_steps=-1 trains no codec: give the folder of a trained one as codec_start")
            if trained := ", ".join(name for name in ("joint_steps", "foundation") if getattr(self, name)):
                raise DataError(f"codec_steps=-1 uses the codec of codec_start as it is: leave out {trained}")
        for key, value in self.reading.items():
            if key not in ("crop", "order"):
                raise DataError(f"reading has no {key!r}; there are crop and order")
            check_type(f"{key} of reading", value, str)

    def to_dict(self) -> dict:
        """The settings as run.json holds them."""
        return json.loads(json.dumps(asdict(self)))


def order_of(reading: dict) -> str:
    """The order of windows that the setting `reading` asks for."""
    return reading.get("order", "number")


def defaults() -> dict:
    """Every setting with its default."""
    return asdict(RunSettings())


def settings_of(parameters: dict) -> dict:
    """The settings of a run among the parameters of a notebook (its `globals()`) or of a request."""
    return {key: parameters[key] for key in defaults() if key in parameters}


def notebook_parameters(notebook: str) -> dict[str, tuple[str, str]]:
    """Default and help of each parameter of a notebook, read from its parameters cell."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])))
    found, lines = {}, source.splitlines()
    for one in ast.parse(source).body:
        help = lines[one.lineno - 1].partition("  # ")[2]
        found[one.target.id] = (ast.unparse(one.value).replace("'", '"'), help)
    return found


def check_names(system: str, preset: str, parameters) -> System:
    """The system of that name. DataError if the system, the preset or a notebook parameter is unknown, or a parameter
    has the wrong type."""
    if key := next((key for key in ("system", "preset", "data", "out") if key in parameters), ""):
        raise DataError(f"{key} is an option of its own: give --{key}, not -p {key}=…")
    found, known = get_system(system), {}
    for notebook in found.notebooks:
        known |= {key: ast.literal_eval(default) for key, (default, _) in notebook_parameters(notebook).items()}
    for key, value in parameters.items():
        if key not in known:
            if key in SAMPLING:
                raise DataError(f'{key} is an option of sampling: give it as sampling={{"{key}": …}}')
            near = " or ".join(get_close_matches(key, known))
            hint = f"did you mean {near}?" if near else "docs/options.md lists all"
            raise DataError(f"no notebook has a parameter {key!r}; {hint}")
        check_type(key, value, type(known[key]))
    if preset != "auto":
        found.table(preset)
    return found


def check_request(
    out: Path, parameters: dict, first: str = "", last: str = "", **given: str
) -> tuple[RunSettings, tuple[str, ...]]:
    """Settings and notebooks of a request to run. Checks names and types (DataError) without importing torch.

    Args:
        out: the run folder; settings that are not given are those of the run in it, or else the defaults.
        parameters: of any notebook.
        first, last: numbers of notebooks, or "".
        given: data, system and preset, where not "".
    """
    stored = read_record(out)["settings"]
    wanted = {**stored, **parameters, **{key: value for key, value in given.items() if value}}
    settings = RunSettings(**settings_of(wanted))
    notebooks = check_names(settings.system, settings.preset, parameters).notebooks
    if not settings.data:
        raise DataError(f"{out} holds no run: correct --out, or start a run with --data FOLDER_OF_WINDOWS")
    if not stored or given.get("data"):
        find_windows(settings.data, order=order_of(settings.reading))
    if first > last > "":
        raise DataError(f"--from {first} comes after --to {last}: give them in order")
    numbers = [name[:2] for name in notebooks]
    for number in (first, last):
        if number and number not in numbers:
            raise DataError(f"this system has no notebook {number!r}: choose among {', '.join(numbers)}")
    return settings, tuple(name for name in notebooks if (first or "00") <= name[:2] <= (last or "99"))


def read_record(out: Path) -> dict:
    """The content of a run folder's run.json; empty settings and steps if there is no run."""
    file, remedy = out / "run.json", "delete it and give the run's first command again, with all options"
    return {"settings": {}, "steps": {}} | (read_json(file, remedy) if file.exists() else {})


def write_record(out: Path, record: dict) -> None:
    with atomic_file(out / "run.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def options_page() -> str:
    """The text of docs/options.md."""
    page = (
        "# Options\n\nEvery parameter of the notebooks. On the command line they are given as `-p NAME=VALUE` to "
        "`run`, `compare` and `study`, except those that `compare` (`images_per_user`, `classifiers`) and "
        "`study` (`split`, `windows_per_user`, `classifiers`) set themselves; `out`, `data`, `system` and "
        "`preset` have options of their own. This page is generated: `python -m mdlib options > docs/options.md`.\n"
    )
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page += f"\n## Notebook {path.stem}\n\n| parameter | default | meaning |\n|---|---|---|\n"
        for name, (default, help) in notebook_parameters(path.stem).items():
            page += f"| `{name}` | `{default}` | {help.replace(' |', ',')} |\n"
    page += (
        "\n## Sampling\n\nKeys of `sampling`, and NAME=VALUE of `generate -o`. A preset changes some of the defaults; "
    )
    page += "those of a pipeline are in its `model_index.json`.\n\n| option | meaning | defaults |\n|---|---|---|\n"
    every = {name: system.sampling_options() for name, system in SYSTEMS.items()}
    for option, help in SAMPLING.items():
        values = [f"{name} `{json.dumps(has[option])}`" for name, has in every.items() if option in has]
        page += f"| `{option}` | {help} | {', '.join(values)} |\n"
    return page
