"""Create the Python environment of this repository and repair it. Standard library only.

    python setup_environment.py            install, then check with check_environment.py (Kaggle, Colab: repair, check)
    python setup_environment.py install    create .venv and install the pinned packages (--extra NAME: and its own)
    python setup_environment.py repair     repair .venv, or the Python of --python (Kaggle, Colab: the running one)
    python setup_environment.py test       install, then run the tests; further arguments go to pytest
    python setup_environment.py demo       install, simulate, train, validate; further arguments go to `mdlib run`

Each command runs the steps of `plan` until none is left; the next run completes an interrupted one. A torch that works
is never reinstalled. Outside .venv constraints stop pip from changing what works. Packages come from a wheelhouse
(--wheelhouse, or a folder below /kaggle/input that holds mdlib-*.whl) or from the package index.
Exit codes: 0 everything works; 1 see the last line; 3 everything works, but on the CPU: no torch for the GPU was found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from collections import namedtuple
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
INPUTS = Path("/kaggle/input")
WHEELHOUSE_MARKER = "mdlib-*.whl"
ACTIVATE = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
REPAIR = "python setup_environment.py repair"
OLDEST_PYTHON, TESTED_PYTHON = (3, 11), "3.11, 3.12 or 3.13"

TOUCH = {"transformers": ["PreTrainedModel"], "diffusers": ["DiffusionPipeline", "VQModel"]}  # they import lazily
MODULE = {"pillow": "PIL", "scikit-learn": "sklearn"}  # distributions whose module has another name
# mdlib works without these. Every other package is required.
OPTIONAL = {"ipywidgets": "no interactive views", "lpips": "no perceptual loss", "tensorboard": "no live curves"}
# These release together: an ImportError in one of them needs all of them at their pins.
HUB_FAMILY = ("huggingface-hub", "tokenizers", "safetensors", "transformers", "diffusers")
HUB_ERROR = re.compile(r"huggingface_hub|huggingface-hub|tokenizers|httpx|safetensors|hf_xet")
# Compiled against one another: pip must not change them on its own.
TORCH_FAMILY = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*")
HELD = re.compile(TORCH_FAMILY.pattern + r"|numpy|pandas|scipy|pillow|protobuf|ipywidgets")
# torch for CUDA 13 needs compute capability 7.5 and driver 580. The CUDA 12.6 build runs on capability 5.0 and driver
# 525 or later; it exists for these releases of torch.
WHEELS = "https://download.pytorch.org/whl/"
MODERN_CAPABILITY, MODERN_DRIVER, OLDEST_DRIVER = (7, 5), 580, 525
CU126_RELEASES, NEWEST_CU126 = ">=2.6,<2.15", "2.14.1"
DRIVER_OF_CUDA = {11: 450, 12: OLDEST_DRIVER, 13: MODERN_DRIVER}
# kind of machine -> name of the step, build of torch ('': that of the default index, which is CPU-only on Windows)
BUILDS = {
    "cpu": ("torch without a GPU", ""),
    "gpu": ("torch for a GPU", "cu130" if os.name == "nt" else ""),
    "old driver": ("torch for an old driver", "cu126"),
    "old gpu": ("torch for an old GPU", "cu126"),
}
MARK = "@probe "
Gpu = namedtuple("Gpu", "name capability driver memory", defaults=[0])  # driver: major number; memory: MiB


class Stop(Exception):
    """Ends the program. The first argument is the error message; the others are lines of a log."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def module_of(name: str) -> str:
    return MODULE.get(name, name.replace("-", "_"))


def split_requirement(requirement: str) -> tuple[str, str]:
    """'Some_Name>=1,<2' -> ('some-name', '>=1,<2')."""
    name, specifier = re.fullmatch(r"([\w.-]*\w)\s*(.*)", requirement).groups()
    return canonical(name), specifier


def read_pins(extras=()) -> SimpleNamespace:
    """{package: specifier} `wanted` and `accepted`, and mdlib's `commands`. Raises Stop for an unknown extra."""
    import tomllib  # Python 3.11

    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, optional = table["project"], table["project"]["optional-dependencies"]
    for extra in sorted(set(extras) - set(optional)):
        raise Stop(f"pyproject.toml has no extra {extra!r}: choose from {', '.join(sorted(optional))}")
    wanted = table["build-system"]["requires"] + [r for extra in ("pinned", *extras) for r in optional[extra]]
    wanted, accepted = (dict(map(split_requirement, texts)) for texts in (wanted, project["dependencies"]))
    return SimpleNamespace(wanted=wanted, accepted=accepted, commands=tuple(project.get("scripts", ())))


def release(version: str) -> tuple[int, ...]:
    """'2.10.0+cu126' -> (2, 10): comparable, without local tag and trailing zeros."""
    text = re.sub(r"(\.0+)+$", "", re.match(r"\d+(\.\d+)*", version).group())
    return tuple(map(int, text.split(".")))


def satisfies(version: str | None, specifier: str) -> bool:
    """Whether a version meets a specifier such as '>=2.6,<3'. Local tags count for '===' only, pre-releases never."""
    for sign, text in re.findall(r"([=!<>]+)\s*([^\s,]+)", specifier) if version else ():
        have, want = (version, text) if sign == "===" else (release(version), release(text))
        order = "=" if have == want else ">" if have > want else "<"
        met = order != "=" if sign == "!=" else order in sign
        if not met:
            return False
    return bool(version)


def probe(names: list[str]) -> int:
    """Print facts about the interpreter that runs this, then whether each module works in it, as lines of JSON."""

    def report(**facts):
        print(MARK + json.dumps(facts), flush=True)

    versions, half = {}, {}
    for dist in importlib.metadata.distributions():
        name, version = canonical(dist.metadata["Name"] or ""), dist.metadata["Version"]
        if name and version and name not in versions:
            versions[name] = version
            # pip writes INSTALLER and RECORD last: without them it was interrupted while it installed this one.
            whole = dist.read_text("INSTALLER") and dist.read_text("RECORD")
            if not whole and str(dist.locate_file("")).startswith(sys.prefix):
                half[name] = version
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    compiles = compiler and Path(sysconfig.get_path("include"), "Python.h").is_file()
    interpreter = {"executable": sys.executable, "version": list(sys.version_info[:3]), "compiles": compiles}
    spec = importlib.util.find_spec("mdlib")
    project = str(Path(spec.origin).parent) if spec and spec.origin else None
    report(interpreter=interpreter, installed=versions, half=half, project=project)
    for name in names:
        report(modules={name: {"error": f"the interpreter crashed while importing {name}"}})  # unless a line follows
        try:
            report(modules={name: {"error": None, **probe_module(name)}})
        except Exception as error:
            report(modules={name: {"error": describe(error), "culprit": culprit(error, names)}})
    return 0


def probe_module(name: str) -> dict:
    """Import a module and use it. Returns its version and, for torch, its build and an error or None by device."""
    module = importlib.import_module(name)
    for attribute in TOUCH.get(name, ()):
        getattr(module, attribute)
    facts = {"version": str(getattr(module, "__version__", ""))}
    if name == "torchvision":
        torch = importlib.import_module("torch")
        module.ops.nms(torch.zeros(2, 4), torch.zeros(2), 0.5)  # an operator of torchvision's own library
    if name == "torch":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count = module.cuda.device_count() if module.cuda.is_available() else 0
        facts.update(cuda=module.version.cuda, arch_list=module.cuda.get_arch_list())
        facts["warning"] = " ".join(str(caught[0].message).split())[:300] if caught else None
        facts["ops"] = {}
        for device in ("cpu", *(f"cuda:{i}" for i in range(count))):
            try:  # convolution, sum, backward: a matmul alone succeeds on GPUs that the build has no kernels for
                x, w = (module.randn(2, 3, n, n, device=device, requires_grad=True) for n in (8, 3))
                module.nn.functional.conv2d(x, w).relu().sum().backward()
                facts["ops"][device] = None if module.isfinite(x.grad.sum()).item() else "the gradient is not finite"
            except Exception as error:
                facts["ops"][device] = describe(error)
    return facts


def chain(error: BaseException) -> list[BaseException]:
    """An exception and its causes, the first cause last."""
    links = [error]
    while len(links) < 20 and (links[-1].__cause__ or links[-1].__context__):
        links.append(links[-1].__cause__ or links[-1].__context__)
    return links


def describe(error: BaseException) -> str:
    """An exception and its first cause in one line."""
    ends = (error, chain(error)[-1])
    return " <- ".join(dict.fromkeys(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}" for e in ends))


def culprit(error: BaseException, modules: list[str]) -> str:
    """The installed package that none of the modules needs and in whose files their import failed; '' if there is none.

    diffusers and transformers import peft, xformers, bitsandbytes or tensorflow where these are installed.
    """
    owners, needed = importlib.metadata.packages_distributions(), set()
    requires = {canonical(one.metadata["Name"] or ""): one.requires or () for one in importlib.metadata.distributions()}
    rest = [canonical(name) for module in modules for name in owners.get(module, ())]
    while rest:
        needed.add(name := rest.pop())
        texts = [text for text in requires.get(name, ()) if "extra ==" not in text]
        rest += {canonical(re.match(r"[\w.-]+", text)[0]) for text in texts} - needed
    frames = [frame for link in reversed(chain(error)) for frame in reversed(traceback.extract_tb(link.__traceback__))]
    imported = re.findall(r"(?:site|dist)-packages[\\/](\w+)", "\n".join(frame.filename for frame in frames))
    found = [name for module in imported for name in owners.get(module, ()) if canonical(name) not in needed]
    return found[0] if found else ""


def run_quietly(*command, timeout: float = 60, **options) -> subprocess.CompletedProcess:
    """Run a program and capture its output; one that is missing or too slow gives exit code 1 and the reason."""
    try:
        return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def ask(python: Path | str, names=()) -> dict:
    """Run `probe` in another interpreter; returns its facts. Raises Stop if it does not run."""
    # PYTHONSAFEPATH: mdlib has to be installed; that it lies next to this file does not count.
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    facts, rest, before = {"modules": {}}, list(names), None
    while rest != before:  # after a crash another run probes the modules that follow
        done = run_quietly(python, ROOT / "setup_environment.py", "probe", *rest, timeout=900, env=env)
        for line in done.stdout.splitlines():
            if line.startswith(MARK):
                found = json.loads(line[len(MARK) :])
                facts["modules"].update(found.pop("modules", {}))
                facts.update(found)
        before, rest = rest, [name for name in rest if name not in facts["modules"]]
        if "interpreter" in facts and not rest:
            return facts
    raise Stop(f"{python} does not run: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")


def unmet_requirements(python: Path) -> list[tuple[str, str, str]]:
    """(package, requirement, installed version or '') of each requirement that is not met, from `pip check`."""
    form = r"^(\S+) \S+ (?:has requirement (.+), but you have \S+ (.+)|requires (\S+), which is not installed)\.$"
    lines = re.findall(form, run_quietly(python, "-m", "pip", "check").stdout, re.MULTILINE)
    return [(canonical(package), wanted or lost, have) for package, wanted, have, lost in lines]


def index_answers(python: Path) -> bool:
    """Whether pip reaches an index. True without pip: .venv gets one, which reports a missing network itself."""
    done = run_quietly(python, "-m", "pip", "index", "versions", "lpips", "--timeout", "3", "--retries", "0")
    return done.returncode == 0 or "No module named pip" in done.stderr


def ask_driver(query: str) -> str:
    """The answer of nvidia-smi, one line for each GPU or process; '' without nvidia-smi."""
    return run_quietly("nvidia-smi", f"--query-{query}", "--format=csv,noheader").stdout


def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, found without torch."""
    text = ask_driver("gpu=name,compute_cap,driver_version,memory.total")
    found = re.findall(r"^(.+), (\d+)\.(\d+), (\d+)\.[\d.]+, (\d*)", text, re.MULTILINE)
    return tuple(Gpu(name, (int(a), int(b)), int(driver), int(memory or 0)) for name, a, b, driver, memory in found)


def hosted() -> str:
    """'Kaggle', 'Colab' or ''. Their image brings a torch that works, and a fresh session restores it."""
    colab = "Colab" if "COLAB_RELEASE_TAG" in os.environ else ""
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else colab


def find_marked(marker: str, *bases: Path) -> list[Path]:
    """The folders in or under the bases, a few levels deep, that hold a file of this pattern."""
    return sorted({p.parent for base in bases for depth in range(6) for p in base.glob("*/" * depth + marker)})


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_ours(python: Path) -> bool:
    return python.parent.absolute() == venv_python().parent.absolute()


def refuse_old_python(version, which: str = "this Python") -> None:
    """Raises Stop for a Python that the pinned packages do not support."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise Stop(f"{which} is {'.'.join(map(str, version[:3]))}, mdlib needs Python {TESTED_PYTHON}")


class State:
    """A Python (default: .venv) and its machine, as `plan` and check_environment.py see them. Raises Stop if it fails.

    strict: whether a CPU build of torch is wrong on a machine with a GPU. wheelhouse: a folder; '' searches for one.
    """

    def __init__(self, pins, python: Path | None = None, strict: bool = False, wheelhouse: str = ""):
        self.pins, self.python, self.strict, self.wheelhouse = pins, python or venv_python(), strict, wheelhouse
        self.gpus, self.ours = find_gpus(), is_ours(self.python)
        self.host = "" if self.ours else hosted()
        driver = min((gpu.driver for gpu in self.gpus), default=0)
        capability = min((gpu.capability for gpu in self.gpus), default=(0, 0))
        kind = "old gpu" if capability < MODERN_CAPABILITY else "gpu" if driver >= MODERN_DRIVER else "old driver"
        self.machine = kind if driver >= OLDEST_DRIVER else "cpu"  # a key of BUILDS
        # A GPU below 7.0 cannot run Triton, which newer torch calls unasked.
        triton = self.machine == "cpu" or capability >= (7, 0)
        self.variables = {} if triton else {"TORCH_DISABLE_NATIVE_JIT": "1", "TORCHDYNAMO_DISABLE": "1"}
        self.specifiers = pins.wanted if self.ours else pins.accepted
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mdlib"
        name = re.sub(r"\W+", "-", str(self.python.absolute())).strip("-")
        self.folder = VENV if self.ours else cache / name  # of the log and the constraints
        self.interpreter, self.installed, self.half = {"version": sys.version_info[:3]}, {}, {}
        self.project, self.modules = None, {}
        self.exists = self.python.exists() or not self.ours
        try:
            if self.exists:
                vars(self).update(ask(self.python, [*map(module_of, pins.accepted), "mdlib"]))
            refuse_old_python(self.interpreter["version"], f"the Python of {VENV if self.ours else python}")
        except Stop as stop:
            raise Stop(f"{stop}; delete {VENV} and run this again" if self.ours else str(stop)) from stop
        self.torch = self.modules.get("torch", {})
        self.repair = REPAIR + ("" if self.ours else f" --python {shlex.quote(str(self.python))}")

    def uninstall(self, name: str) -> str:
        return shlex.join([str(self.python), "-m", "pip", "uninstall", "--yes", name])

    @cached_property
    def online(self) -> bool:
        return index_answers(self.python if self.exists else Path(sys.executable))

    @cached_property
    def wheels(self) -> list[Path]:
        """The wheels that this Python can install. Raises Stop for several wheelhouses and for one without wheels."""
        given = [Path(self.wheelhouse)] if self.wheelhouse else []
        found = given or find_marked(WHEELHOUSE_MARKER, ROOT / "wheelhouse", INPUTS)
        if len(found) > 1:
            raise Stop(f"found {len(found)} wheelhouses: choose one with --wheelhouse: {', '.join(map(str, found))}")
        files = sorted(found[0].absolute().glob("*.whl")) if found else []
        if given and not files:
            raise Stop(f"{given[0]} holds no wheels (*.whl): give another folder with --wheelhouse")
        major, minor = self.interpreter["version"][:2]
        tags = re.compile(rf".*-(py\d.*|(.*\.)?cp{major}{minor}(\..*)?|.*-abi3)-.*")
        return [file for file in files if tags.fullmatch(file.stem)]

    def lacking(self, requirements, online: bool | None = None) -> list[str]:
        """The requirements that are unobtainable; with online=False those that the wheelhouse does not have."""
        found = []
        for requirement in [] if (self.online if online is None else online) else requirements:
            name, specifier = split_requirement(requirement)
            wheels = [file.stem.split("-")[:2] for file in self.wheels]
            if not any(canonical(its) == name and satisfies(version, specifier) for its, version in wheels):
                found.append(requirement)
        return found


def has_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether a build runs on a GPU: sm_ serves later minors of its major, compute_ (PTX) all later capabilities."""
    found = [(kind, (int(a), int(b))) for kind, a, b in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(arch_list))]
    return any(built <= capability and (kind == "compute" or built[0] == capability[0]) for kind, built in found)


def torch_trouble(s: State, gpu: bool = True) -> str:
    """Why torch has to be replaced, or ''. gpu=False: why it does not work even on the CPU. A busy GPU is no reason."""
    version, torch = s.installed.get("torch"), s.torch
    if version is None:
        return "torch is not installed"
    if "torch" in s.half and (s.ours or torch["error"]):
        return "torch is half installed"
    if torch["error"]:
        return f"torch does not import: {torch['error']}"
    if not satisfies(version, s.pins.accepted["torch"]):
        return f"torch {version} is outside {s.pins.accepted['torch']}"
    if torch["ops"]["cpu"]:
        return f"torch does not compute: {torch['ops']['cpu']}"
    if not gpu or s.machine == "cpu":
        return ""
    if torch["cuda"] is None:
        return f"torch {version} is a CPU build and does not use {s.gpus[0].name}" if s.strict else ""
    for g in s.gpus:
        if g.driver < DRIVER_OF_CUDA.get(int(torch["cuda"].split(".")[0]), 0):
            return f"driver {g.driver} is too old for CUDA {torch['cuda']} of torch {version}"
        if not has_kernels(g.capability, torch["arch_list"]):
            return f"torch {version} has no kernels for {g.name} ({g.capability[0]}.{g.capability[1]})"
    return next((e for e in torch["ops"].values() if e and "no kernel image" in e), "")


def hosted_remedy(s: State) -> str:
    """What to do about the torch of a hosted image. '' if it may be replaced: for a GPU that it has no kernels for."""
    broken = torch_trouble(s, gpu=False)
    if not s.host or (s.machine == "old gpu" and not broken and s.torch["cuda"]):
        return ""
    session = "this is the image of a session without a GPU: choose the accelerator again, verify the account's phone"
    session += f" number, and remove docker_image from the {s.host} notebook's metadata"
    return f"start a fresh {s.host} session: its image brings a torch that works" if broken else session


def pair_trouble(s: State) -> str:
    """Why torchvision does not match a torch that works, or ''. A mismatch breaks diffusers and transformers."""
    vision = s.modules["torchvision"]
    if "torchvision" in s.half and (s.ours or vision["error"]):
        return "torchvision is half installed"
    if vision["error"]:
        return f"torchvision does not work: {vision['error']}"
    tags = [facts["version"].partition("+")[2] for facts in (s.torch, vision)]
    return f"torch is built for {tags[0]}, torchvision for {tags[1]}" if all(tags) and tags[0] != tags[1] else ""


def pip_install(s: State, requirements, *options: str, index: str = "") -> list[str]:
    """A pip command. A wheelhouse that has every requirement is enough; otherwise pip may look further."""
    source = ["--index-url", WHEELS + index] if index else []
    if s.wheels:
        enough = "--no-deps" in options and not s.lacking(requirements, online=False)
        source = ["--no-index"] if enough or not s.online else source
        source += ["--find-links", str(s.wheels[0].parent)]
    pip = [str(s.python), "-m", "pip", "install", "-c", str(s.folder / "constraints.txt")]
    pip += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    return [*pip, *source, *options, "--", *requirements]


def requirements_of(command: list[str]) -> list[str]:
    """What a command of `pip_install` installs; [] for other commands."""
    return command[command.index("--") + 1 :] if "--" in command else []


def rewrite(s: State, names) -> list[str]:
    """A pip command for damaged files. Not --force-reinstall: pip cannot uninstall a package without RECORD."""
    return pip_install(s, [f"{name}==={s.installed[name]}" for name in names], "--ignore-installed", "--no-deps")


def install_pair(s: State, change: str) -> list[str]:
    """A pip command for torch and torchvision of one build for this machine; for torchvision alone if torch stays.

    Three equals signs mean exactly this build; two also accept a local build of the same version.
    """
    pin, (have, _, tag) = s.pins.wanted["torch"].lstrip("="), s.installed.get("torch", "").partition("+")
    alone, version = not change and not (s.ours and tag == "cpu"), have  # the default index has no +cpu build
    if not alone:
        tag, version = BUILDS[s.machine][1], pin
        if s.machine == "old gpu" and have:  # the same release, if it has a build for this GPU
            version = have if satisfies(have, CU126_RELEASES) else NEWEST_CU126
    build, vision = f"+{tag}" if tag else "", "torchvision"  # pip finds the one for this torch
    if release(version) == release(pin):
        vision += "===" + s.pins.wanted["torchvision"].lstrip("=") + build
    elif satisfies(version, ">=2.1,<2.15"):  # torch 2.10.0 and torchvision 0.25.0 are released together
        _, minor, patch = (*release(version), 0, 0)[:3]
        vision += f"===0.{minor + 15}.{patch}{build}"
    wanted, options = [vision] if alone else [f"torch==={version}{build}", vision], ["--no-deps"] if alone else []
    if set(wanted) <= {f"{name}==={version}" for name, version in s.installed.items()}:
        # The version is right, but its files do not work.
        wanted, options = wanted if change else [vision], ["--ignore-installed", "--no-deps"]
    return pip_install(s, wanted, *options, index=tag)


def reinstall_imports(s: State, failing: dict[str, str]) -> list[list[str]]:
    """First the dependencies of the packages that fail, then their own files and those of a module they miss."""
    errors = " ".join(failing.values())
    missed = filter(s.installed.get, map(canonical, re.findall(r"No module named '(\w+)", errors)))
    culprits = dict.fromkeys([*(HUB_FAMILY if HUB_ERROR.search(errors) else ()), *failing])
    if s.ours:
        update = pip_install(s, [name + s.specifiers[name] for name in culprits])
        return [update, rewrite(s, dict.fromkeys([*culprits, *missed]))]
    if any(package in culprits for package, _, _ in unmet_requirements(s.python)):
        specifiers = {**s.specifiers, "huggingface-hub": s.pins.wanted["huggingface-hub"]}
        return [pip_install(s, [name + specifiers[name] for name in culprits])]
    return [rewrite(s, dict.fromkeys([*failing, *missed]))]


def link_project() -> int:
    """Let this interpreter find mdlib in its folder, which may be read-only."""
    packages = Path(sysconfig.get_path("purelib"))
    if not os.access(packages, os.W_OK):
        packages = Path(site.getusersitepackages())
        packages.mkdir(parents=True, exist_ok=True)
    (packages / "mdlib.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    return 0


def plan(s: State) -> tuple[list[tuple], list[str], int]:
    """([(name, reason, commands)] in the order to run, notes, exit code). Raises Stop if a repair is impossible."""
    change, remedy, notes, skip, code = torch_trouble(s), hosted_remedy(s), [], [], 0
    on_cpu = change and not remedy and not torch_trouble(s, gpu=False)
    if on_cpu and s.lacking(requirements_of(install_pair(s, change))):
        notes.append(f"the GPU is not used, everything runs on the CPU: {change}")
        change, code = "", 3
    vision = "" if change else pair_trouble(s)
    unmatched = bool(vision and s.lacking(requirements_of(install_pair(s, ""))))
    if unmatched and "torchvision" not in s.installed:
        vision, skip = "", ["torchvision", "lpips"]
    here = Path(sys.executable).absolute() == s.python.absolute()
    loaded = " and ".join(name for name in ("torch", "torchvision") if here and name in sys.modules)
    if loaded and (change or vision):
        advice = "restart the kernel and run repair before anything imports torch"
        if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
            advice = f"a batch run has no second kernel: put `!{REPAIR}` into the first cell"
        raise Stop(f"torch in use: {change or vision}, and this process has loaded {loaded}; {advice}")
    if change and remedy:
        raise Stop(f"torch of a hosted image: {change}; {remedy}")

    # the other packages
    errors = {name: s.modules[module_of(name)]["error"] for name in s.pins.accepted if s.modules}
    half = [name for name in s.half if name not in ("torch", "torchvision", "mdlib")]
    if not s.ours:  # system packages look half installed: only those count that do not import
        half = [name for name in half if errors.get(name)]
    pins = {name: name + specifier for name, specifier in s.specifiers.items() if name not in ("torch", "torchvision")}
    off = [name for name in pins if not satisfies(s.installed.get(name), s.specifiers[name])]
    for name in off:  # mdlib works without it, or with the version that is installed
        works = satisfies(s.installed[name], s.pins.accepted.get(name, "")) if name in s.installed else name in OPTIONAL
        skip += [name] if works and name not in skip and s.lacking([pins[name]]) else []
    off = [name for name in off if name not in skip]
    if not s.ours:  # the missing ones first: alone they need no other package to change
        off = [name for name in off if name not in s.installed] or off
    # In .venv pip sees all pins together. A hosted image has the dependencies of what it lacks.
    wanted = [pins[name] for name in (pins if s.ours else off) if name not in skip]
    alone = ["--no-deps"] if s.host and not any(name in s.installed for name in off) else []
    few = ", ".join(f"{name} {s.installed.get(name, 'missing')}" for name in off)
    failing = {name: error for name, error in errors.items() if error and name not in skip}
    if change or vision or half or off:
        failing = {}
    for name in failing:
        if foreign := s.modules[module_of(name)].get("culprit"):
            raise Stop(
                f"{name} does not import because of {foreign}, which mdlib does not need: {s.uninstall(foreign)}"
            )

    project = "" if s.project else "mdlib is not installed"
    if s.ours:
        lost = [name for name in s.pins.commands if not shutil.which(name, path=str(s.python.parent))]
        there = s.project is not None and Path(s.project) == ROOT / "mdlib" and "mdlib" not in s.half and not lost
        project = "" if there else "mdlib of this folder is not installed"

    def install_project():
        if s.ours:
            return pip_install(s, [], "--no-deps", "--no-build-isolation", f"--editable={ROOT}")
        link = [str(s.python), str(ROOT / "setup_environment.py"), "link"]
        return link if (ROOT / "mdlib").is_dir() else pip_install(s, ["mdlib"], "--no-deps")

    venv, create = "" if s.exists else f"{VENV} does not exist", [sys.executable, "-m", "venv", str(VENV)]
    if s.ours and s.exists and "pip" not in s.installed:
        venv, create = "pip is not installed", [str(s.python), "-m", "ensurepip", "--upgrade"]
    remove = vision if unmatched and s.ours else ""  # diffusers works without torchvision, not with a wrong one
    table = (
        ("virtual environment", venv, lambda: [create]),
        ("half-installed packages", ", ".join(half), lambda: [rewrite(s, half)]),
        (BUILDS[s.machine][0], change, lambda: [install_pair(s, change)]),
        ("torchvision to match torch", "" if remove else vision, lambda: [install_pair(s, "")]),
        ("torchvision that cannot be matched", remove, lambda: [shlex.split(s.uninstall("torchvision"))]),
        ("packages", few, lambda: [pip_install(s, wanted, *alone)]),
        ("imports", "; ".join(map(": ".join, failing.items())), lambda: reinstall_imports(s, failing)),
        ("mdlib", project, lambda: [install_project()]),
    )
    steps = [(name, reason, commands()) for name, reason, commands in table if reason]
    where = "attach the dataset that holds it, or turn the Internet on" if s.host else "give its folder by --wheelhouse"
    for _, reason, commands in steps:
        missing = s.lacking([r for command in commands for r in requirements_of(command)])
        if missing:
            what = f"the package index does not answer, and no wheelhouse has {', '.join(missing)}"
            raise Stop(f"nothing to install from: {reason}; {what}; {where}")
    if skip:
        stay = ", ".join(f"{n} stays at {s.installed[n]}" if n in s.installed else f"{n} is missing" for n in skip)
        lpips = "; without LPIPS images are compared by PSNR, SSIM and classifier features" if "lpips" in skip else ""
        notes.append(f"{stay}: the package index does not answer{lpips}; {where}")
    if not change and s.machine != "cpu" and s.torch["cuda"] is None:
        notes.append(f"torch is a CPU build: to use {s.gpus[0].name}, run {REPAIR}")
    if s.machine == "old gpu" and not torch_trouble(s):  # a plain `pip install` brings back a torch without kernels
        notes.append(f"before you install anything else: PIP_CONSTRAINT={s.folder / 'constraints.txt'}")
    return steps, notes, code


def execute(command: list[str], log: Path) -> None:
    """Run a command and log its output. Raises Stop with the last lines of the log if it fails."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise Stop(f"a step ended with exit code {done.returncode}; the whole log is {log}", *lines[-12:])


def hold(s: State, requirements) -> None:
    """Write the constraints that prevent pip from changing what is not named."""
    named = {split_requirement(requirement)[0] for requirement in requirements}
    family, lines = TORCH_FAMILY if s.ours else HELD, []
    for name, version in sorted(ask(s.python)["installed"].items()):
        free = name in named or (name in HUB_FAMILY and named & set(HUB_FAMILY))
        free = free or ("torch" in named and TORCH_FAMILY.fullmatch(name))
        if not free and (family.fullmatch(name) or name in s.pins.accepted):
            lines.append(f"{name}==={version}\n")
    (s.folder / "constraints.txt").write_text("".join(lines), encoding="utf-8")


def ensure(extras=(), python: Path | None = None, strict=False, wheelhouse="", dry_run=False) -> tuple[State, int]:
    """Inspect and repair until nothing is left; returns the state and the exit code. Raises Stop if this fails."""
    pins, tried = read_pins(extras), []
    print(f"mdlib environment: {python or VENV} (importing every package takes a moment)", flush=True)
    while True:
        s = State(pins, python, strict, wheelhouse)
        log, (steps, notes, code) = s.folder / "setup.log", plan(s)
        if dry_run:
            for name, reason, commands in steps:
                print(f"  would do: {name}: {reason}", *map(shlex.join, commands), sep="\n    ")
            print(*([] if steps else notes), "nothing was changed" if steps else "nothing to do", sep="\n")
            return s, code
        if s.exists and not steps:
            s.folder.mkdir(parents=True, exist_ok=True)
            hold(s, [])  # check_environment.py reports when another torch replaces this one
            print(*(f"note: {note}\n" for note in notes), sep="", end="")
            return s, code
        if len(tried) == 6 or steps in tried:
            raise Stop(f"{steps[0][0]}: {steps[0][1]}; the repair did not help; see the log {log}")
        tried.append(steps)
        s.folder.mkdir(parents=True, exist_ok=True)
        for name, reason, commands in steps:
            print(f"  {name}: {reason if len(reason) < 160 else reason[:157] + '...'} ... ", end="", flush=True)
            start, end = time.monotonic(), "failed"
            try:
                for command in commands:
                    if "-c" in command:
                        hold(s, requirements_of(command))
                    execute(command, log)
                end = "done"
            finally:
                print(f"{end} ({time.monotonic() - start:.0f} s)", flush=True)


def run(argv: list[str]) -> int:
    """Run a command; returns its exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=("install", "repair", "test", "demo"))
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml, e.g. test")
    parser.add_argument("--wheelhouse", default="", metavar="DIR", help="folder of wheels to install from")
    parser.add_argument("--python", help="repair: an interpreter outside .venv")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command not in ("test", "demo"):
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    if args.python is not None and args.command != "repair":
        parser.error("--python needs the command repair")
    command = args.command or ("repair" if hosted() else "install")
    given = args.python or (sys.executable if command == "repair" and hosted() else "")
    if command == "repair" and not given and not venv_python().exists():
        raise Stop(f"{VENV} does not exist: run `python setup_environment.py install`")
    extras = args.extra + (["test"] if command == "test" else [])
    python = Path(shutil.which(given) or given) if given else None
    s, code = ensure(extras, python, command == "repair", args.wheelhouse, args.dry_run)
    if args.dry_run:
        return 0
    if args.command:
        print(f"ready: torch {s.torch['version']} (details: python check_environment.py)")

    def module(*arguments: str, cwd: Path | None = None) -> int:
        print(f"$ python -m {shlex.join(arguments)}", flush=True)
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **s.variables}
        return subprocess.run([str(s.python), "-m", *arguments], env=env, cwd=cwd).returncode

    if command == "test":
        # Two processes; the README's commands, which most long tests need, run once, in one of them.
        return module("pytest", "-n", "2", *args.rest, cwd=ROOT)
    if command == "demo":
        code = module("mdlib", "simulate", "--out", "runs/demo-data", "--users", "31", "--windows", "60")
        few = ("-p", "windows_per_user=5", "-p", "images_per_user=10")
        system = ("--system", "vae-diffusion", "--preset", "demo", *few)
        return code or module("mdlib", "run", *system, "--data", "runs/demo-data", "--out", "runs/demo", *args.rest)
    if not args.command:
        import check_environment

        code = check_environment.main(["--python", str(s.python)]) or code
    if s.ours:
        jupyter = "`jupyter lab` opens the notebooks"
        if "jupyterlab" not in s.installed:
            jupyter = "`python setup_environment.py install --extra jupyter` adds JupyterLab"
        print(f"Activate the environment:  {ACTIVATE}\nThen `mdlib --help` lists the commands; {jupyter}.")
    return code


def main(argv: list[str]) -> int:
    """Run a command; returns its exit code. A failure is one line."""
    try:
        refuse_old_python(sys.version_info)
        if argv[:1] == ["probe"]:
            return probe(argv[1:])
        return link_project() if argv[:1] == ["link"] else run(argv)
    except Stop as stop:
        line, *log = stop.args
        print(*(f"    {text}" for text in log), f"setup_environment: {line}", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup_environment: interrupted; run the same command again to complete it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
