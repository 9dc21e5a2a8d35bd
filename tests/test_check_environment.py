"""check_environment.py with pretended probes."""

import json
import sys

import pytest

import check_environment
import setup_environment as setup

PINS = setup.read_pins()


def healthy():
    facts = {
        "interpreter": {"executable": "python", "version": [3, 12, 1]},
        "installed": {name: PINS.wanted[name].lstrip("=") for name in PINS.accepted},
        "half": {},
        "project": {"mdlib": None},
        "mdlib": {"error": None, "version": "0.1.0"},
    }
    facts |= {check_environment.module_of(name): {"error": None, "version": "1"} for name in PINS.accepted}
    facts["torch"] |= {
        "version": "2.13.0+cu130",
        "cuda": "13.0",
        "arch_list": ["sm_75"],
        "ops": {"cpu": None},
    }
    facts["torchvision"]["version"] = "0.28.0+cu130"
    return facts


@pytest.fixture
def facts(monkeypatch, tmp_path):
    """What the probe will say; a test spoils it."""
    found = healthy()
    monkeypatch.setattr(setup, "ask", lambda python, modules=(): found)
    monkeypatch.setattr(setup, "find_gpus", lambda: ())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return found


def by_name(rows):
    return {r["name"]: r for r in rows}


def test_all_is_well(facts, capsys):
    assert check_environment.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready"


def test_json_holds_the_rows_of_check(facts, capsys):
    assert check_environment.main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True and set(answer) == {"ok", "python", "checks"}
    for row in answer["checks"]:
        assert set(row) == {"name", "status", "detail", "remedy"}
        assert row["status"] in ("ok", "warn", "fail")
        assert row["status"] == "ok" or row["remedy"]
    names = [row["name"] for row in answer["checks"]]
    assert len(names) == len(set(names)) and set(PINS.accepted) <= set(names)


def test_a_failing_probe_gives_exit_code_1_and_a_remedy(facts, capsys):
    facts["torchvision"] = {"error": "RuntimeError: operator torchvision::nms does not exist"}
    assert check_environment.main(["--json", "--python", sys.executable]) == 1
    answer = json.loads(capsys.readouterr().out)
    row = by_name(answer["checks"])["torchvision"]
    assert answer["ok"] is False and row["status"] == "fail" and "nms" in row["detail"] and row["remedy"]


def test_in_the_virtual_environment_the_remedy_is_repair(facts):
    facts["diffusers"]["error"] = "ImportError: x"
    row = by_name(check_environment.check(setup.venv_python()))["diffusers"]
    assert row["remedy"] == "python setup_environment.py repair"


def test_elsewhere_pip_installs_without_touching_torch(facts):
    del facts["installed"]["lpips"]
    row = by_name(check_environment.check("/opt/other/bin/python"))["lpips"]
    assert row["status"] == "warn"
    assert row["remedy"] == "/opt/other/bin/python -m pip install --no-deps lpips" + PINS.accepted["lpips"]


def test_a_missing_required_package_fails(facts):
    del facts["installed"]["accelerate"]
    assert by_name(check_environment.check())["accelerate"]["status"] == "fail"


def test_a_version_outside_its_range_is_told(facts):
    facts["installed"]["transformers"] = "4.40.0"
    row = by_name(check_environment.check())["transformers"]
    assert row["status"] == "warn" and PINS.accepted["transformers"] in row["detail"]


def test_a_gpu_that_fails_to_compute_fails(facts, monkeypatch):
    monkeypatch.setattr(setup, "find_gpus", lambda: (setup.Gpu("Tesla T4", (7, 5), 580),))
    facts["torch"]["ops"]["cuda:0"] = "OutOfMemoryError: CUDA out of memory"
    rows = by_name(check_environment.check())
    assert rows["compute on cuda:0"]["status"] == "fail" and rows["compute on cpu"]["status"] == "ok"
    assert "fp16" in rows["gpu 0"]["detail"]


def test_a_gpu_that_torch_does_not_see_is_told(facts, monkeypatch):
    monkeypatch.setattr(setup, "find_gpus", lambda: (setup.Gpu("Tesla T4", (7, 5), 580),))
    facts["torch"] |= {"version": "2.13.0+cpu", "cuda": None, "arch_list": []}
    facts["torchvision"]["version"] = "0.28.0+cpu"
    rows = by_name(check_environment.check())
    assert rows["gpu 0"]["status"] == "warn" and "does not see" in rows["gpu 0"]["detail"]
    assert rows["torch"]["status"] == "ok"


@pytest.mark.parametrize("capability, advice", [((6, 0), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 6), "bf16")])
def test_precision_is_what_the_gpu_is_fast_in(capability, advice):
    assert check_environment.precision(capability).startswith(advice)


def test_lpips_weights_are_found_in_torch_home(facts, tmp_path):
    assert by_name(check_environment.check())["lpips weights"]["status"] == "warn"
    file = tmp_path / "hub" / "checkpoints" / check_environment.LPIPS_BACKBONES["squeeze"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    row = by_name(check_environment.check())["lpips weights"]
    assert row["status"] == "ok" and "squeeze" in row["detail"]


def test_an_old_python_fails(facts, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    row = by_name(check_environment.check())["python"]
    assert row["status"] == "fail" and "3.11" in row["detail"]


def test_a_python_that_does_not_run_fails(monkeypatch, tmp_path, capsys):
    assert check_environment.main(["--python", str(tmp_path / "python")]) == 1
    assert "does not run" in capsys.readouterr().out
