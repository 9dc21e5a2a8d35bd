"""setup_environment.py with a pretended machine: no package is installed, no other Python is started."""

import ast
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import setup_environment as setup

ROOT = Path(setup.__file__).parent
PINS = setup.read_pins()
TORCH, VISION = (PINS.wanted[name].lstrip("=") for name in ("torch", "torchvision"))
CUDA13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


class World:
    """A machine and its .venv, as `ask` and `execute` see them."""

    def __init__(self, gpus=()):
        self.gpus = tuple(gpus)
        self.installed, self.half, self.errors = {}, {}, {}
        self.venv = self.mdlib = False
        self.commands = []
        self.stop_at = None  # text of a command that fails
        # local tag of the distribution -> (that of torch.__version__, architectures)
        self.builds = {"": ("+cu130", CUDA13), "+cpu": ("+cpu", []), "+cu126": ("+cu126", CUDA126)}

    def full(self):
        self.venv = self.mdlib = True
        self.installed = {"pip": "25.0", "mdlib": "0.1.0"}
        self.installed |= {name: re.sub("[=<>]", "", pin) for name, pin in PINS.wanted.items()}
        return self

    def build(self, name):
        """(version with build tag, architectures) of an installed torch or torchvision."""
        version = self.installed[name]
        release, plus, tag = version.partition("+")
        tag, archs = self.builds[plus + tag]
        return release + tag, archs

    def ask(self, python, modules=()):
        facts = {
            "interpreter": {"executable": str(python), "version": [3, 12, 1]},
            "installed": dict(self.installed),
            "half": dict(self.half),
            "project": {"mdlib": str(setup.ROOT / "mdlib") if self.mdlib else None},
        }
        return facts | {name: self.look(name) for name in modules}

    def look(self, name):
        if name in self.errors:
            return {"error": self.errors[name]}
        if name not in self.installed:
            return {"error": f"ModuleNotFoundError: No module named '{name}'"}
        if name == "torch":
            version, archs = self.build(name)
            cuda = {"cu130": "13.0", "cu126": "12.6"}.get(version.partition("+")[2])
            return {"error": None, "version": version, "cuda": cuda, "arch_list": archs, "ops": {"cpu": None}}
        if "torchvision" in self.installed and self.build("torch")[0][-4:] != self.build("torchvision")[0][-4:]:
            if name != "accelerate":
                return {"error": "RuntimeError: operator torchvision::nms does not exist"}
        return {
            "error": None,
            "version": self.build(name)[0] if name == "torchvision" else self.installed[name],
        }

    def execute(self, command):
        self.commands.append(command)
        text = " ".join(command)
        if self.stop_at and self.stop_at in text:
            raise setup.Stop("a step ended with exit code 1; the whole log is LOG", "ERROR: no space")
        if "venv" in command:
            self.venv, self.installed["pip"] = True, "23.0"
            setup.venv_python().parent.mkdir(parents=True, exist_ok=True)
            setup.venv_python().touch()
        elif "-e" in command:
            self.mdlib, self.installed["mdlib"] = True, "0.1.0"
            self.half.pop("mdlib", None)
        else:
            for requirement in command[command.index("off") + 1 :]:
                match = re.fullmatch(r"([\w-]+)(?:[=>]=+)([\w.+]+)", requirement)
                if match:
                    self.installed[match[1]] = match[2]
                    self.half.pop(match[1], None)
                    if "--ignore-installed" in command:
                        self.errors.pop(match[1], None)


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Put a World in place of this machine, with .venv in a temporary folder."""

    def put(world):
        monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
        monkeypatch.setattr(setup, "LOG", tmp_path / ".venv" / "setup.log")
        monkeypatch.setattr(setup, "CONSTRAINTS", tmp_path / ".venv" / "constraints.txt")
        monkeypatch.setattr(setup, "find_gpus", lambda: world.gpus)
        monkeypatch.setattr(setup, "ask", world.ask)
        monkeypatch.setattr(setup, "execute", world.execute)
        if world.venv:
            setup.venv_python().parent.mkdir(parents=True)
            setup.venv_python().touch()
        return world

    return put


def rows():
    return [step.name for step in setup.plan(setup.detect(PINS))]


def pip_text(world):
    return [" ".join(c[c.index("off") + 1 :]) for c in world.commands if "pip" in c]


def gpu(capability, driver, name="GPU"):
    return setup.Gpu(name, capability, driver)


# -- detect and plan -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13)])
def test_an_old_python_is_told_which_ones_are_supported(version, monkeypatch, capsys):
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
def test_a_torch_that_works_with_its_torchvision_is_kept(make, build, gpus):
    world = make(World(gpus).full())
    world.installed |= {"torch": TORCH + build, "torchvision": VISION + build}
    assert rows() == []


def test_another_accepted_release_of_torch_is_kept(make):
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
    for requirement in setup.pinned(setup.detect(PINS), setup.HUB_FAMILY):
        assert requirement in pip_text(world)[0]
    assert not any(re.search(r"\btorch=", text) for text in pip_text(world))


def test_a_package_that_was_exchanged_returns_to_its_pin_under_constraints(make):
    world = make(World().full())
    world.installed["huggingface-hub"] = "2.4.0"
    assert rows() == ["packages"]
    setup.ensure()
    assert "huggingface-hub" + PINS.wanted["huggingface-hub"] in pip_text(world)[0]
    assert f"-c {setup.CONSTRAINTS}" in pip_text(world)[0]
    held = setup.CONSTRAINTS.read_text().split()
    assert f"torch==={TORCH}" in held and f"torchvision==={VISION}" in held


def test_an_interrupted_install_is_completed(make):
    world = make(World())
    world.stop_at = "-c "
    assert setup.main(["install"]) == 1
    assert "torch" in world.installed and "diffusers" not in world.installed
    before, world.stop_at = len(world.commands), None
    world.half = {"pip-half": "1.0", "mdlib": "0.1.0"}
    assert setup.main(["install"]) == 0
    again = [" ".join(c) for c in world.commands[before:]]
    assert not any("torch===" in text or "-m venv" in text for text in again)
    assert "--ignore-installed --no-deps pip-half===1.0" in again[0]
    assert rows() == []


def test_a_second_install_runs_no_command(make):
    world = make(World())
    setup.main(["install"])
    world.commands.clear()
    assert setup.main(["install"]) == 0
    assert world.commands == []


def test_the_test_extra_is_installed_when_asked_for(make):
    world = make(World().full())
    assert setup.main(["install", "--extra", "test"]) == 0
    assert "pytest" in world.installed and "ruff" in world.installed


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


def test_execute_logs_and_reports_the_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    setup.execute([sys.executable, "-c", "print('well')"])
    with pytest.raises(setup.Stop, match=r"exit code 3.*setup\.log") as stop:
        setup.execute([sys.executable, "-c", "import sys; print('ill'); sys.exit(3)"])
    assert stop.value.args[-1] == "ill"
    assert "well" in setup.LOG.read_text()


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


def test_every_version_is_written_once():
    for name in ("setup_environment.py", "check_environment.py", "environment.yml"):
        text = (ROOT / name).read_text()
        for package, pin in setup.read_pins(("test",)).wanted.items():
            assert not re.search(rf"\b{package}\s*[=<>]=+\s*\d", text), (name, package)
            version = pin.lstrip("=")  # a range, as that of setuptools, is no version
            assert ">" in pin or version not in text, (name, package, version)


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
    assert facts["json"]["error"] is None
    assert facts["torch"]["ops"]["cpu"] is None
    assert "no_such_module" in facts["no_such_module"]["error"]
    assert "pytest" in facts["installed"]


def test_a_module_that_crashes_the_interpreter_is_named(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text("import os; os._exit(11)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = setup.ask(sys.executable, ("crashing",))
    assert "crashed" in facts["crashing"]["error"]


def test_an_import_error_names_its_first_cause():
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as cause:
            raise ImportError("look\nabove") from cause
    except ImportError as error:
        text = setup.describe(error)
    assert text == "ImportError: look above <- RuntimeError: operator torchvision::nms does not exist"


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    table = "Tesla T4, 7.5, 580.159.04\nTesla P100-PCIE-16GB, 6.0, 580.159.04\n"
    monkeypatch.setattr(setup.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=table))
    assert setup.find_gpus() == (
        gpu((7, 5), 580, "Tesla T4"),
        gpu((6, 0), 580, "Tesla P100-PCIE-16GB"),
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


def test_demo_ends_with_the_report_and_its_verdict(modules_run, tmp_path, capsys):
    _, calls = modules_run
    out = tmp_path / "demo"
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"verdict": {"sentence": "No evidence that it helps."}}))
    assert setup.main(["demo", "--out", str(out), "--users", "4", "-p", "epochs=1"]) == 0
    simulate, run = calls
    assert simulate == ["mdlib", "simulate", "--out", f"{out}-data", "--users", "4"]
    assert run[:2] == ["mdlib", "run"] and run[-2:] == ["-p", "epochs=1"]
    last = capsys.readouterr().out.splitlines()[-2:]
    assert str(out / "report.html") in last[0] and last[1].endswith("No evidence that it helps.")


def test_demo_without_a_report_fails_in_one_line(modules_run, tmp_path, capsys):
    assert setup.main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "report.json" in capsys.readouterr().err


def test_exit_codes_are_passed_on(modules_run, tmp_path):
    world, calls = modules_run
    world.code = 5
    assert setup.main(["test", "-k", "nothing", "-x", "tests/test_x.py"]) == 5
    assert calls == [["pytest", "-n", "2", "-k", "nothing", "-x", "tests/test_x.py"]]
    assert setup.main(["demo", "--out", str(tmp_path / "demo")]) == 5
    assert len(calls) == 2  # nothing runs after the simulation failed
