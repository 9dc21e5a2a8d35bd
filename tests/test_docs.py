"""The commands of all pages: the README's run, made small; the others are parsed and their settings accepted."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer
from helpers import ROOT, readme_blocks, told_commands, write_set
from typer.testing import CliRunner

from mdlib.cli import app, pair
from mdlib.experiments.execute import _check_values
from mdlib.experiments.run import open_run
from mdlib.experiments.settings import check_request
from mdlib.models.fetch import PUBLISHED
from mdlib.simulation.walker import CONDITIONS
from mdlib.systems import SYSTEMS, get_preset, make_codec, make_prior

PAGES = ["README.md", "README.zh-CN.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES += ["kaggle/README.md", "kaggle/README.zh-CN.md"]


def test_the_readmes_commands_run_in_their_order(story):
    assert list(story.answers) == ["simulate", "run", "generate", "identify", "split", "validate", "select", "compare"]
    products = ("first/report.html", "checked/report.html", "best/manifest.csv", "compared/comparison.html")
    for product in ("more/manifest.csv", "split.json", *(f"runs/{name}" for name in products)):
        assert (story.folder / product).exists(), product
    generated = sorted(path.parent.name for path in (story.folder / "more").glob("ID_*/*.png"))
    assert generated == ["ID_1"] * 4 + ["ID_3"] * 4
    assert "in 3 recordings" in story.answers["identify"].stdout


def test_the_python_snippets_run(story, monkeypatch):
    monkeypatch.chdir(story.folder)
    names: dict = {}
    page = (ROOT / "docs/identify.md").read_text(encoding="utf-8")
    for block in [*readme_blocks("python"), *re.findall(r"```python\n(.*?)```", page, re.DOTALL)]:
        exec(compile(block, "README.md", "exec"), names)
    assert (story.folder / "window.png").stat().st_size > 0


@pytest.mark.parametrize("page", PAGES)
def test_files_and_systems_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", text):
        assert (ROOT / Path(page).parent / link).exists(), link
    assert set(re.findall(r"--system ([\w-]+)", text)) <= {*SYSTEMS, "identifier"}
    for path in re.findall(r"`((?:mdlib|tests|benchmarks|kaggle)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_readmes_are_short_and_name_every_size_and_system():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.count("\n") <= 160 and len(text.split()) <= 1500
        for system, one in SYSTEMS.items():
            assert f"`{system}`" in text and all(f"`{size}`" in text for size in one.sizes)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_accepted(page, tmp_path, monkeypatch):
    """Settings are checked; training, simulation and comparisons, which other tests run, are replaced."""

    def simulated(out, condition, **sizes):
        for folder in CONDITIONS if condition == "all" else ("",):
            write_set(out / folder, users=range(1, 7), numbers=range(1, 33))

    def executed(notebook, run, *_):
        if notebook.startswith("04"):  # what a later run may start from
            preset = open_run(run).preset
            codec = make_codec(preset, 1, 2)
            codec.save_pretrained(run / "pipeline" / "codec")
            make_prior(open_run(run).settings["system"], preset, codec, 2).save_pretrained(run / "pipeline" / "prior")
            (run / "pipeline" / "model_index.json").write_text("{}")

    def compared(data, out, systems, preset, *rest):
        for system in SYSTEMS if systems == "all" else systems.split(","):
            get_preset(system, "demo" if preset == "auto" else preset)
        return {"conclusions": {}, "systems": {}}

    def pretrained(system, out, preset, *rest):
        _pretrained(out / "weights", system, preset)

    def fetched(name):
        assert name in (*PUBLISHED, "NAME")

    def studied(data, out, system, preset, *rest, **options):
        get_preset(system, "demo" if preset == "auto" else preset)
        return {"rows": []}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mdlib.experiments.execute._execute_one", executed)
    monkeypatch.setattr("mdlib.simulation.dataset.simulate_dataset", simulated)
    monkeypatch.setattr("mdlib.experiments.compare.compare", compared)
    monkeypatch.setattr("mdlib.experiments.study.study", studied)
    monkeypatch.setattr("mdlib.experiments.pretrain.pretrain", pretrained)
    monkeypatch.setattr("mdlib.models.fetch.fetch_weights", fetched)
    for folder in ("people", "REAL_WINDOWS"):
        write_set(tmp_path / folder, numbers=range(12))
    for needed in re.findall(r"init=(runs/[\w-]+)/pipeline", (ROOT / page).read_text(encoding="utf-8")):
        _pretrained(tmp_path / needed / "pipeline")
    for first, *words in told_commands(page):
        if first == "-m":
            module, *words = words
            command, *options = words if module == "mdlib" and words else [""]
            if command in (
                "",
                "check-codec",
                "inspect",
                "split",
                "generate",
                "identify",
                "validate",
                "select",
                "options",
            ):  # they run as they stand elsewhere
                continue
            answer = CliRunner().invoke(app, [command, *options])
            assert answer.exit_code == 0, f"{page}: {command} {options}: {answer.output} {answer.exception!r}"
            continue
        source = (ROOT / first).read_text(encoding="utf-8")
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source or word[2:].replace("-", "_") in source, (
                f"{page}: {first} takes no {word}"
            )


def replacements():
    """(system, words after `python -m mdlib`) of every short command in the tables of docs/coming-from.md."""
    intro, *sections = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8").split("\n## ")
    complete = {words[0]: words for words in (line.split()[3:] for line in intro.splitlines() if "-m mdlib" in line)}
    for section in sections:
        system = re.search(r"`--system ([\w-]+)`", section)[1]
        for row in re.findall(r"^\|.*", section, re.MULTILINE):
            for short in re.findall(r"`([^`]*)`", row.split(" | ", 1)[-1]):
                name, *options = shlex.split(short)
                if name in complete:
                    yield system, complete[name] + options


CHANGES = inspect.signature(get_preset).parameters.keys() - {"system", "name", "init"}
REPLACEMENTS = list(replacements())


@pytest.mark.parametrize("system, words", REPLACEMENTS, ids=[" ".join(words) for _, words in REPLACEMENTS])
def test_what_replaces_a_command_of_an_earlier_project_is_accepted(system, words, tmp_path, monkeypatch):
    command = typer.main.get_command(app).commands[words[0]]
    options = command.make_context(words[0], words[1:]).params  # names and types
    if words[0] == "run":
        parameters = dict(map(pair, options["parameter"]))
        given = dict(data=str(write_set(tmp_path / "people")), system=system, preset=options["preset"])
        wanted, _ = check_request(tmp_path / "run", parameters, options["first"], options["last"], **given)
        changes = wanted.to_dict()
        preset = get_preset(system, wanted.preset, **{key: changes[key] for key in changes.keys() & CHANGES})
        _check_values(tmp_path / "run", wanted, parameters)
        codec = make_codec(preset, wanted.channels, 2)
        make_prior(system, preset, codec, 2)
    for text in options.get("option") or []:
        assert pair(text)[0] in SYSTEMS[system].sampling_options()


def _pretrained(folder, system="vae-diffusion", preset="demo"):
    """A pipeline for commands that start from one of another page, or from what `pretrain` wrote."""
    preset = get_preset(system, preset)
    codec = make_codec(preset, 1, 2)
    codec.save_pretrained(folder / "codec")
    make_prior(system, preset, codec, 2).save_pretrained(folder / "prior")
    (folder / "model_index.json").write_text("{}")
