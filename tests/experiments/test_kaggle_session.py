"""A simulated Kaggle session: inputs are found wherever they are mounted, and nothing is lost when it ends."""

import json
import os
import shutil
import time
from contextlib import suppress
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
import torch
from helpers import ROOT, message, write_set
from test_fit import CONFIG, line, points, same
from tqdm.std import tqdm as text_bar

from mdlib import utils
from mdlib.experiments import kaggle_session
from mdlib.experiments.kaggle_session import find_data, find_run
from mdlib.experiments.run import open_run
from mdlib.systems import SYSTEMS, get_preset
from mdlib.systems.system import preset_for
from mdlib.training.fit import fit
from mdlib.training.state import precision
from mdlib.utils import bar


def gpu(name: str, capability: tuple[int, int], memory: int) -> SimpleNamespace:
    """As torch.cuda.get_device_properties."""
    return SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=memory)


T4 = gpu("Tesla T4", (7, 5), 15_828_320_256)
P100 = gpu("Tesla P100-PCIE-16GB", (6, 0), 17_066_885_120)
LAYOUTS = ["windows", "windows/people", "datasets/me/windows", "datasets/me/windows/some/people"]


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A batch session with nothing attached: its folders of inputs and of outputs."""
    for name in ("input", "working"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(kaggle_session, "INPUT", tmp_path / "input")
    monkeypatch.setattr(kaggle_session, "session_end", lambda: time.time() + 3600)  # whatever this machine's age
    monkeypatch.setattr(utils, "KEPT", tmp_path / "working")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv(utils.DEADLINE, "")  # so that what a session sets goes with the test
    monkeypatch.delenv(utils.DEADLINE)
    monkeypatch.chdir(tmp_path / "working")
    return SimpleNamespace(input=tmp_path / "input", working=tmp_path / "working")


def write_run(folder, steps=(), **settings):
    folder.mkdir(parents=True)
    record = {"settings": {"data": "/kaggle/input/gone", "seed": 0} | settings, "steps": dict.fromkeys(steps, {})}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_are_found_wherever_they_are_mounted(layout, tmp_path):
    windows = write_set(tmp_path / layout)
    write_set(write_run(tmp_path / "notebooks" / "me" / "mdlib-05" / "runs" / "demo") / "generated")
    (write_set(tmp_path / "notebooks" / "me" / "other" / "more") / "generation.json").touch()
    assert find_data(tmp_path) == windows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conditions_are_one_folder_of_windows(layout, tmp_path):
    for condition in ("normal", "backpack"):
        write_set(tmp_path / layout / condition)
    assert find_data(tmp_path) == tmp_path / layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_split_are_one_folder_of_windows(layout, tmp_path):
    for part in ("Train", "val", "test"):
        write_set(tmp_path / layout / part)
    assert find_data(tmp_path) == tmp_path / layout
    folder = tmp_path / "other" / "layout"
    for part in ("Train", "val", "test"):
        write_set(folder / part / "normal")
    assert find_data(tmp_path / "other") == folder


def test_users_have_other_names_and_folders_without_images_are_none(tmp_path):
    for path in ("models/me/net/pytorch/default/1/weights.bin", "datasets/me/words/P1/text.csv"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert find_data(tmp_path) is None
    windows = tmp_path / "datasets" / "me" / "windows"
    for user in ("P1", "P2"):
        (windows / user / "day1").mkdir(parents=True)
        (windows / user / "day1" / "w1.png").touch()
    assert find_data(tmp_path) == windows


@pytest.mark.parametrize("first, second", [("a", "b"), ("datasets/me/a", "datasets/me/b"), ("a", "datasets/you/b")])
def test_of_two_data_sets_one_has_to_be_named(first, second, tmp_path):
    assert find_data(tmp_path) is None
    write_set(tmp_path / first)
    write_set(tmp_path / second)
    text = message(find_data, tmp_path)
    assert first in text and second in text and text.endswith("give one of them as data")


def test_the_most_advanced_run_continues(tmp_path):
    assert find_run(tmp_path) is None
    write_run(tmp_path / "notebooks" / "me" / "mdlib-02" / "runs" / "demo", ["02"])
    further = write_run(tmp_path / "notebooks" / "me" / "mdlib-03" / "runs" / "demo", ["02"], data="/elsewhere")
    (further / "prior").mkdir()
    (further / "prior" / "state.pt").touch()
    assert find_run(tmp_path) == further
    assert find_run(tmp_path) != write_run(tmp_path / "mdlib-04", [])
    write_run(tmp_path / "mdlib-05", ["02", "03"], seed=1)
    assert "runs with different settings are attached" in message(find_run, tmp_path)


@pytest.mark.parametrize(
    "gpus, preset",
    [
        ([], "demo"),
        ([T4, T4], "t4x2"),
        ([T4], "gpu-16gb"),
        ([P100], "p100"),
        ([gpu("Tesla P4", (6, 1), 8 * 10**9)], "p100"),
        ([gpu("NVIDIA L4", (8, 9), 24 * 10**9)], "gpu-16gb"),
        ([gpu("RTX 2070", (7, 5), 8_589_934_592)], "gpu-8gb"),
        ([gpu("RTX 2060", (7, 5), 6_442_450_944)], "gpu-6gb"),
    ],
)
def test_the_preset_follows_the_gpu(gpus, preset):
    assert preset_for(gpus) == preset
    wanted = {"demo": {"no"}, "p100": {"no"}}.get(preset, {"fp16"})
    for system in SYSTEMS.values():
        found = get_preset(system.name, preset)
        assert {found.codec_training.mixed_precision, found.prior_training.mixed_precision} == wanted


@pytest.mark.parametrize(
    "capability, wanted, got",
    [
        ((7, 5), "auto", "fp16"),
        ((6, 0), "auto", "no"),
        ((8, 0), "bf16", "bf16"),
        ((7, 5), "bf16", "only emulates bf16, and slowly: use fp16"),
        (None, "fp16", "training in fp16 needs a GPU"),
        (None, "auto", "no"),
    ],
)
def test_bf16_is_never_emulated(capability, wanted, got, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    if " " not in got:
        assert precision(wanted) == got
        return
    with pytest.raises(ValueError, match=got):
        precision(wanted)


def test_preset_auto_is_chosen_once(tmp_path, monkeypatch):
    people = write_set(tmp_path / "people", numbers=range(1, 25))
    monkeypatch.setattr("mdlib.experiments.run.gpus", lambda: [P100])
    assert open_run(tmp_path / "run", data=str(people), preset="auto").settings["preset"] == "p100"
    (tmp_path / "run" / "codec").mkdir()
    monkeypatch.setattr("mdlib.experiments.run.gpus", lambda: [])
    assert open_run(tmp_path / "run", data=str(people), preset="auto").settings["preset"] == "p100"


def test_a_session_ends_half_an_hour_before_kaggle_ends_it(monkeypatch):
    now, ages = 10**9, {}
    processes = SimpleNamespace(
        Error=OSError, Process=lambda number: SimpleNamespace(create_time=lambda: now - ages.get(number, 60))
    )
    monkeypatch.setattr(kaggle_session, "psutil", processes)
    monkeypatch.setattr(time, "time", lambda: now)
    ages[1] = 3 * 3600
    assert kaggle_session.session_end() == now + 8.5 * 3600
    ages[1] = 20 * 24 * 3600  # the machine's own first process, not the session's
    assert kaggle_session.session_end() == now + 11.5 * 3600 - 60
    ages[os.getpid()] = 13 * 3600
    assert kaggle_session.session_end() == now + 11.5 * 3600


def test_a_session_without_the_gpu_it_requested_stops(session, monkeypatch, capsys):
    write_set(session.input / "windows")
    assert kaggle_session.begin("runs/demo") == str(session.input / "windows")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "a batch run: no GPU" in printed and "verified phone number" in printed
    assert "training stops by itself in" in printed and "GB may be written" in printed
    monkeypatch.setenv(kaggle_session.REQUESTED, "NvidiaTeslaT4")
    text = message(kaggle_session.begin, "runs/demo")
    assert text.startswith("NvidiaTeslaT4 was requested, but this session has no GPU: ")
    monkeypatch.setattr(kaggle_session, "gpus", lambda: [T4, T4])
    kaggle_session.begin("runs/demo")
    assert "2 × Tesla T4, 16 GB each; preset auto is t4x2" in capsys.readouterr().out


def test_elsewhere_nothing_happens(session, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    write_run(session.input / "run")
    assert kaggle_session.begin("runs/demo", "people") == "people" and kaggle_session.begin("runs/demo") == ""
    assert capsys.readouterr().out == "" and not (session.working / "runs").exists()
    assert not utils.has_deadline()


def test_a_run_is_copied_from_read_only_inputs_and_finds_its_windows(session, capsys):
    attached = write_run(session.input / "notebooks" / "me" / "mdlib-02" / "runs" / "demo", ["02"])
    (attached / "codec").mkdir()
    (attached / "codec" / "state.pt").write_bytes(b"state")
    for path in (attached / "codec", attached):
        path.chmod(0o555)
    out = session.working / "runs" / "demo"
    assert "read /kaggle/input/gone: attach its windows too" in message(kaggle_session.begin, out)
    assert kaggle_session.begin(out, "mine") == "mine"
    assert "data starts a new run: leave data empty" in capsys.readouterr().out
    people = write_set(session.input / "datasets" / "me" / "windows")
    assert kaggle_session.begin(out) == ""
    assert json.loads((out / "run.json").read_text())["settings"]["data"] == str(people)
    assert (out / "codec" / "state.pt").read_bytes() == b"state" and out.stat().st_mode & 0o200
    (out / "codec" / "new").touch()
    (out / "run.json").write_text("{}")
    assert kaggle_session.begin(out) == "" and (out / "run.json").read_text() == "{}", "an existing run stays"


def test_disk_space_is_checked_before_work_starts(session, monkeypatch, tmp_path):
    (session.working / "large").write_bytes(b"0" * 9_000)
    monkeypatch.setattr(utils, "KEPT_BYTES", 9_100)
    assert utils.room(session.working / "runs" / "demo") == 100
    assert utils.room(tmp_path / "elsewhere") > 100
    with pytest.raises(OSError, match=r"training the model takes up to .* and 0 MB are left: make room"):
        fit(line(), points(), CONFIG, session.working / "runs", progress=False)
    attached = write_run(session.input / "run", data=str(write_set(session.input / "windows")))
    (attached / "state.pt").write_bytes(b"0" * 1_000)
    with pytest.raises(OSError, match="a copy of the run takes up to"):
        kaggle_session.begin(session.working / "runs")
    assert not (session.working / "runs" / "run.json").exists()


def test_training_stops_in_time_and_continues_bit_for_bit(tmp_path, monkeypatch, capsys):
    whole, broken = line(), line()
    fit(whole, points(), CONFIG, tmp_path / "whole", held_out=points(20), progress=False)
    monkeypatch.setenv(utils.DEADLINE, str(time.time() - 1))
    for step in (1, 2):  # each time the session is over after a step
        with pytest.raises(SystemExit) as end:
            fit(broken, points(), CONFIG, tmp_path / "broken", held_out=points(20), name="codec", progress=False)
        assert end.value.code == 0
        assert f"The session's time is up. codec stopped at step {step} of 12" in capsys.readouterr().out
    fit(line(), points(), CONFIG, progress=False)  # without a folder there is nothing to continue from: it finishes
    monkeypatch.setenv(utils.DEADLINE, str(time.time() + 3600))
    fit(broken, points(), CONFIG, tmp_path / "broken", held_out=points(20), progress=False)
    assert same(whole, broken)


def run_cells(notebook: str, **parameters) -> bool:
    """Run a notebook's cells here as papermill does; whether it came to its end."""
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    names: dict = {"display": lambda *shown: None}
    with suppress(SystemExit):
        for cell in cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= parameters
        return True
    return False


def test_a_notebook_that_ran_out_of_time_continues_from_its_last_output(session, monkeypatch, capsys):
    matplotlib.use("agg")
    write_set(session.input / "windows", numbers=range(1, 33))
    monkeypatch.setenv(utils.DEADLINE, str(time.time()))
    assert not run_cells("02_train_vqvae", preset="smoke")
    assert "codec stopped at step 1 of 6" in capsys.readouterr().out
    before = session.working / "runs"
    assert not (before / "demo" / "codec" / "config.json").exists()

    # The next session: the output is an input now, and the windows are mounted in the newer way.
    shutil.move(before, session.input / "notebooks" / "me" / "mdlib-02-train-vqvae" / "runs")
    (session.input / "datasets" / "me").mkdir(parents=True)
    shutil.move(session.input / "windows", session.input / "datasets" / "me" / "windows")
    monkeypatch.delenv(utils.DEADLINE)
    assert run_cells("02_train_vqvae")  # with its own parameters: the run keeps its settings
    printed = capsys.readouterr().out
    assert "codec: 1/6" in printed or "codec: 2/6" in printed, "the bar goes on where it stopped"
    record = json.loads((before / "demo" / "run.json").read_text())
    assert record["settings"]["preset"] == "smoke" and "02_train_vqvae" in record["steps"]
    assert record["settings"]["data"] == str(session.input / "datasets" / "me" / "windows")


@pytest.mark.parametrize("kind, text", [("Batch", True), ("Interactive", False)])
def test_progress_is_plain_text_in_batch_runs(kind, text, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", kind)
    with bar(3, "codec") as progress:
        progress.update(3)
    assert (type(progress) is text_bar) == text
    out, err = capsys.readouterr()
    assert ("codec: 3/3 100%" in out) == text and bool(err) != text


def test_the_check_is_found_in_the_repository_or_next_to_the_wheels(session, monkeypatch):
    assert kaggle_session.home() == ROOT
    monkeypatch.setattr(kaggle_session, "ROOT", session.working / "lib")
    assert "neither in" in message(kaggle_session.home)
    house = session.input / "mdlib-wheels"
    house.mkdir()
    for name in ("mdlib-0.1.0-py3-none-any.whl", "check_environment.py", "pyproject.toml"):
        (house / name).touch()
    assert kaggle_session.home() == house
