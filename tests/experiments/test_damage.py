"""Files that a disk or a copy damaged: one line names the file and what to do; caches are made again."""

import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, message, write_set

from mdlib.experiments.compare import read_report
from mdlib.experiments.run import open_run
from mdlib.experiments.steps import attach_trained_losses, codec_stage, prior_stage, save_codec, train_stage
from mdlib.pipeline import MicroDopplerPipeline, load_pipeline
from mdlib.systems import load_codec
from mdlib.utils import read_history, readable


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder as notebooks 02 and 04 leave it."""
    folder = tmp_path_factory.mktemp("trained")
    people = write_set(folder / "people", numbers=range(1, 33))
    run = open_run(folder / "run", data=str(people), preset="smoke", system="vae-diffusion")
    stage = codec_stage(run)
    train_stage(stage)
    save_codec(stage)
    stage = prior_stage(run)
    train_stage(stage)
    MicroDopplerPipeline(stage.codec, stage.model, users=[1, 2]).save_pretrained(run.path / "pipeline")
    (run.path / "report.json").write_text('{"verdict": {"sentence": "No."}}\n')
    return run.path


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\x00\xff no file of this kind" + content[30:],
}
attach = lambda out: attach_trained_losses(open_run(out), load_codec(out / "codec"))
build_prior = lambda out: prior_stage(open_run(out))
train_codec = lambda out: train_stage(codec_stage(open_run(out)))
train_prior = lambda out: train_stage(prior_stage(open_run(out)))
load = lambda out: load_pipeline(out / "pipeline")
WEIGHTS = "diffusion_pytorch_model.safetensors"
USES = [  # a file, what reads it, the remedy
    ("run.json", open_run, "delete it and give the run's first command again, with all options"),
    ("split.json", lambda out: open_run(out).split, "delete it: it is written again from the same windows"),
    ("codec/state.pt", train_codec, "delete it: training starts from the beginning of this stage"),
    ("prior/state.pt", train_prior, "delete it: training starts from the beginning of this stage"),
    ("codec/best.safetensors", train_codec, "delete {out}/codec: training starts from the beginning of this stage"),
    ("codec/losses.safetensors", attach, "train the codec again with --from 02"),
    ("codec/config.json", build_prior, "train the codec again with --from 02"),
    (f"codec/{WEIGHTS}", build_prior, "train the codec again with --from 02"),
    ("codec/history.csv", lambda out: read_history(out / "codec"), "train the codec again (run --from"),
    ("report.json", read_report, "write it again: python -m mdlib run --out {out} --from 06"),
    ("pipeline/model_index.json", load, "write the pipeline again (run --from, with the prior's notebook)"),
    ("pipeline/prior/config.json", load, "write the pipeline again"),
    (f"pipeline/codec/{WEIGHTS}", load, "write the pipeline again"),
]  # fmt: skip


def damaged(out, pattern, damage) -> str:
    (file,) = out.glob(pattern)
    content = file.read_bytes()
    file.unlink()  # tensors may be mapped to it
    file.write_bytes(DAMAGE[damage](content))
    return str(file)


@pytest.mark.parametrize(
    "file, use, remedy, damage",
    [
        pytest.param(*one, damage, id=f"{one[0]}-{damage}")
        for one in USES
        for damage in DAMAGE
        if not (one[0].endswith(".csv") and damage == "truncated")  # half a table is a table
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(file, use, remedy, damage, out):
    path = damaged(out, file, damage)
    said = message(use, out)
    assert said.startswith(f"{path} is missing or damaged: ") and remedy.format(out=out) in said


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
def test_a_damaged_teacher_is_trained_again(file, damage, out):
    (path,) = out.glob(f"codec/teacher/*/{file}")
    before = path.read_bytes()
    damaged(out, f"codec/teacher/*/{file}", damage)
    codec_stage(open_run(out))
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_latents_are_encoded_again(damage, out):
    wanted = prior_stage(open_run(out)).data.tensors[0]
    for file in (out / "codec").glob("latents-*.safetensors"):
        damaged(out / "codec", file.name, damage)
    assert torch.equal(prior_stage(open_run(out)).data.tensors[0], wanted)


def test_the_command_line_says_it_in_one_line(out):
    path = damaged(out, "run.json", "truncated")
    words = [sys.executable, "-m", "mdlib", "run", "--out", str(out)]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.startswith(f"mdlib: {path} is missing or damaged: delete it and")
    assert answer.stderr.count("\n") == 1


def test_another_error_while_reading_stays_what_it_is(out):
    """Sizes that do not fit are no damage, and memory that ran out must not lead to a deletion."""
    for error in (RuntimeError("CUDA out of memory"), MemoryError(), KeyError("weight")):
        with pytest.raises(type(error)), readable(out / "codec" / "state.pt", "delete it"):
            raise error
