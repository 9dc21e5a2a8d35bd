"""The comparison's and the study's pages, and conclusions that follow from the metrics."""

import copy
import json

import pytest
from test_report import Page, case, report  # noqa: F401

from mdlib.reports.report import choose_codec, conclusions, write_comparison, write_study


@pytest.fixture
def system(report):  # noqa: F811
    """What `compare` measures of a system."""
    sections = ("reconstruction", "codebook", "identity", "augmentation", "fidelity", "memorisation", "physics")
    return copy.deepcopy({section: report[section] for section in sections}) | {
        "training": {"codec_minutes": 1.5, "codec_steps": 60, "prior_minutes": 2.0, "prior_steps": 80},
        "resources": {"wall_minutes": 4.0, "training_memory_gb": None, "generation_memory_gb": 1.5, "device": "CPU"},
        "sampling": {"seconds_per_window": 0.25},
        "parameters": {"codec": 1234567, "prior": 2345678},
    }


def test_the_comparison_is_one_page_that_opens_offline(case, system, tmp_path):  # noqa: F811
    systems = {"one": system, "two": copy.deepcopy(system), "three": {"error": "memory ran out"}}
    about = {"mdlib": "0", "created": "now", "settings": {"preset": "<smoke>", "budget_minutes": 3.0}}
    result = {**about, "conclusions": conclusions(systems), "systems": systems}
    write_comparison(result, {"real": case.test, "one": case.generated}, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == result
    html = (tmp_path / "comparison.html").read_text()
    page = Page(html)
    assert len(page.images) == 2 and "http" not in html
    assert page.text.index(result["conclusions"]["gain"]["sentence"]) < page.text.index("Settings")
    assert "three failed: memory ran out" in page.text and "trained for 3 minutes" in page.text
    assert ["preset", "<smoke>"] in page.rows
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["parameters of the codec"] == ["1.23 million", "1.23 million", ""]
    assert rows["training time of the codec"][:2] == ["1.5 min", "1.5 min"]
    assert "peak memory of training" not in rows, "measured of no system"
    trunk = next(row for label, row in rows.items() if label.startswith("trunk speed"))
    assert trunk[0].endswith("× real)") and trunk[-1] == "↓ lower is better"
    write_comparison({**result, "systems": {"three": systems["three"]}, "conclusions": {}}, {}, tmp_path)
    assert "three failed" in (tmp_path / "comparison.html").read_text()


def test_the_study_is_one_page_that_opens_offline(report, tmp_path):  # noqa: F811
    rows = [{"windows_per_user": count, "folds": 1, **report} for count in (5, 10)]
    rows[1]["augmentation"] = {**report["augmentation"], "gain_per_fold": [0.01, -0.02]}
    result = {"mdlib": "0", "created": "now", "settings": {"system": "one"}, "rows": rows}
    write_study(result, tmp_path)
    assert json.loads((tmp_path / "study.json").read_text()) == result
    html = (tmp_path / "study.html").read_text()
    page = Page(html)
    assert len(page.images) == 1 and "http" not in html and page.text.count(report["verdict"]["sentence"]) == 2
    heads = next(row for row in page.rows if row[0] == "Real windows per user")
    assert heads == ["Real windows per user", "5", "10", "Good value"]
    folds = next(row for row in page.rows if row[0].startswith("gain of each fold"))
    assert folds[1:3] == ["–", "+1.0, -2.0 points"]
    assert any(row[0].startswith("equivalent real windows") for row in page.rows)


def metrics(psnr: float, usage: float | None, gain: tuple, fd: float, identity: float) -> dict:
    value, low, high = gain
    return {
        "reconstruction": {"psnr_db": {"value": psnr}},
        "codebook": {"usage": {"value": usage}},
        "augmentation": {"gain": {"value": value, "ci95": [low, high]}},
        "fidelity": {"fd_ratio": {"value": fd}},
        "identity": {"accuracy": {"value": identity}},
    }


def test_conclusions_follow_from_the_metrics():
    systems = {
        "transformer": metrics(27.6, 0.9, (0.01, -0.01, 0.02), 1.2, 0.7),
        "diffusion": metrics(25.0, None, (0.05, 0.03, 0.07), 1.5, 0.9),
        "worse": metrics(24.0, 0.2, (0.0, -0.01, 0.02), 1.6, 0.3),
    }
    found = conclusions(systems)
    assert found["codec"]["value"] == "vq" and "27.6 dB, is 1.10 times" in found["codec"]["sentence"]
    assert found["codec"]["systems"] == {"vq": "transformer", "kl": "diffusion"}
    assert found["gain"]["value"] == "diffusion" and "lies above that of transformer" in found["gain"]["sentence"]
    assert "diffusion, +5.0 points [+3.0, +7.0]" in found["gain"]["sentence"]
    assert found["fidelity"]["value"] == "transformer" and found["identity"]["value"] == "diffusion"


def test_without_enough_usage_or_with_wide_intervals_nothing_is_concluded():
    systems = {
        "transformer": metrics(27.6, 0.7, (0.01, -0.01, 0.04), 1.2, 0.7),
        "diffusion": metrics(25.0, None, (0.05, -0.03, 0.07), 1.5, 0.9),
    }
    found = conclusions(systems)
    assert found["codec"]["value"] == "kl" and found["gain"]["sentence"].endswith("It overlaps that of transformer.")
    assert found["gain"]["sentence"].startswith("No system's generated windows clearly help.")
    systems["diffusion"]["codebook"]["usage"]["value"] = 0.9
    assert "a codec with a codebook and one without" in conclusions(systems)["codec"]["reason"]
    alone = conclusions({"vq-diffusion": systems["transformer"], "vavae-dit": {"error": "x"}})
    assert alone["codec"]["value"] is None and alone["gain"]["value"] == "vq-diffusion"
    assert "overlap" not in alone["gain"]["sentence"], "there is no other system"
    systems["transformer"]["augmentation"]["gain"]["ci95"] = [0.005, 0.015]
    assert conclusions(systems)["gain"]["sentence"].startswith("Largest gain"), "the other system's windows help"
    assert list(conclusions({"vavae-dit": {"error": "x"}})) == ["codec"]


@pytest.mark.parametrize(
    "vq, usage, kl, choice",
    [(27.5, 0.9, 25.0, "vq"), (27.5, 0.8, 25.0, "kl"), (27.4, 0.9, 25.0, "kl"), (20.0, 1.0, 25.0, "kl")],
)
def test_the_codec_is_chosen_by_the_rule(vq, usage, kl, choice):
    codecs = {"a": metrics(vq, usage, (0, 0, 0), 1, 1), "b": metrics(kl, None, (0, 0, 0), 1, 1)}
    found = choose_codec(codecs | {"c": metrics(vq - 1, 1.0, (0, 0, 0), 1, 1)})
    assert found["value"] == choice and found["ratio"] == pytest.approx(vq / kl)
    assert (found["vq_psnr_db"], found["kl_psnr_db"], found["usage"]) == (vq, kl, usage)
    assert found["sentence"].startswith(f"Take the {choice.upper()} codec") and f"{vq:.1f} dB" in found["sentence"]
