"""What a full disk and packages that do not import end with: one line that says what to do. What a GPU changes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

from mdlib.utils import amount, atomic_file, best_device, require_room

WRITERS = {
    "text": lambda path: path.write_text("x" * 10**6),
    "torch.save": lambda path: torch.save(torch.zeros(10**6), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(10**6)}, path),
    "picture": lambda path: __import__("PIL.Image").Image.effect_noise((1000, 1000), 90).save(path, format="PNG"),
}
LIMITED = """
import resource, signal, sys
sys.path[:0] = ["tests", "."]
from test_utils import WRITERS, atomic_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_file({path!r}) as temporary:
        WRITERS[{writer!r}](temporary)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit_is_named_with_the_space_that_is_left(writer, tmp_path):
    path = tmp_path / "folder" / "file"
    code = LIMITED.format(path=str(path), writer=writer)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = answer.stdout
    assert said.startswith(f"{path} cannot be written (") and said.endswith("B are left there\n"), answer.stderr
    assert said.count("\n") == 1 and not list(path.parent.iterdir())


def test_an_errno_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"/file cannot be written \(No space left on device\): .* are left there"):
        with atomic_file(tmp_path / "file"):
            raise OSError(28, "No space left on device")
    with pytest.raises(TypeError), atomic_file(tmp_path / "file"):
        raise TypeError("a mistake is no full disk")


@pytest.mark.parametrize("device, precision", [("cuda", "high"), ("cpu", "highest")])
def test_a_gpu_multiplies_matrices_in_tf32(device, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    try:
        assert best_device() == device and torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_small_sizes_are_in_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("mdlib.utils.room", lambda _: 3_000_000)
    with pytest.raises(OSError, match="training takes up to 45 MB and 3 MB are left: make room there"):
        require_room(tmp_path, 45_000_000, "training")
    assert amount(1.25e9) == "1.2 GB"


BROKEN = {
    "peft": ("diffusers", "from transformers import NothingOfThatName"),
    "xformers": ("diffusers", "raise OSError('libcudart.so.11.0: cannot open shared object file')"),
    "bitsandbytes": ("transformers", "raise RuntimeError('CUDA Setup failed\\n  despite GPU being available')"),
}


@pytest.mark.parametrize("package", BROKEN)
def test_a_package_that_does_not_import_is_named(package, tmp_path):
    """As diffusers and transformers do: they import what is installed, and wrap its error."""
    importer, line = BROKEN[package]
    site = tmp_path / "site-packages"
    for name, text in {
        package: line,
        importer: f"""
            try:
                import {package}
            except Exception as error:
                raise RuntimeError("Failed to import because of the following error:\\n" + str(error)) from error
        """,
    }.items():
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(textwrap.dedent(text))
    words = ["mdlib", "generate", "--pipeline", "p", "--out", "o"]
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = {words}"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "model_index.json").write_text("{}")
    code += "\nfrom runpy import run_module; run_module('mdlib', run_name='__main__')"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1, answer.stderr
    assert answer.stderr.startswith(f"mdlib: {importer} does not import because of {package} (")
    assert answer.stderr.endswith("): run python check_environment.py for the remedy\n")
