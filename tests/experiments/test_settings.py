"""The settings of a run are written once: notebooks, command line and documentation follow them."""

import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields

import nbformat
import pytest
from helpers import ROOT, message, write_set
from typer.testing import CliRunner

import mdlib
from mdlib.cli import app
from mdlib.data.files import find_windows
from mdlib.experiments.settings import (
    NOTEBOOKS,
    SAMPLING,
    RunSettings,
    check_type,
    defaults,
    notebook_parameters,
    options_page,
    write_record,
)
from mdlib.systems import SYSTEMS, get_preset
from mdlib.utils import DataError, use_gpus


def parameters(notebook: str) -> str:
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))


def parameter_cell() -> str:
    """The parameters cell of notebook 02: all settings, the run folder and the time limit."""
    lines = []
    for one in fields(RunSettings):
        default = one.default if one.default is not MISSING else one.default_factory()
        value = json.dumps(default) if isinstance(default, str) else repr(default)
        lines.append(f"{one.name}: {one.type.__name__} = {value}  # {one.metadata['help']}")
    lines.insert(1, 'out: str = "runs/demo"  # run folder; a relative path starts at the repository')
    limit = "time limit of each training, resumes included; the learning rate decays within it; 0: none"
    return "\n".join([*lines, f"max_minutes: float = 0.0  # {limit}"])


def test_notebook_02_takes_the_settings_and_the_others_none_of_them():
    assert parameters("02_train_vqvae") == parameter_cell()
    names: dict = {}
    exec(parameter_cell(), names)
    assert {key: names[key] for key in defaults()} == defaults()
    for notebook in ("03_train_prior", "04_train_diffusion", "05_generate", "06_validate"):
        assert not notebook_parameters(notebook).keys() & defaults().keys(), notebook
        assert all(help for _, help in notebook_parameters(notebook).values()), "each parameter is explained"
    for notebook in ("03_train_prior", "04_train_diffusion"):
        assert list(notebook_parameters(notebook)) == ["out", "max_minutes"]


def test_options_page_is_current():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options_page(), "python -m mdlib options > docs/options.md"
    assert SAMPLING.keys() == set().union(*(system.sampling_options() for system in SYSTEMS.values()))


def test_changes_of_a_preset_are_settings():
    import inspect

    changes = set(inspect.signature(get_preset).parameters) - {"system", "name"}
    assert changes <= defaults().keys()


def test_a_setting_of_another_type_is_refused():
    check_type("max_minutes", 1, float)  # a whole number will do
    assert json.loads(json.dumps(RunSettings().to_dict())) == RunSettings().to_dict()
    with pytest.raises(DataError, match="seed must be of type int, got '3'"):
        RunSettings(seed="3")
    with pytest.raises(DataError, match="reading has no 'croop'; there are crop and order"):
        RunSettings(reading={"croop": "auto"})
    with pytest.raises(DataError, match="crop of reading must be of type str, got 5"):
        RunSettings(reading={"crop": 5})


def test_a_folder_without_images_of_users_is_refused_at_once(tmp_path):
    assert "no such folder" in message(find_windows, tmp_path / "absent")
    for path in ("ID_1/notes.txt", "anna/w1.png", "ID_2/.hidden/w1.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert "no user folders in it" in message(find_windows, tmp_path)
    for user in ("P1", "P2"):
        (tmp_path / "train" / "bag" / user).mkdir(parents=True)
        (tmp_path / "train" / "bag" / user / "w1.png").touch()
    with pytest.warns(UserWarning, match="3 images found, 2 used"):
        assert len(find_windows(tmp_path)) == 2


@pytest.mark.parametrize(
    "words, code, line",
    [
        (["--help"], 0, "Generative models"),
        (["run", "--help"], 0, "--extend"),
        (["run", "--out", "{out}", "--sytem", "x"], 2, "No such option"),
        (["run", "--out", "{out}"], 1, "holds no run: correct --out, or start a run with --data"),
        (["run", "--out", "{out}", "--data", "{out}/none"], 1, "no such folder"),
        (["run", "--out", "{out}", "--data", "{out}", "--preset", "huge"], 1, "unknown preset 'huge' of system vqvae"),
        (["run", "--out", "{out}", "--data", "{out}", "-p", "codec_step=3"], 1, "no notebook has a parameter"),
        (["run", "--out", "{out}", "--data", "{out}", "-p", "system=x"], 1, "give --system, not -p system="),
        (["run", "--out", "{out}", "--data", "{out}", "-p", "codec_steps=x"], 1, "codec_steps must be of type int"),
        (["run", "--out", "{out}", "--precision", "16"], 1, "precision is fp16, bf16, no (float32) or auto, got '16'"),
        (
            ["run", "--out", "{out}", "--precision", "fp16", "-p", 'prior_options={{"mixed_precision": "no"}}'],
            1,
            "precision fp16 contradicts mixed_precision in prior_options",
        ),
        (["validate", "--real", "{out}/none", "--generated", "{out}", "--split", "s", "--out", "o"], 1, "no such file"),
        (["generate", "--pipeline", "{out}", "--out", "{out}/made"], 1, "holds no pipeline"),
    ],
)
def test_the_first_word_comes_before_torch_is_imported(words, code, line, tmp_path):
    program = "import sys; from mdlib import cli\ntry: cli.main()\nfinally: print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", program, *(word.format(out=tmp_path) for word in words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | dict.fromkeys(("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"), ""),
    )
    assert answer.returncode == code and line in answer.stdout + answer.stderr, answer.stderr
    assert answer.stdout.endswith("False\n"), "torch takes seconds to import"
    assert not list(tmp_path.iterdir())


def test_missing_packages_name_the_environment(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')")
    answer = subprocess.run(
        [sys.executable, "-m", "mdlib", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert answer.returncode == 1 and answer.stderr.startswith("mdlib: typer is not installed for ")
    assert ".venv/bin/activate" in answer.stderr and answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "visible, number, left", [("3,5,GPU-ab", 2, "3,5"), (None, 1, "0"), ("3,5,GPU-ab", 0, "3,5,GPU-ab")]
)
def test_devices_hides_the_other_gpus_from_every_process_that_trains(visible, number, left, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES") if visible is None else monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", visible
    )
    use_gpus(number)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == left
    assert "devices=4, but torch sees 3 GPUs: give at most 3" in message(use_gpus, 4)


@pytest.mark.parametrize("command", ["run", "compare", "study"])
def test_devices_and_precision_reach_the_trainings(command, tmp_path, monkeypatch):
    """On a machine without a GPU one device is its CPU. A run that continues keeps its other options."""
    data, out, seen = write_set(tmp_path / "people", numbers=range(12)), tmp_path / "out", {}
    words = [command, "--data", str(data), "--out", str(out), "--preset", "smoke"]

    def trained(*arguments, **given):
        seen.update(next(one for one in arguments if isinstance(one, dict)))
        raise DataError("far enough")

    monkeypatch.setattr(mdlib, "execute" if command == "run" else command, trained, raising=False)
    answer = CliRunner().invoke(
        app, [*words, "--devices", "1", "--precision", "auto", "-p", 'codec_options={"num_codes": 8}']
    )
    assert str(answer.exception) == "far enough"
    assert seen["prior_options"] == {"mixed_precision": "auto"}
    assert seen["codec_options"] == {"num_codes": 8, "mixed_precision": "auto"}
    assert "torch sees 0 GPUs: give at most 1" in str(CliRunner().invoke(app, [*words, "--devices", "2"]).exception)
    if command == "run":
        write_record(out, {"settings": {"data": str(data), "codec_options": {"num_codes": 4}}, "steps": {}})
        CliRunner().invoke(app, ["run", "--out", str(out), "--precision", "no"])
        assert seen["codec_options"] == {"num_codes": 4, "mixed_precision": "no"}
