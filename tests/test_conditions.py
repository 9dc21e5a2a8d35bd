"""What people carry: a condition of priors next to the user, generated where it was never recorded, evaluated apart."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import listed, small_set, write_set
from priors import small_dit
from torch import nn

from mdlib.data.files import find_windows
from mdlib.data.splits import make_split
from mdlib.data.windows import load_windows
from mdlib.evaluation.augmentation_study import Arms, chosen_arm, conditions, of_common_conditions
from mdlib.evaluation.evidence import Evidence
from mdlib.experiments.execute import execute
from mdlib.experiments.run import open_run
from mdlib.models.transformer import TokenPrior
from mdlib.models.vqvae import VQVAE
from mdlib.pipeline import MicroDopplerPipeline
from mdlib.systems import start
from mdlib.utils import DataError


@pytest.mark.parametrize(("known", "wanted"), [(2, 2), (2, 1), (1, 2), (3, 2)])
def test_a_prior_starts_from_other_people_with_other_conditions(known, wanted, tmp_path):
    source, prior = small_dit(num_conditions=known), small_dit(num_conditions=wanted)
    source.save_pretrained(tmp_path)
    start(prior, tmp_path, other_users=True)
    if wanted > 1:
        kept = source.users.conditions if known == wanted else torch.zeros(wanted, 16)
        assert torch.equal(prior.users.conditions, kept)
    torch.testing.assert_close(prior.users.weight[0], source.users.weight[:-1].mean(0))


def pipeline(conditions=None) -> MicroDopplerPipeline:
    torch.manual_seed(0)
    codec = VQVAE(image_size=16, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4).eval()
    prior = TokenPrior(8, codec.token_shape, 3, 16, 1, 2, num_conditions=len(conditions or [""])).eval()
    if conditions:
        nn.init.normal_(prior.users.conditions, std=3.0)
    return MicroDopplerPipeline(codec, prior, users=(3, 7, 12), output_size=32, conditions=conditions)


def test_a_pipeline_generates_what_was_carried(tmp_path):
    both = pipeline(["bag", "normal"])
    made = both([7], images_per_user=2, output_type="pt")
    assert [(row["condition"], row["number"]) for row in made.manifest] == [
        ("bag", 1),
        ("bag", 2),
        ("normal", 1),
        ("normal", 2),
    ]
    assert not torch.equal(made.images[0], made.images[2])
    again = both([7], images_per_user=2, conditions=["normal"], output_type="pt").images
    torch.testing.assert_close(again, made.images[2:])
    with pytest.raises(DataError, match="knows conditions bag, normal; it was not trained on skis"):
        both([7], conditions=["skis"])
    both.save_pretrained(tmp_path / "pipeline")
    loaded = MicroDopplerPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.generate_folder(tmp_path / "out", per_user=1)
    loaded.generate_folder(tmp_path / "out", per_user=2, conditions=["bag"])
    written = load_windows(tmp_path / "out", size=16)
    assert written.conditions == ("bag", "normal") and len(written) == 9
    with open(tmp_path / "out" / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and all(row["path"].startswith(row["condition"] + "/ID_") for row in rows)


def test_the_label_map_of_conditions():
    windows = small_set()
    assert windows.conditions == ("",) and windows.condition_labels(("",)).tolist() == [0] * len(windows)
    files = tuple(listed(range(3), 4, condition="bag") + listed(range(3), 7, condition="normal"))
    several = type(windows)(windows.images, windows.labels, windows.users, files, "jet", "data")
    assert several.condition_labels(("bag", "normal")).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="no training window shows condition bag"):
        several.condition_labels(("normal",))


def test_unrecorded_windows_all_go_to_the_test(tmp_path):
    for condition in ("normal", "backpack"):
        write_set(tmp_path / condition, users=(1, 2), numbers=range(30))
    files = find_windows(tmp_path)
    split = make_split(files, unrecorded={"backpack": [2]}, windows_per_user=4)
    away = {f.path for f in files if f.user == 2 and f.condition == "backpack"}
    assert away <= set(split["test"]) and len(away) == 30
    assert not away & {*split["train"], *split["val"], *split["spare"], *split["dropped"]}
    plain = make_split(files, windows_per_user=4)
    assert [path for path in plain["val"] if "ID_1" in path] == [path for path in split["val"] if "ID_1" in path]
    with pytest.raises(DataError, match="no windows of ID_3 in condition 'backpack'"):
        make_split(files, unrecorded={"backpack": [3]})


def test_the_table_of_conditions_tells_recorded_from_not():
    windows = small_set(users=(4, 7), n=8)

    def of(which):
        files = tuple(listed(range(8), 4, condition="normal") + listed(range(8), 7, condition=which))
        return type(windows)(windows.images, windows.labels, windows.users, files, "jet", "data")

    train, test = of("normal"), of("bag")
    case = Evidence(train=train, val=train, test=test, generated=train, gap=1)
    real = np.array([[True] * 8 + [False] * 8] * 2)
    arms = Arms({}, {"real_only": real, "real_plus_generated": np.ones_like(real)}, 0.5)
    found = conditions(case, arms)
    assert set(found) == {"normal", "normal_gain", "bag_unrecorded", "bag_unrecorded_gain"}
    assert found["bag_unrecorded"]["value"] == 1 and found["bag_unrecorded"]["real"] == 0
    assert found["bag_unrecorded_gain"]["value"] == 1 and found["normal_gain"]["value"] == 0
    generated = of("bag")  # normal windows of ID_4, which training windows show, and ID_7 with a bag
    assert not Evidence(train=train, val=train, test=test, generated=generated, gap=1).has_unrecorded, (
        "nobody had a bag"
    )
    both = listed(range(4), 4, condition="normal") + listed(range(4, 8), 4, condition="bag")
    both = tuple(both + listed(range(8), 7, condition="normal"))
    shown = type(windows)(windows.images, windows.labels, windows.users, both, "jet", "data")
    filled = Evidence(train=shown, val=train, test=test, generated=generated, gap=1)
    assert filled.has_unrecorded and {(file.user, file.condition) for file in filled.added.files} == {(7, "bag")}
    assert not case.has_unrecorded and case.added is case.generated
    assert len(of_common_conditions(train)) == len(train)
    assert of_common_conditions(test) is None
    sure, wrong = (
        SimpleNamespace(probabilities=lambda _, labels=labels: torch.eye(2)[labels])
        for labels in (train.labels, 1 - train.labels)
    )
    networks = {"real_only": [sure], "real_plus_generated": [wrong]}
    assert chosen_arm(networks, case) == "real_only" and chosen_arm(networks, filled) == "real_plus_generated"
    alone = conditions(Evidence(train=train, val=train, test=train, generated=train, gap=1), arms)
    assert "one condition" in alone["cross_condition"]["reason"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"unrecorded": {"skis": [1]}}, "no windows of ID_1 in condition 'skis'"),
        ({"unrecorded": {"backpack": 1}}, "names users by condition"),
        ({"unrecorded": {"backpack": [1]}, "split": "mine.json"}, "cannot be combined with a split file"),
        ({"unrecorded": {"backpack": [1], "normal": [1]}}, "ID_1 has 0 windows, too few"),
    ],
)
def test_conditions_that_cannot_be_kept_away_are_one_line(settings, told, tmp_path):
    for condition, first in (("normal", 0), ("backpack", 100)):
        write_set(tmp_path / "people" / condition, numbers=range(first, first + 12))
    with pytest.raises(DataError, match=told):
        open_run(tmp_path / "run", data=str(tmp_path / "people"), preset="smoke", **settings)
    assert not (tmp_path / "run").exists()


def test_a_run_generates_a_condition_that_was_not_recorded(tmp_path):
    for condition, first in (("normal", 0), ("backpack", 100)):
        write_set(tmp_path / "people" / condition, users=(1, 2, 3), numbers=range(first, first + 40))
    settings = {"unrecorded": {"backpack": [3]}, "windows_per_user": 8}
    chosen = dict(data=str(tmp_path / "people"), system="vqvae-transformer", preset="smoke")
    out = execute(str(tmp_path / "run"), settings, "02", **chosen)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["conditions"]["backpack_unrecorded"]["n"] == 40
    assert {"backpack", "normal"} <= report["conditions"].keys() and "normal_unrecorded" not in report["conditions"]
    assert len(list((tmp_path / "run" / "generated" / "backpack" / "ID_3").glob("*.png"))) == 3
    assert "backpack, not recorded" in (tmp_path / "run" / "report.html").read_text() and out
