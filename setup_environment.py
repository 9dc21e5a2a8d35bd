"""Make the Python environment of this repository and keep it in order. Standard library only.

    python setup_environment.py install    make .venv beside this file and install the pinned packages
    python setup_environment.py repair     mend an existing .venv
    python setup_environment.py test       install, then run the tests (further arguments go to pytest)
    python setup_environment.py demo       install, then simulate, train and validate a small model

Every command does the same: detect what is there, plan by the table `ROWS`, act, and detect again until
nothing is left to do. The state of .venv is all that is looked at: a run that was interrupted is completed by
the next one, and a run that finds everything in place changes nothing. A torch that works is never installed
again. Versions are pinned in pyproject.toml and nowhere else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
LOG = VENV / "setup.log"
CONSTRAINTS = VENV / "constraints.txt"

OLDEST_PYTHON = (3, 11)
TESTED_PYTHON = "3.11, 3.12 or 3.13"

STACK = ("torchvision", "accelerate", "transformers", "diffusers", "lpips")
# Libraries that import lazily look fine until a name is taken from them.
TOUCH = {"accelerate": "Accelerator", "transformers": "PreTrainedModel", "diffusers": "DiffusionPipeline"}
# These release together; an ImportError in one of them is mended by installing all of them at their pins.
HUB_FAMILY = ("huggingface-hub", "tokenizers", "safetensors", "transformers", "diffusers")
HUB_ERROR = re.compile(r"huggingface_hub|huggingface-hub|tokenizers|httpx|safetensors|hf_xet")

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
    tell("interpreter", executable=sys.executable, version=list(sys.version_info[:3]))
    import importlib.metadata
    import importlib.util

    versions: dict[str, str] = {}
    half: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        name, version = dist.metadata["Name"], dist.metadata["Version"]
        if not name or not version or canonical(name) in versions:
            continue
        versions[canonical(name)] = version
        # pip writes INSTALLER and RECORD last: without them it was stopped while it installed this one.
        ours = str(dist.locate_file("")).startswith(sys.prefix)
        if ours and not (dist.read_text("INSTALLER") and dist.read_text("RECORD")):
            half[canonical(name)] = version
    tell("installed", **versions)
    tell("half", **half)
    spec = importlib.util.find_spec("mdlib")
    tell("project", mdlib=str(Path(spec.origin).parent) if spec and spec.origin else None)
    for name in modules:
        tell(name, error=f"the interpreter crashed while importing {name}")  # replaced if it does not
        try:
            facts = {"torch": probe_torch, "torchvision": probe_torchvision}.get(name, probe_import)(name)
            tell(name, error=None, **facts)
        except Exception as error:
            tell(name, error=describe(error))


def probe_import(name: str) -> dict:
    module = importlib.import_module(name)
    if name in TOUCH:
        getattr(module, TOUCH[name])
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


def ask(python: Path | str, modules: tuple[str, ...] = (), timeout: float = 900) -> dict:
    """Run `probe` in another interpreter -> {section: facts}. Raises Stop if it does not run."""
    # Safe path: mdlib must be found because it is installed, not because this file lies beside it.
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    command = [str(python), str(ROOT / "setup_environment.py"), "probe", *modules]
    facts: dict = {}
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
    return facts


# -- detect ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    driver: int  # major number


def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, without importing torch; () where there are none."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.findall(r"^(.+), (\d+)\.(\d+), (\d+)\.", done.stdout, re.MULTILINE)
    return tuple(Gpu(name, (int(major), int(minor)), int(driver)) for name, major, minor, driver in found)


@dataclass(frozen=True)
class State:
    """All that the table of rows looks at. `python` is None until .venv has one."""

    pins: Pins
    gpus: tuple[Gpu, ...] = ()
    python: Path | None = None
    installed: dict[str, str] = field(default_factory=dict)
    half: dict[str, str] = field(default_factory=dict)
    mdlib: str | None = None
    torch: dict = field(default_factory=dict)
    modules: dict[str, dict] = field(default_factory=dict)


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def detect(pins: Pins) -> State:
    """Look at the machine and at .venv; nothing is changed."""
    gpus, python = find_gpus(), venv_python()
    if not python.exists():
        return State(pins, gpus)
    try:
        facts = ask(python, ("torch", *STACK))
        refuse_old_python(facts["interpreter"]["version"], f"the Python of {VENV}")
    except Stop as stop:
        raise Stop(f"{stop}; delete {VENV} to have it made anew") from stop
    return State(
        pins=pins,
        gpus=gpus,
        python=python,
        installed=facts["installed"],
        half=facts["half"],
        mdlib=facts["project"]["mdlib"],
        torch=facts["torch"],
        modules={name: facts[name] for name in STACK},
    )


def refuse_old_python(version, which: str = "this Python") -> None:
    """Raises Stop for a Python that the pinned packages do not support."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        have = ".".join(map(str, version[:3]))
        raise Stop(f"{which} is {have}, mdlib needs Python {TESTED_PYTHON}")


# -- what the rows ask -----------------------------------------------------------------------------

# torch for CUDA 13 needs compute capability 7.5 and driver 580; its CUDA 12.6 build reaches back to
# capability 5.0 and driver 525.
WHEELS = "https://download.pytorch.org/whl/"
MODERN_CAPABILITY, MODERN_DRIVER, OLDEST_DRIVER = (7, 5), 580, 525
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


def torch_trouble(s: State) -> str:
    """Why torch has to be installed, or ''. A CPU build that works is no trouble, nor is a busy GPU."""
    version = s.installed.get("torch")
    if version is None:
        return "torch is not there"
    if "torch" in s.half:
        return "torch is half installed"
    if s.torch["error"]:
        return f"torch does not import: {s.torch['error']}"
    if not satisfies(version, s.pins.accepted["torch"]):
        return f"torch {version} is outside {s.pins.accepted['torch']}"
    if s.torch["ops"]["cpu"]:
        return f"torch does not compute: {s.torch['ops']['cpu']}"
    if machine(s) == "cpu" or s.torch["cuda"] is None:
        return ""
    needed = DRIVER_OF_CUDA.get(int(s.torch["cuda"].split(".")[0]), 0)
    for gpu in s.gpus:
        if gpu.driver < needed:
            return f"driver {gpu.driver} is too old for CUDA {s.torch['cuda']} of torch {version}"
        if not has_kernels(gpu.capability, s.torch["arch_list"]):
            return f"torch {version} has no kernels for {gpu.name} ({gpu.capability[0]}.{gpu.capability[1]})"
    return next((e for e in s.torch["ops"].values() if e and "no kernel image" in e), "")


def torch_trouble_on(kind: str) -> Callable[[State], str]:
    return lambda s: torch_trouble(s) if machine(s) == kind else ""


def pair_trouble(s: State) -> str:
    """Why torchvision does not go with a torch that works, or ''. It breaks diffusers and transformers."""
    if torch_trouble(s):
        return ""
    if "torchvision" in s.half:
        return "torchvision is half installed"
    vision = s.modules["torchvision"]
    if vision["error"]:
        return f"torchvision does not work: {vision['error']}"
    tags = local_tag(s.torch["version"]), local_tag(vision["version"])
    if all(tags) and tags[0] != tags[1]:
        return f"torch is built for {tags[0]}, torchvision for {tags[1]}"
    return ""


def venv_trouble(s: State) -> str:
    if s.python is None:
        return f"{VENV} is not there"
    return "" if "pip" in s.installed else "pip is not there"


def half_installed(s: State) -> dict[str, str]:
    """Packages that an interrupted pip left behind; torch, torchvision and mdlib have rows of their own."""
    return {k: v for k, v in s.half.items() if k not in ("torch", "torchvision", "mdlib")}


def half_trouble(s: State) -> str:
    return ", ".join(half_installed(s))


def package_trouble(s: State) -> str:
    """The packages that are missing or not at their pins. torch and torchvision have rows of their own."""
    off = [
        f"{name} {s.installed.get(name, 'missing')}"
        for name, pin in s.pins.wanted.items()
        if name not in ("torch", "torchvision") and (name not in s.installed or not satisfies(s.installed[name], pin))
    ]
    return ", ".join(off) if len(off) < 6 else f"{len(off)} packages are missing or not at their pins"


def import_trouble(s: State) -> str:
    """Modules that do not import although torch works and every package is there."""
    if torch_trouble(s) or pair_trouble(s) or package_trouble(s):
        return ""
    return "; ".join(f"{name}: {facts['error']}" for name, facts in s.modules.items() if facts["error"])


def project_trouble(s: State) -> str:
    here = s.mdlib is not None and Path(s.mdlib) == ROOT / "mdlib" and "mdlib" not in s.half
    return "" if here else "mdlib of this folder is not installed"


# -- what the rows do ------------------------------------------------------------------------------


def pip_install(*arguments: str) -> list[str]:
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    return [str(venv_python()), "-m", "pip", "install", *quiet, *arguments]


def make_venv(s: State) -> list[list[str]]:
    if s.python is None:
        return [[sys.executable, "-m", "venv", str(VENV)]]
    return [[str(s.python), "-m", "ensurepip", "--upgrade"]]


def torch_pair(s: State) -> tuple[str, list[str]]:
    """-> (build tag, or '' for the default index; requirements of torch and torchvision of the same build).

    Three equals signs: the very build of that index; two are content with a local one of the same version.
    A torch that works stays as it is. The exception is a `+cpu` build without its torchvision: the default
    index has the pair that works everywhere.
    """
    pin = {name: s.pins.wanted[name].lstrip("=") for name in ("torch", "torchvision")}
    have = s.installed.get("torch", "")
    keep = not torch_trouble(s) and local_tag(have) != "cpu"
    tag = local_tag(have) if keep else INDEX[machine(s)]
    build = f"+{tag}" if tag else ""
    if keep and release(have) != release(pin["torch"]):
        return tag, [f"torch==={have}", "torchvision"]  # pip finds the one that belongs to this torch
    return tag, [f"{name}==={version}{build}" for name, version in pin.items()]


def pair_arguments(s: State) -> list[str]:
    """Arguments of `pip install` that bring the pair of `torch_pair`."""
    tag, wanted = torch_pair(s)
    index = ["--index-url", WHEELS + tag] if tag else []
    if not set(wanted) <= {f"{name}==={version}" for name, version in s.installed.items()}:
        return [*index, *wanted]
    broken = wanted if torch_trouble(s) else wanted[1:]  # of the right version, yet its files do not work
    return [*index, "--ignore-installed", "--no-deps", *broken]


def install_pair(s: State) -> list[list[str]]:
    return [pip_install(*pair_arguments(s))]


def rewrite_half(s: State) -> list[list[str]]:
    # Not --force-reinstall: pip cannot uninstall what has no RECORD.
    wanted = [f"{name}==={version}" for name, version in half_installed(s).items()]
    return [pip_install("--ignore-installed", "--no-deps", *wanted)]


def pinned(s: State, names) -> list[str]:
    return [name + s.pins.wanted[name] for name in names]


def install_packages(s: State) -> list[list[str]]:
    names = [name for name in s.pins.wanted if name not in ("torch", "torchvision")]
    return [pip_install("-c", str(CONSTRAINTS), *pinned(s, names))]


def reinstall_imports(s: State) -> list[list[str]]:
    """First what the culprits depend on, then their own files."""
    culprits: list[str] = []
    for name, facts in s.modules.items():
        if facts["error"]:
            culprits += HUB_FAMILY if HUB_ERROR.search(facts["error"]) else ()
            culprits.append(name)
    wanted = pinned(s, dict.fromkeys(culprits))
    held = ["-c", str(CONSTRAINTS)]
    return [pip_install(*held, *wanted), pip_install(*held, "--ignore-installed", "--no-deps", *wanted)]


def install_project(s: State) -> list[list[str]]:
    return [pip_install("--no-deps", "--no-build-isolation", "-e", str(ROOT))]


# -- plan ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """If `why(state)` is not empty, the commands are run."""

    name: str
    why: Callable[[State], str]
    commands: Callable[[State], list[list[str]]]


ROWS = (
    Row("virtual environment", venv_trouble, make_venv),
    Row("half-installed packages", half_trouble, rewrite_half),
    Row("torch for an old GPU", torch_trouble_on("old gpu"), install_pair),
    Row("torch for an old driver", torch_trouble_on("old driver"), install_pair),
    Row("torch for a GPU", torch_trouble_on("gpu"), install_pair),
    Row("torch without a GPU", torch_trouble_on("cpu"), install_pair),
    Row("torchvision to match torch", pair_trouble, install_pair),
    Row("packages", package_trouble, install_packages),
    Row("imports", import_trouble, reinstall_imports),
    Row("mdlib", project_trouble, install_project),
)


@dataclass(frozen=True)
class Step:
    name: str
    why: str
    commands: list[list[str]]


def plan(s: State) -> list[Step]:
    """What to do in a state; [] when there is nothing to do."""
    return [Step(row.name, row.why(s), row.commands(s)) for row in ROWS if row.why(s)]


# -- act -------------------------------------------------------------------------------------------


def execute(command: list[str]) -> None:
    """Run a command with its output in the log. Raises Stop with the last lines of the log if it fails."""
    VENV.mkdir(parents=True, exist_ok=True)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        log.flush()
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = LOG.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise Stop(f"a step ended with exit code {done.returncode}; the whole log is {LOG}", *lines[-12:])


def hold_torch() -> None:
    """Write the constraints that keep pip's hands off torch and what belongs to it."""
    held = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")
    installed = ask(venv_python())["installed"]
    lines = [f"{name}==={version}\n" for name, version in sorted(installed.items()) if held.fullmatch(name)]
    CONSTRAINTS.write_text("".join(lines), encoding="utf-8")


def act(steps: list[Step]) -> None:
    for step in steps:
        with timed(f"{step.name}: {step.why}"):
            for command in step.commands:
                if str(CONSTRAINTS) in command:
                    hold_torch()
                execute(command)


class timed:
    """One line on the screen: what is being done and, when it is done, for how long it took."""

    def __init__(self, what: str):
        self.what = what if len(what) <= 160 else what[:157] + "..."

    def __enter__(self):
        self.start = time.monotonic()
        print(f"  {self.what} ... ", end="", flush=True)

    def __exit__(self, kind, error, trace):
        print("failed" if kind else "done", f"({time.monotonic() - self.start:.0f} s)", flush=True)


def ensure(extras: tuple[str, ...] = (), dry_run: bool = False) -> State:
    """Detect, plan, act, detect again, until nothing is left. Raises Stop if a remedy does not help."""
    pins = read_pins(extras)
    print(f"mdlib environment: {VENV}" + ("" if dry_run else f" (log: {LOG.name} in it)"))
    tried: list[list[Step]] = []
    while True:
        with timed("checking torch, torchvision, diffusers, transformers, accelerate, lpips"):
            state = detect(pins)
        steps = plan(state)
        if dry_run:
            for step in steps:
                print(f"  would do: {step.name}: {step.why}", *map(shlex.join, step.commands), sep="\n    ")
            print("nothing was changed" if steps else "nothing to do")
            return state
        if not steps:
            print("\n".join(summary(state)))
            return state
        commands = [step.commands for step in steps]
        if len(tried) == 4 or commands in tried:
            raise Stop(f"{steps[0].name}: {steps[0].why}; the remedy did not help; the log is {LOG}")
        tried.append(commands)
        act(steps)


def summary(s: State) -> list[str]:
    """What is there, and what a user should know about it."""
    lines = [
        f"ready: torch {s.torch['version']}, torchvision {s.modules['torchvision']['version']}, "
        f"diffusers {s.installed['diffusers']}, transformers {s.installed['transformers']}"
    ]
    if s.gpus and machine(s) == "cpu":
        lines.append(f"note: {s.gpus[0].name} is not used: its driver {s.gpus[0].driver} is below {OLDEST_DRIVER}")
    elif s.gpus and s.torch["cuda"] is None:
        lines.append(f"note: torch is a CPU build: to use {s.gpus[0].name}, delete {VENV} and install again")
    if needs_no_jit(s):
        lines.append("note: this GPU is too old for Triton: start Python with TORCH_DISABLE_NATIVE_JIT=1")
    return lines


def needs_no_jit(s: State) -> bool:
    """Newer torch calls Triton kernels without asking whether the GPU can run them (capability 7.0)."""
    return machine(s) != "cpu" and min(g.capability for g in s.gpus) < (7, 0)


# -- commands --------------------------------------------------------------------------------------


def run_module(s: State, *arguments: str, cwd: Path | None = None) -> int:
    """`python -m ...` of .venv with its output on this screen -> exit code."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if needs_no_jit(s):
        env["TORCH_DISABLE_NATIVE_JIT"] = "1"
    print(f"$ python -m {shlex.join(arguments)}", flush=True)
    return subprocess.run([str(venv_python()), "-m", *arguments], env=env, cwd=cwd).returncode


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
        "repair": "mend an existing .venv",
        "test": "install, then run pytest; further arguments go to pytest",
        "demo": "install, then simulate, train and validate; further arguments go to `mdlib run`",
    }.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
        if name in ("install", "repair"):
            command.add_argument("--extra", action="append", default=[], help="of pyproject.toml, e.g. test")
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
        args = parse(argv)
        if args.command == "repair" and not venv_python().exists():
            raise Stop(f"{VENV} is not there: run `python setup_environment.py install`")
        extras = ("test",) if args.command == "test" else tuple(getattr(args, "extra", ()))
        state = ensure(extras, args.dry_run)
        if args.dry_run:
            return 0
        if args.command == "test":
            # Two processes; the README's commands, which most long tests look at, are run once, in one of them.
            return run_module(state, "pytest", "-n", "2", *args.rest, cwd=ROOT)
        if args.command == "demo":
            return demo(state, args.out, args.users, args.rest)
        return 0
    except Stop as stop:
        line, *log = stop.args
        print(*(f"    {text}" for text in log), f"setup_environment: {line}", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup_environment: interrupted; the same command completes it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
