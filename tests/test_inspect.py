"""`mdlib inspect` from the command line."""

import json
import shutil
import sys

import pytest
from PIL import Image

from mdlib.cli import main
from mdlib.simulation.dataset import simulate_dataset


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["mdlib", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr()

    return call


def test_inspect_shows_a_table_and_a_sheet_and_ends_with_ready_or_a_problem(call, tmp_path):
    data = simulate_dataset(tmp_path / "people", users=2, windows=30, size=64, progress=False)
    code, said = call("inspect", "--data", data)
    assert code == 0 and said.out.rstrip().endswith("ready")
    assert "ID_2  30       1           –" in said.out and "60 images found, 60 used" in said.out
    assert "identical files: none" in said.out and "4 numbers apart they share nothing (gap 4)" in said.out
    assert Image.open(tmp_path / "inspect.png").width > 300
    shutil.copyfile(next((data / "ID_1").iterdir()), data / "ID_2" / "ID2_case1_1_Doppler900.png")
    code, said = call("inspect", "--data", data, "--out", tmp_path / "sheet.png")
    assert code == 1 and "identical files of two users" in said.out.splitlines()[-1]
    assert (tmp_path / "sheet.png").exists()
    code, said = call("split", "--data", data, "--out", tmp_path / "split.json")
    assert code == 1 and "identical files of two users" in said.err and not (tmp_path / "split.json").exists()


def test_a_split_keeps_how_the_windows_are_read(call, tmp_path):
    data = simulate_dataset(tmp_path / "people", users=2, windows=30, size=64, progress=False)
    names = iter("abcdefghijklmnopqrstuvwxyzäöüß")
    for file in sorted((data / "ID_1").glob("*.png"), key=lambda path: int(path.stem.rpartition("Doppler")[2])):
        file.rename(file.with_name(f"window {next(names)}.png"))
    code, said = call("split", "--data", data, "--out", tmp_path / "split.json")
    assert code == 1 and "order name or time" in said.err
    code, said = call("split", "--data", data, "--out", tmp_path / "split.json", "--order", "name")
    assert code == 0, said.err
    reading = json.loads((tmp_path / "split.json").read_text())["reading"]
    assert reading == {"colormap": "auto", "crop": "none", "order": "name"}
    code, said = call(
        "select", "--real", data, "--generated", data, "--split", tmp_path / "split.json", "--out", "best"
    )
    assert code == 1 and "no record of how its windows were generated" in said.err  # real windows were read
