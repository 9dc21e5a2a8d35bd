"""On several GPUs a notebook trains in a process for each, and goes on as if it had trained by itself: here with two
processes on a CPU, started by the very command that serves GPUs."""

import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import write_set
from test_fit import CONFIG, line, points, same

from mdlib import utils
from mdlib.data.speckle import Speckle
from mdlib.data.windows import load_windows, to_uint8
from mdlib.evaluation.fidelity import texture
from mdlib.experiments import steps
from mdlib.experiments.run import open_run
from mdlib.pipeline import MicroDopplerPipeline
from mdlib.simulation.dataset import simulate_dataset
from mdlib.training import distributed
from mdlib.training import fit as training
from mdlib.training.fit import fit

STEP = training._step


def no_training(*_):
    raise AssertionError("the notebook's own process trains")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A run's codec trained in two processes, by two sessions of which the first ran out of time, and its prior; and
    the same codec trained in one (`alone`). `told`: what was printed meanwhile."""
    folder = tmp_path_factory.mktemp("launched")
    people = write_set(folder / "people", numbers=range(1, 33))
    seen = SimpleNamespace(told={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDLIB_CACHE", str(folder / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        seen.alone = steps.codec_stage(open_run(folder / "alone", data=str(people), preset="smoke"))
        seen.alone_history = steps.train_stage(seen.alone)

        def train(name, stage):
            patch.setattr(training, "_step", no_training)
            try:
                with redirect_stdout(StringIO()) as printed:
                    return steps.train_stage(stage)
            finally:
                seen.told[name] = printed.getvalue()
                patch.setattr(training, "_step", STEP)

        patch.setattr(steps, "processes", lambda: 2)
        seen.run = open_run(folder / "two", data=str(people), preset="smoke")
        with pytest.MonkeyPatch.context() as session, pytest.raises(SystemExit) as seen.end:
            session.setenv(utils.DEADLINE, str(time.time()))
            before_and_after = iter([False, True])  # the time is up while the others train
            session.setattr("mdlib.training.fit.time_is_up", lambda: next(before_and_after))
            train("first session", steps.codec_stage(seen.run))
        seen.codec = steps.codec_stage(seen.run)
        seen.codec_history = train("codec", seen.codec)
        seen.codec.codec.save_pretrained(seen.run.path / "codec")
        seen.prior = steps.prior_stage(seen.run)
        seen.inputs = {path: path.stat().st_mtime_ns for path in (seen.run.path / "codec").glob("tokens-*")}
        seen.prior_history = train("prior", seen.prior)
        seen.again = train("again", seen.prior)
    return seen


def test_two_processes_train_as_one_does(launched):
    assert [row["step"] for row in launched.codec_history] == [3, 6]
    for row, expected in zip(launched.codec_history, launched.alone_history, strict=True):
        assert row.keys() == expected.keys()
        for key in ("learning_rate", "mse", "teacher", "held_out_mse", "held_out_teacher"):
            assert row[key] == pytest.approx(expected[key], rel=5e-3, abs=1e-9), key
    weights, others = (stage.model.decoder.state_dict() for stage in (launched.codec, launched.alone))
    torch.testing.assert_close(weights, others, rtol=0, atol=0.01)


def test_their_progress_comes_as_lines_of_text(launched):
    for name in ("codec", "prior"):
        told = launched.told[name].splitlines()
        assert any(text.startswith(f"{name}: 6/6 100%") for text in told) and "\r" not in launched.told[name]


def test_a_session_whose_time_is_up_ends_for_all(launched):
    assert launched.end.value.code == 0
    told = launched.told["first session"]
    assert told.count("The session's time is up. codec stopped at step 1 of 6, saved in") == 1 and "Error" not in told
    assert "codec: 1/6" in launched.told["codec"], "the next session goes on there"


def test_what_takes_long_is_made_once(launched):
    made = {path: path.stat().st_mtime_ns for path in (launched.run.path / "codec").glob("tokens-*")}
    assert made == launched.inputs and len(made) == 2
    assert len(list((launched.run.path / "codec" / "teacher").iterdir())) == 1
    assert launched.told["again"] == "" and launched.again == launched.prior_history, "a finished stage starts nothing"


def test_the_pipeline_draws_with_what_two_processes_trained(launched):
    stage, train = launched.prior, launched.run.parts["train"]
    pipeline = MicroDopplerPipeline(
        stage.codec, stage.model, users=train.users, colormap=train.colormap, output_size=32
    )
    made = pipeline(list(train.users), images_per_user=2, seed=0, output_type="pt")
    assert made.images.shape[0] == 4 and torch.isfinite(made.images).all()


class Blur(torch.nn.Module):
    """A codec that removes what is finer than `size` pixels."""

    device = "cpu"

    def __init__(self, size: int):
        super().__init__()
        self.blur = torch.nn.AvgPool2d(size, 1, size // 2, count_include_pad=False)

    def encode(self, images, users=None):
        return self.blur(images)

    def decode(self, latents, users=None):
        return latents


def test_speckle_is_fitted_where_the_codec_removes_it_and_only_there(tmp_path):
    walkers = load_windows(simulate_dataset(tmp_path, users=2, windows=20, seed=3, size=64, progress=False))
    fitted = steps.fitted_speckle(Blur(5), walkers)
    smooth = to_uint8(Blur(5).encode(walkers.float()))
    speckled = Speckle(**fitted).add(smooth, range(len(smooth)))
    real, without, added = (texture(images[:, 0] / 255).mean(0) for images in (walkers.images, smooth, speckled))
    assert ((added - real).abs()[:2] < 0.3 * (without - real).abs()[:2]).all(), "contrast and dissimilarity"
    assert steps.fitted_speckle(Blur(1), walkers) == {}, "nothing is lost"
    rgb = replace(walkers, images=walkers.images.repeat(1, 3, 1, 1))
    assert steps.fitted_speckle(Blur(5), rgb) == {}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that `launch` can start."""

    def write(text: str) -> str:
        (tmp_path / "launched_here.py").write_text(text)
        return "launched_here"

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def test_a_failure_is_one_line_with_its_exit_code_and_all_output_is_shown(module, capsys):
    name = module(
        "import os, sys, time, mdlib.utils\n"
        "from pathlib import Path\n"
        "rank, words = os.environ['RANK'], sys.argv[1:]\n"
        "print(f'process {rank} of {os.environ[\"WORLD_SIZE\"]} {words} {mdlib.utils.batch_run()}')\n"  # in one piece
        "Path(f'{__file__}.{rank}').touch()\n"
        "while not Path(f'{__file__}.0').exists():\n"  # one that fails first ends the other before it has printed
        "    time.sleep(0.05)\n"
        "if rank == '1':\n"
        "    print('mdlib: ValueError: no such user', file=sys.stderr)\n"
        "    sys.exit(3)\n"
    )
    with pytest.raises(RuntimeError) as error:
        distributed.launch(2, name, "a run", 0.5)
    assert str(error.value) == "training in 2 processes ended with exit code 1: ValueError: no such user"
    printed = capsys.readouterr().out
    for rank in "01":
        assert f"process {rank} of 2 ['a run', '0.5'] True" in printed
    assert "exitcode  : 3" in printed


def test_a_process_that_was_killed_is_told_of(module):
    name = module("import os, signal\nos.environ['RANK'] == '0' and os.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(RuntimeError, match="exit code 1: .*SIGKILL"):
        distributed.launch(2, name)


def test_an_interrupt_ends_the_processes_too(module, monkeypatch):
    # In one piece: two processes share the line's end.
    name = module("import os, sys, time\nsys.stdout.write(f'ready {os.getpid()}\\n')\ntime.sleep(120)\n")
    ready = []

    def interrupt_when_both_are_ready(line, **options):
        ready.extend([int(line.split()[1])] if line.startswith("ready") else [])
        if len(ready) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(distributed, "print", interrupt_when_both_are_ready, raising=False)
    with pytest.raises(KeyboardInterrupt):
        distributed.launch(2, name)
    assert len(ready) == 2 and not any(map(psutil.pid_exists, ready))


def test_one_of_the_processes_says_in_one_line_why_it_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stages", str(tmp_path), "codec", "0.0"])
    with pytest.raises(ValueError):
        steps.main()
    assert capsys.readouterr().out == (
        f"mdlib: DataError: {tmp_path} holds no run: correct --out, or start a run with --data FOLDER_OF_WINDOWS\n"
    )


@pytest.mark.parametrize("gpus, launched_already, number", [(0, False, 1), (1, False, 1), (2, False, 2), (2, True, 1)])
def test_a_process_for_each_gpu_and_none_within_a_launched_one(gpus, launched_already, number, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched_already:
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.processes() == number
    started = []
    monkeypatch.setattr(steps, "launch", lambda *words, on_line: started.append(words))
    monkeypatch.setattr(steps, "fit_stages", lambda *arguments, launch, **options: launch and launch())
    stage = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path),
        name="prior",
        model=None,
        data=None,
        held_out=None,
        config=CONFIG,
        options={},
    )
    steps.train_stage(stage)
    assert started == ([(2, "mdlib.experiments.steps", tmp_path, "prior", 0.0)] if number == 2 else [])


def test_gpus_that_cannot_share_a_batch_are_told_of_before_anything_is_trained(tmp_path, monkeypatch):
    people = write_set(tmp_path / "people", numbers=range(1, 33))
    run = open_run(tmp_path / "run", data=str(people), preset="smoke")
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    for refused in (
        lambda: steps.codec_stage(run),
        lambda: open_run(tmp_path / "new", data=str(people), preset="smoke"),
    ):
        with pytest.raises(ValueError, match="3 GPUs cannot share a batch of 8: set a batch_size divisible by 3 in"):
            refused()
    assert not (run.path / "codec").exists() and not (tmp_path / "new").exists()


def test_fit_takes_over_what_others_trained_and_starts_nothing_where_all_is_done(tmp_path, monkeypatch):
    here, there, calls = line(), line(), []

    def others():
        calls.append(1)
        monkeypatch.setattr(training, "_step", STEP)
        fit(there, points(), CONFIG, tmp_path, held_out=points(20), progress=False)
        monkeypatch.setattr(training, "_step", no_training)

    monkeypatch.setattr(training, "_step", no_training)
    for _ in range(2):
        history = fit(here, points(), CONFIG, tmp_path, held_out=points(20), launch=others)
        assert same(here, there) and history[-1]["step"] == CONFIG.steps
    assert calls == [1]
    with pytest.raises(RuntimeError, match="codec: training in other processes stopped early, at step 0 of 12"):
        fit(here, points(), CONFIG, tmp_path / "other", name="codec", launch=lambda: None)
    monkeypatch.setenv(utils.DEADLINE, "1")
    with pytest.raises(SystemExit):
        fit(here, points(), CONFIG, tmp_path / "other", launch=others)
    assert calls == [1], "where no time is left nothing is started"


def test_a_budget_that_others_spent_is_spent(tmp_path):
    short = replace(CONFIG, max_minutes=1e-6)
    train = lambda **options: fit(line(), points(), short, tmp_path, progress=False, **options)
    assert train(launch=train) == train()
