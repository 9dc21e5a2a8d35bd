"""Training by two processes: like one process of twice the batch; one writes; they decide, fail and resume together."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mdlib.training.fit import batch_order

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`first` and `second`: what each process saw (two_processes.py); `ended`: how; `folder`: what they wrote."""
    folder = tmp_path_factory.mktemp("two")
    words = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=2".split()
    words += [TESTS / "training" / "two_processes.py", folder]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "training"))),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    # Less than the half hour after which a process that waits for another gives up.
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=1500)
    files = [folder / f"{rank}.pt" for rank in (0, 1)]
    assert all(file.exists() for file in files), ended.stdout + ended.stderr
    first, second = (torch.load(file, weights_only=True) for file in files)
    return SimpleNamespace(first=first, second=second, ended=ended, folder=folder)


def same(one: tuple[dict, list], other: tuple[dict, list]) -> bool:
    """Whether two runs ended with the same bits and the same history."""
    (weights, history), (others, their_history) = one, other
    assert weights.keys() == others.keys()
    return history == their_history and all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize("name", ["line", "accumulated", "codec"])
def test_two_processes_end_like_one_of_twice_the_batch(run, name):
    weights, history = run.first["alone"][name]
    shared, rows = run.first["together"][name]
    for key in weights.keys() - {"seen"}:  # the samples that one process saw
        if key.endswith("to_k.bias"):  # a softmax does not see it: its gradient is rounding, which Adam scales up
            continue
        torch.testing.assert_close(shared[key], weights[key], rtol=1e-3, atol=1e-4)
    for row, expected in zip(rows, history, strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() & {"step", "learning_rate", "error", "mse", "held_out_loss"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-9), key
    assert same(run.first["together"][name], run.second["together"][name])


def test_each_sample_of_the_global_batch_goes_to_one_process(run):
    for number in range(24):
        parts = [process["shown"][number][0] for process in (run.first, run.second)]
        assert [len(part) for part in parts] == [4, 4]
        assert sum(parts, []) == batch_order(number, 8, 37, seed=0).tolist()


def test_noise_differs_between_processes(run):
    draws = [draw for process in (run.first, run.second) for _, *two in process["shown"] for draw in two]
    assert len(set(draws)) == len(draws) == 2 * 24 * 2


def test_one_process_evaluates_writes_and_shows_a_bar(run):
    assert run.first["written"] and not run.second["written"]
    names = {path.name for path in (run.folder / "whole").iterdir()}
    assert names == {"state.pt", "best.safetensors", "history.csv", "tensorboard"}
    assert same(run.first["whole"], run.second["whole"])
    assert {row["rank"] for row in run.second["whole"][1]} == {0}
    assert run.ended.stderr.count("Shown:   0%") == 1


def test_a_run_whose_time_is_up_in_the_first_process_stops_in_all_and_resumes_bit_for_bit(run):
    for process in (run.first, run.second):
        assert process["broken"] == "SystemExit: 0"
        assert same(process["resumed"], run.first["unbroken"])
    assert run.ended.stdout.count("model stopped at step 11 of 12") == 1


def test_a_run_goes_on_under_another_number_of_processes_if_the_global_batch_stays(run):
    weights, history = run.first["continued"]
    assert [row["step"] for row in history] == [1, 3, 6, 9, 12]
    torch.testing.assert_close(weights["weight.weight"], run.first["alone"]["line"][0]["weight.weight"])
    for process in (run.first, run.second):
        assert "other settings (batch_size)" in process["refused"] and "number of processes" in process["refused"]


def test_a_loss_that_is_not_finite_in_one_process_is_one_line_in_all(run):
    assert run.first["infinite"].startswith("FloatingPointError: Line: the loss became")
    assert run.first["infinite"] == run.second["infinite"]


def test_weights_end_alike_whatever_each_process_reached(run):
    weights, _ = run.first["uneven"]
    assert same(run.first["uneven"], run.second["uneven"])
    assert (weights["never"] == 1).all()


def test_a_budget_spent_in_the_first_process_stops_all(run):
    assert [row["step"] for row in run.second["budget"][1]] == [1]
    assert same(run.first["budget"], run.second["budget"])


def test_an_error_in_one_process_ends_the_launch(run):
    assert run.ended.returncode != 0
    assert "ValueError: label 9 is out of range" in run.ended.stderr
