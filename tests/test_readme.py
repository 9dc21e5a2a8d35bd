"""The README's commands and snippets run as they stand, made small."""

import re

from helpers import ROOT, readme_blocks

from mdlib.systems import SYSTEMS


def test_the_commands_run_in_the_order_they_are_told(story):
    assert list(story.answers) == ["simulate", "run", "generate", "split", "validate", "compare"]
    products = ("first/report.html", "judged/report.html", "compared/comparison.html")
    for product in ("more/manifest.csv", "split.json", *(f"runs/{name}" for name in products)):
        assert (story.folder / product).exists(), product
    made = sorted(path.parent.name for path in (story.folder / "more").glob("ID_*/*.png"))
    assert made == ["ID_1"] * 4 + ["ID_3"] * 4


def test_the_python_snippets_run(story, monkeypatch):
    monkeypatch.chdir(story.folder)
    names: dict = {}
    for block in readme_blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (story.folder / "window.png").stat().st_size > 0


def test_files_systems_and_presets_the_readmes_name_exist():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"^[A-Z_]{6,}$|TODO", text, re.MULTILINE), "a place that waits for its figures"
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (ROOT / link).exists(), f"{name}: {link}"
        assert set(re.findall(r"--system ([\w-]+)", text)) <= SYSTEMS.keys()
        for system in SYSTEMS.values():
            assert set(re.findall(r"--preset ([\w-]+)", text)) <= system.presets.keys()
            assert all(f"`{preset}`" in text for preset in system.presets), "every preset is told"
