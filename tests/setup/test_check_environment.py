"""check_environment.py with simulated probes."""

import json
import sys
from pathlib import Path

import pytest

import check_environment
import setup_environment as setup
from mdlib.systems.system import MACHINES

PINS = setup.read_pins()


def healthy():
    facts = {
        "interpreter": {"executable": "python", "version": [3, 12, 1], "compiles": True},
        "conflicts": [],
        "torchaudio": {"error": "ModuleNotFoundError: No module named 'torchaudio'"},
        "installed": {name: PINS.wanted[name].lstrip("=") for name in PINS.accepted},
        "half": {},
        "project": None,
        "mdlib": {"error": None, "version": "0.1.0"},
    }
    facts |= {setup.module_of(name): {"error": None, "version": "1"} for name in PINS.accepted}
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
    """What the probe reports; a test changes it."""
    found = healthy()

    def ask(python, names=()):
        general = ("interpreter", "installed", "half", "project")
        return {name: found[name] for name in general} | {"modules": {name: found.get(name) for name in names}}

    monkeypatch.setattr(setup, "ask", ask)
    monkeypatch.setattr(setup, "unmet_requirements", lambda python: found["conflicts"])
    monkeypatch.setattr(setup, "find_gpus", lambda: ())
    monkeypatch.setattr(setup, "ask_driver", lambda query: "")
    monkeypatch.setattr(setup, "index_answers", lambda python: True)
    monkeypatch.setattr(setup, "INPUTS", tmp_path / "input")
    monkeypatch.setattr(check_environment, "WORKING", tmp_path / "working")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "TORCH_DISABLE_NATIVE_JIT", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def gpus(facts, monkeypatch):
    """Simulate GPUs, which torch sees."""

    def put(*found):
        monkeypatch.setattr(setup, "find_gpus", lambda: found)
        facts["torch"]["ops"] = {"cpu": None} | {f"cuda:{i}": None for i in range(len(found))}

    return put


T4, P100 = setup.Gpu("Tesla T4", (7, 5), 580, 15360), setup.Gpu("Tesla P100-PCIE-16GB", (6, 0), 580, 16384)


def by_name(rows):
    return {r["name"]: r for r in rows}


def test_all_is_well(facts, capsys):
    assert check_environment.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready"


def test_the_report_names_its_environment(facts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    assert check_environment.main([]) == 0
    assert "the running Python" in capsys.readouterr().out.splitlines()[0]
    setup.venv_python().parent.mkdir(parents=True)
    setup.venv_python().touch()
    assert check_environment.main([]) == 0
    first, *_, note, last = capsys.readouterr().out.splitlines()
    assert ".venv" in first and "activate it: source .venv/bin/activate" in note and last == "ready"


def test_the_machines_are_those_of_the_presets():
    assert set(check_environment.EXPECTED) == {*MACHINES, "gpu"}
    with pytest.raises(setup.Stop, match="unknown machine 'tpu': choose from cpu, gpu"):
        check_environment.check(expect="tpu")


def test_json_holds_the_rows_of_check(facts, capsys):
    assert check_environment.main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True and set(answer) == {"ok", "python", "checks"}
    for row in answer["checks"]:
        assert set(row) == {"name", "status", "detail", "cause", "remedy"}
        assert row["status"] in ("ok", "warn", "fail")
        assert (row["status"] == "ok") == (row["remedy"] == "") == (row["cause"] == "")
    names = [row["name"] for row in answer["checks"]]
    assert len(names) == len(set(names)) and set(PINS.accepted) <= set(names)


def test_a_failing_probe_gives_exit_code_1_and_a_remedy(facts, capsys):
    facts["torchvision"] = {"error": "RuntimeError: operator torchvision::nms does not exist"}
    assert check_environment.main(["--json", "--python", sys.executable]) == 1
    answer = json.loads(capsys.readouterr().out)
    row = by_name(answer["checks"])["torchvision"]
    assert answer["ok"] is False and row["status"] == "fail" and "nms" in row["detail"] and row["remedy"]


def test_the_remedy_is_repair_of_the_python_that_is_looked_at(facts, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    setup.venv_python().parent.mkdir(parents=True)
    setup.venv_python().touch()
    facts["diffusers"]["error"] = "ImportError: x"
    row = by_name(check_environment.check(setup.venv_python()))["diffusers"]
    assert row["remedy"] == "python setup_environment.py repair"
    row = by_name(check_environment.check("/opt/other/bin/python"))["diffusers"]
    assert row["remedy"] == "python setup_environment.py repair --python /opt/other/bin/python"


def test_a_missing_optional_package_is_a_warning(facts):
    del facts["installed"]["lpips"]
    assert by_name(check_environment.check("/opt/other/bin/python"))["lpips"]["status"] == "warn"


def test_a_missing_required_package_fails(facts):
    del facts["installed"]["accelerate"]
    assert by_name(check_environment.check())["accelerate"]["status"] == "fail"


def test_a_version_outside_its_range_is_reported(facts):
    facts["installed"]["transformers"] = "4.40.0"
    row = by_name(check_environment.check())["transformers"]
    assert row["status"] == "warn" and PINS.accepted["transformers"] in row["detail"]


def test_a_gpu_that_fails_to_compute_fails(facts, monkeypatch):
    monkeypatch.setattr(setup, "find_gpus", lambda: (setup.Gpu("Tesla T4", (7, 5), 580),))
    facts["torch"]["ops"]["cuda:0"] = "OutOfMemoryError: CUDA out of memory"
    rows = by_name(check_environment.check("/opt/other/bin/python"))
    assert rows["compute on cuda:0"]["status"] == "fail" and rows["compute on cpu"]["status"] == "ok"
    assert "fp16" in rows["gpu 0"]["detail"]


def test_a_gpu_that_torch_does_not_see_is_reported(facts, monkeypatch):
    monkeypatch.setattr(setup, "find_gpus", lambda: (setup.Gpu("Tesla T4", (7, 5), 580),))
    facts["torch"] |= {"version": "2.13.0+cpu", "cuda": None, "arch_list": []}
    facts["torchvision"]["version"] = "0.28.0+cpu"
    rows = by_name(check_environment.check())
    assert rows["gpu 0"]["status"] == "warn" and "does not see" in rows["gpu 0"]["detail"]
    assert rows["torch"]["status"] == "ok"


@pytest.mark.parametrize("capability, advice", [((6, 0), "no"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 6), "bf16")])
def test_precision_is_what_the_gpu_is_fast_in(capability, advice):
    assert check_environment.precision_of(capability) == advice


def test_an_old_python_fails(facts, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    row = by_name(check_environment.check())["python"]
    assert row["status"] == "fail" and "3.11" in row["detail"]


def test_a_python_that_does_not_run_fails(monkeypatch, tmp_path, capsys):
    assert check_environment.main(["--python", str(tmp_path / "python")]) == 1
    assert "does not run" in capsys.readouterr().out


# -- the breakages, one by one ---------------------------------------------------------------------


def found(name, **options):
    """Status, and detail, cause and remedy as one text, of a check."""
    row = by_name(check_environment.check("/opt/other/bin/python", **options))[name]
    return row["status"], f"{row['detail']} {row['cause']} {row['remedy']}"


def test_a_build_without_kernels_for_the_gpu(facts, gpus):
    gpus(P100)
    status, text = found("torch")
    assert status == "fail" and "no kernels for Tesla P100" in text and "repair --python" in text


def test_a_torch_that_was_replaced_after_set_up(facts):
    assert "torch since set-up" not in by_name(check_environment.check("/opt/other/bin/python"))
    file = setup.State(PINS, Path("/opt/other/bin/python")).folder / "constraints.txt"
    file.parent.mkdir(parents=True)
    file.write_text("numpy===2.4.6\ntorch===2.13.0\n")
    assert found("torch since set-up")[0] == "ok"
    file.write_text("torch===2.13.0+cu126\n")
    assert "2.13.0+cu126 was set up, found 2.13.0" in found("torch since set-up")[1]
    file.unlink()
    facts["installed"] |= {"nvidia-cudnn-cu12": "9", "nvidia-nccl-cu13": "2", "nvidia-cublas": "13"}
    assert "cu12 and cu13" in found("torch since set-up")[1]


def test_a_torchvision_built_for_another_torch(facts):
    facts["conflicts"] = [["torchvision", "torch==2.12.0", "2.13.0"]]
    assert found("torchvision")[0] == "warn" and "torch==2.12.0" in found("torchvision")[1]
    facts["torchvision"] = {"error": "RuntimeError: operator torchvision::nms does not exist"}
    status, text = found("torchvision")
    assert status == "fail" and "compiled for one build of torch" in text


def test_hub_and_its_family_out_of_their_windows(facts):
    facts["conflicts"] = [["diffusers", "huggingface-hub<2", "2.4.0"], ["some-game", "numpy<2", "2.4"]]
    status, text = found("requirements")
    assert status == "warn" and "diffusers requires huggingface-hub<2, found 2.4.0" in text and "game" not in text
    status, text = found("other packages")
    assert status == "ok" and "some-game requires numpy<2, found 2.4" in text
    facts["diffusers"]["error"] = "ImportError: cannot import name 'cached_download' from 'huggingface_hub'"
    assert "accept only certain releases of one another" in found("diffusers")[1]


def test_a_package_replaced_under_this_process(facts):
    for name in PINS.accepted:
        module = sys.modules.get(setup.module_of(name))
        if module is not None:
            facts["installed"][name] = str(getattr(module, "__version__", facts["installed"][name]))
    assert by_name(check_environment.check())["loaded modules"]["status"] == "ok"
    import numpy

    facts["installed"]["numpy"] = "1.99.0"
    row = by_name(check_environment.check())["loaded modules"]
    assert row["status"] == "fail" and f"numpy {numpy.__version__} is loaded, 1.99.0 is on disk" in row["detail"]
    assert "loaded modules" not in by_name(check_environment.check("/opt/other/bin/python"))


def test_another_accelerator_than_the_one_asked_for(facts, gpus, monkeypatch, capsys):
    gpus(T4, T4)
    assert found("accelerator", expect="t4x2")[0] == "ok"
    assert found("accelerator", expect="cpu")[0] == "fail"
    gpus(T4)
    for fits in ("gpu", "t4", "gpu-6gb", "gpu-8gb", "gpu-16gb"):
        assert found("accelerator", expect=fits)[0] == "ok"
    gpus(T4._replace(memory=8192))
    assert found("accelerator", expect="gpu-8gb")[0] == "ok"
    assert found("accelerator", expect="gpu-16gb")[0] == "fail"
    gpus(T4)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    status, text = found("accelerator", expect="t4x2")
    assert status == "fail" and "phone number" in text and "machine_shape" in text and "docker_image" in text
    assert check_environment.main(["--expect", "p100", "--python", sys.executable]) == 1
    assert "not ready: accelerator" in capsys.readouterr().out


def test_an_image_without_cuda_next_to_a_gpu_fails_on_kaggle(facts, gpus, monkeypatch):
    gpus(T4)
    facts["torch"] |= {"version": "2.10.0+cpu", "cuda": None, "arch_list": [], "ops": {"cpu": None}}
    assert found("torch")[0] == "ok"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    status, text = found("torch")
    assert status == "fail" and "phone number" in text


def test_a_driver_too_old_for_the_build_and_for_any(facts, gpus):
    gpus(setup.Gpu("Tesla T4", (7, 5), 535))
    status, text = found("torch")
    assert status == "fail" and "driver 535 is too old for CUDA 13.0" in text and "580" in text
    gpus(setup.Gpu("Tesla T4", (7, 5), 470))
    status, text = found("gpu 0")
    assert status == "warn" and "update its driver to 525" in text


def test_data_and_wheels_are_found_by_what_they_hold(facts, tmp_path):
    people = tmp_path / "input" / "datasets" / "somebody" / "gait"
    (people / "ID_1").mkdir(parents=True)
    assert found("data") == ("ok", f"{people}  ")
    assert "none below" in found("wheels")[1]
    (tmp_path / "input" / "gait" / "ID_2").mkdir(parents=True)
    status, text = found("data")
    assert status == "warn" and str(people) in text and "differs between sessions" in text


def test_other_processes_on_the_gpus_are_named(facts, gpus, monkeypatch):
    gpus(T4, T4)
    assert found("gpu processes")[0] == "ok"
    monkeypatch.setattr(setup, "ask_driver", lambda query: "4242, 900 MiB\n" if "apps" in query else "")
    status, text = found("gpu processes")
    assert status == "warn" and "in use by 4242" in text and "end processes" in text


def test_a_gpu_that_is_too_old_for_triton(facts, gpus):
    facts["torch"]["arch_list"] = ["sm_60", "sm_75", "sm_80"]
    gpus(P100)
    status, text = found("triton")
    assert status == "warn" and "TORCH_DISABLE_NATIVE_JIT=1" in text


@pytest.mark.parametrize("name", ["peft", "torchaudio"])
def test_a_broken_package_that_mdlib_does_not_need_is_named(facts, name):
    facts["diffusers"] = {"error": "RuntimeError: Failed to import", "culprit": name}
    status, text = found("diffusers")
    assert status == "fail" and f"in {name}, which mdlib does not need" in text
    assert f"pip uninstall --yes {name}" in text and "repair" not in text


def test_no_compiler_next_to_a_torch_that_compiles(facts, gpus):
    gpus(T4)
    assert "triton" not in by_name(check_environment.check("/opt/other/bin/python"))
    facts["interpreter"]["compiles"] = False
    assert "TORCH_DISABLE_NATIVE_JIT=1" in found("triton")[1]


def test_little_memory_disk_and_cores(facts, monkeypatch):
    for name in ("LEAST_MEMORY", "LEAST_DISK", "LEAST_CORES", "LEAST_SHARED"):
        monkeypatch.setattr(check_environment, name, 1 << 60)
    for name in ("memory", "disk", "cores", "shared memory"):
        assert found(name)[0] == "warn"


def test_widgets_of_another_major_than_the_page_shows(facts, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert found("widgets")[0] == "ok"
    facts["installed"]["ipywidgets"] = "7.7.1"
    status, text = found("widgets")
    assert status == "warn" and "do not install ipywidgets" in text
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert found("widgets")[0] == "ok"


def test_offline_is_reported_with_the_place_of_the_weights(facts, monkeypatch):
    monkeypatch.setattr(setup, "index_answers", lambda python: False)
    assert "nothing can be downloaded" in found("network")[1]
