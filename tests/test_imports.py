"""The house's rules: arrows one way, a quick root, matplotlib in one file, no CUDA named outside, nothing flipped."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mdlib

PACKAGE = Path(mdlib.__file__).parent
FILES = sorted(PACKAGE.glob("*.py"))
# The floors of the house, lowest first: a file imports from floors below its own, or beside it where named.
FLOORS = [
    {"colormap", "distributed", "files", "gait", "launch", "limits", "physics", "progress", "metrics", "published"},
    {"nn", "data", "radar", "perceptual"},
    {
        "split",
        "augment",
        "latents",
        "train",
        "simulate",
        "plot",
        "codebook",
        "codec",
        "evidence",
        "attention",
        "diffusion",
        "foundation",
        "kernel",
        "ldm",
        "terms",
    },
    {
        "vqvae",
        "vae",
        "vavae",
        "transformer",
        "unet",
        "dit",
        "vqdiffusion",
        "joint",
        "judge",
        "kinematics",
        "neighbours",
        "pipeline",
        "quality",
    },
    {"outcomes", "resnet", "widgets", "selection", "verification", "statistics", "presets", "teacher"},
    {"arms"},
    {"fidelity", "conditions"},
    {"validate"},
    {"systems"},
    {"run", "report"},
    {"comparison", "stages"},
    {"compare", "study"},
    {"__main__"},
]
BESIDE = {("vavae", "vae"), ("vqdiffusion", "dit")}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "mdlib":
                names |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
            elif node.module.startswith("mdlib."):
                names.add(node.module.split(".")[1])
    return names


def test_every_file_has_its_floor():
    assert {path.stem for path in FILES} - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_run_downwards(path):
    if path.stem == "__init__":
        assert not imported(path)
        return
    floor = next(number for number, floor in enumerate(FLOORS) if path.stem in floor)
    below = set().union(*FLOORS[:floor])
    wrong = {name for name in imported(path) - below if (path.stem, name) not in BESIDE}
    assert not wrong, f"{path.name} must not import {wrong}"


def test_only_plot_imports_matplotlib():
    for path in FILES:
        roots = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert path.stem == "plot" or not roots & {"matplotlib", "seaborn"}, path.name


def test_no_model_names_cuda_and_nothing_flips_time():
    for path in FILES:
        text = path.read_text()
        assert ".cuda(" not in text, path.name
        assert "torch.flip" not in text and "RandomHorizontalFlip" not in text, path.name


def test_import_mdlib_brings_in_nothing_heavy():
    heavy = ("torch", "diffusers", "transformers", "matplotlib")
    code = f"import sys, mdlib; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert answer.stdout.strip() == "[]"
