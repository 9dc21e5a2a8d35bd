"""A prior that trains with keep_best leaves its best and its last weights, and generation takes either."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import write_set
from safetensors.torch import load_file

from mdlib.experiments.execute import execute
from mdlib.experiments.run import open_run
from mdlib.experiments.steps import codec_stage, prior_stage, save_codec, save_pipeline, train_stage
from mdlib.pipeline import load_pipeline
from mdlib.utils import DataError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Pipeline folders of two equal trainings, with keep_best and without; the first evaluation is the best."""
    folder, runs = tmp_path_factory.mktemp("trained"), {}
    people = write_set(folder / "people", numbers=range(1, 33))
    for keep in (True, False):
        settings = dict(data=str(people), preset="smoke", system="vae-diffusion", prior_options={"keep_best": keep})
        if runs:
            settings |= dict(codec_steps=-1, codec_start=str(runs[True].parent / "codec"))
        run = open_run(folder / str(keep), **settings)
        stage = codec_stage(run)
        train_stage(stage)
        save_codec(stage)
        stage = prior_stage(run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mdlib.training.fit._held_out_logs", lambda state, _: {"held_out_loss": state.step})
            train_stage(stage)
        before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
        pipeline = save_pipeline(stage)
        assert same(pipeline.prior.state_dict(), before) and not pipeline.prior.training
        runs[keep] = run.path / "pipeline"
    return runs


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_both_are_loaded_by_name(trained):
    best, last = (load_pipeline(trained[True], weights) for weights in ("best", "last"))
    assert same(best.prior.state_dict(), load_file(trained[True].parent / "prior" / "best.safetensors"))
    alone = load_pipeline(trained[False], "last").prior.state_dict()
    assert same(last.prior.state_dict(), alone), "averaged, as a training without keep_best ends"
    assert not same(best.prior.state_dict(), alone) and same(best.codec.state_dict(), last.codec.state_dict())
    assert (best.config.weights, last.config.weights) == ("best", "last")
    assert same(load_pipeline(trained[True]).prior.state_dict(), best.prior.state_dict()), "the run's own"
    by_diffusers = DiffusionPipeline.from_pretrained(trained[True], variant="last")
    assert same(by_diffusers.prior.state_dict(), alone)


def test_windows_of_both_are_not_mixed_in_one_folder(trained, tmp_path):
    load_pipeline(trained[True], "last").generate_folder(tmp_path, per_user=1)
    with pytest.raises(DataError, match=r"windows generated with other settings \(weights\)"):
        load_pipeline(trained[True], "best").generate_folder(tmp_path, per_user=1)


def test_weights_that_are_not_there_are_one_line(trained, tmp_path):
    with pytest.raises(DataError, match="does not hold the best weights of its prior: leave weights out, or train"):
        load_pipeline(trained[False], "best")
    with pytest.raises(ValueError, match="weights must be one of , best, last, got 'first'"):
        load_pipeline(trained[True], "first")
    old = shutil.copytree(trained[False], tmp_path / "old")
    index = json.loads((old / "model_index.json").read_text())
    del index["weights"]
    (old / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(old).config.weights == ""
    with pytest.raises(DataError, match="does not hold the last weights"):  # an earlier version does not say which
        load_pipeline(old, "last")


def test_a_run_that_keeps_no_best_weights_says_so_before_it_starts(tmp_path):
    data = str(write_set(tmp_path / "people", numbers=range(1, 33)))
    given = dict(data=data, system="vae-diffusion", preset="demo")
    for more in ({}, {"prior_options": {"keep_best": True}, "joint_steps": 5}):
        with pytest.raises(DataError, match='weights="best": this run keeps the last weights of its prior only: leave'):
            execute(tmp_path / "run", {"weights": "best", **more}, **given)
    with pytest.raises(ValueError, match="weights must be one of"):
        execute(tmp_path / "run", {"weights": "first"}, **given)
    assert not (tmp_path / "run").exists()
