"""The study: one run for each number of windows, on exactly those windows."""

import json

import pytest
from helpers import write_set
from toys import evidence, windows

from mdlib.cli import app
from mdlib.data.files import find_windows
from mdlib.data.reading import hashes
from mdlib.data.splits import make_split, read_split, write_split
from mdlib.evaluation.evidence import Protocol
from mdlib.evaluation.protocol import evaluate
from mdlib.experiments import study as module
from mdlib.experiments.study import study
from mdlib.utils import DataError


@pytest.fixture
def people(tmp_path):
    return write_set(tmp_path / "people", numbers=range(60))


@pytest.fixture(scope="module")
def report():
    return evaluate(evidence(windows(5, 7)), Protocol(evaluation_steps=1, seeds=2))


@pytest.fixture
def runs(monkeypatch, report):
    """The calls of `execute`; each writes a report instead of running notebooks."""
    calls = []

    def execute(out, parameters, first="", **given):
        calls.append((out, parameters, given))
        path = module.Path(out)
        path.mkdir(parents=True, exist_ok=True)
        (path / "run.json").write_text(json.dumps({"settings": {"split": parameters["split"]}}))
        if not (path / "split.json").exists():
            (path / "split.json").write_text(module.Path(parameters["split"]).read_text())
        paths = [f"{path.name}/{name}" for name in report["outcomes"]["paths"]]  # every fold has windows of its own
        (path / "report.json").write_text(json.dumps(report | {"outcomes": report["outcomes"] | {"paths": paths}}))

    monkeypatch.setattr(module, "execute", execute)
    return calls


def test_each_number_has_its_run_and_all_share_the_test(people, tmp_path, runs):
    out = tmp_path / "study"
    result = study(people, out, "vqvae-ldm", "smoke", (8, 4), parameters={"seeds": 2})
    assert [row["windows_per_user"] for row in result["rows"]] == [4, 8]
    few, more = (read_split(parameters["split"]) for _, parameters, _ in runs)
    users = len(few["users"])
    assert (len(few["train"]), len(more["train"])) == (4 * users, 8 * users)
    assert few["test"] == more["test"] and few["val"] == more["val"]
    assert all(given == {"data": str(people), "system": "vqvae-ldm", "preset": "smoke"} for *_, given in runs)
    assert runs[0][1]["classifiers"] == runs[1][1]["classifiers"] and runs[0][1]["seeds"] == 2
    assert json.loads((out / "study.json").read_text()) == result and (out / "study.html").exists()


def test_a_second_call_adds_numbers_and_other_settings_are_refused(people, tmp_path, runs):
    out = tmp_path / "study"
    study(people, out, "vqvae-ldm", "smoke", (4,))
    assert [row["windows_per_user"] for row in study(people, out, "vqvae-ldm", counts=(6,))["rows"]] == [4, 6]
    expected = r"holds a study with other settings \(system: 'vqvae-ldm' is not 'vae-diffusion'\)"
    with pytest.raises(DataError, match=expected):
        study(people, out, "vae-diffusion", "smoke", (4,))


def test_a_study_goes_on_where_it_was_moved_but_not_with_other_windows(people, tmp_path, runs):
    study(people, tmp_path / "study", "vqvae-ldm", "smoke", (4,))
    (tmp_path / "study").rename(tmp_path / "moved")
    study(people, tmp_path / "moved", "vqvae-ldm", "smoke", (4, 6))
    assert runs[1][1]["split"] == runs[0][1]["split"], "the run knows it by that name"
    write_set(people, numbers=range(60, 70))
    with pytest.raises(DataError, match="windows-[46] was trained on other windows than the data holds now"):
        study(people, tmp_path / "moved", "vqvae-ldm", "smoke", (4, 8))


def test_folds_are_one_measurement_on_other_test_windows_each(people, tmp_path, runs):
    out = tmp_path / "study"
    (row,) = study(people, out, "vqvae-ldm", "smoke", (4,), folds=3)["rows"]
    splits = [read_split(parameters["split"]) for _, parameters, _ in runs]
    assert [split["fold"] for split in splits] == [0, 1, 2]
    assert len({tuple(split["test"]) for split in splits}) == 3
    single = json.loads((out / "windows-4" / "report.json").read_text())
    one, three = single["augmentation"], row["augmentation"]
    assert row["folds"] == 3 and three["gain"]["n"] == 3 * one["gain"]["n"]
    assert three["gain"]["value"] == pytest.approx(one["gain"]["value"]), "three times the same report"
    assert three["gain_per_fold"] == [one["gain"]["value"]] * 3
    distance, before = row["fidelity"]["kid"], single["fidelity"]["kid"]
    assert distance["value"] == pytest.approx(before["value"]) and distance["n_per_fold"] == [before["n"]] * 3
    assert distance["real_vs_real"] == pytest.approx(before["real_vs_real"]), "the figure of real windows stays with it"
    assert "of 3 folds" in row["verdict"]["sentence"] and "of 3 folds" in (out / "study.html").read_text()
    (row,) = study(people, out, "vqvae-ldm", "smoke", (4,), folds=4)["rows"]
    assert row["folds"] == 4, "a further fold joins"
    (row,) = study(people, out, "vqvae-ldm", "smoke", (4,))["rows"]
    assert row["folds"] == 4, "what is measured stays"


def test_a_figure_that_one_fold_lacks_is_no_mean(people, tmp_path, runs):
    out = tmp_path / "study"
    study(people, out, "vqvae-ldm", "smoke", (4,))
    path = out / "windows-4" / "report.json"
    report = json.loads(path.read_text())
    report["identity"]["accuracy"] = {"value": 0.25, "n": 5}
    report["fidelity"]["fd_ratio"] = {"value": None, "reason": "too few windows"}
    path.write_text(json.dumps(report))
    (out / "windows-4-of-mine").mkdir()
    (out / "windows-4-of-mine" / "report.json").write_text("{}")
    after = study(people, out, "vqvae-ldm", "smoke", (6,))["rows"][0]
    assert after["identity"]["accuracy"]["value"] == 0.25, "a folder of the user's own is left alone"
    both = module._row([report, report | {"identity": {}}])
    assert both["fidelity"]["fd_ratio"] == {"value": None, "reason": "too few windows"}
    assert "accuracy" not in both["identity"]


def test_weights_that_saw_a_folds_test_windows_are_refused(people, tmp_path, runs):
    other = tmp_path / "other"
    other.mkdir()
    files = find_windows(people)
    contents = hashes(people, [file.path for file in files])
    write_split({**make_split(files), "hashes": contents}, other / "split.json")
    (other / "run.json").write_text("{}")
    start = {"codec_start": str(other / "codec")}
    study(people, tmp_path / "study", "vqvae-ldm", "smoke", (4,), parameters=start)
    with pytest.raises(DataError, match="codec_start: .* was trained on .* of the test windows of this split"):
        study(people, tmp_path / "study", "vqvae-ldm", "smoke", (4,), folds=2, parameters=start)
    later = tmp_path / "later"  # a run on other people that began with that one
    later.mkdir()
    (later / "split.json").write_text((other / "split.json").read_text())
    settings = {"data": "/somewhere/else", "init": str(other / "pipeline")}
    (later / "run.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(DataError, match="codec_start: .* of the test windows of this split"):
        study(
            people,
            tmp_path / "chain",
            "vqvae-ldm",
            "smoke",
            (4,),
            folds=2,
            parameters={"codec_start": str(later / "codec")},
        )
    others = {path: f"of others {path}" for path in contents}  # the same names, other images
    write_split({**make_split(files), "hashes": others}, other / "split.json")
    study(people, tmp_path / "study", "vqvae-ldm", "smoke", (4,), folds=2, parameters=start)


def test_the_command_line_prints_every_verdict(people, tmp_path, runs, capsys):
    words = ["study", "--data", people, "--out", tmp_path / "study", "--preset", "smoke", "--windows", "4,6"]
    app([*map(str, words), "--folds", "1", "-p", "seeds=2"], standalone_mode=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3].endswith("study.html") and all("test windows" in line for line in printed[-2:])
    assert (tmp_path / "study" / "split-4.json").exists()
    assert runs[0][2]["system"] == "vae-diffusion" and runs[0][1]["seeds"] == 2
    with pytest.raises(ValueError, match="windows: whole numbers .*, got '4,x'"):
        app([*map(str, words[:-1]), "4,x"], standalone_mode=False)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(counts=(4, 1000)), "windows_per_user=1000 is not possible"),
        (dict(counts=()), "counts must be whole numbers of 1 or more"),
        (dict(counts=(0,)), "counts must be whole numbers of 1 or more"),
        (dict(folds=5), "folds must be a whole number from 1 to 4, got 5"),
        (dict(folds=0), "folds must be a whole number from 1 to 4, got 0"),
        (dict(parameters={"split": "mine.json"}), "split is no parameter of a study"),
        (dict(parameters={"windows": 3}), "no notebook has a parameter 'windows'"),
        (dict(system="vae"), "unknown system 'vae'"),
        (dict(preset="demos"), "unknown preset 'demos'"),
    ],
)
def test_bad_input_raises_before_anything_is_written(people, tmp_path, runs, options, expected):
    with pytest.raises(DataError, match=expected) as error:
        study(people, tmp_path / "study", **{"preset": "smoke", "counts": (4,), **options})
    assert not runs and not (tmp_path / "study").exists() and "\n" not in str(error.value)
