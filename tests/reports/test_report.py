"""Pages as a reader meets them: what they say, in which words, and that they open offline."""

import json
from html.parser import HTMLParser

import pytest
from helpers import ROOT, message, write_set
from toys import USERS, evidence, windows

from mdlib.data.checks import split_folder
from mdlib.evaluation.evidence import Protocol
from mdlib.evaluation.protocol import evaluate, verdict
from mdlib.models.vqvae import VQVAE
from mdlib.reports import pages, plots
from mdlib.reports.report import load_generated, validate_folders, write_report
from mdlib.reports.user_page import write_user
from mdlib.utils import DataError, read_history, write_history


class Page(HTMLParser):
    """text: all of it in order; texts: of every cell, heading and summary; rows: the cells of every table's rows."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.rows, self.images, self.inside = "", [], [], []
        self.texts = {"h2": [], "summary": [], "style": []}
        self.feed(html)
        self.text = " ".join(self.text.split())  # lines and spaces as a browser shows them

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag in ("td", "th") or tag in self.texts:
            found = self.texts.get(tag, self.rows[-1] if self.rows else [])
            found.append("")
            self.inside.append(found)

    def handle_data(self, data):
        for found in self.inside:
            found[-1] += data.replace("\xa0", " ")
        if self.texts["style"] not in self.inside:
            self.text += data

    def handle_endtag(self, tag):
        if tag in ("td", "th") or tag in self.texts:
            self.inside.pop()

    def row(self, section: str, name: str) -> list[str]:
        """The row of a figure: its label and help, value, …"""
        about = pages.describe(section, name)
        return next(row for row in self.rows if row[0] == about["label"] + about["help"])


@pytest.fixture(scope="module")
def case():
    codec = VQVAE(image_size=32, patch_size=(2, 2), block_out_channels=(8,), norm_num_groups=4, num_codes=8, code_dim=4)
    return evidence(windows(20, 7), codec=codec.eval())


@pytest.fixture(scope="module")
def report(case):
    return evaluate(case, Protocol(evaluation_steps=2, seeds=2), about={"data": "<toy> & more"})


@pytest.fixture(scope="module")
def written(case, report, tmp_path_factory):
    """The page of a run folder with training logs, its charts, and its HTML."""
    out = tmp_path_factory.mktemp("run")
    for part in ("codec", "prior"):
        rows = [dict(step=10 * row, learning_rate=0.1, mse=1 / row, held_out_mse=1.1 / row) for row in (1, 2)]
        (out / part).mkdir()
        write_history(rows, out / part / "history.csv")
        assert read_history(out / part) == rows
    charts = write_report(report, case, out)
    assert json.loads((out / "report.json").read_text()) == report
    html = (out / "report.html").read_text()
    return Page(html), charts, html


def test_the_report_is_one_page_that_opens_offline(written, report):
    page, charts, html = written
    assert set(charts) == {
        *("headline", "accuracies", "gain_curves", "contact", "confusion", "verification", "nearest", "map"),
        *("user_means", "user_spreads", "reconstructions", "code_usage", "codec", "prior"),
    }
    assert len(page.images) == 14 and all(source.startswith("data:image/png;base64,") for source in page.images)
    assert "://" not in html and "<script" not in html and "docs/evaluation.md" in page.text
    assert ["data", "<toy> & more"] in page.rows


def test_verdict_and_three_numbers_come_first(written, report):
    page, _, _ = written
    headings = page.texts["h2"]
    shown = (report["verdict"]["sentence"], " points [", "recognised as their user", "copies", headings[0])
    place = 0
    for text in shown:
        place = page.text.find(text, place)
        assert place >= 0, f"{text} does not follow"
    assert headings[0] == "Do generated windows train a better identifier?" and len(headings) == 10


def test_the_identifier_is_one_line(written, report):
    page, one = written[0], report["identifier"]
    line = page.text[page.text.index("Identifier (identifier/): ") : page.text.index("About this run")]
    assert line.split(": ")[1].startswith(pages.describe("augmentation", one["arm"])["label"])
    for name in ("validation_accuracy", "accuracy", "false_acceptance", "false_rejection"):
        assert f"{100 * one[name]['value']:.1f} %" in line, name


def test_figures_read_in_percent_and_points_with_a_cue(written, report):
    page, _, _ = written
    gain = report["augmentation"]["gain"]
    value, low, high = (f"{100 * edge:+.1f}" for edge in (gain["value"], *gain["ci95"]))
    assert page.row("augmentation", "gain")[1] == f"{value} points [{low}, {high}]"
    copies = page.row("memorisation", "copies")
    assert "%" in copies[1] and copies[-1] == "↓ lower is better"
    assert " dB [" in page.row("reconstruction", "psnr_db")[1]
    users = [row for row in page.rows if row[0].startswith("ID_")]
    assert len(users) == 4 and users[0][:2] == ["ID_2", "25"] and "%" in users[0][2]
    assert not any("_" in row[0] for row in page.rows if row not in users), "plain labels"


def test_what_was_not_measured_stands_at_the_end_with_its_reason(written, case, report, tmp_path):
    page, _, html = written
    assert page.texts["summary"][-1].startswith("What was not measured (")
    assert html.rindex("<details") > html.rindex("<h2")
    reference = pages.describe("augmentation", "resnet18_gain")["label"]
    reasons = {row[1]: row[2] for row in page.rows if row[0] == "Do generated windows train a better identifier?"}
    assert reasons[reference] == report["augmentation"]["resnet18_gain"]["reason"]
    assert not any(row[0].startswith(reference) for row in page.rows)
    write_report(report, case, tmp_path)
    alone = Page((tmp_path / "report.html").read_text())
    assert ["How did training go?", "training curves", "no training logs in this folder"] in alone.rows
    assert "How did training go?" not in alone.texts["h2"] and len(alone.images) == 12


def test_every_figure_is_labelled_on_the_page_and_defined_in_the_docs(report):
    docs = (ROOT / "docs" / "evaluation.md").read_text()
    for section in pages.SECTIONS.keys() & report.keys():
        for name, figure in report[section].items():
            if isinstance(figure, list):
                continue
            about = pages.describe(section, name)
            assert about["help"] or section == "split", f"{section}.{name} is not in metrics.toml"
            if isinstance(figure, dict) and not name.startswith(("resnet18", "gain_", "cross")):
                assert f"`{name}`" in docs, f"{section}.{name} is not in docs/evaluation.md"
    assert len(docs.splitlines()) <= 150


@pytest.mark.parametrize(
    "figure, unit, text",
    [
        ({"value": 0.044, "ci95": [0.01, 0.078]}, "points", "+4.4 points [+1.0, +7.8]"),
        ({"value": 0.137}, "percent", "13.7 %"),
        ({"value": None, "reason": "why"}, "percent", "–"),
        (1234567, "million", "1.23 million"),
        (1062, "", "1062"),
        ([0.01, -0.02], "points", "+1.0, -2.0 points"),
    ],
)
def test_a_figure_is_written_for_people(figure, unit, text):
    assert pages.format_metric(figure, unit) == text


def test_a_figure_stands_next_to_that_of_real_windows():
    figure = {"value": 0.08, "unit": "m/s", "n": 80, "ci95": [0.06, 0.1], "real_vs_real": 0.05, "ratio": 1.6}
    (row,) = pages.table("physics", {"torso_speed": figure})
    assert row["value"] == "0.08 m/s [0.06, 0.1]"
    assert (row["real"], row["ratio"], row["n"], row["correlation"]) == ("0.05 m/s", "1.6", "80", "–")
    (row,) = pages.table("physics", {"torso_speed": {**figure, "ci95": None, "unit": "", "user_correlation": 0.9}})
    assert row["value"] == "0.08" and row["correlation"] == "0.9 (–)"
    (row,) = pages.table("conditions", {"backpack_unrecorded": {"value": 0.5, "n": 9, "real": 0.25}})
    assert (row["label"], row["value"], row["real"]) == ("backpack, not recorded", "50.0 %", "25.0 %")


@pytest.fixture(scope="module")
def from_scratch(report):
    """The section augmentation without pretrained arms."""
    return {**report["augmentation"], "total_gain": {"value": None, "reason": "none"}}


def test_the_verdict_is_not_confident_at_chance(from_scratch):
    augmentation = from_scratch
    gain = {"value": 0.015, "ci95": [0.01, 0.02]}
    near = {**augmentation, "real_only": {"value": 0.27, "n": 100}, "gain": gain}
    sentence = verdict(near)["sentence"]
    assert sentence.startswith("Inconclusive: real windows alone reach 27.0 %, where chance is 25.0 % (4 users)")
    far = {**near, "real_only": {"value": 0.6, "n": 100}}
    assert verdict(far)["sentence"].startswith("Generated windows help")


def test_the_verdict_explains_a_gain_for_other_people_that_disagrees(from_scratch):
    others = {"gain_other_users": {"value": 0.02, "ci95": [0.01, 0.03]}}
    found = {**from_scratch, "real_only": {"value": 0.6, "n": 100}, **others}
    gained = lambda *ci95: {**found, "gain": {"value": 0.0, "ci95": ci95}}
    text = "other people (+2.0 points, 95 % interval +1.0 to +3.0) does exclude 0: it resamples users"
    assert text in verdict(gained(-0.01, 0.02))["sentence"]
    assert text not in verdict(gained(0.01, 0.02))["sentence"]


def test_generated_users_without_real_windows_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "ID_4").mkdir()
    Image.new("RGB", (32, 32), (0, 0, 143)).save(tmp_path / "ID_4" / "x_1.png")
    with pytest.raises(DataError, match="ID_4"):
        load_generated(tmp_path, windows(2, 0))


def test_the_page_of_a_user_shows_that_user_alone(case, report, tmp_path):
    write_user(report, case, 5, tmp_path)
    html = (tmp_path / "report-user-5.html").read_text()
    page, row = Page(html), USERS.index(5)
    own = {section: report[section]["per_user"][row] for section in ("identity", "augmentation", "memorisation")}
    assert all(one["user"] == 5 for one in own.values())
    for value in (
        own["identity"]["accuracy"],
        own["augmentation"]["real_plus_generated"],
        own["memorisation"]["copies"],
    ):
        assert f"{100 * value:.1f} %" in page.text
    speed = report["physics"]["torso_speed"]
    values = (speed["unseen_means"][row], speed["generated_means"][row], speed["per_user"][row], speed["value"])
    assert ["trunk speed", *(pages.format_metric(value, "m/s") for value in values)] in page.rows
    named = next(cells for cells in page.rows if cells[0] == "The generated windows are classified as")[1]
    assert named.count("ID_") == sum(fraction > 0 for fraction in report["identity"]["confusion"][row])
    assert len(page.images) == 2 and "://" not in html
    found = json.loads((tmp_path / "report-user-5.json").read_text())
    assert sum(found["identity"]["named"].values()) == pytest.approx(1) and found["user"] == 5


def test_an_unknown_user_is_refused_before_anything_is_evaluated(tmp_path):
    data, out = write_set(tmp_path / "people", numbers=range(24)), tmp_path / "out"
    split_folder(data, tmp_path / "split.json", {})
    made = write_set(tmp_path / "made", users=[1], name="made{n}.png")
    for user, line in ((3, "no user ID_3; there are 1, 2"), (2, "made holds no window of ID_2: generate some")):
        assert line in message(validate_folders, data, made, tmp_path / "split.json", out, user=user)
    assert not out.exists()


def test_windows_are_read_as_asked_or_as_the_split_was_made(tmp_path, monkeypatch):
    def channels(evidence, *_, **__):
        raise InterruptedError(evidence.train.images.shape[1])

    monkeypatch.setattr("mdlib.reports.report.evaluate", channels)
    data = write_set(tmp_path / "people", numbers=range(24))
    made = write_set(tmp_path / "made", users=[1], name="made{n}.png")
    split_folder(data, tmp_path / "split.json", {"channels": 1})
    for asked, read in ((0, 1), (3, 3)):
        with pytest.raises(InterruptedError, match=str(read)):
            validate_folders(data, made, tmp_path / "split.json", tmp_path / "out", channels=asked)


def test_a_contact_sheet_shows_all_windows_or_says_how_many(tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (32, 32), "blue").save(tmp_path / "x.png")
    rows = [{"path": "x.png", "user": user} for user in (3, 3, *[7] * 12)]

    def sheet():
        (axis,) = plots.contact_sheet(tmp_path, rows).axes
        blue = (axis.images[0].get_array() == (0, 0, 255)).all(-1)
        return [label.get_text() for label in axis.get_yticklabels()], blue.sum() / 155**2

    assert sheet() == (["ID_3", "ID_7"], 14)
    monkeypatch.setattr(plots, "SHEET_ROWS", 2)
    assert sheet() == (["ID_3", "ID_7, 10 of 12"], 12)


def test_the_sheet_next_to_real_windows_shows_users_with_generated_ones():
    made = windows(3, 7)
    figure = plots.real_and_generated(windows(5, 2), made.select(made.labels >= 2))
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == [f"ID_{user}" for user in USERS[2:]]
