"""Environments that are broken and then fixed by `repair`: takes half an hour, gigabytes and a package index.

    python -m pytest -m slow -s tests/test_repair_for_real.py

A copy of the repository gets its own .venv; every test works on a copy of both in the same folder, so that paths stay
valid. The copies are hard links: pip replaces files, it does not write into them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import setup_environment as setup

ROOT = Path(setup.__file__).parent
PINS = setup.read_pins().wanted
# A pandas compiled against another numpy; which one there is depends on Python.
OLD_PANDAS = {(3, 11): "2.0.3", (3, 12): "2.1.1"}.get(sys.version_info[:2], "2.2.3")
OLD_NUMPY = {(3, 11): "1.24.4", (3, 12): "1.26.4"}.get(sys.version_info[:2], "2.1.3")
NOWHERE = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
}

pytestmark = pytest.mark.slow


class Copy:
    """A copy of the repository with its environment."""

    def __init__(self, folder):
        self.folder, self.python = folder, folder / ".venv" / "bin" / "python"

    def run(self, *command, **variables):
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **variables},
            capture_output=True,
            text=True,
        )
        return done

    def pip(self, *arguments):
        done = self.run(self.python, "-m", "pip", *arguments, "--quiet", "--no-input")
        assert done.returncode == 0, done.stderr

    def setup(self, *arguments, **variables):
        done = self.run(sys.executable, "setup_environment.py", *arguments, **variables)
        text = f"$ python setup_environment.py {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        print(text.replace(f"{self.folder.parent}{os.sep}", ""), end="", flush=True)
        return done

    def failures(self):
        """{check: detail} of the failures and warnings of check_environment.py, except the machine's."""
        done = self.run(
            sys.executable,
            "-c",
            "import check_environment as c, json; print(json.dumps(c.check(c.setup.venv_python())))",
        )
        rows = json.loads(done.stdout.splitlines()[-1])
        machine = ("cores", "memory", "disk", "shared memory")
        return {r["name"]: r["detail"] for r in rows if r["status"] != "ok" and r["name"] not in machine}

    def versions(self):
        return setup.ask(self.python)["installed"]

    def torch_file(self):
        """The inode of torch's library: it changes if torch is reinstalled."""
        return next(self.folder.glob(".venv/lib/python*/site-packages/torch/_C.*.so")).stat().st_ino

    def packages(self):
        return next(self.folder.glob(".venv/lib/python*/site-packages"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A copy of the repository with a complete environment, stored elsewhere, and the folder it belongs to."""
    place = tmp_path_factory.mktemp("repair")
    tree, stored = place / "mdlib", place / "stored"
    names = ("setup_environment.py", "check_environment.py", "pyproject.toml", "README.md", "LICENSE", "mdlib")
    tree.mkdir()
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    done = Copy(tree).setup("install")
    assert done.returncode == 0, done.stderr
    assert Copy(tree).failures() == {}
    for name in ("setup.log", "constraints.txt"):  # written into, so not to be shared by links
        (tree / ".venv" / name).unlink()
    tree.rename(stored)
    yield stored, tree
    shutil.rmtree(place)


@pytest.fixture
def copy(good, request, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    stored, tree = good
    shutil.copytree(stored, tree, copy_function=os.link, symlinks=True)
    print(f"\n== {request.node.name.removeprefix('test_').replace('_', ' ')}")
    yield Copy(tree)
    shutil.rmtree(tree)


def assert_repaired(copy, row, why):
    """`repair` runs one step; then everything works, and torch has not changed."""
    before = copy.torch_file()
    done = copy.setup("repair")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(re.findall(r"^  ([^:\n]+): (.*) \.\.\. done \(", done.stdout, re.MULTILINE))
    assert list(rows) == [row] and why in rows[row]
    assert copy.torch_file() == before
    assert copy.failures() == {}
    wrong = {n: v for n, v in copy.versions().items() if n in PINS and not setup.satisfies(v, PINS[n])}
    assert wrong == {}


def test_a_torchvision_of_another_torch(copy):
    copy.pip("install", "--no-deps", "torchvision===0.27.0")
    assert "torchvision::nms" in copy.failures()["torchvision"]
    assert_repaired(copy, "torchvision to match torch", "torchvision::nms")


def test_old_pins_that_import_cached_download(copy):
    copy.pip("install", "--no-deps", "diffusers==0.27.2")
    assert "cached_download" in copy.failures()["diffusers"]
    assert_repaired(copy, "packages", "diffusers 0.27.2")


def test_a_hub_outside_the_window(copy):
    copy.pip("install", "--no-deps", "huggingface-hub==0.25.2")
    failures = copy.failures()
    assert "huggingface" in failures["transformers"] and "found 0.25.2" in failures["requirements"]
    assert_repaired(copy, "packages", "huggingface-hub 0.25.2")


def test_lpips_removed(copy):
    copy.pip("uninstall", "--yes", "lpips")
    assert_repaired(copy, "packages", "lpips missing")


def test_an_install_that_was_killed(copy):
    """pip writes INSTALLER and RECORD last."""
    for name in ("INSTALLER", "RECORD"):
        next(copy.packages().glob(f"accelerate-*.dist-info/{name}")).unlink()
    shutil.rmtree(copy.packages() / "accelerate" / "utils")
    assert_repaired(copy, "half-installed packages", "accelerate")


def test_another_numpy_and_pandas(copy):
    copy.pip("install", "--no-deps", f"numpy=={OLD_NUMPY}", f"pandas=={OLD_PANDAS}")
    assert_repaired(copy, "packages", f"numpy {OLD_NUMPY}, pandas {OLD_PANDAS}")


def test_files_of_a_dependency_lost(copy):
    shutil.rmtree(copy.packages() / "filelock")
    assert_repaired(copy, "imports", "filelock")


def test_a_Python_that_is_not_ours_offline_and_from_a_wheelhouse(copy, tmp_path):
    """The same packages as a foreign Python, as Kaggle's image is: lpips and mdlib are missing, there is no index."""
    foreign = copy.folder.parent / "foreign"
    shutil.copytree(copy.folder / ".venv", foreign, copy_function=os.link, symlinks=True)
    wheels, nowhere = tmp_path / "wheels", {**NOWHERE, "XDG_CACHE_HOME": str(tmp_path)}
    try:
        copy.pip("download", "--no-deps", "--dest", wheels, f"lpips{PINS['lpips']}")
        copy.python = foreign / "bin" / "python"
        copy.pip("uninstall", "--yes", "lpips", "mdlib")
        before = copy.versions()

        done = copy.setup("repair", "--python", copy.python, **nowhere)
        assert done.returncode == 0 and "lpips is missing: the package index does not answer" in done.stdout
        assert copy.versions() == before  # mdlib is linked, not installed

        done = copy.setup("repair", "--python", copy.python, "--wheelhouse", wheels, **nowhere)
        assert done.returncode == 0, done.stderr
        assert copy.versions() == {**before, "lpips": "0.1.4"}
        assert setup.ask(copy.python, ("lpips", "mdlib"))["modules"]["mdlib"]["error"] is None
    finally:
        shutil.rmtree(foreign)
