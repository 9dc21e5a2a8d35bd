"""setup_environment.py with a simulated machine: no package is installed, no other Python is started."""

import ast
import re
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import setup_environment as setup

ROOT = Path(setup.__file__).parent
PINS = setup.read_pins()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TORCH, VISION = (PINS.wanted[name].lstrip("=") for name in ("torch", "torchvision"))
CUDA13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


class World:
    """A machine and its .venv (or another Python), as `ask` and `execute` see them."""

    def __init__(self, gpus=()):
        self.gpus = tuple(gpus)
        self.installed, self.half, self.errors = {}, {}, {}
        self.conflicts = []
        self.online = True
        self.asked_index = 0
        self.venv = self.mdlib = False
        self.commands = []
        self.stop_at = None  # text of a command that fails
        # local tag of the distribution -> (that of torch.__version__, architectures)
        self.builds = {"": ("+cu130", CUDA13), "+cpu": ("+cpu", []), "+cu126": ("+cu126", CUDA126)}
        self.builds |= {"+cu128": ("+cu128", ["sm_70", *CUDA13]), "+cu121": ("+cu121", CUDA126)}

    def full(self):
        self.venv = self.mdlib = True
        self.installed = {"pip": "25.0", "mdlib": "0.1.0"}
        self.installed |= {name: re.sub("[=<>]", "", pin) for name, pin in PINS.wanted.items()}
        return self

    def kaggle(self):
        """Kaggle's image: what mdlib accepts, but for lpips, pytorch-metric-learning and mdlib."""
        self.installed = {name: "1.99" for name in PINS.accepted} | {"pip": "25.0", "some-game": "1.0"}
        self.installed |= {"torch": "2.10.0+cu128", "torchvision": "0.25.0+cu128", "diffusers": "0.37.1"}
        self.installed |= {"transformers": "5.0.0", "accelerate": "1.14.0", "papermill": "2.6.0"}
        self.installed |= {"numpy": "2.0.2", "scipy": "1.16.3", "pandas": "2.2.2", "ipywidgets": "8.1.5"}
        self.installed |= {"matplotlib": "3.10.0", "pytorch-metric-learning": "2.9.0", "mdlib": "0.1.0"}
        self.installed |= {"lpips": "0.1.4"}
        self.mdlib = True
        return self

    def without(self, *names):
        for name in names:
            del self.installed[name]
        self.mdlib = "mdlib" in self.installed
        return self

    def build(self, name):
        """(version with build tag, architectures) of an installed torch or torchvision."""
        version = self.installed[name]
        release, plus, tag = version.partition("+")
        tag, archs = self.builds[plus + tag]
        return release + tag, archs

    def index_answers(self, python):
        self.asked_index += 1
        return self.online

    def ask(self, python, names=()):
        return {
            "interpreter": {"executable": str(python), "version": [3, 12, 1], "compiles": True},
            "installed": dict(self.installed),
            "half": dict(self.half),
            "project": str(setup.ROOT / "mdlib") if self.mdlib else None,
            "modules": {name: self.look(name) for name in names},
        }

    def ops(self, tag):
        """A build for CUDA 12.1 lists kernels that it does not have."""
        error = "RuntimeError: CUDA error: no kernel image is available" if tag == "cu121" else None
        return {"cpu": None} | {f"cuda:{i}": error for i in range(len(self.gpus))}

    def look(self, name):
        if name in self.errors:
            return {"error": self.errors[name]}
        name = next((n for n in PINS.accepted if setup.module_of(n) == name), name)
        if name not in self.installed:
            return {"error": f"ModuleNotFoundError: No module named '{name}'"}
        if name == "torch":
            version, archs = self.build(name)
            tag = version.partition("+")[2]
            cuda = f"{tag[2:4]}.{tag[4]}" if tag != "cpu" else None
            return {"error": None, "version": version, "cuda": cuda, "arch_list": archs, "ops": self.ops(tag)}
        if "torchvision" in self.installed and self.build("torch")[0][-4:] != self.build("torchvision")[0][-4:]:
            if name in ("torchvision", "transformers", "diffusers", "lpips"):
                return {"error": "RuntimeError: operator torchvision::nms does not exist"}
        return {
            "error": None,
            "version": self.build(name)[0] if name == "torchvision" else self.installed[name],
        }

    def execute(self, command, log=None):
        self.commands.append(command)
        if "-c" in command:
            self.constraints = Path(command[command.index("-c") + 1]).read_text().split()
        text = " ".join(command)
        if self.stop_at and self.stop_at in text:
            raise setup.Stop("a step ended with exit code 1; the whole log is LOG", "ERROR: no space")
        if "venv" in command:
            self.venv, self.installed["pip"] = True, "23.0"
            files()
        elif "uninstall" in command:
            del self.installed[command[-1]]
        elif "--editable" in text or "link" in command:
            self.mdlib, self.installed["mdlib"] = True, "0.1.0"
            files(*PINS.commands)
            self.half.pop("mdlib", None)
        else:
            for requirement in setup.requirements_of(command):
                match = re.match(r"([\w-]+)(?:[=>]=+)([\w.+]+)", requirement)
                if match and match[1] == "huggingface-hub":  # its family is in step again
                    self.errors.pop("diffusers", None)
                    self.conflicts = []
                if match:
                    self.installed[match[1]] = match[2]
                    self.half.pop(match[1], None)
                    if "--ignore-installed" in command:
                        self.errors.pop(match[1], None)


def files(*commands):
    """The programs of .venv: Python and these commands."""
    setup.venv_python().parent.mkdir(parents=True, exist_ok=True)
    for name in (setup.venv_python().name, *commands):
        setup.venv_python().with_name(name).touch(mode=0o755)


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Put a World in place of this machine, with .venv in a temporary folder."""

    def put(world):
        monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
        monkeypatch.setattr(setup, "INPUTS", tmp_path / "input")
        monkeypatch.setattr(setup, "index_answers", world.index_answers)
        monkeypatch.setattr(setup, "unmet_requirements", lambda python: world.conflicts)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(setup, "find_gpus", lambda: world.gpus)
        monkeypatch.setattr(setup, "ask", world.ask)
        monkeypatch.setattr(setup, "execute", world.execute)
        if world.venv:
            files(*PINS.commands)
        return world

    return put


def rows():
    return [name for name, *_ in setup.plan(setup.State(PINS))[0]]


def pip_text(world):
    return [" ".join(w for w in c[c.index("off") + 1 :] if w != "--") for c in world.commands if "off" in c]


def gpu(capability, driver, name="GPU"):
    return setup.Gpu(name, capability, driver)


# -- detect and plan -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13)])
def test_an_old_python_is_refused_with_the_supported_ones(version, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", version)
    assert setup.main(["install"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "3.11" in lines[0] and "3.13" in lines[0] and ".".join(map(str, version)) in lines[0]


def test_an_old_python_can_at_least_read_the_programs():
    for name in ("setup_environment.py", "check_environment.py"):
        ast.parse((ROOT / name).read_text(), feature_version=(3, 8))


def test_the_oldest_python_is_that_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, setup.OLDEST_PYTHON))}"' in text


@pytest.mark.parametrize(
    "gpus, row, index",
    [
        ([], "torch without a GPU", None),
        ([gpu((7, 5), 580), gpu((7, 5), 580)], "torch for a GPU", None),
        ([gpu((8, 6), 550)], "torch for an old driver", "whl/cu126"),
        ([gpu((6, 0), 580)], "torch for an old GPU", "whl/cu126"),
        ([gpu((7, 0), 535)], "torch for an old GPU", "whl/cu126"),
        ([gpu((7, 5), 470)], "torch without a GPU", None),
    ],
)
def test_a_fresh_machine_gets_the_torch_it_can_run(make, gpus, row, index):
    world = make(World(gpus))
    assert rows() == ["virtual environment", row, "packages", "mdlib"]
    setup.ensure()
    torch = pip_text(world)[0]
    assert f"torch==={TORCH}" in torch and f"torchvision==={VISION}" in torch
    assert (index in torch) if index else ("--index-url" not in torch)
    assert rows() == []


@pytest.mark.parametrize("build", ["", "+cpu"])
@pytest.mark.parametrize("gpus", [[], [gpu((7, 5), 580)]])
def test_a_torch_that_works_with_its_torchvision_stays(make, build, gpus):
    world = make(World(gpus).full())
    world.installed |= {"torch": TORCH + build, "torchvision": VISION + build}
    assert rows() == []


def test_another_accepted_release_of_torch_stays(make):
    world = make(World().full())
    world.installed |= {"torch": "2.10.0", "torchvision": "0.25.0"}
    assert rows() == []
    world.installed["torch"] = "2.5.1"
    assert rows() == ["torch without a GPU"]


@pytest.mark.parametrize(
    "gpus, row",
    [
        ([gpu((6, 0), 580)], "torch for an old GPU"),
        ([gpu((8, 6), 550)], "torch for an old driver"),
    ],
)
def test_a_torch_without_kernels_for_the_gpu_is_exchanged(make, gpus, row):
    world = make(World(gpus).full())
    assert rows() == [row]
    setup.ensure()
    assert world.installed["torch"] == TORCH + "+cu126" and world.installed["torchvision"] == VISION + "+cu126"


def test_a_busy_gpu_is_no_reason_to_exchange_torch(make, monkeypatch):
    world = make(World([gpu((8, 0), 580)]).full())
    look = world.look
    busy = {"ops": {"cpu": None, "cuda:0": "OutOfMemoryError: CUDA out of memory"}}
    monkeypatch.setattr(world, "look", lambda n: look(n) | (busy if n == "torch" else {}))
    assert rows() == []


def test_kernels_serve_later_minor_versions_and_ptx_later_majors():
    assert setup.has_kernels((6, 1), ["sm_60"])
    assert not setup.has_kernels((6, 0), ["sm_61", "sm_70"])
    assert not setup.has_kernels((10, 0), ["sm_90"])
    assert setup.has_kernels((10, 0), ["sm_90", "compute_90"])
    assert setup.has_kernels((12, 0), CUDA13)


# -- repair ----------------------------------------------------------------------------------------


def test_a_mismatched_pair_is_mended_from_the_default_index(make, capsys):
    world = make(World().full())
    world.installed["torch"] = TORCH + "+cpu"
    assert rows() == ["torchvision to match torch"]
    assert setup.main(["repair"]) == 0
    assert pip_text(world) == [f"torch==={TORCH} torchvision==={VISION}"]
    assert "nms does not exist" in capsys.readouterr().out


def test_the_torch_of_a_mismatched_pair_stays_if_its_index_has_the_partner(make):
    world = make(World([gpu((7, 5), 580)]).full())
    world.installed |= {"torch": TORCH + "+cu126"}
    setup.ensure()
    assert world.installed["torch"] == TORCH + "+cu126"
    assert world.installed["torchvision"] == VISION + "+cu126"


def test_damaged_files_of_the_right_version_are_written_again(make):
    world = make(World().full())
    world.errors["torchvision"] = "ImportError: libjpeg.so: file too short"
    setup.ensure()
    assert pip_text(world) == [f"--ignore-installed --no-deps torchvision==={VISION}"]


@pytest.mark.parametrize("name", ["huggingface_hub", "tokenizers", "httpx"])
def test_a_broken_hub_brings_its_whole_family_back(make, name):
    world = make(World().full())
    world.errors["diffusers"] = f"ImportError: cannot import name 'x' from '{name}'"
    assert rows() == ["imports"]
    setup.ensure()
    for name in setup.HUB_FAMILY:
        assert name + PINS.wanted[name] in pip_text(world)[0]
    assert not any(re.search(r"\btorch=", text) for text in pip_text(world))


def test_a_package_that_was_exchanged_returns_to_its_pin_under_constraints(make):
    world = make(World().full())
    world.installed["huggingface-hub"] = "2.4.0"
    assert rows() == ["packages"]
    setup.ensure()
    assert "huggingface-hub" + PINS.wanted["huggingface-hub"] in pip_text(world)[0]
    constraints = setup.VENV / "constraints.txt"
    assert f"-c {constraints}" in " ".join(world.commands[0])
    lines = constraints.read_text().split()
    assert f"torch==={TORCH}" in lines and f"torchvision==={VISION}" in lines


def test_an_interrupted_install_is_completed(make):
    world = make(World())
    world.stop_at = "diffusers=="
    assert setup.main(["install"]) == 1
    assert "torch" in world.installed and "diffusers" not in world.installed
    before, world.stop_at = len(world.commands), None
    world.half = {"pip-half": "1.0", "mdlib": "0.1.0"}
    world.installed |= world.half
    assert setup.main(["install"]) == 0
    again = [" ".join(c) for c in world.commands[before:]]
    assert not any("torch===" in text or "-m venv" in text for text in again)
    assert "--ignore-installed --no-deps -- pip-half===1.0" in again[0]
    assert rows() == []


def test_a_second_install_runs_no_command(make):
    world = make(World())
    setup.main(["install"])
    world.commands.clear()
    assert setup.main(["install"]) == 0
    assert world.commands == []


@pytest.mark.parametrize("extra", sorted({"test", "browser", *EXTRAS}))
def test_an_extra_is_installed_when_asked_for(make, extra):
    world = make(World().full())
    assert setup.main(["install", "--extra", extra]) == 0
    assert {setup.split_requirement(requirement)[0] for requirement in EXTRAS[extra]} <= set(world.installed)
    assert setup.main(["test", "--dry-run"]) == 0


# -- the table, row by row -------------------------------------------------------------------------

T4, P100 = gpu((7, 5), 580, "Tesla T4"), gpu((6, 0), 580, "Tesla P100")
PASCAL = "torch 2.10.0+cu128 has no kernels for Tesla P100 (6.0)"


def wheelhouse(folder, *wheels):
    folder.mkdir(parents=True)
    (folder / setup.WHEELHOUSE_MARKER.replace("*", "0")).touch()
    for wheel in wheels:
        (folder / f"{wheel}.whl").touch()
    return folder


@dataclass
class Case:
    """A state of the table, and what follows: the names of the steps, what pip gets, the exit code, a printed text."""

    state: str
    world: World
    rows: list = field(default_factory=list)
    pip: list = field(default_factory=list)
    code: int = 0
    text: str = ""
    host: str = ""  # of KAGGLE_KERNEL_RUN_TYPE; '' is .venv
    wheels: tuple = ()
    loaded: bool = False


def offline(world):
    world.online = False
    return world


def spoilt(world, installed=(), errors=(), conflicts=()):
    world.installed |= dict(installed)
    world.errors |= dict(errors)
    world.conflicts = list(conflicts)
    return world


NMS = "RuntimeError: operator torchvision::nms does not exist"
HUB = "ImportError: cannot import name 'cached_download' from 'huggingface_hub'"
HUB_PIN = "huggingface-hub" + PINS.wanted["huggingface-hub"]
CU126 = setup.WHEELS + "cu126"
CU126_WHEELS = tuple(f"{n}+cu126-cp312-cp312-manylinux_2_28_x86_64" for n in ("torch-2.10.0", "torchvision-0.25.0"))
INTERACTIVE = "Interactive"


def TABLE():
    """The decision table of this program. Row 1, an old Python, has tests of its own above."""
    return [
        Case(
            "2 torch is loaded and has to change",
            World([P100]).kaggle(),
            code=1,
            text="restart the kernel",
            host=INTERACTIVE,
            loaded=True,
        ),
        Case("2 the same in a batch run", World([P100]).kaggle(), code=1, text="first cell", host="Batch", loaded=True),
        Case("2 torch is loaded and may stay", World([T4]).kaggle(), host=INTERACTIVE, loaded=True),
        Case(
            "3 a hosted image lacks packages",
            World([T4, T4]).kaggle().without("lpips", "pytorch-metric-learning", "mdlib"),
            ["packages", "mdlib"],
            [f"--no-deps lpips{PINS.accepted['lpips']} pytorch-metric-learning>=2.0"],
            host=INTERACTIVE,
        ),
        Case(
            "3 the same from a wheelhouse",
            offline(World([T4, T4]).kaggle().without("lpips")),
            ["packages"],
            [f"--no-index --find-links WHEELHOUSE --no-deps lpips{PINS.accepted['lpips']}"],
            host=INTERACTIVE,
            wheels=("lpips-0.1.4-py3-none-any",),
        ),
        Case(
            "3 the wheelhouse before the index",
            World([T4]).kaggle().without("lpips"),
            ["packages"],
            [f"--no-index --find-links WHEELHOUSE --no-deps lpips{PINS.accepted['lpips']}"],
            host=INTERACTIVE,
            wheels=("lpips-0.1.4-py3-none-any",),
        ),
        Case(
            "4 no Internet, no wheelhouse",
            offline(World([T4]).kaggle().without("lpips")),
            text="without LPIPS images are compared by PSNR, SSIM",
            host=INTERACTIVE,
        ),
        Case(
            "4 the same, for a required package",
            offline(World([T4]).kaggle().without("lpips", "diffusers")),
            code=1,
            text="attach the dataset",
            host=INTERACTIVE,
        ),
        Case(
            "5 a GPU and a CPU build on Kaggle",
            spoilt(World([T4]).kaggle(), {"torch": "2.10.0+cpu", "torchvision": "0.25.0+cpu"}),
            code=1,
            text="phone number",
            host=INTERACTIVE,
        ),
        Case(
            "5 the same in .venv",
            spoilt(World([T4]).full(), {"torch": TORCH + "+cpu", "torchvision": VISION + "+cpu"}),
            ["torch for a GPU"],
            [f"torch==={TORCH} torchvision==={VISION}"],
        ),
        Case("6 no GPU", World().full()),
        Case(
            "6 no GPU on Kaggle",
            spoilt(World().kaggle(), {"torch": "2.10.0+cpu", "torchvision": "0.25.0+cpu"}),
            host=INTERACTIVE,
        ),
        Case(
            "7 torch is broken",
            spoilt(World([T4]).full(), errors={"torch": "ImportError: libcudart"}),
            ["torch for a GPU"],
            [f"--ignore-installed --no-deps torch==={TORCH} torchvision==={VISION}"],
        ),
        Case(
            "7 torch is broken on Kaggle",
            spoilt(World([T4]).kaggle(), errors={"torch": "ImportError: libcudart"}),
            code=1,
            text="start a fresh Kaggle session",
            host=INTERACTIVE,
        ),
        Case(
            "8 the driver is older than CUDA 13",
            World([gpu((7, 5), 535)]).full(),
            ["torch for an old driver"],
            [f"--index-url {CU126} torch==={TORCH}+cu126 torchvision==={VISION}+cu126"],
        ),
        Case(
            "9 no kernels: the same release for CUDA 12.6",
            World([P100]).kaggle(),
            ["torch for an old GPU"],
            [f"--index-url {CU126} torch===2.10.0+cu126 torchvision===0.25.0+cu126"],
            text="PIP_CONSTRAINT=",
            host=INTERACTIVE,
        ),
        Case(
            "9 the same of a release that has no such build",
            spoilt(World([P100]).full(), {"torch": "2.15.0", "torchvision": "0.29.2"}),
            ["torch for an old GPU"],
            [f"--index-url {CU126} torch===2.14.1+cu126 torchvision===0.29.1+cu126"],
            text="PIP_CONSTRAINT=",
        ),
        Case(
            "9 a torch that has the kernels stays",
            spoilt(World([P100]).full(), {"torch": "2.10.0+cu126", "torchvision": "0.25.0+cu126"}),
            text="PIP_CONSTRAINT=",
        ),
        Case(
            "9 the kernels are listed, yet a convolution finds none",
            spoilt(World([P100]).full(), {"torch": "2.9.1+cu121", "torchvision": "0.24.1+cu121"}),
            ["torch for an old GPU"],
            [f"--index-url {CU126} torch===2.9.1+cu126 torchvision===0.24.1+cu126"],
        ),
        Case("10 offline", offline(World([P100]).kaggle()), code=3, text=PASCAL, host=INTERACTIVE),
        Case(
            "10 offline with a wheelhouse",
            offline(World([P100]).kaggle()),
            ["torch for an old GPU"],
            ["--no-index --find-links WHEELHOUSE torch===2.10.0+cu126 torchvision===0.25.0+cu126"],
            host=INTERACTIVE,
            wheels=CU126_WHEELS,
        ),
        Case(
            "10 the wheels are for another Python",
            offline(World([P100]).kaggle()),
            code=3,
            text=PASCAL,
            host=INTERACTIVE,
            wheels=tuple(wheel.replace("cp312", "cp311") for wheel in CU126_WHEELS),
        ),
        Case("11 the driver is too old for any build", World([gpu((7, 5), 470)]).full()),
        Case(
            "12 torchvision of another build",
            spoilt(World([T4]).kaggle(), {"torchvision": "0.25.0+cpu"}),
            ["torchvision to match torch"],
            [f"--index-url {setup.WHEELS}cu128 --no-deps torchvision===0.25.0+cu128"],
            host=INTERACTIVE,
        ),
        Case(
            "12 offline in .venv: diffusers does without",
            offline(spoilt(World().full(), {"torchvision": VISION + "+cpu"})),
            ["torchvision that cannot be matched"],
            text="torchvision is missing",
        ),
        Case(
            "12 offline on Kaggle: the image is left alone",
            offline(spoilt(World([T4]).kaggle(), {"torchvision": "0.25.0+cpu"})),
            code=1,
            text="no wheelhouse has torchvision===0.25.0+cu128",
            host=INTERACTIVE,
        ),
        Case(
            "13 hub, transformers and diffusers out of step",
            spoilt(
                World([T4]).kaggle(),
                errors={"diffusers": HUB},
                conflicts=[["diffusers", "huggingface-hub<2.0", "2.4.0"]],
            ),
            ["imports"],
            ["WINDOW"],
            host=INTERACTIVE,
        ),
        Case(
            "13 the same offline",
            offline(
                spoilt(
                    World([T4]).kaggle(),
                    errors={"diffusers": HUB},
                    conflicts=[["diffusers", "huggingface-hub<2.0", "2.4.0"]],
                )
            ),
            code=1,
            text=f"no wheelhouse has {HUB_PIN}",
            host=INTERACTIVE,
        ),
        Case(
            "16 other packages disagree",
            spoilt(World([T4]).kaggle(), conflicts=[["some-game", "numpy<2", "2.0.2"]]),
            host=INTERACTIVE,
        ),
    ]


@pytest.mark.parametrize("number", range(len(TABLE())), ids=lambda number: TABLE()[number].state)
def test_every_row_of_the_table(number, make, monkeypatch, tmp_path, capsys):
    case = TABLE()[number]
    world = make(case.world)
    if case.host:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", case.host)
    if case.wheels:
        wheelhouse(tmp_path / "input" / "datasets" / "somebody" / "wheels", *case.wheels)
    if not case.loaded:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.10.0"))

    before = dict(world.installed)
    code = setup.main(["repair"])
    printed = capsys.readouterr()
    done = re.findall(r"^  ([^:\n]+): .* done \(", printed.out, re.MULTILINE)
    given = [text.replace(str(tmp_path / "input/datasets/somebody/wheels"), "WHEELHOUSE") for text in pip_text(world)]
    window = " ".join([HUB_PIN, *(f"{n}{PINS.accepted[n]}" for n in setup.HUB_FAMILY[1:])])
    assert done == case.rows
    assert [text.lstrip() for text in given] == [text.replace("WINDOW", window) for text in case.pip]
    assert code == case.code
    assert case.text in printed.out + printed.err
    if not any("torch" in row for row in case.rows):
        fixed = {name: version for name, version in before.items() if setup.HELD.fullmatch(name)}
        assert fixed.items() <= world.installed.items()
    assert len(printed.err.splitlines()) == (code == 1)


def test_what_is_not_named_is_held(make, monkeypatch):
    world = make(World([T4]).kaggle().without("lpips"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", INTERACTIVE)
    assert setup.main(["repair"]) == 0
    constraints = setup.State(PINS, Path(sys.executable)).folder / "constraints.txt"
    assert f"-c {constraints}" in " ".join(world.commands[0])
    lines = world.constraints
    assert {"torch===2.10.0+cu128", "numpy===2.0.2", "ipywidgets===8.1.5", "diffusers===0.37.1"} <= set(lines)
    assert not any(line.startswith(("lpips", "some-game")) for line in lines)


def test_a_torch_for_an_old_gpu_is_held_afterwards(make, capsys):
    world = make(World([P100]).full())
    assert setup.main(["repair"]) == 0
    held = setup.VENV / "constraints.txt"
    assert f"torch==={TORCH}+cu126" in held.read_text().split()
    assert f"PIP_CONSTRAINT={held}" in capsys.readouterr().out
    assert world.asked_index == 1  # and only because something had to be installed


def test_nothing_to_do_asks_no_index(make):
    world = make(World().full())
    assert setup.main(["repair"]) == setup.main(["install"]) == 0
    assert world.commands == [] and world.asked_index == 0


def test_another_python_keeps_what_lies_in_the_ranges(make, tmp_path):
    world = make(World().kaggle().without("lpips", "mdlib"))
    world.installed["diffusers"] = "0.30.0"
    assert setup.main(["repair", "--python", str(tmp_path / "bin" / "python")]) == 0
    assert pip_text(world) == [f"lpips{PINS.accepted['lpips']}", f"diffusers{PINS.accepted['diffusers']}"]
    assert world.installed["torch"] == "2.10.0+cu128" and world.mdlib


def test_system_packages_are_not_taken_for_half_installed_ones(make, tmp_path):
    world = make(World().kaggle())
    world.half = {"numpy": "2.0.2", "papermill": "2.6.0", "some-game": "1.0"}
    world.errors["papermill"] = "ModuleNotFoundError: No module named 'papermill.execute'"
    assert setup.main(["repair", "--python", str(tmp_path / "bin" / "python")]) == 0
    assert pip_text(world) == ["--ignore-installed --no-deps papermill===2.6.0"]


def test_a_module_that_lost_its_files_is_written_again(make):
    world = make(World().full())
    world.installed["regex"] = "2026.1.1"
    world.errors["transformers"] = "ModuleNotFoundError: No module named 'regex'"
    setup.main(["repair"])
    assert "regex===2026.1.1" in pip_text(world)[1]


def test_install_keeps_a_cpu_build_and_says_how_to_exchange_it(make, capsys):
    world = make(World([T4]).full())
    world.installed |= {"torch": TORCH + "+cpu", "torchvision": VISION + "+cpu"}
    assert setup.main(["install"]) == 0
    assert world.commands == [] and "setup_environment.py repair" in capsys.readouterr().out


def test_several_wheelhouses_are_listed_and_a_folder_without_wheels_is_refused(make, tmp_path, monkeypatch, capsys):
    make(World([T4]).kaggle().without("lpips"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", INTERACTIVE)
    first, second = (wheelhouse(tmp_path / "input" / name, "lpips-0.1.4-py3-none-any") for name in ("one", "two"))
    assert setup.main(["repair"]) == 1
    assert f"{first}, {second}" in capsys.readouterr().err
    assert setup.main(["repair", "--wheelhouse", str(tmp_path)]) == 1
    assert "holds no wheels" in capsys.readouterr().err
    assert setup.main(["repair", "--wheelhouse", str(second)]) == 0


def test_mdlib_is_linked_where_packages_are(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert setup.main(["link"]) == 0
    assert (tmp_path / "mdlib.pth").read_text().strip() == str(ROOT)


@pytest.mark.parametrize(
    "torch, vision",
    [
        ("2.9.1+cu126", "torchvision===0.24.1+cu126"),
        ("2.10.0", "torchvision===0.25.0"),
        ("2.10.0+cu128", "torchvision===0.25.0+cu128"),
        ("2.15.0", "torchvision"),
    ],
)
def test_a_torchvision_of_each_torch(make, torch, vision):
    make(World().full()).installed["torch"] = torch
    assert setup.requirements_of(setup.install_pair(setup.State(PINS), "")) == [vision]


# -- failures --------------------------------------------------------------------------------------


def test_a_remedy_that_does_not_help_ends_with_one_line(make, monkeypatch, capsys):
    world = make(World().full())
    look = world.look
    broken = {"error": "ImportError: cannot import name 'y'"}
    monkeypatch.setattr(world, "look", lambda n: broken if n == "lpips" else look(n))
    assert setup.main(["install"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "lpips" in error[0] and "cannot import name 'y'" in error[0]
    assert len([c for c in world.commands if "--ignore-installed" in c]) == 1


def test_a_failing_pip_shows_the_end_of_its_log(make, capsys):
    world = make(World())
    world.stop_at = "torch==="
    assert setup.main(["install"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-2].strip() == "ERROR: no space" and "log" in error[-1]


def test_execute_logs_and_reports_the_exit_code(tmp_path):
    log = tmp_path / "setup.log"
    setup.execute([sys.executable, "-c", "print('well')"], log)
    with pytest.raises(setup.Stop, match=r"exit code 3.*setup\.log") as stop:
        setup.execute([sys.executable, "-c", "import sys; print('ill'); sys.exit(3)"], log)
    assert stop.value.args[-1] == "ill"
    assert "well" in log.read_text()


def test_repair_needs_an_environment(make, capsys):
    make(World())
    assert setup.main(["repair"]) == 1
    assert "setup_environment.py install" in capsys.readouterr().err


def test_an_unknown_extra_is_refused(make, capsys):
    make(World().full())
    assert setup.main(["install", "--extra", "tests"]) == 1
    assert "'tests'" in capsys.readouterr().err


def test_an_interpreter_that_does_not_run_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "find_gpus", lambda: ())
    setup.venv_python().parent.mkdir(parents=True)
    setup.venv_python().write_text("not a program")
    assert setup.main(["install"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and f"delete {tmp_path}" in error[0]


# -- dry run, pins ---------------------------------------------------------------------------------


def test_a_dry_run_prints_the_rows_and_commands_and_does_nothing(make, capsys):
    world = make(World())
    assert setup.main(["install", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert world.commands == [] and not setup.VENV.exists()
    assert "torch without a GPU" in out and f"torch==={TORCH} torchvision==={VISION}" in out
    assert "-m venv" in out and "nothing was changed" in out


def test_a_dry_run_of_repair_prints_the_notes(make, capsys):
    make(offline(World([P100]).kaggle().full()))
    assert setup.main(["repair", "--dry-run"]) == 0
    assert "everything runs on the CPU: torch" in capsys.readouterr().out


def test_every_version_is_written_once():
    for name in ("setup_environment.py", "check_environment.py", "environment.yml"):
        text = (ROOT / name).read_text()
        for package, pin in setup.read_pins(("test",)).wanted.items():
            assert not re.search(rf"\b{package}\s*[=<>]=+\s*\d", text), (name, package)
            version = pin.lstrip("=")  # a range, as that of setuptools, is no version
            assert ">" in pin or version not in text, (name, package, version)


def test_environment_yml_brings_a_tested_python_and_the_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"} and environment["channels"] == ["conda-forge"]
    python, pip, packages = environment["dependencies"]
    name, specifier = setup.split_requirement(python)
    assert name == "python" and pip == "pip"
    assert [v for v in ("3.10", "3.11", "3.12", "3.13", "3.14") if setup.satisfies(v, specifier)] == [
        "3.11",
        "3.12",
        "3.13",
    ]
    assert packages == {"pip": ["-e .[pinned]"]}


def test_pins_lie_in_the_accepted_ranges():
    for name, accepted in PINS.accepted.items():
        assert setup.satisfies(PINS.wanted[name].lstrip("="), accepted), name


def test_satisfies_agrees_with_packaging():
    specifiers = pytest.importorskip("packaging.specifiers")
    for version in ("1.9", "2.0", "2.6.0", "2.6.1", "2.10.0+cu126", "3.0"):
        for specifier in (">=2.6", ">2.6,<3", "==2.6.0", "!=2.6.1,<=2.10", "<2", ""):
            want = specifiers.SpecifierSet(specifier).contains(version)
            assert setup.satisfies(version, specifier) == want, (version, specifier)


# -- probe -----------------------------------------------------------------------------------------


def test_probe_reports_each_module(capfd):
    facts = setup.ask(sys.executable, ("json", "torch", "no_such_module"))
    modules = facts["modules"]
    assert modules["json"]["error"] is None
    assert modules["torch"]["ops"]["cpu"] is None
    assert "no_such_module" in modules["no_such_module"]["error"]
    assert "pytest" in facts["installed"]


def test_a_module_that_crashes_the_interpreter_is_named(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text("import os; os._exit(11)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = setup.ask(sys.executable, ("crashing", "json"))["modules"]
    assert "crashed" in facts["crashing"]["error"] and facts["json"]["error"] is None


def test_requirements_that_are_not_met_are_found(monkeypatch):
    printed = (
        "diffusers 0.37.1 has requirement huggingface-hub<2.0,>=0.34, but you have huggingface-hub 2.4.0.\n"
        "diffusers 0.37.1 requires lost, which is not installed.\n"
    )
    monkeypatch.setattr(setup.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=printed))
    assert setup.unmet_requirements(Path(sys.executable)) == [
        ("diffusers", "huggingface-hub<2.0,>=0.34", "2.4.0"),
        ("diffusers", "lost", ""),
    ]


def test_an_import_error_names_its_first_cause():
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as cause:
            raise ImportError("look\nabove") from cause
    except ImportError as error:
        text = setup.describe(error)
    assert text == "ImportError: look above <- RuntimeError: operator torchvision::nms does not exist"


def test_a_package_that_breaks_the_import_of_another_is_named(tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    for name, text in {"wanted": "import helper", "helper": "import nonsense", "nonsense": "import gone"}.items():
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(text)
        needs = "Requires-Dist: helper\n" if name == "wanted" else ""
        about = packages / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
        (about / "top_level.txt").write_text(name)
    monkeypatch.syspath_prepend(str(packages))
    with pytest.raises(ModuleNotFoundError) as caught:
        setup.probe_module("wanted")
    assert setup.culprit(caught.value, ["wanted"]) == "nonsense"
    assert setup.culprit(caught.value, ["wanted", "nonsense"]) == ""


def test_repair_does_not_reinstall_a_package_that_another_one_breaks(make, capsys):
    world = make(World().full())
    look = world.look
    broken = {"error": "RuntimeError: Failed to import", "culprit": "peft"}
    world.look = lambda name: broken if name == "diffusers" else look(name)
    assert setup.main(["repair"]) == 1
    assert "because of peft, which mdlib does not need" in (error := capsys.readouterr().err)
    assert "pip uninstall --yes peft" in error and not world.commands


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    table = "Tesla T4, 7.5, 580.159.04, 15360 MiB\nTesla P100-PCIE-16GB, 6.0, 580.159.04, 16384 MiB\n"
    monkeypatch.setattr(setup.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=table))
    assert setup.find_gpus() == (
        setup.Gpu("Tesla T4", (7, 5), 580, 15360),
        setup.Gpu("Tesla P100-PCIE-16GB", (6, 0), 580, 16384),
    )


# -- demo and test ---------------------------------------------------------------------------------


@pytest.fixture
def modules_run(make, monkeypatch):
    """A complete environment; `python -m ...` is recorded instead of run."""
    world = make(World().full())
    calls = []
    world.code = 0

    def run(command, **options):
        calls.append(command[2:])
        return SimpleNamespace(returncode=world.code)

    monkeypatch.setattr(setup.subprocess, "run", run)
    return world, calls


def test_demo_simulates_and_runs(modules_run, capsys):
    _, calls = modules_run
    assert setup.main(["demo", "-p", "epochs=1"]) == 0
    simulate, run = calls
    assert simulate[:2] == ["mdlib", "simulate"] and run[-2:] == ["-p", "epochs=1"]
    assert run[:4] == ["mdlib", "run", "--system", "vae-diffusion"]
    assert "windows_per_user=5" in run, "few windows, with the pretrained weights that come along"


@pytest.mark.parametrize("words", [["install", "-x"], ["install", "--users", "4"], ["test", "--python", "x"], ["dema"]])
def test_an_option_of_another_command_is_refused(make, words, capsys):
    make(World().full())
    with pytest.raises(SystemExit):
        setup.main(words)
    assert words[-1] in capsys.readouterr().err or "--" in words[1]


@pytest.mark.parametrize("words, lab", [([], False), (["--extra", "test"], True), (["install"], False)])
def test_a_set_up_ends_with_how_to_use_it(make, words, lab, monkeypatch, capsys):
    """Without a command it installs, and then checks."""
    import check_environment

    checked = []
    monkeypatch.setattr(check_environment, "main", lambda argv: checked.append(argv) or 0)
    world = make(World())
    world.installed |= {"jupyterlab": "4"} if lab else {}
    assert setup.main(words) == 0
    assert world.venv and checked == ([] if "install" in words else [["--python", str(setup.venv_python())]])
    activate, then = capsys.readouterr().out.splitlines()[-2:]
    assert activate.endswith("source .venv/bin/activate") and "`mdlib --help`" in then
    assert ("`jupyter lab`" if lab else "install --extra jupyter") in then
    monkeypatch.setattr(check_environment, "main", lambda argv: 1)
    assert setup.main(words) == ("install" not in words)


def test_without_a_command_a_hosted_image_is_repaired(make, monkeypatch):
    import check_environment

    world = make(World([T4]).kaggle().without("lpips"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", INTERACTIVE)
    monkeypatch.setattr(check_environment, "main", lambda argv: 0)
    assert setup.main([]) == 0
    assert "lpips" in world.installed and not setup.VENV.exists()


def test_a_missing_command_of_mdlib_is_installed_again(make, monkeypatch):
    monkeypatch.setattr(setup, "read_pins", lambda extras=(): PINS)
    monkeypatch.setattr(PINS, "commands", ("mdlib",))
    world = make(World().full())
    setup.venv_python().with_name("mdlib").unlink()
    assert rows() == ["mdlib"]
    assert setup.main(["install"]) == 0
    assert len(world.commands) == 1 and "--editable" in " ".join(world.commands[0])


def test_exit_codes_are_passed_on(modules_run, tmp_path):
    world, calls = modules_run
    world.code = 5
    assert setup.main(["test", "-k", "nothing", "-x", "tests/test_x.py"]) == 5
    assert calls == [["pytest", "-n", "2", "-k", "nothing", "-x", "tests/test_x.py"]]
    assert setup.main(["demo", "--out", str(tmp_path / "demo")]) == 5
    assert len(calls) == 2  # nothing runs after the simulation failed
