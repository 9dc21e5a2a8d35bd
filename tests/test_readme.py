"""The README's commands and snippets run as they stand, made small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALLER = {"--users 31": "--users 3", "--windows 150": "--windows 40 --size 64", "--preset demo": "--preset smoke",
           "--windows-per-user 20": "--windows-per-user 5"}  # fmt: skip


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m mdlib")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's commands have been run, one after the other."""
    folder = tmp_path_factory.mktemp("readme")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands():
        for long, short in SMALLER.items():
            command = command.replace(long, short)
        if "validate" in command:
            command += " --size 32 --judge-steps 2 --seeds 2"
        words = [sys.executable, *shlex.split(command)[1:]]
        answer = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, f"{command}\n{answer.stdout[-2000:]}{answer.stderr[-2000:]}"
    return folder


def test_the_commands_run_in_the_order_they_are_told(folder):
    assert len(commands()) >= 5
    for product in ("runs/first/report.html", "more/manifest.csv", "split.json", "runs/judged/report.json"):
        assert (folder / product).exists(), product


def test_the_python_snippets_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (folder / "window.png").stat().st_size > 0


def test_files_and_options_the_readmes_name_exist():
    from mdlib.systems import SYSTEMS

    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (ROOT / link).exists(), f"{name}: {link}"
        for system in re.findall(r"--system ([\w-]+)", text):
            assert system in SYSTEMS
        for preset in set(re.findall(r"--preset ([\w-]+)", text)):
            assert preset in SYSTEMS["vqvae-transformer"].presets, preset
