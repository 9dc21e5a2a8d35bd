"""`mdlib inspect` and `mdlib check-codec` from the command line."""

import json
import shutil
import sys

import pytest
from helpers import write_set
from PIL import Image

from mdlib.cli import main
from mdlib.models.kl import KLVAE
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


def test_check_codec_gives_figures_a_verdict_and_difference_maps(call, tmp_path):
    data, sizes = write_set(tmp_path / "people", numbers=range(40)), dict(block_out_channels=(8,), norm_num_groups=4)
    KLVAE(image_size=32, **sizes).save_pretrained(tmp_path / "codec")
    code, said = call("check-codec", "--codec", "codec", "--data", data, "--out", "maps.png")
    lines = said.out.splitlines()
    assert code == 0 and "n: 80" in lines and lines[0].startswith("psnr_db: ") and "Reconstruction is" in lines[-1]
    assert Image.open(tmp_path / "maps.png").height > 300  # windows, reconstructions, differences
    assert call("split", "--data", data, "--out", "split.json", "--val", "0.2")[0] == 0
    held_out = len(json.loads((tmp_path / "split.json").read_text())["val"])
    code, said = call("check-codec", "--codec", "codec", "--data", data, "--split", "split.json")
    assert code == 0 and f"n: {held_out}" in said.out.splitlines()
    KLVAE(image_size=32, num_users=3, **sizes).save_pretrained(tmp_path / "conditioned")
    code, said = call("check-codec", "--codec", "conditioned", "--data", data)
    assert code == 1 and "is conditioned on 3 users" in said.err and said.err.count("\n") == 1
    assert "holds no codec" in call("check-codec", "--codec", data, "--data", data)[1].err
