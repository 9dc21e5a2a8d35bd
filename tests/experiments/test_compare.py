"""The comparison: equal settings for all systems, and nothing lost."""

import json
import shutil

import pytest
from helpers import message

from mdlib.evaluation.evidence import Protocol
from mdlib.experiments import compare as module
from mdlib.experiments.compare import compare
from mdlib.utils import DataError


@pytest.fixture
def people(story):
    return story.folder / "people"


@pytest.fixture
def compared(story):
    """A comparison of two systems with the smoke preset."""
    return story.folder / "runs" / "compared"


@pytest.fixture
def result(compared):
    return json.loads((compared / "comparison.json").read_text())


def test_every_system_is_measured_with_the_same_settings(result, compared):
    assert list(result["systems"]) == ["vqvae-ldm", "vq-diffusion"]
    splits = [json.loads((compared / name / "split.json").read_text()) for name in result["systems"]]
    assert splits[0] == splits[1]
    for name, found in result["systems"].items():
        report = json.loads((compared / name / "report.json").read_text())
        assert found["augmentation"] == report["augmentation"] and found["physics"] == report["physics"]
        assert found["training"]["codec_steps"] == found["training"]["prior_steps"] == 6
        assert min(found["parameters"].values()) > 1000
        assert found["resources"]["training_memory_gb"] > 0 and found["resources"]["wall_minutes"] > 0
        assert report["windows"]["generated"] == 3 * result["settings"]["images_per_user"]
        assert found["sampling"]["seconds_per_window"] > 0


def test_the_gain_is_measured_for_fewer_windows_too(result):
    for found in result["systems"].values():
        rows = found["augmentation"]["gain_by_windows"]
        assert [row["windows_per_user"] for row in rows] == [1, 3]
        assert rows[-1]["value"] == found["augmentation"]["gain"]["value"]
        assert all(row["ci95"][0] <= row["value"] <= row["ci95"][1] for row in rows)


def test_the_page_names_every_system(compared, result):
    page = (compared / "comparison.html").read_text()
    assert all(name in page for name in result["systems"]) and "Fréchet distance" in page


def test_a_second_call_repeats_nothing(compared, people, monkeypatch, tmp_path):
    out = shutil.copytree(compared, tmp_path / "compared")
    monkeypatch.setattr(module, "repeat", None)
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".pt", ".png", ".safetensors")
    }
    again = compare(people, out, "vqvae-ldm,vq-diffusion", "smoke")
    assert not any("error" in found for found in again["systems"].values())
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_settings_are_refused(compared, people):
    expected = "holds a comparison with other settings (budget_minutes: 0.0 is not 3.0)"
    assert expected in message(compare, people, compared, "vqvae-ldm", "smoke", budget_minutes=3.0)
    assert "preset: 'smoke' is not 'demo'" in message(compare, people, compared, "vqvae-ldm", "demo")


@pytest.mark.parametrize(
    "systems, preset, options, expected",
    [
        ("vqvae-ldm,gan", "smoke", {}, "unknown system 'gan'"),
        (" , ", "smoke", {}, "give systems separated by commas, or all"),
        ("all", "f16d32", {}, "unknown preset 'f16d32'"),
        ("all", "smoke", dict(budget_minutes=-1.0), "budget_minutes and images_per_user must be 0 or more"),
        ("all", "smoke", dict(parameters={"images_per_user": 5}), "images_per_user is no parameter of a comparison"),
        ("all", "smoke", dict(parameters={"classifiers": "x"}), "classifiers is no parameter of a comparison"),
        (
            "all",
            "smoke",
            dict(budget_minutes=3.0, parameters={"codec_steps": 5}),
            "codec_steps is no parameter of a comparison: the time budget decides",
        ),
        ("all", "smoke", dict(parameters={"prior_options": 5}), "prior_options must be of type dict, got 5"),
        ("all", "smoke", dict(parameters={"codec_step": 5}), "has a parameter 'codec_step'; did you mean codec_steps"),
    ],
)
def test_bad_input_raises_before_anything_is_written(people, tmp_path, systems, preset, options, expected):
    assert expected in message(compare, people, tmp_path / "x", systems, preset, **options)
    assert "no such folder" in message(compare, tmp_path / "none", tmp_path / "x", "all", "smoke")
    assert not (tmp_path / "x").exists()


def test_settings_without_runs_may_change(people, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "execute", lambda *_, **__: (_ for _ in ()).throw(DataError("no GPU")))
    first = compare(people, tmp_path / "x", "vq-diffusion", "gpu-6gb")
    second = compare(people, tmp_path / "x", "vq-diffusion", "smoke")
    assert first["systems"] == second["systems"] == {"vq-diffusion": {"error": "no GPU"}}
    assert json.loads((tmp_path / "x" / "settings.json").read_text())["preset"] == "smoke"


def test_systems_measured_before_stay_and_auto_is_their_preset(compared, people, tmp_path):
    out = shutil.copytree(compared, tmp_path / "compared")
    assert list(compare(people, out, "vq-diffusion")["systems"]) == ["vqvae-ldm", "vq-diffusion"]


def test_a_system_that_fails_does_not_take_the_others_with_it(compared, people, monkeypatch, tmp_path):
    out = shutil.copytree(compared, tmp_path / "compared")

    def execute(path, *arguments, system, **given):
        if system == "vqvae-ldm":
            raise RuntimeError("memory ran out:\n8 GiB")

    monkeypatch.setattr(module, "execute", execute)
    found = compare(people, out, "vqvae-ldm,vq-diffusion", "smoke")
    assert found["systems"]["vqvae-ldm"] == {"error": "memory ran out: 8 GiB"}
    assert "identity" in found["systems"]["vq-diffusion"]
    assert "vqvae-ldm failed: memory ran out" in (out / "comparison.html").read_text()


def test_a_budget_of_time_replaces_the_steps(people, tmp_path, monkeypatch):
    received = {}

    def execute(path, parameters, *, system, **given):
        received.update(parameters)
        raise DataError("enough")

    monkeypatch.setattr(module, "execute", execute)
    options = {"seed": 4, "prior_options": {"ema_decay": 0.5}}
    compare(people, tmp_path / "x", "vq-diffusion", "smoke", budget_minutes=3.0, images_per_user=18, parameters=options)
    assert received["max_minutes"] == 1.5 and received["codec_steps"] == received["prior_steps"] > 10**5
    assert received["prior_options"] == {"ema_decay": 0.5} and received["seed"] == 4
    assert received["images_per_user"] == 18 and received["counts"] == [2, 6]


@pytest.mark.parametrize("counts", [(0,), (3, 3), (2.5,)])
def test_counts_that_cannot_be_used_are_refused(counts):
    assert "counts must be different whole numbers of 1 or more" in message(Protocol, counts=counts)
