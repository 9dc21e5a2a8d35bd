"""The house: rooms and their order, a quick root, matplotlib in two files, no CUDA named, nothing flipped."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import mdlib

PACKAGE = Path(mdlib.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Highest first: a room imports from itself and from rooms below it.
ROOMS = [
    "__main__",
    "cli",
    "experiments",
    "reports",
    "evaluation",
    "pipeline",
    "systems",
    "training",
    "models",
    "simulation",
    "data",
    "utils",
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mdlib":
            names |= {alias.name for alias in node.names if alias.name in ROOMS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mdlib."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_downwards(path):
    if path == PACKAGE / "__init__.py":
        return
    wrong = imported(path) - set(ROOMS[ROOMS.index(room(path)) :])
    assert not wrong, f"{path.relative_to(PACKAGE)} must not import from {', '.join(sorted(wrong))}"


def test_the_command_line_needs_experiments_and_the_public_face_only():
    assert imported(PACKAGE / "cli.py") <= {"experiments", "utils"}


def test_rooms_depend_on_few_others():
    arrows = {(room(path), other) for path in FILES for other in imported(path) if other != room(path)}
    assert len({arrow for arrow in arrows if arrow[0] in ROOMS[1:]}) <= 30, sorted(arrows)


def test_only_plots_and_charts_import_matplotlib():
    for path in FILES:
        roots = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        # colormaps.py: inside the functions that need a map of matplotlib
        assert path.stem in ("charts", "plots", "colormaps") or not roots & {"matplotlib", "seaborn"}, path.name


def test_no_model_names_cuda_and_nothing_flips_time():
    for path in FILES:
        text = path.read_text()
        assert ".cuda(" not in text, path.name
        assert "torch.flip" not in text and "RandomHorizontalFlip" not in text, path.name


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_of_mdlib_exists(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "mdlib":
            module = importlib.import_module(node.module)
            for name in (one.name for one in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), (
                    f"{node.module}.{name}"
                )


def test_import_mdlib_brings_in_nothing_heavy():
    heavy = ("torch", "diffusers", "transformers", "matplotlib")
    code = f"import sys, mdlib; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_mdlib_offers_the_names_a_user_needs():
    for name in mdlib.__all__:
        assert getattr(mdlib, name).__name__ == name if name != "SYSTEMS" else mdlib.SYSTEMS
    assert "load_windows" in dir(mdlib) and not hasattr(mdlib, "nothing_of_that_name")
