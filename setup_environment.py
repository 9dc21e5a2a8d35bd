"""Make the Python environment of this repository and keep it in order. Standard library only.

    python setup_environment.py install    make .venv beside this file and install the pinned packages
    python setup_environment.py repair     mend an existing .venv, or the Python of --python
    python setup_environment.py test       install, then run the tests (further arguments go to pytest)
    python setup_environment.py demo       install, then simulate, train and validate a small model

Every command does the same: detect what is there, plan by the table `ROWS`, act, and detect again until
nothing is left to do. The state of .venv is all that is looked at: a run that was interrupted is completed by
the next one, and a run that finds everything in place changes nothing. A torch that works is never installed
again. Versions are pinned in pyproject.toml and nowhere else.

A Python that is not .venv's keeps what it has: `repair --python PATH` adds what is missing and changes what
does not work; pip is held back from everything else. On Kaggle and Colab `repair` looks after the Python that
runs it. Packages come from a wheelhouse where there is one (--wheelhouse, or a folder under /kaggle/input that
holds mdlib-*.whl), else from the package index.

Exit codes: 0 everything works; 1 something does not, and the last line says what; 3 everything works, but on
the CPU, because a torch for the GPU could not be got.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
INPUTS = Path("/kaggle/input")
WHEELHOUSE_MARKER = "mdlib-*.whl"

OLDEST_PYTHON = (3, 11)
TESTED_PYTHON = "3.11, 3.12 or 3.13"

STACK = ("torchvision", "accelerate", "transformers", "diffusers", "lpips")
# Libraries that import lazily look fine until a name is taken from them.
TOUCH = {
    "accelerate": ("Accelerator",),
    "transformers": ("PreTrainedModel",),
    "diffusers": ("DiffusionPipeline", "VQModel"),
}
# Distributions whose module has another name.
MODULE = {"pillow": "PIL", "scikit-learn": "sklearn"}
# Without these a part is left out; without any other package nothing runs.
OPTIONAL = {
    "ipywidgets": "no interactive views",
    "lpips": "no perceptual loss",
    "tensorboard": "no live curves",
}
# These release together; an ImportError in one of them is mended by installing all of them at their pins.
HUB_FAMILY = ("huggingface-hub", "tokenizers", "safetensors", "transformers", "diffusers")
HUB_ERROR = re.compile(r"huggingface_hub|huggingface-hub|tokenizers|httpx|safetensors|hf_xet")
# Compiled against one another: pip may not move them on its own account.
TORCH_FAMILY = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*")
HELD = re.compile(TORCH_FAMILY.pattern + r"|numpy|pandas|scipy|pillow|protobuf|ipywidgets")

MARK = "@probe "


class Stop(Exception):
    """Ends the program. The first argument is the one line a user reads; lines of a log may follow."""


# -- versions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pins:
    """`wanted`: name -> specifier to install; `accepted`: name -> specifier of what may stay."""

    wanted: dict[str, str]
    accepted: dict[str, str]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def module_of(name: str) -> str:
    """The module of a distribution."""
    return MODULE.get(name, name.replace("-", "_"))


def split_requirement(requirement: str) -> tuple[str, str]:
    """'Some_Name>=1,<2' -> ('some-name', '>=1,<2')."""
    name, specifier = re.fullmatch(r"([\w.-]*\w)\s*(.*)", requirement).groups()
    return canonical(name), specifier


def read_pins(extras: tuple[str, ...] = ()) -> Pins:
    """The pins of pyproject.toml, with those of the extras asked for and of the build system.

    Raises Stop if an extra does not exist.
    """
    import tomllib  # Python 3.11

    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = table["project"]["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise Stop(f"pyproject.toml has no extra named {extra!r}: it has {', '.join(sorted(optional))}")
    wanted = table["build-system"]["requires"] + [r for e in ("pinned", *extras) for r in optional[e]]
    return Pins(
        wanted=dict(map(split_requirement, wanted)),
        accepted=dict(map(split_requirement, table["project"]["dependencies"])),
    )


def release(version: str) -> tuple[int, ...]:
    """'2.10.0+cu126' -> (2, 10): comparable, without local tag and trailing zeros."""
    numbers = [int(n) for n in re.match(r"\d+(?:\.\d+)*", version).group().split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, specifier: str) -> bool:
    """Whether a release meets a specifier such as '>=2.6,<3'; local tags and pre-releases do not count."""
    have = release(version)
    for clause in filter(None, specifier.split(",")):
        operator, want = re.fullmatch(r"\s*(===|==|!=|>=|<=|>|<)\s*(\S+)\s*", clause).groups()
        other = release(want)
        meets = {
            "===": have == other,
            "==": have == other,
            "!=": have != other,
            ">=": have >= other,
            "<=": have <= other,
            ">": have > other,
            "<": have < other,
        }
        if not meets[operator]:
            return False
    return True


def local_tag(version: str) -> str:
    """'2.10.0+cu126' -> 'cu126'; '' where there is none."""
    return version.partition("+")[2]


# -- probe: runs in the interpreter that is looked at ----------------------------------------------


def tell(section: str, **facts) -> None:
    print(MARK + json.dumps({section: facts}), flush=True)


def describe(error: BaseException) -> str:
    """An exception and the first cause of it, in one line."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    texts = [f"{type(e).__name__}: {' '.join(str(e).split())[:200]}" for e in (links[0], links[-1])]
    return " <- ".join(dict.fromkeys(texts))


def probe(modules: list[str]) -> None:
    """Print, one JSON object a line, what this interpreter is and whether the modules work in it."""
    import importlib.metadata
    import importlib.util
    import sysconfig

    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    version = list(sys.version_info[:3])
    tell("interpreter", executable=sys.executable, version=version, compiles=bool(compiler and headers))
    versions: dict[str, str] = {}
    half: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    for dist in importlib.metadata.distributions():
        name, version = dist.metadata["Name"], dist.metadata["Version"]
        if not name or not version or canonical(name) in versions:
            continue
        versions[canonical(name)] = version
        needs[canonical(name)] = dist.requires or []
        # pip writes INSTALLER and RECORD last: without them it was stopped while it installed this one.
        ours = str(dist.locate_file("")).startswith(sys.prefix)
        if ours and not (dist.read_text("INSTALLER") and dist.read_text("RECORD")):
            half[canonical(name)] = version
    tell("installed", **versions)
    tell("half", **half)
    tell("conflicts", all=conflicts(needs, versions))
    spec = importlib.util.find_spec("mdlib")
    tell("project", mdlib=str(Path(spec.origin).parent) if spec and spec.origin else None)
    for name in modules:
        tell(name, error=f"the interpreter crashed while importing {name}")  # replaced if it does not
        try:
            facts = {"torch": probe_torch, "torchvision": probe_torchvision}.get(name, probe_import)(name)
            tell(name, error=None, **facts)
        except Exception as error:
            tell(name, error=describe(error))


def conflicts(needs: dict[str, list[str]], versions: dict[str, str]) -> list[list[str]]:
    """[package, what it requires, what is there ('' if nothing)] of every requirement that is not met."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
        except ImportError:
            return []
    found = []
    for package, texts in needs.items():
        for text in texts:
            try:
                wanted = Requirement(text)
            except InvalidRequirement:
                continue
            if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
                continue
            have = versions.get(canonical(wanted.name), "")
            if not have or not wanted.specifier.contains(have, prereleases=True):
                found.append([package, f"{canonical(wanted.name)}{wanted.specifier}", have])
    return found


def probe_import(name: str) -> dict:
    module = importlib.import_module(name)
    for attribute in TOUCH.get(name, ()):
        getattr(module, attribute)
    return {"version": str(getattr(module, "__version__", ""))}


def probe_torch(name: str) -> dict:
    import warnings

    torch = importlib.import_module(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = ["cpu"] + [f"cuda:{i}" for i in range(count)]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list(),
        "warning": " ".join(str(caught[0].message).split())[:300] if caught else None,
        "ops": {device: op_error(torch, device) for device in devices},
    }


def op_error(torch, device: str) -> str | None:
    """Convolution, reduction, backward: a matmul alone succeeds on GPUs that the build has no kernels for."""
    try:
        x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
        w = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
        torch.nn.functional.conv2d(x, w).relu().sum().backward()
        return None if torch.isfinite(x.grad.sum()).item() else "the gradient of a convolution is not finite"
    except Exception as error:
        return describe(error)


def probe_torchvision(name: str) -> dict:
    torch, torchvision = importlib.import_module("torch"), importlib.import_module(name)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5)
    if kept.tolist() != [0]:
        raise RuntimeError(f"torchvision.ops.nms kept boxes {kept.tolist()} of two equal ones")
    return {"version": torchvision.__version__}


def ask(python: Path | str, modules: tuple[str, ...] = (), timeout: float = 900, path: str = "") -> dict:
    """Run `probe` in another interpreter -> {section: facts}. Raises Stop if it does not run.

    path: a folder that is searched for modules before those of PYTHONPATH.
    """
    # Safe path: mdlib must be found because it is installed, not because this file lies beside it.
    folders = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": folders}
    facts: dict = {}
    rest = list(modules)
    while True:
        command = [str(python), str(ROOT / "setup_environment.py"), "probe", *rest]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
            for line in done.stdout.splitlines():
                if line.startswith(MARK):
                    facts.update(json.loads(line[len(MARK) :]))
            trouble = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            trouble = str(error)
        if "interpreter" not in facts:
            raise Stop(f"{python} does not run: {trouble}")
        before, rest = rest, [name for name in rest if name not in facts]
        if not rest:
            return facts
        if rest == before:  # a module that crashes is named, and the rest asked again
            raise Stop(f"{python} does not answer: {trouble}")


# -- detect ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    driver: int  # major number


def ask_driver(query: str) -> str:
    """The answer of nvidia-smi, a line for each GPU or process; '' where there is none."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, without importing torch; () where there are none."""
    text = ask_driver("gpu=name,compute_cap,driver_version")
    found = re.findall(r"^(.+), (\d+)\.(\d+), (\d+)\.", text, re.MULTILINE)
    return tuple(Gpu(name, (int(major), int(minor)), int(driver)) for name, major, minor, driver in found)


def hosted() -> str:
    """'Kaggle', 'Colab' or ''. There the image brings a torch that works, and a fresh session restores it."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "Kaggle"
    return "Colab" if "COLAB_RELEASE_TAG" in os.environ else ""


@dataclass(frozen=True)
class State:
    """All that the table of rows looks at."""

    pins: Pins
    gpus: tuple[Gpu, ...] = ()
    python: Path | None = None  # None until .venv has one
    ours: bool = True  # whether it is .venv's
    host: str = ""  # see `hosted`
    mend: bool = False  # `repair` looks closer than `install`
    interpreter: dict = field(default_factory=dict)
    installed: dict[str, str] = field(default_factory=dict)
    half: dict[str, str] = field(default_factory=dict)
    conflicts: tuple[tuple[str, str, str], ...] = ()
    mdlib: str | None = None
    torch: dict = field(default_factory=dict)
    modules: dict[str, dict] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()  # of torch's family, in the process that asks
    online: bool | None = None  # whether the package index answers; None while nobody has asked
    wheelhouse: Path | None = None
    wheels: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what the wheelhouse has for this Python

    @property
    def folder(self) -> Path:
        """Where the log, the constraints and the note of what was set up are."""
        return folder_of(self.python) if self.python else VENV

    @property
    def specifiers(self) -> dict[str, str]:
        """What every package has to meet: its pin in .venv, the accepted range elsewhere."""
        return self.pins.wanted if self.ours else self.pins.accepted


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_ours(python: Path) -> bool:
    return python.parent.absolute() == venv_python().parent.absolute()


def folder_of(python: Path) -> Path:
    """.venv, or a folder of the user's cache for a Python that is not ours."""
    if is_ours(python):
        return VENV
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "mdlib" / re.sub(r"\W+", "-", str(python.absolute())).strip("-")


def detect(pins: Pins, python: Path | None = None, mend: bool = False, more=(), path: str = "") -> State:
    """Look at the machine and at a Python (default: .venv's); nothing is changed.

    more: modules to try beside those of the pins; path: a folder that is searched for modules first.
    """
    gpus, python = find_gpus(), python or venv_python()
    ours = is_ours(python)
    if ours and not python.exists():
        return State(pins, gpus)
    names = [*STACK, *(map(module_of, pins.accepted) if mend else ()), *more]
    names = [name for name in dict.fromkeys(names) if name != "torch"]
    try:
        facts = ask(python, ("torch", *names), path=path)
        refuse_old_python(facts["interpreter"]["version"], f"the Python of {VENV if ours else python}")
    except Stop as stop:
        raise Stop(f"{stop}; delete {VENV} to have it made anew" if ours else str(stop)) from stop
    here = Path(sys.executable).absolute() == python.absolute()
    return State(
        pins=pins,
        gpus=gpus,
        python=python,
        ours=ours,
        host="" if ours else hosted(),
        mend=mend,
        interpreter=facts["interpreter"],
        installed=facts["installed"],
        half=facts["half"],
        conflicts=tuple(map(tuple, facts["conflicts"]["all"])),
        mdlib=facts["project"]["mdlib"],
        torch=facts["torch"],
        modules={name: facts[name] for name in names},
        loaded=tuple(name for name in ("torch", "torchvision") if here and name in sys.modules),
    )


def refuse_old_python(version, which: str = "this Python") -> None:
    """Raises Stop for a Python that the pinned packages do not support."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        have = ".".join(map(str, version[:3]))
        raise Stop(f"{which} is {have}, mdlib needs Python {TESTED_PYTHON}")


# -- where packages come from ----------------------------------------------------------------------


def index_answers(python: Path) -> bool:
    """Whether pip, as it is set up here, reaches an index. Asked of a small package that mdlib needs."""
    command = [str(python), "-m", "pip", "index", "versions", "lpips", "--timeout", "3", "--retries", "0"]
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_marked(marker: str, *bases: Path) -> list[Path]:
    """The folders in or under the bases, a few levels deep, that hold a file of the marker's pattern."""
    return sorted({p.parent for base in bases for depth in range(5) for p in base.glob("*/" * depth + marker)})


def choose_wheelhouse(given: str = "") -> Path | None:
    """The folder given, or the one that is marked, or None. Raises Stop if it is none or one of several."""
    found = [Path(given)] if given else find_marked(WHEELHOUSE_MARKER, ROOT / "wheelhouse", INPUTS)
    if len(found) > 1:
        raise Stop(f"there are {len(found)} wheelhouses: choose one with --wheelhouse: {', '.join(map(str, found))}")
    if given and not list(found[0].glob("*.whl")):
        raise Stop(f"{given} holds no wheels (*.whl)")
    return found[0].absolute() if found else None


def read_wheels(folder: Path | None, version: list[int]) -> dict[str, tuple[str, ...]]:
    """{name: versions} of the wheels of a folder that this version of Python can install."""
    wheels: dict[str, tuple[str, ...]] = {}
    for file in sorted(folder.glob("*.whl")) if folder else ():
        parts = file.stem.split("-")
        if len(parts) < 5:
            continue
        name, its, python, abi = parts[0], parts[1], parts[-3], parts[-2]
        if f"cp{version[0]}{version[1]}" in python.split(".") or python.startswith("py") or abi == "abi3":
            wheels[canonical(name)] = (*wheels.get(canonical(name), ()), its)
    return wheels


def in_wheelhouse(s: State, requirement: str) -> bool:
    name, specifier = split_requirement(requirement)
    versions = s.wheels.get(name, ())
    return specifier[3:] in versions if specifier.startswith("===") else any(satisfies(v, specifier) for v in versions)


def obtainable(s: State, *requirements: str) -> bool:
    return s.online is not False or all(in_wheelhouse(s, r) for r in requirements)


def needed(s: State) -> list[tuple[str, list[str]]]:
    """(why, requirements) of every row that would install something."""
    rows = [(row.why(s), row.commands(s)) for row in ROWS if row.commands and row.why(s)]
    found = [(why, [r for command in commands for r in requirements_of(command)]) for why, commands in rows]
    return [(why, requirements) for why, requirements in found if requirements]


def with_sources(s: State, given: str = "") -> State:
    """The state with where packages may come from."""
    wheelhouse = choose_wheelhouse(given)
    wheels = read_wheels(wheelhouse, s.interpreter.get("version", sys.version_info))
    python = s.python or Path(sys.executable)
    # A Python without pip cannot ask; .venv gets one, and pip will tell.
    online = "pip" not in (s.installed or ask(python)["installed"]) or index_answers(python)
    return replace(s, online=online, wheelhouse=wheelhouse, wheels=wheels)


# -- what the rows ask -----------------------------------------------------------------------------

# torch for CUDA 13 needs compute capability 7.5 and driver 580; its CUDA 12.6 build reaches back to
# capability 5.0 and driver 525, and there is one of these releases of torch.
WHEELS = "https://download.pytorch.org/whl/"
MODERN_CAPABILITY, MODERN_DRIVER, OLDEST_DRIVER = (7, 5), 580, 525
CU126_RELEASES, NEWEST_CU126 = ">=2.6,<2.15", "2.14.1"
DRIVER_OF_CUDA = {11: 450, 12: OLDEST_DRIVER, 13: MODERN_DRIVER}
INDEX = {  # kind of machine -> build of torch; '' is that of the default package index
    "cpu": "",
    "gpu": "cu130" if os.name == "nt" else "",  # the default index has no CUDA build for Windows
    "old driver": "cu126",
    "old gpu": "cu126",
}


def machine(s: State) -> str:
    """'cpu', 'gpu', 'old driver' or 'old gpu'; a GPU whose driver is too old for any build counts as none."""
    if not s.gpus or min(g.driver for g in s.gpus) < OLDEST_DRIVER:
        return "cpu"
    if min(g.capability for g in s.gpus) < MODERN_CAPABILITY:
        return "old gpu"
    return "gpu" if min(g.driver for g in s.gpus) >= MODERN_DRIVER else "old driver"


def has_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether a build runs on a GPU: same major, no later minor (sm_), or any earlier by PTX (compute_)."""
    for arch in arch_list:
        kind, digits = re.fullmatch(r"(sm|compute)_(\d+)\w?", arch).groups()
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def torch_broken(s: State) -> str:
    """Why torch does not even work on the CPU, or ''."""
    version = s.installed.get("torch")
    if version is None:
        return "torch is not there"
    if "torch" in s.half and (s.ours or s.torch["error"]):
        return "torch is half installed"
    if s.torch["error"]:
        return f"torch does not import: {s.torch['error']}"
    if not satisfies(version, s.pins.accepted["torch"]):
        return f"torch {version} is outside {s.pins.accepted['torch']}"
    if s.torch["ops"]["cpu"]:
        return f"torch does not compute: {s.torch['ops']['cpu']}"
    return ""


def torch_unfit(s: State) -> str:
    """Why a torch that works on the CPU does not on this GPU, or ''. A busy GPU is no reason.

    `install` leaves a CPU build alone; `repair` exchanges it for one that uses the GPU.
    """
    version = s.installed["torch"]
    if machine(s) == "cpu":
        return ""
    if s.torch["cuda"] is None:
        return f"torch {version} is a CPU build and does not use {s.gpus[0].name}" if s.mend else ""
    needed = DRIVER_OF_CUDA.get(int(s.torch["cuda"].split(".")[0]), 0)
    for gpu in s.gpus:
        if gpu.driver < needed:
            return f"driver {gpu.driver} is too old for CUDA {s.torch['cuda']} of torch {version}"
        if not has_kernels(gpu.capability, s.torch["arch_list"]):
            return f"torch {version} has no kernels for {gpu.name} ({gpu.capability[0]}.{gpu.capability[1]})"
    return next((e for e in s.torch["ops"].values() if e and "no kernel image" in e), "")


def torch_trouble(s: State) -> str:
    """Why torch has to be installed, or ''."""
    return torch_broken(s) or torch_unfit(s)


def cpu_instead(s: State) -> str:
    """Why a torch that the GPU cannot run stays, or '': the right one cannot be got, and the CPU works."""
    if s.online is not False or torch_broken(s) or obtainable(s, *new_pair(s)[1]):
        return ""
    return torch_unfit(s) if not s.host or exchanged_on_host(s) else ""


def torch_to_change(s: State) -> str:
    return "" if cpu_instead(s) else torch_trouble(s)


def torch_to_change_on(kind: str) -> Callable[[State], str]:
    return lambda s: torch_to_change(s) if machine(s) == kind else ""


def pair_trouble(s: State) -> str:
    """Why torchvision does not go with a torch that works, or ''. It breaks diffusers and transformers."""
    if torch_to_change(s) or "torchvision" in forgone(s):
        return ""
    vision = s.modules["torchvision"]
    if "torchvision" in s.half and (s.ours or vision["error"]):
        return "torchvision is half installed"
    if vision["error"]:
        return f"torchvision does not work: {vision['error']}"
    tags = local_tag(s.torch["version"]), local_tag(vision["version"])
    if all(tags) and tags[0] != tags[1]:
        return f"torch is built for {tags[0]}, torchvision for {tags[1]}"
    return ""


def pair_trouble_where(got: bool) -> Callable[[State], str]:
    """Of a torchvision that can be got, or that cannot: then it goes, diffusers does without it."""

    def why(s: State) -> str:
        trouble = pair_trouble(s)
        return trouble if trouble and (obtainable(s, *own_pair(s)[1]) or not s.ours) is got else ""

    return why


def in_use_trouble(s: State) -> str:
    """torch cannot be exchanged under a process that has loaded it."""
    trouble = s.loaded and (torch_to_change(s) or pair_trouble(s))
    return f"{trouble}, and this process has loaded {' and '.join(s.loaded)}" if trouble else ""


def use_another_process(s: State) -> str:
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
        return "a batch run has no second kernel: put `!python setup_environment.py repair` into the first cell"
    return "restart the kernel, and repair before anything imports torch"


def exchanged_on_host(s: State) -> bool:
    """torch is never installed into a hosted image, but for a GPU that the image has no kernels for."""
    return machine(s) == "old gpu" and not torch_broken(s) and s.torch["cuda"] is not None


def hosted_trouble(s: State) -> str:
    return torch_to_change(s) if s.host and not exchanged_on_host(s) else ""


def use_another_session(s: State) -> str:
    if torch_broken(s):
        return f"start a fresh {s.host} session: its image brings a torch that works"
    return (
        f"this is the image of a session without a GPU: choose the accelerator anew, verify the account's phone "
        f"number, and remove docker_image from the {s.host} notebook's metadata"
    )


def venv_trouble(s: State) -> str:
    if s.python is None:
        return f"{VENV} is not there"
    return "" if "pip" in s.installed or not s.ours else "pip is not there"


def half_installed(s: State) -> dict[str, str]:
    """Packages that an interrupted pip left behind; torch, torchvision and mdlib have rows of their own.

    Elsewhere than in .venv, system packages look the same; there only those count that do not import.
    """
    half = {k: v for k, v in s.half.items() if k not in ("torch", "torchvision", "mdlib")}
    if s.ours:
        return half
    return {k: v for k, v in half.items() if s.modules.get(module_of(k), {}).get("error")}


def half_trouble(s: State) -> str:
    return ", ".join(half_installed(s))


def packages_off(s: State) -> list[str]:
    """Those that are missing or outside their specifiers. torch and torchvision have rows of their own."""
    return [
        name
        for name, specifier in s.specifiers.items()
        if name not in ("torch", "torchvision")
        and (name not in s.installed or not satisfies(s.installed[name], specifier))
    ]


def forgone(s: State) -> list[str]:
    """Packages that cannot be got and that mdlib goes on without, or with in another version than the pin."""
    if s.online is not False:
        return []
    gone = [name for name in packages_off(s) if not obtainable(s, *pinned(s, [name]))]
    tolerable = [
        name
        for name in gone
        if (satisfies(s.installed[name], s.pins.accepted.get(name, "")) if name in s.installed else name in OPTIONAL)
    ]
    if "torchvision" not in s.installed and not torch_broken(s) and not obtainable(s, *own_pair(s)[1]):
        tolerable += ["torchvision", "lpips"]
    return list(dict.fromkeys(tolerable))


def packages_to_install(s: State) -> list[str]:
    """Outside .venv the missing ones come first: alone they need no other package to move."""
    off = [name for name in packages_off(s) if name not in forgone(s)]
    missing = [name for name in off if name not in s.installed]
    return missing if missing and not s.ours else off


def package_trouble(s: State) -> str:
    off = packages_to_install(s)
    told = ", ".join(f"{name} {s.installed.get(name, 'missing')}" for name in off)
    return told if len(off) < 6 else f"{len(off)} packages are missing or not at their pins"


def failing(s: State) -> dict[str, str]:
    """{module: error} of those that do not import, other than what is gone without."""
    without = [module_of(name) for name in forgone(s)]
    return {name: facts["error"] for name, facts in s.modules.items() if facts["error"] and name not in without}


def import_trouble(s: State) -> str:
    """Modules that do not import although torch works and every package is there."""
    if torch_to_change(s) or pair_trouble(s) or half_trouble(s) or package_trouble(s):
        return ""
    return "; ".join(f"{name}: {error}" for name, error in failing(s).items())


def project_trouble(s: State) -> str:
    if not s.ours:
        return "" if s.mdlib else "mdlib is not installed"
    here = s.mdlib is not None and Path(s.mdlib) == ROOT / "mdlib" and "mdlib" not in s.half
    return "" if here else "mdlib of this folder is not installed"


def offline_trouble(s: State) -> str:
    """What has to be installed and cannot be got."""
    if s.online is not False:
        return ""
    for why, requirements in needed(s):
        lacking = [r for r in requirements if not in_wheelhouse(s, r)]
        if lacking:
            return f"{why}; the package index does not answer, and no wheelhouse has {', '.join(lacking)}"
    return ""


def use_a_wheelhouse(s: State) -> str:
    where = "attach the dataset that holds it, or turn the Internet on" if s.host else "name its folder by --wheelhouse"
    return where + (f" (looked into {s.wheelhouse})" if s.wheelhouse else "")


# What is told and left as it is.


def forgone_note(s: State) -> str:
    told = [
        f"{name} stays at {s.installed[name]}" if name in s.installed else f"{name} is missing" for name in forgone(s)
    ]
    if not told:
        return ""
    lpips = "; without LPIPS images are compared by PSNR, SSIM and judges' features" if "lpips" in forgone(s) else ""
    return f"{', '.join(told)}: the package index does not answer{lpips}; {use_a_wheelhouse(s)}"


def driver_note(s: State) -> str:
    if not s.gpus or machine(s) != "cpu":
        return ""
    oldest = min(s.gpus, key=lambda g: g.driver)
    return f"{oldest.name} is not used: its driver {oldest.driver} is below {OLDEST_DRIVER}"


def cpu_build_note(s: State) -> str:
    if s.mend or machine(s) == "cpu" or s.torch["error"] or s.torch["cuda"] is not None:
        return ""
    return f"torch is a CPU build: to use {s.gpus[0].name}, run python setup_environment.py repair"


def old_gpu_note(s: State) -> str:
    told = " ".join(f"{name}={value}" for name, value in variables(s).items())
    if not told:
        return ""
    return f"this GPU is too old for Triton: start Python with {told}, and train in float32 (preset p100)"


def hold_note(s: State) -> str:
    """A later plain `pip install` would bring back a torch without kernels for this GPU."""
    if machine(s) != "old gpu" or torch_trouble(s):
        return ""
    return f"before you install anything else: PIP_CONSTRAINT={s.folder / 'constraints.txt'}"


def launcher_note(s: State) -> str:
    if len(s.gpus) < 2 or satisfies(s.installed.get("accelerate", "0"), ">=1.14"):
        return ""
    return "two GPUs: start with `accelerate launch --multi_gpu`; notebook_launcher fails before accelerate 1.14"


def conflict_note(s: State) -> str:
    others = [c for c in s.conflicts if s.mend and not s.ours and c[0] not in s.pins.accepted]
    told = "; ".join(f"{package} wants {wanted}, {have or 'nothing'} is there" for package, wanted, have in others[:3])
    return (
        f"{len(others)} requirements of packages mdlib does not use are not met, left alone: {told}" if others else ""
    )


# -- what the rows do ------------------------------------------------------------------------------


def pip_install(s: State, *arguments: str, index: str = "") -> list[str]:
    """Requirements stand last. A wheelhouse that has all of them is enough; else pip may look further."""
    requirements = [a for a in arguments if not a.startswith("-")]
    enough = "--no-deps" in arguments and all(in_wheelhouse(s, r) for r in requirements)
    source = ["--index-url", WHEELS + index] if index else []
    if s.wheelhouse and s.wheels:
        source += ["--find-links", str(s.wheelhouse)]
        source = ["--no-index", *source[-2:]] if enough or s.online is False else source
    quiet = ["--no-input", "--disable-pip-version-check", "-c", str(s.folder / "constraints.txt")]
    python = str(s.python or venv_python())
    return [python, "-m", "pip", "install", *quiet, "--progress-bar", "off", *source, *arguments]


def requirements_of(command: list[str]) -> list[str]:
    """What a command of `pip_install` installs from an index; [] of another command."""
    if "--progress-bar" not in command:
        return []
    tail = command[command.index("--progress-bar") + 2 :]
    values = {tail[i + 1] for i, word in enumerate(tail) if word in ("--index-url", "--find-links")}
    return [word for word in tail if not word.startswith("-") and word not in values]


def make_venv(s: State) -> list[list[str]]:
    if s.python is None:
        return [[sys.executable, "-m", "venv", str(VENV)]]
    return [[str(s.python), "-m", "ensurepip", "--upgrade"]]


def pair(s: State, version: str, tag: str) -> list[str]:
    """Requirements of torch and torchvision of one build; `tag` is '' for that of the default index.

    Three equals signs: the very build of that index; two are content with a local one of the same version.
    """
    build = f"+{tag}" if tag else ""
    vision = "torchvision"  # pip finds the one that belongs to this torch
    if release(version) == release(s.pins.wanted["torch"].lstrip("=")):
        vision += "===" + s.pins.wanted["torchvision"].lstrip("=") + build
    elif satisfies(version, ">=2.1,<2.15"):  # torch 2.10.0 and torchvision 0.25.0 are released together
        _, minor, patch = (*release(version), 0, 0)[:3]
        vision += f"===0.{minor + 15}.{patch}{build}"
    return [f"torch==={version.partition('+')[0]}{build}", vision]


def new_pair(s: State) -> tuple[str, list[str]]:
    """-> (build tag, requirements) of the torch that this machine gets.

    A torch that an old GPU cannot run is exchanged for the same release, as far as there is a build for it.
    """
    tag, version = INDEX[machine(s)], s.pins.wanted["torch"].lstrip("=")
    if machine(s) == "old gpu" and "torch" in s.installed:
        version = s.installed["torch"] if satisfies(s.installed["torch"], CU126_RELEASES) else NEWEST_CU126
    return tag, pair(s, version, tag)


def own_pair(s: State) -> tuple[str, list[str]]:
    """-> (build tag, requirements) that match a torchvision to the torch that works and stays.

    The exception is a `+cpu` build in .venv: the default index has a pair that works everywhere.
    """
    have = s.installed["torch"]
    tag = local_tag(have)
    return new_pair(s) if s.ours and tag == "cpu" else (tag, pair(s, have, tag)[1:])


def install_pair(s: State) -> list[list[str]]:
    tag, wanted = new_pair(s) if torch_to_change(s) else own_pair(s)
    alone = ["--no-deps"] if len(wanted) == 1 else []
    if set(wanted) <= {f"{name}==={version}" for name, version in s.installed.items()}:
        # Of the right version, yet its files do not work.
        wanted = wanted if torch_to_change(s) else wanted[-1:]
        alone = ["--ignore-installed", "--no-deps"]
    return [pip_install(s, *alone, *wanted, index=tag)]


def remove_torchvision(s: State) -> list[list[str]]:
    return [[str(s.python), "-m", "pip", "uninstall", "--yes", "torchvision"]]


def rewrite(s: State, names) -> list[str]:
    # Not --force-reinstall: pip cannot uninstall what has no RECORD.
    return pip_install(s, "--ignore-installed", "--no-deps", *(f"{name}==={s.installed[name]}" for name in names))


def rewrite_half(s: State) -> list[list[str]]:
    return [rewrite(s, half_installed(s))]


def pinned(s: State, names) -> list[str]:
    return [name + s.specifiers[name] for name in names]


def install_packages(s: State) -> list[list[str]]:
    """In .venv all of them, so that pip sees their pins together."""
    if s.ours:
        skipped = ("torch", "torchvision", *forgone(s))
        return [pip_install(s, *pinned(s, [name for name in s.pins.wanted if name not in skipped]))]
    names = packages_to_install(s)
    # What a hosted image lacks has its needs met there; left to itself, pip might change the image.
    alone = ["--no-deps"] if s.host and not any(name in s.installed for name in names) else []
    return [pip_install(s, *alone, *pinned(s, names))]


def reinstall_imports(s: State) -> list[list[str]]:
    """First what the culprits depend on, then their own files, and those of a module they miss."""
    names = {module_of(name): name for name in s.pins.accepted}
    culprits: list[str] = []
    damaged: list[str] = []
    for module, error in failing(s).items():
        culprits += HUB_FAMILY if HUB_ERROR.search(error) else ()
        culprits.append(names[module])
        damaged.append(names[module])
        damaged += filter(s.installed.get, map(canonical, re.findall(r"No module named '(\w+)", error)))
    culprits, damaged = list(dict.fromkeys(culprits)), list(dict.fromkeys(damaged))
    if s.ours:
        return [pip_install(s, *pinned(s, culprits)), rewrite(s, dict.fromkeys([*culprits, *damaged]))]
    if any(package in culprits for package, _, _ in s.conflicts):
        hub = {name: s.pins.wanted[name] for name in culprits if name == "huggingface-hub"}
        return [pip_install(s, *(name + {**s.specifiers, **hub}[name] for name in culprits))]
    return [rewrite(s, damaged)]


def install_project(s: State) -> list[list[str]]:
    if s.ours:
        return [pip_install(s, "--no-deps", "--no-build-isolation", f"--editable={ROOT}")]
    if (ROOT / "mdlib").is_dir():
        return [[str(s.python), str(ROOT / "setup_environment.py"), "link"]]
    return [pip_install(s, "--no-deps", "mdlib")]


def link_project() -> None:
    """Let this interpreter find mdlib where it lies, which may be a place that cannot be written to."""
    import site
    import sysconfig

    packages = Path(sysconfig.get_path("purelib"))
    if not os.access(packages, os.W_OK):
        packages = Path(site.getusersitepackages())
        packages.mkdir(parents=True, exist_ok=True)
    (packages / "mdlib.pth").write_text(f"{ROOT}\n", encoding="utf-8")


# -- plan ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """If `why(state)` is not empty, the commands are run; without commands a row stops, or is told as a note."""

    name: str
    why: Callable[[State], str]
    commands: Callable[[State], list[list[str]]] | None = None
    stop: Callable[[State], str] | None = None  # what to do, in words
    code: int = 0  # exit code of a note


ROWS = (
    Row("virtual environment", venv_trouble, make_venv),
    Row("torch in use", in_use_trouble, stop=use_another_process),
    Row("torch of a hosted image", hosted_trouble, stop=use_another_session),
    Row("nothing to install from", offline_trouble, stop=use_a_wheelhouse),
    Row("half-installed packages", half_trouble, rewrite_half),
    Row("torch for an old GPU", torch_to_change_on("old gpu"), install_pair),
    Row("torch for an old driver", torch_to_change_on("old driver"), install_pair),
    Row("torch for a GPU", torch_to_change_on("gpu"), install_pair),
    Row("torch without a GPU", torch_to_change_on("cpu"), install_pair),
    Row("torchvision to match torch", pair_trouble_where(got=True), install_pair),
    Row("torchvision that cannot be matched", pair_trouble_where(got=False), remove_torchvision),
    Row("packages", package_trouble, install_packages),
    Row("imports", import_trouble, reinstall_imports),
    Row("mdlib", project_trouble, install_project),
    Row("the GPU is not used, everything runs on the CPU", cpu_instead, code=3),
    Row("goes on without", forgone_note),
    Row("old driver", driver_note),
    Row("CPU build", cpu_build_note),
    Row("old GPU", old_gpu_note),
    Row("constraints", hold_note),
    Row("launcher", launcher_note),
    Row("other packages", conflict_note),
)


@dataclass(frozen=True)
class Step:
    name: str
    why: str
    commands: list[list[str]]


def plan(s: State) -> list[Step]:
    """What to do in a state; [] when there is nothing to do. Raises Stop if nothing can be done."""
    steps = []
    for row in ROWS:
        why = row.why(s) if row.commands or row.stop else ""
        if why and row.stop:
            raise Stop(f"{row.name}: {why}; {row.stop(s)}")
        if why:
            steps.append(Step(row.name, why, row.commands(s)))
    return steps


def notes(s: State) -> list[tuple[str, int]]:
    """What is told when nothing is left to do: (line, exit code)."""
    told = [(row, row.why(s)) for row in ROWS if not row.commands and not row.stop]
    return [(f"note: {row.name}: {why}", row.code) for row, why in told if why]


# -- act -------------------------------------------------------------------------------------------


def execute(command: list[str], log: Path) -> None:
    """Run a command with its output in the log. Raises Stop with the last lines of the log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise Stop(f"a step ended with exit code {done.returncode}; the whole log is {log}", *lines[-12:])


def hold(s: State, command: list[str]) -> None:
    """Write the constraints that keep pip's hands off what the command does not name."""
    named = {split_requirement(requirement)[0] for requirement in requirements_of(command)}

    def free(name: str) -> bool:
        if "torch" in named and TORCH_FAMILY.fullmatch(name):
            return True
        return name in named or (name in HUB_FAMILY and bool(named & set(HUB_FAMILY)))

    installed = ask(s.python or venv_python())["installed"]
    family = TORCH_FAMILY if s.ours else HELD
    held = {name: v for name, v in installed.items() if family.fullmatch(name) or name in s.pins.accepted}
    lines = [f"{name}==={version}\n" for name, version in sorted(held.items()) if not free(name)]
    s.folder.mkdir(parents=True, exist_ok=True)
    (s.folder / "constraints.txt").write_text("".join(lines), encoding="utf-8")


def act(s: State, steps: list[Step]) -> None:
    for step in steps:
        with timed(f"{step.name}: {step.why}"):
            for command in step.commands:
                if "-c" in command and "pip" in command:
                    hold(s, command)
                execute(command, s.folder / "setup.log")


class timed:
    """One line on the screen: what is being done and, when it is done, for how long it took."""

    def __init__(self, what: str):
        self.what = what if len(what) <= 160 else what[:157] + "..."

    def __enter__(self):
        self.start = time.monotonic()
        print(f"  {self.what} ... ", end="", flush=True)

    def __exit__(self, kind, error, trace):
        print("failed" if kind else "done", f"({time.monotonic() - self.start:.0f} s)", flush=True)


def ensure(
    extras: tuple[str, ...] = (),
    dry_run: bool = False,
    python: Path | None = None,
    mend: bool = False,
    wheelhouse: str = "",
) -> State:
    """Detect, plan, act, detect again, until nothing is left. Raises Stop if a remedy does not help."""
    pins = read_pins(extras)
    folder = folder_of(python or venv_python())
    where = VENV if folder == VENV else python
    print(f"mdlib environment: {where}" + ("" if dry_run else f" (log: {folder / 'setup.log'})"))
    what = "every package" if mend else "torch, " + ", ".join(STACK)
    sources: dict = {}
    tried: list[list[Step]] = []
    while True:
        with timed(f"checking {what}"):
            state = detect(pins, python, mend)
        if not sources and needed(state):
            found = with_sources(state, wheelhouse)
            sources = {name: getattr(found, name) for name in ("online", "wheelhouse", "wheels")}
        state = replace(state, **sources)
        steps = plan(state)
        if dry_run:
            for step in steps:
                print(f"  would do: {step.name}: {step.why}", *map(shlex.join, step.commands), sep="\n    ")
            told = [] if steps else [line for line, _ in notes(state)]
            print(*told, "nothing was changed" if steps else "nothing to do", sep="\n")
            return state
        if not steps:
            remember(state)
            print(summary(state), *(line for line, _ in notes(state)), sep="\n")
            return state
        commands = [step.commands for step in steps]
        if len(tried) == 6 or commands in tried:
            raise Stop(f"{steps[0].name}: {steps[0].why}; the remedy did not help; the log is {folder / 'setup.log'}")
        tried.append(commands)
        act(state, steps)


def remember(s: State) -> None:
    """Note the torch that works, so that check_environment.py can tell when another has taken its place."""
    if hold_note(s):
        hold(s, [])
    text = json.dumps({"torch": s.torch["version"], "cuda": s.torch["cuda"]}) + "\n"
    file = s.folder / "torch.json"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        s.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def summary(s: State) -> str:
    versions = [f"torch {s.torch['version']}"]
    versions += [
        f"{name} {s.installed[name]}" for name in ("torchvision", "diffusers", "transformers") if name in s.installed
    ]
    return f"ready: {', '.join(versions)}"


def variables(s: State) -> dict[str, str]:
    """The environment that an old GPU needs: it cannot run Triton (capability 7.0), and newer torch calls Triton
    kernels without asking."""
    if machine(s) == "cpu" or min(g.capability for g in s.gpus) >= (7, 0):
        return {}
    return {"TORCH_DISABLE_NATIVE_JIT": "1", "TORCHDYNAMO_DISABLE": "1"}


# -- commands --------------------------------------------------------------------------------------


def run_module(s: State, *arguments: str, cwd: Path | None = None) -> int:
    """`python -m ...` of .venv with its output on this screen -> exit code."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **variables(s)}
    print(f"$ python -m {shlex.join(arguments)}", flush=True)
    return subprocess.run([str(venv_python()), "-m", *arguments], env=env, cwd=cwd).returncode


def repair(args: argparse.Namespace) -> int:
    """Mend .venv, or the Python that was named or that the host brings -> exit code."""
    given = args.python or (sys.executable if hosted() else "")
    python = Path(shutil.which(given) or given) if given else venv_python()
    if is_ours(python) and not python.exists():
        raise Stop(f"{VENV} is not there: run `python setup_environment.py install`")
    state = ensure(tuple(args.extra), args.dry_run, python, mend=True, wheelhouse=args.wheelhouse)
    return 0 if args.dry_run else exit_code(state)


def exit_code(s: State) -> int:
    return max((code for _, code in notes(s)), default=0)


def demo(s: State, out: str, users: int, extra: list[str]) -> int:
    """Simulate walking people, train and validate on them, and say where the report lies."""
    data = f"{out}-data"
    system = ["--system", "vqvae-transformer", "--preset", "demo"]
    code = run_module(s, "mdlib", "simulate", "--out", data, "--users", str(users))
    code = code or run_module(s, "mdlib", "run", *system, "--data", data, "--out", out, *extra)
    if code:
        print(f"setup_environment: the demo ended with exit code {code}, see above", file=sys.stderr)
        return code
    report = Path(out) / "report.json"
    try:
        verdict = json.loads(report.read_text(encoding="utf-8"))["verdict"]["sentence"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(f"{report} holds no verdict ({error!r}): run the demo again with another --out") from error
    print(f"report:  {report.with_suffix('.html')}\nverdict: {verdict}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(description=lines[0], epilog="\n".join(lines[1:]), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "install": "make .venv or bring it up to date",
        "repair": "mend an existing .venv, or another Python",
        "test": "install, then run pytest; further arguments go to pytest",
        "demo": "install, then simulate, train and validate; further arguments go to `mdlib run`",
    }.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
        if name in ("install", "repair"):
            command.add_argument("--extra", action="append", default=[], help="of pyproject.toml, e.g. test")
            command.add_argument("--wheelhouse", default="", metavar="DIR", help="folder of wheels to install from")
        if name == "repair":
            command.add_argument(
                "--python", help="an interpreter that is not .venv's (on Kaggle: the one that runs this)"
            )
        if name == "demo":
            command.add_argument("--out", default="runs/demo", help="run folder (default: %(default)s)")
            command.add_argument("--users", type=int, default=31, help="simulated people (default: %(default)s)")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command in ("install", "repair"):
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    return args


def main(argv: list[str]) -> int:
    """Run a command -> exit code; a failure is told in one line."""
    try:
        refuse_old_python(sys.version_info)
        if argv[:1] == ["probe"]:
            probe(argv[1:])
            return 0
        if argv[:1] == ["link"]:
            link_project()
            return 0
        args = parse(argv)
        if args.command == "repair":
            return repair(args)
        extras = ("test",) if args.command == "test" else tuple(getattr(args, "extra", ()))
        state = ensure(extras, args.dry_run, wheelhouse=getattr(args, "wheelhouse", ""))
        if args.dry_run:
            return 0
        if args.command == "test":
            # Two processes; the README's commands, which most long tests look at, are run once, in one of them.
            return run_module(state, "pytest", "-n", "2", *args.rest, cwd=ROOT)
        if args.command == "demo":
            return demo(state, args.out, args.users, args.rest)
        return exit_code(state)
    except Stop as stop:
        line, *log = stop.args
        print(*(f"    {text}" for text in log), f"setup_environment: {line}", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup_environment: interrupted; the same command completes it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
