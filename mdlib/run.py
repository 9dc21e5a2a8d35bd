"""The run folder, and papermill over the notebooks.

A run folder remembers what it is (run.json), so a notebook needs only its path, and a second call goes on where the
first one stopped.
"""

import json
import os
import platform
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image

from mdlib import __version__
from mdlib.data import DataError, WindowSet, find_windows, load_windows
from mdlib.files import whole_file
from mdlib.split import apply_split, make_split, read_split, write_split
from mdlib.systems import Preset, get_preset, get_system

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
# What a notebook makes; running it anew starts by removing this.
PRODUCTS = {
    "01": (),
    "02": ("codec", "split.json"),
    "03": ("prior", "pipeline"),
    "04": ("prior", "pipeline"),
    "05": ("generated",),
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
        changes = {key: self.settings[key] for key in ("codec_steps", "prior_steps", "windows_per_user")}
        return get_preset(self.settings["system"], self.settings["preset"], **changes)

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
            given = self.settings["split"]
            per_user = self.preset.windows_per_user or None
            split = read_split(given) if given else make_split(self.windows, windows_per_user=per_user)
            apply_split(self.windows, split)  # a split that does not fit is refused before it is kept
            write_split(split, path)
        return read_split(path)

    @cached_property
    def parts(self) -> dict[str, WindowSet]:
        """train, val and test."""
        return apply_split(self.windows, self.split)

    @classmethod
    def at(cls, path: str | Path) -> "Run":
        """The run in a folder that holds one."""
        return open_run(path)

    @property
    def output_size(self) -> int:
        """Height and width in pixels of the windows on disk; generated ones get the same."""
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
            "device": device_name(),
            "time": ", ".join(f"{name} {seconds}" for name, seconds in times.items()),
        }

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


def open_run(
    out: str | Path,
    *,
    data: str = "",
    system: str = "vqvae-transformer",
    preset: str = "demo",
    split: str = "",
    windows_per_user: int = 0,
    codec_steps: int = 0,
    prior_steps: int = 0,
    channels: int = 1,
    colormap: str = "auto",
    seed: int = 0,
) -> Run:
    """Start a run folder, or go on with one.

    Args:
        out: the folder; where it holds a run, that run's settings stand and empty `data` means just that run.
        data: folder of ID_k/ folders.
        system, preset: names of `mdlib.systems`.
        split: a split file of your own; "" makes one by recording and time.
        windows_per_user, codec_steps, prior_steps: instead of the preset's; 0 keeps the preset's.
        channels, colormap: how images are read, see `mdlib.data.load_windows`.
        seed: of weights, data order and noise.

    Raises:
        DataError: `out` holds a run of other settings, or there is no run and no data.
    """
    out = Path(out)
    settings = {
        "system": system,
        "preset": preset,
        "data": str(Path(data).resolve()) if data else "",
        "split": str(Path(split).resolve()) if split else "",
        "windows_per_user": windows_per_user,
        "codec_steps": codec_steps,
        "prior_steps": prior_steps,
        "channels": channels,
        "colormap": colormap,
        "seed": seed,
    }
    if (out / "run.json").exists():
        kept = _read(out)["settings"]
        changed = [key for key in settings if kept.get(key) != settings[key]] if data else []
        if changed:
            told = ", ".join(f"{key}: {kept.get(key)!r} is not {settings[key]!r}" for key in changed)
            raise DataError(f"{out} holds a run with other settings ({told}): choose another --out or those settings")
        return Run(out, kept)
    if not data:
        raise DataError(f"{out} holds no run yet: give the folder of your windows as data")
    get_preset(system, preset)  # a wrong name or folder is told before anything is written
    find_windows(data)
    out.mkdir(parents=True, exist_ok=True)
    _write(out, {"mdlib": __version__, "settings": settings, "versions": versions(), "steps": {}})
    return Run(out, settings)


def execute(system: str, preset: str, data: str, out: str, parameters: dict, first: str = "", last: str = "") -> Path:
    """Run the system's notebooks with papermill, output relayed as it comes; returns the path of the run folder.

    Notebooks that are done are skipped. `first` and `last` are notebook numbers ("03"); naming `first` runs anew from
    there on.

    Raises:
        DataError: an unknown system, preset, notebook number or parameter, or what a notebook stopped with.
    """
    names = _chosen(get_system(system).notebooks, first, last)
    known = {name: _parameters(name) for name in names}
    for key in parameters:
        if not any(key in accepted for accepted in known.values()):
            everything = sorted(set().union(*known.values()) - {"system", "preset", "data", "out"})
            raise DataError(f"no notebook has a parameter {key!r}; there are {', '.join(everything)}")
    out = Path(out)
    kept = {key: value for key, value in parameters.items() if key in known.get("02_train_vqvae", {})}
    given = {**kept, "system": system, "preset": preset, "data": data}
    if not (out / "run.json").exists() or "02_train_vqvae" in names:
        open_run(out, **{key: value for key, value in given.items() if key in open_run.__kwdefaults__})
    if first:
        _forget(out, names)
    common = {
        "system": system,
        "preset": preset,
        "data": str(Path(data).resolve()),
        "out": str(out.resolve()),
    }
    for name in names:
        if name in _read(out)["steps"]:
            print(f"{name}: done already", flush=True)
            continue
        values = {key: value for key, value in {**common, **parameters}.items() if key in known[name]}
        _execute_one(name, out, values)
    return out


def _execute_one(name: str, out: Path, values: dict) -> None:
    import papermill
    from traitlets.config import Config

    # Sockets in the file system where there are such: nobody on the network can listen, and ipykernel does not warn.
    transport = Config(KernelManager={"transport": "ipc"} if os.name == "posix" else {})
    print(f"{name}: starts", flush=True)
    started = time.monotonic()
    target = out / "notebooks" / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    with _environment(MDLIB_BATCH="1", PYTHONPATH=_python_path()):
        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                target,
                parameters=values,
                kernel_name="python3",
                progress_bar=False,
                config=transport,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
        except papermill.PapermillExecutionError as error:
            raise DataError(f"{name} stopped: {error.ename}: {error.evalue} (see {target})") from error
    print(f"{name}: done in {time.monotonic() - started:.0f} s", flush=True)


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
    """Remove what the named notebooks made, and the note that they are done."""
    record = _read(out)
    for name in names:
        record["steps"].pop(name, None)
        for product in PRODUCTS[name[:2]]:
            path = out / product
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    _write(out, record)


@contextmanager
def _environment(**variables: str):
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _python_path() -> str:
    """The kernel finds this very mdlib, also when it is not installed."""
    here = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


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
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def peak_memory_gb() -> float:
    """Largest resident memory of this process, or of the GPU where one is used, in GB (10⁹ bytes)."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
