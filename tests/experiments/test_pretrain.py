"""Weights pretrained on simulated people: made by one command, found, checked, and taken as initial weights."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from mdlib.cli import app
from mdlib.data.checks import seen, seen_beyond
from mdlib.data.splits import read_split
from mdlib.experiments.pretrain import IDENTIFIER, MARGIN, SCALE, MarginSoftmax, pretrain
from mdlib.experiments.run import open_run
from mdlib.experiments.settings import read_record
from mdlib.experiments.steps import codec_stage, prior_stage, save_codec, train_stage
from mdlib.models.classifier import SmallCNN
from mdlib.models.pretrained import WEIGHTS, pretrained_backbone
from mdlib.pipeline import load_pipeline
from mdlib.simulation.dataset import simulate_dataset
from mdlib.systems import SYSTEMS, load_codec
from mdlib.utils import DataError

SEED = 77


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders that `pretrain` writes for every system and the identifier, of the same three people."""
    root = tmp_path_factory.mktemp("pretrained")
    people = simulate_dataset(root / "people", users=3, windows=60, seed=SEED, progress=False)
    for name in (*SYSTEMS, "identifier"):
        shutil.copytree(people, root / name / "people")
        pretrain(name, root / name, "smoke", people=3, minutes=0.04, seed=SEED)
    return root


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Two other people."""
    out = tmp_path_factory.mktemp("data") / "people"
    return simulate_dataset(out, users=2, windows=40, size=64, seed=9, progress=False)


@pytest.fixture
def shipped(made, tmp_path, monkeypatch):
    """The weights in the place of those that come with mdlib."""
    for name in (*SYSTEMS, "identifier"):
        shutil.copytree(made / name / "weights", tmp_path / "weights" / name)
    monkeypatch.setattr("mdlib.models.pretrained.WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_starts_from_the_weights_that_come_along(system, shipped, windows, tmp_path):
    run = open_run(tmp_path / "run", data=windows, system=system, preset="smoke")
    assert run.settings["init"] == read_record(run.path)["settings"]["init"] == "shipped"
    assert run.about()["initial weights"] == "pretrained on 3 simulated people (shipped)"
    scratch = open_run(tmp_path / "scratch", data=windows, system=system, preset="smoke", init="none")
    assert scratch.about()["initial weights"] == "from scratch" and scratch.preset.prior_training.user_rate == 1
    assert run.preset.prior_training.user_rate > 1 and run.preset.codec_training.steps < 6

    stage, known = codec_stage(run), load_codec(shipped / system / "codec").float().state_dict()
    own = stage.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in known.items())
    assert all(parameter.dtype == torch.float32 for parameter in stage.model.parameters())
    train_stage(stage)
    save_codec(stage)
    stage, table = prior_stage(run), load_pipeline(shipped / system).prior.float().users.weight
    torch.testing.assert_close(stage.model.users.weight, torch.stack([table[0], table[0], table[1]]))
    assert train_stage(stage)[-1]["step"] == run.preset.prior_training.steps
    assert f"simulated with seed {SEED}" in run.trained_on, "what comes after knows of those people too"
    assert open_run(run.path, data=windows, system=system, preset="smoke").settings == run.settings


def test_the_weights_are_half_as_large_and_name_no_place_and_no_user(shipped):
    for name in SYSTEMS:
        pipeline = load_pipeline(shipped / name)
        assert pipeline.config.users == [1] and pipeline.prior.users.num_embeddings == 2
        pipeline(users=[1], output_type="pt")
        stored = torch.cat([p.flatten() for p in (*pipeline.codec.parameters(), *pipeline.prior.parameters())])
        assert stored.dtype == torch.float32 and torch.equal(stored, stored.half().float())
        assert not any(str(shipped.parents[1]) in path.read_text() for path in (shipped / name).rglob("*.json"))


def test_another_pretraining_does_not_replace_an_export(made):
    before = (made / "identifier" / "weights" / "weights.json").read_text()
    with pytest.raises(
        DataError, match="was exported by `python -m mdlib pretrain --system identifier .*another --out"
    ):
        pretrain("identifier", made / "identifier", "smoke", people=3, minutes=5, seed=SEED)
    assert (made / "identifier" / "weights" / "weights.json").read_text() == before


def test_they_are_not_used_where_they_do_not_fit(shipped, windows, tmp_path, capsys):
    common = dict(data=windows, system="vae-diffusion", preset="smoke")
    wider = {"block_out_channels": [16, 32]}
    cases = [{"codec_options": wider}, {"prior_options": wider}, {"channels": 3}, {"codec": "vq"}, {"preset": "demo"}]
    for number, case in enumerate(cases):
        assert open_run(tmp_path / str(number), **common | case).settings["init"] == "none", case
        assert "codec and prior train from scratch, the shipped weights have other sizes" in capsys.readouterr().out
        with pytest.raises(DataError, match="cannot start from|init: .*vae-diffusion"):  # asked for by name
            open_run(tmp_path / "strict", **common | case, init=str(shipped / "vae-diffusion"))
    named = open_run(tmp_path / "named", **common, init=shipped / "vae-diffusion")
    assert named.about()["initial weights"] == f"pretrained on 3 simulated people ({shipped / 'vae-diffusion'})"
    started = open_run(tmp_path / "started", **common, codec_start=str(shipped / "vae-diffusion" / "codec"))
    assert started.settings["init"] == "none"
    shutil.rmtree(shipped)
    assert open_run(tmp_path / "without", **common).settings["init"] == "none"


def test_people_of_the_pretraining_are_no_data_for_it(shipped, tmp_path, capsys):
    same = simulate_dataset(tmp_path / "same", users=2, windows=40, size=32, seed=SEED, progress=False)
    common = dict(data=same, system="vae-diffusion", preset="smoke")
    assert open_run(tmp_path / "auto", **common).settings["init"] == "none"
    assert "weights were trained on the simulated people in" in capsys.readouterr().out
    with pytest.raises(DataError, match="init: .* was trained on the simulated people in .*: simulate others"):
        open_run(tmp_path / "named", **common, init=str(shipped / "vae-diffusion"))


def test_a_run_that_started_from_them_passes_on_what_they_have_seen(shipped, windows, tmp_path):
    run = open_run(tmp_path / "run", data=windows, system="vae-diffusion", preset="smoke")
    assert run.split  # written
    assert f"simulated with seed {SEED}" in seen(run.path / "codec")
    assert seen_beyond(run.path / "codec", read_split(run.path / "split.json"), windows) == 0


def test_attached_weights_are_preferred_and_have_to_stay(made, shipped, windows, tmp_path, monkeypatch):
    inputs = tmp_path / "input"
    monkeypatch.setattr("mdlib.models.pretrained.INPUTS", inputs)
    attached = shutil.copytree(made / "vq-diffusion" / "weights", inputs / "datasets" / "me" / "any" / "weights")
    (inputs / "weights.json").write_text("[]")  # somebody else's
    common = dict(data=windows, preset="smoke")
    run = open_run(tmp_path / "run", **common, system="vq-diffusion")
    assert run.settings["init"] == "attached" and run.init == attached
    assert open_run(tmp_path / "other", **common, system="vqvae-ldm").settings["init"] == "shipped"
    (attached / "prior" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(DataError, match="diffusion_pytorch_model.safetensors is missing or damaged: copy it again"):
        open_run(tmp_path / "damaged", **common, system="vq-diffusion")
    moved = attached.rename(inputs / "elsewhere")
    assert open_run(run.path).init == moved
    shutil.rmtree(moved)
    with pytest.raises(DataError, match="starts from weights that are no longer attached: attach or restore them"):
        codec_stage(open_run(run.path))


def test_a_run_that_has_not_begun_takes_the_weights_of_its_new_sizes(shipped, windows, tmp_path):
    common = dict(data=windows, system="vae-diffusion")
    assert open_run(tmp_path, **common, preset="smoke").settings["init"] == "shipped"
    assert open_run(tmp_path, **common, preset="demo", init="shipped").settings["init"] == "none"


def test_the_identifiers_backbone_is_found_where_it_fits(shipped):
    folder = pretrained_backbone()
    assert folder == shipped / "identifier" and pretrained_backbone(channels=3) is None
    network = SmallCNN.from_pretrained(folder)
    assert network.config.num_users == 1 and all(p.dtype == torch.float32 for p in network.parameters())
    assert seen(folder) == {f"simulated with seed {SEED}"}
    card = json.loads((folder / "weights.json").read_text())
    assert card["people"] == 3 and 0 < card["identifier"]["steps"] <= IDENTIFIER["steps"]
    shutil.rmtree(folder)
    assert pretrained_backbone() is None


def test_the_identifiers_loss_takes_a_margin_off_the_cosine_of_the_right_user():
    torch.manual_seed(0)
    model = MarginSoftmax(SmallCNN(1, dropout=0.0), 5).eval()
    images, users = torch.rand(6, 1, 64, 64) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 0])
    loss, _ = model.loss(images, users)
    cosines = F.normalize(model.network.features(images)) @ F.normalize(model.criterion.W, dim=0)
    torch.testing.assert_close(loss, F.cross_entropy(SCALE * (cosines - MARGIN * F.one_hot(users, 5)), users))


def test_a_second_call_continues_and_an_impossible_one_is_one_line(made, capsys):
    out = made / "vq-diffusion"
    before = {path: path.read_bytes() for path in sorted((out / "weights").rglob("*.*"))}
    words = ["pretrain", "--system", "vq-diffusion", "--preset", "smoke", "--people", 3, "--minutes", 0.04]
    app([*map(str, words), "--seed", str(SEED), "--out", str(out)], standalone_mode=False)
    assert f"{out / 'weights'}: give it as init" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in sorted((out / "weights").rglob("*.*"))}
    with pytest.raises(DataError, match="minutes must be more than 0, got 0"):
        pretrain("vq-diffusion", out, minutes=0)
    with pytest.raises(DataError, match="unknown system 'vq'"):
        pretrain("vq", out)


def test_what_comes_along_is_small_and_in_the_wheel(tmp_path):
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert WEIGHTS / "README.md" in files
    assert sum(path.stat().st_size for path in files) <= 20e6 and max(path.stat().st_size for path in files) <= 6e6
    for card in WEIGHTS.glob("*/weights.json"):
        assert json.loads(card.read_text())["name"] == card.parent.name
    source = tmp_path / "source"
    shutil.copytree(WEIGHTS.parent, source / "mdlib", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "mdlib" / "weights" / "some-system" / "codec").mkdir(parents=True)
    (source / "mdlib" / "weights" / "some-system" / "codec" / "config.json").write_text("{}")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(Path(tmp_path).glob("*.whl"))).namelist())
    assert {f"mdlib/weights/{path.relative_to(WEIGHTS).as_posix()}" for path in files} <= names
    assert "mdlib/weights/some-system/codec/config.json" in names
