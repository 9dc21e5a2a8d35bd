"""What ends a run from outside: Ctrl-C, SIGKILL, another process on the same folder, another Python's kernel."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from filelock import FileLock
from helpers import ROOT, write_set

from mdlib.experiments import execute as module
from mdlib.experiments.execute import _forget, execute, locked
from mdlib.experiments.run import open_run
from mdlib.experiments.settings import read_record
from mdlib.utils import DataError, remove_unfinished

KILLS = int(os.environ.get("MDLIB_KILLS", "20"))  # of the slow test


class Started:
    """`python -m mdlib WORDS` with its output in a file."""

    def __init__(self, folder, *words, **variables):
        self.file, self.errors = folder / "stdout.txt", folder / "stderr.txt"
        variables = {"MDLIB_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", **variables}
        with self.file.open("w") as out, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mdlib", *map(str, words)],
                stdout=out,
                stderr=errors,
                cwd=ROOT,
                env=os.environ | variables,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
            )

    def wait_for(self, pattern: str) -> re.Match:
        while not (found := re.search(pattern, self.file.read_text())):
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.1)
        return found

    def family(self) -> list[psutil.Process]:
        return [self.process, *psutil.Process(self.process.pid).children(recursive=True)]

    def end(self) -> SimpleNamespace:
        code = self.process.wait()
        return SimpleNamespace(code=code, out=self.file.read_text(), err=self.errors.read_text())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that Ctrl-C stops twice while its prior trains, next to another Python's kernel named python3, and what a
    second process on the same folder prints meanwhile."""
    folder = tmp_path_factory.mktemp("interrupted")
    people, foreign = write_set(folder / "people", numbers=range(1, 33)), folder / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text('{"argv": ["false"], "display_name": "another", "language": "python"}')
    words = ["run", "--data", people, "--out", folder / "run", "--preset", "smoke", "-p", "prior_steps=100000"]
    seen = SimpleNamespace(run=folder / "run", answers=[], shown=[], kernels=[])
    for number in range(2):
        started = Started(folder, *words, JUPYTER_PATH=str(folder / "jupyter"))
        at = started.wait_for(r"prior: (\d+)/100000")[1]
        seen.shown.append((int(at), int(started.wait_for(rf"prior: (?!{at}/)(\d+)/100000")[1])))
        seen.kernels += started.family()[1:]
        if number == 0:
            seen.holder = started.process.pid
            (folder / "second").mkdir()
            seen.second = Started(folder / "second", "run", "--out", folder / "run").end()
        started.process.send_signal(signal.SIGINT)
        seen.answers.append(started.end())
    return seen


def test_ctrl_c_is_one_line_with_the_step_and_leaves_no_kernel(interrupted):
    for answer, (_, step) in zip(interrupted.answers, interrupted.shown, strict=True):
        assert answer.code == 130
        line = answer.err.strip().splitlines()
        assert len(line) == 1, answer.err
        pattern = r"mdlib: 03_train_prior: stopped at step (\d+) of 100000; to resume, run the same command"
        assert int(re.fullmatch(pattern, line[0])[1]) >= step
    assert interrupted.kernels and not any(kernel.is_running() for kernel in interrupted.kernels)


def test_after_ctrl_c_the_same_command_goes_on_at_that_step(interrupted):
    stopped = int(re.search(r"at step (\d+)", interrupted.answers[0].err)[1])
    assert interrupted.shown[1][0] == stopped
    assert "02_train_vqvae: done already" in interrupted.answers[1].out


def test_a_second_process_on_the_same_folder_names_the_first(interrupted):
    assert interrupted.second.code == 1
    pattern = rf"mdlib: {interrupted.run} is in use by process {interrupted.holder} on \S+ since .*: wait for it or end"
    assert re.match(pattern, interrupted.second.err) and interrupted.second.err.count("\n") == 1


def test_notebooks_run_in_this_interpreter_and_end_quietly(interrupted):
    """Another Python's kernel would not even start; a kernel that is shut down logs an interrupt as an error."""
    assert "02_train_vqvae: done in" in interrupted.answers[0].out
    assert "KeyboardInterrupt" not in interrupted.answers[0].err


def test_an_interrupt_between_two_cells_counts(tmp_path, monkeypatch):
    def execute_notebook(*arguments, on_cell_start, **options):
        os.kill(os.getpid(), signal.SIGINT)
        on_cell_start(cell=None, cell_index=0)

    monkeypatch.setattr("papermill.execute_notebook", execute_notebook)
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    people = write_set(tmp_path / "people", numbers=range(1, 33))
    with pytest.raises(KeyboardInterrupt, match="01_env_check: interrupted"):
        execute(tmp_path / "run", {}, data=str(people), preset="smoke")


def test_a_second_interrupt_ends_a_kernel_that_ignores_the_first():
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    kernel = subprocess.Popen([sys.executable, "-c", code, "ipykernel_launcher"], stdout=subprocess.PIPE)
    kernel.stdout.readline()
    module._interrupt_kernel(first=True)
    time.sleep(0.2)
    assert kernel.poll() is None
    module._interrupt_kernel(first=False)
    assert kernel.wait() == -signal.SIGKILL


def test_a_lock_ends_with_its_process_and_leaves_no_files(tmp_path):
    code = f"from filelock import FileLock; lock = FileLock({str(tmp_path / '.lock')!r}); lock.acquire()"
    code += "; print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(DataError, match="is in use by another process: wait for it or end it"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        assert "process" in (tmp_path / ".in-use").read_text()
        (tmp_path / "run.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with locked(tmp_path / "refused"):
        pass
    assert not (tmp_path / "refused").exists()


def test_a_disk_without_locks_does_without(tmp_path, monkeypatch):
    def refuse(*_, **options):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # as on a read-only disk
    with locked(tmp_path / "other"):
        pass


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".state.pt.123", "prior/.a.png.7", ".hidden", "state.pt", ".ipynb_checkpoints/x.1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".hidden", "state.pt", ".ipynb_checkpoints/x.1"}


@pytest.mark.parametrize(
    "first, parameters, message",
    [
        ("06", {"counts": "5,10"}, "counts must be of type list, got '5,10'"),
        ("06", {"reference": "vgg"}, "reference must be one of auto, resnet18, none"),
        ("06", {"evaluation_compile": "yes"}, "evaluation_compile must be one of auto, graph, compile, no"),
        ("06", {"evaluation_steps": -1}, "evaluation_steps must be 0 or more, got -1"),
        ("05", {"images_per_user": "many"}, "images_per_user must be of type int, got 'many'"),
        ("05", {"batch_size": -4}, "batch_size must be 1 or more, got -4"),
        ("05", {"conditions": ["bag"]}, "conditions: .* holds no 'bag'"),
        ("05", {"users": ["1"]}, "users: .* holds no '1'; there are "),
        ("05", {"sampling": {"temperature": -1.0}}, "temperature must be above 0"),
        ("05", {}, "02_train_vqvae, 03_train_prior is not done yet: leave out --from"),
    ],
)
def test_nothing_is_removed_before_the_settings_are_known_to_be_valid(first, parameters, message, tmp_path):
    people = write_set(tmp_path / "people", numbers=range(1, 33))
    run = open_run(tmp_path / "run", data=str(people), preset="smoke")
    for name in run.system.notebooks if parameters else ():
        run.done(name, time.monotonic())
    (run.path / "generated").mkdir()
    for file in ("report.json", "generated/window.png"):
        (run.path / file).write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        execute(run.path, parameters, first)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()} == before


def test_running_again_removes_what_depends_on_it_only(tmp_path):
    people = write_set(tmp_path / "people", numbers=range(1, 33))
    run = open_run(tmp_path / "run", data=str(people), preset="smoke")
    with pytest.raises(DataError, match="--from 05 comes after --to 02"):
        execute(run.path, {}, "05", "02")
    for name in run.system.notebooks:
        run.done(name, time.monotonic())
    for folder in ("codec", "prior"):
        (run.path / folder).mkdir()
    _forget(run, "01")
    assert list(read_record(run.path)["steps"]) == list(run.system.notebooks[1:]) and (run.path / "codec").exists()
    _forget(run, "02")  # another codec takes another prior
    assert not (run.path / "codec").exists() and not (run.path / "prior").exists()


def test_a_page_that_was_not_written_in_full_does_not_stop_a_run(tmp_path, monkeypatch):
    people = write_set(tmp_path / "people", numbers=range(1, 33))
    run = open_run(tmp_path / "run", data=str(people), preset="smoke")
    for name in run.system.notebooks:
        run.done(name, time.monotonic())
    (run.path / "notebooks").mkdir()
    (run.path / "notebooks" / "05_generate.ipynb").write_text('{"cells": [')
    monkeypatch.setattr(module, "_execute_one", lambda name, *_: pytest.fail(name))
    execute(run.path, {"images_per_user": 2})


# ---- SIGKILL at any moment


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted: the command, its report and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    words = ["run", "--data", write_set(folder / "people", numbers=range(1, 33)), "--preset", "smoke", "--out"]
    started = time.monotonic()
    answer = Started(folder, *words, folder / "run").end()
    assert answer.code == 0, answer.err
    return SimpleNamespace(words=words, report=figures(folder / "run"), seconds=time.monotonic() - started)


def figures(run) -> dict:
    """A report without the time at which, and in which, it was made."""
    report = json.loads((run / "report.json").read_text())
    report.pop("created", None)
    report["about"].pop("time")
    return report


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(number, whole, tmp_path):
    moment = random.Random(number).uniform(0, whole.seconds)
    started = Started(tmp_path, *whole.words, tmp_path / "run")
    time.sleep(moment)
    for process in started.family():
        process.kill()
    started.end()
    answer = Started(tmp_path, *whole.words, tmp_path / "run").end()
    assert answer.code == 0, f"killed after {moment:.1f} of {whole.seconds:.1f} s: {answer.err}"
    assert figures(tmp_path / "run") == whole.report
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.is_file()]
