import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that each take all cores keep each other waiting. Set before torch starts.
    import joblib  # its count respects affinity and the limits of a container

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, joblib.cpu_count() // 2)))

from helpers import ROOT, readme_commands  # noqa: E402

STORY = ("test_compare.py", "test_docs.py", "test_run.py")
SMALLER = {
    "--users 31": "--users 3",
    "--windows 150": "--windows 40 --size 64",
    "--preset demo": "--preset smoke",
    "--windows-per-user 20": "--windows-per-user 5",
    "--out runs/compared": "--out runs/compared --systems vqvae-ldm,vq-diffusion --preset smoke",
    "--out runs/best": "--out runs/best --size 32",
    "--out runs/checked": "--out runs/checked --size 32 --evaluation-steps 2 --seeds 2",
}


def pytest_configure(config):
    """Tests compare results bit by bit, which only a CPU promises: GPUs are hidden but from tests marked `gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one file share its fixtures, and the files of STORY share the story: one process for each."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0].rsplit("/")[-1]
            return "story" if file in STORY else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MDLIB_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def alone(tmp_path_factory):
    """No test reads or fills the user's cache, and classifiers train one at a time: tests put other functions in place,
    which further processes would not know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("mdlib.evaluation.evidence.training_at_once", lambda: 1)
        yield


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """The README's commands, made small and run one after the other in a folder of their own.

    `folder`: that folder; `answers`: what each command printed, by its name (simulate, run, …).
    """
    folder = tmp_path_factory.mktemp("readme")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MDLIB_CACHE": str(folder / "cache")}
    answers = {}
    for command in readme_commands():
        for long, short in SMALLER.items():
            command = command.replace(long, short)
        words = [sys.executable, *shlex.split(command)[1:]]
        answer = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, f"{command}\n{answer.stdout[-2000:]}{answer.stderr[-2000:]}"
        answers[words[3]] = answer
    return SimpleNamespace(folder=folder, answers=answers)
