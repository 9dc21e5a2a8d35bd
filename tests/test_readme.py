"""The README's commands and snippets run as they stand, made small."""

import re

import pytest
from helpers import ROOT, readme_blocks, told_commands, write_set
from typer.testing import CliRunner

from mdlib.cli import app
from mdlib.experiments.run import open_run
from mdlib.simulation.walker import CONDITIONS
from mdlib.systems import SYSTEMS, get_preset, make_codec, make_prior

PAGES = ("README.md", "README.zh-CN.md", "docs/kaggle.md", "kaggle/README.md", "kaggle/README.zh-CN.md")


def test_the_commands_run_in_the_order_they_are_told(story):
    assert list(story.answers) == ["simulate", "run", "generate", "split", "validate", "select", "compare"]
    products = ("first/report.html", "judged/report.html", "kept/manifest.csv", "compared/comparison.html")
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


@pytest.mark.parametrize("page", PAGES)
def test_every_command_told_is_one_that_is_taken(page, tmp_path, monkeypatch):
    """Parsed, its settings accepted, and stopped at the door of the work, which is done elsewhere."""

    def simulated(out, condition, **sizes):
        for carried in CONDITIONS if condition == "all" else ("",):
            write_set(out / carried, users=range(1, 7), numbers=range(1, 33))

    def executed(notebook, run, parameters):
        if notebook.startswith("04"):  # what a later run may begin with
            preset = open_run(run).preset
            codec = make_codec(preset, 1, 2)
            codec.save_pretrained(run / "pipeline" / "codec")
            make_prior(open_run(run).settings["system"], preset, codec, 2).save_pretrained(run / "pipeline" / "prior")
            (run / "pipeline" / "model_index.json").touch()

    def prepared(data, out, systems, preset, *rest):
        for system in SYSTEMS if systems == "all" else systems.split(","):
            get_preset(system, preset)
        return {"conclusions": {}, "systems": {}}

    def studied(data, out, system, preset, *rest, **options):
        get_preset(system, preset)
        return {"rows": []}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mdlib.experiments.execute._execute_one", executed)
    monkeypatch.setattr("mdlib.simulation.dataset.simulate_dataset", simulated)
    monkeypatch.setattr("mdlib.experiments.compare.compare", prepared)
    monkeypatch.setattr("mdlib.experiments.study.study", studied)
    for folder in ("people", "REAL_WINDOWS"):
        write_set(tmp_path / folder, numbers=range(12))
    told = told_commands(page)
    assert len(told) > 8
    for first, *words in told:
        if first == "-m":
            module, command, *options = words
            if module != "mdlib" or command in ("split", "generate", "validate", "select"):  # these run as they stand
                continue
            answer = CliRunner().invoke(app, [command, *options])
            assert answer.exit_code == 0, f"{page}: {command} {options}: {answer.output} {answer.exception!r}"
            if command == "run":
                assert open_run(options[options.index("--out") + 1]).preset
            continue
        source = (ROOT / first).read_text(encoding="utf-8")
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source or word[2:].replace("-", "_") in source, (
                f"{page}: {first} takes no {word}"
            )
