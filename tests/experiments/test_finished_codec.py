"""A run that trains a prior on the finished codec of another run (codec_steps=-1), which stays as it is."""

import pytest
import torch
from helpers import write_set
from safetensors.torch import load_file

from mdlib.data.splits import read_split, write_split
from mdlib.experiments import steps
from mdlib.experiments.execute import extended
from mdlib.experiments.run import open_run
from mdlib.experiments.settings import RunSettings
from mdlib.experiments.steps import codec_stage, prior_stage, save_codec, save_pipeline, train_stage
from mdlib.utils import DataError

KINDS = {"vq": dict(system="vqvae-ldm"), "kl": dict(system="vae-diffusion"), "users": dict(system="vavae-dit")}
KINDS["users"]["user_codec"] = True


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("people"), numbers=range(1, 33))


@pytest.fixture(scope="module", params=KINDS)
def finished(request, people, tmp_path_factory):
    """The settings of a run with a trained codec, and its codec/ folder."""
    settings = dict(data=str(people), preset="smoke", **KINDS[request.param])
    run = open_run(tmp_path_factory.mktemp(request.param), **settings)
    stage = codec_stage(run)
    train_stage(stage)
    save_codec(stage)
    return settings, run.path / "codec"


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_prior_trains_on_it_and_it_stays_bit_for_bit(finished, tmp_path, monkeypatch):
    settings, folder = finished
    before = weights(folder)
    monkeypatch.setattr(steps, "_frozen_networks", lambda *_: pytest.fail("a teacher of a codec that is not trained"))
    run = open_run(tmp_path / "run", **settings, codec_steps=-1, codec_start=str(folder))
    stage = codec_stage(run)
    assert train_stage(stage) == []
    save_codec(stage)
    prior = prior_stage(run)
    assert train_stage(prior)[-1]["step"] == 6
    save_pipeline(prior)
    for place in (folder, run.path / "codec", run.path / "pipeline" / "codec"):
        assert same(weights(place), before), "codebook, its counts and the calibration among them"
    assert run.about()["initial weights"] == f"from {folder}, used as it is"
    with pytest.raises(DataError, match="uses the codec in .* as it is: start a new run to train it further"):
        extended(run.path, RunSettings(**run.settings | {"codec_steps": 9}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(codec_start=""), "codec_steps=-1 trains no codec: give the folder of a trained one as codec_start"),
        (dict(joint_steps=2), "uses the codec of codec_start as it is: leave out joint_steps"),
        (dict(codec_options={"batch_size": 4}), "would ignore batch_size of codec_options"),
        (dict(codec_options={"block_out_channels": [8, 8]}), r"differs from this run's in .*block_out_channels"),
        (
            dict(codec_options={"patch_size": [1, 4]}),
            r"differs from this run's in patch_size \[2, 2\] \(here \[1, 4\]\)",
        ),
        (dict(channels=3), r"differs from this run's in in_channels 1 \(here 3\): give preset, channels and codec_opt"),
        (dict(codec_start="{}/absent"), "absent holds no codec: give the codec/ folder of a run"),
        (dict(codec_steps=-2), "codec_steps must be -1 or more"),
    ],
)
@pytest.mark.parametrize("finished", ["kl"], indirect=True)
def test_what_cannot_go_with_it_is_one_line(changes, message, finished, tmp_path):
    settings, folder = finished
    given = {**settings, "codec_steps": -1, "codec_start": str(folder), **changes}
    given["codec_start"] = given["codec_start"].format(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_run(tmp_path / "run", **given)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("finished", ["kl"], indirect=True)
def test_a_codec_that_saw_test_windows_or_of_another_kind_is_refused(finished, people, tmp_path):
    settings, folder = finished
    given = {**settings, "codec_steps": -1, "codec_start": str(folder)}
    split = read_split(folder.parent / "split.json")
    write_split({**split, "train": split["test"], "test": split["train"]}, tmp_path / "split.json")
    with pytest.raises(DataError, match="codec_start: .*codec was trained on .* of the test windows of this split"):
        open_run(tmp_path / "run", **given, split=str(tmp_path / "split.json"))
    with pytest.raises(DataError, match="codec holds a KLVAE, this run's codec is a VQVAE"):
        open_run(tmp_path / "run", **{**given, "system": "vqvae-ldm"})


@pytest.mark.parametrize("finished", ["users"], indirect=True)
def test_a_codec_conditioned_on_users_is_of_the_same_users(finished, tmp_path):
    settings, folder = finished
    others = write_set(tmp_path / "others", users=(2, 3), numbers=range(1, 33))
    with pytest.raises(DataError, match="codec is conditioned on users and was not trained on ID_3"):
        open_run(tmp_path / "run", **{**settings, "data": str(others)}, codec_steps=-1, codec_start=str(folder))
