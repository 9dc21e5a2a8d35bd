"""Arms differ in their training windows alone, and the windows are those that each arm stands for; what classifiers
made of test windows is written, read again, and put together over folds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import ONCE, QUICK, evidence, gait, real_only_classifiers, windows

from mdlib.data.windows import WindowSet
from mdlib.evaluation import augmentation_study
from mdlib.evaluation import evidence as evidence_file
from mdlib.evaluation.augmentation_study import (
    Arms,
    Outcomes,
    augmentation,
    check_request,
    compared,
    correctness,
    joined,
    mixed,
    times,
    train_arms,
    unseen_classifiers,
)
from mdlib.evaluation.evidence import Evidence, Protocol, train_classifier
from mdlib.evaluation.protocol import verdict
from mdlib.models.classifier import SmallCNN
from mdlib.reports import charts
from mdlib.utils import DataError


def blurred(label: int, n: int, seed: int) -> torch.Tensor:
    """Users who are hard to tell apart by few windows."""
    return gait(label, n, seed, spread=2.5)


def hard(made: WindowSet) -> Evidence:
    parts = dict(train=windows(3, 1, of=blurred), val=windows(12, 2, 40, of=blurred))
    return evidence(made, **parts, test=windows(40, 3, 80, of=blurred), spare=None)


def studied(case: Evidence, protocol: Protocol = ONCE) -> dict:
    return augmentation(case, protocol, train_arms(case, protocol))


def test_more_windows_of_the_same_walkers_help():
    assert verdict(studied(hard(windows(60, 7, of=blurred))))["word"] == "helps"


def test_copies_of_training_windows_do_not_help():
    train = windows(3, 1, of=blurred)
    copies = hard(train.select(torch.arange(len(train)).repeat_interleave(4)))
    assert verdict(studied(copies))["word"] == "no evidence"


def test_shuffled_labels_teach_nothing():
    train = windows(4, 1)
    case = evidence(windows(5, 7), train=replace(train, labels=torch.arange(16) % 4))
    assert correctness(real_only_classifiers(case, ONCE), case.test.images, case.test.labels).mean() < 0.45


def test_spare_windows_are_taken_evenly_and_only_where_all_have_them():
    case = evidence(windows(5, 7))
    more = times(case, 3)
    numbers = [file.number for file in more.files[len(case.train) :]]
    assert more.labels.bincount().tolist() == [9] * 4 and numbers == [20, 22, 23, 25, 26, 28] * 4
    assert times(case, 5) is None and times(replace(case, spare=None), 2) is None
    without = augmentation(replace(case, spare=None), QUICK, fake_arms(case))
    for name in ("real_x2", "gain_over_x2", "equivalent_real_windows"):
        assert "windows_per_user" in without[name]["reason"]


def fake_arms(case: Evidence) -> Arms:
    """Arms that are always right."""
    right = np.ones((2, len(case.test)), dtype=bool)
    names = ("real_only", "real_plus_generated", "generated_only")
    return Arms({}, {name: right for name in names}, 0.5)


def test_the_fraction_of_generated_windows_is_what_it_says():
    of = lambda value, n: replace(
        windows(20, 0).select(range(n)), images=torch.full((n, 1), value), labels=torch.full((n,), value)
    )
    real, made = of(0.0, 10), of(1.0, 70)
    for fraction in (0.125, 0.25, 0.5):
        both = mixed(real, made, fraction)
        assert float(both.images.mean()) == pytest.approx(fraction, abs=0.01)
        assert torch.equal(both.images.flatten(), both.labels)
        assert int(both.images.sum()) >= 70, "every generated window takes part"


@pytest.mark.parametrize(
    "real, made, fraction", [(20, 50, 0.5), (20, 30, 0.5), (50, 30, 0.5), (10, 5, 0.125), (3, 7, 0.25)]
)
def test_no_user_is_seen_more_often_than_another(real, made, fraction):
    both = mixed(windows(real, 1), windows(made, 2), fraction)
    counts = both.labels.bincount()
    assert counts.max() - counts.min() <= 2, "one for the real windows, one for the generated ones"
    often = both.images.flatten(1).unique(dim=0, return_counts=True)[1]
    assert often.min() >= 1 and len(often) == 4 * (real + made), "every window takes part"


def test_a_filters_choice_keeps_its_fractions_of_users():
    kept = windows(8, 2).select([0, 1, 2, 8, 16, 17, 18, 19, 24])  # 3, 1, 4 and 1 of four users
    both = mixed(windows(3, 1), kept, 0.5)
    assert (both.labels.bincount() - torch.tensor([6, 4, 7, 4])).abs().max() <= 1


def test_the_gain_is_measured_for_as_many_generated_windows_as_real_ones_and_more():
    found = studied(evidence(windows(7, 7)), Protocol(evaluation_steps=2, seeds=2))
    assert [row["windows_per_user"] for row in found["gain_by_windows"]] == [3, 6, 7], "five times three were not made"


def test_the_gain_is_measured_for_fewer_generated_windows():
    protocol = Protocol(evaluation_steps=2, seeds=2, counts=(2, 4))
    found = studied(evidence(windows(5, 7)), protocol)
    assert [row["windows_per_user"] for row in found["gain_by_windows"]] == [2, 4, 5]
    assert found["gain_by_windows"][-1]["value"] == found["gain"]["value"]
    with pytest.raises(DataError, match="counts: 9 generated windows of each user, but one has 5"):
        check_request(evidence(windows(5, 7)), replace(protocol, counts=(2, 9)))


def test_the_reference_classifier_joins_the_small_one(monkeypatch):
    small = evidence(windows(5, 7))
    monkeypatch.setattr(augmentation_study, "best_device", lambda: "cpu")
    protocol = Protocol(evaluation_steps=1, seeds=2, counts=(), reference="resnet18", backbone="none")
    arms = train_arms(small, protocol)
    found = augmentation(small, protocol, arms)
    assert {name for name in found if name.startswith("resnet18")} == {
        *("resnet18_real_only", "resnet18_real_plus_generated", "resnet18_real_x2"),
        *("resnet18_generated_only", "resnet18_gain"),
    }
    real, both = (found[f"resnet18_{name}"] for name in ("real_only", "real_plus_generated"))
    assert found["resnet18_gain"]["value"] == pytest.approx(both["value"] - real["value"])
    assert len(charts.accuracies(found).axes[0].get_yticks()) == 9, "eight arms and the chosen one"
    of = lambda reference: set(train_arms(small, replace(protocol, reference=reference)).correct)
    assert of("auto") == of("none") == {name for name in arms.correct if not name.startswith("resnet18")}
    monkeypatch.setattr(augmentation_study, "best_device", lambda: "cuda")
    assert of("auto") == set(arms.correct)
    with pytest.raises(DataError, match="reference must be one of auto, resnet18, none, got 'resnet'"):
        Protocol(reference="resnet")


def test_classifiers_do_not_see_the_windows_they_are_tested_on(monkeypatch):
    seen = []

    def fake(images, labels, num_users, *_, **__):
        seen.append(images)
        return SmallCNN(num_users).eval()

    monkeypatch.setattr(evidence_file, "train_classifier", fake)
    given = evidence(windows(5, 7))
    protocol = replace(QUICK, evaluation_steps=1)
    unseen_classifiers(given, protocol)
    train_arms(given, protocol)
    rows = lambda images: {image.numpy().tobytes() for image in images}
    train, test, made = rows(given.train.images), rows(given.test.images), rows(given.generated.images)
    unseen = rows(given.val.images) | test
    unseen_only, choice, arms = seen[:2], seen[2:5], seen[5:]
    assert all(rows(images) == unseen for images in unseen_only)
    assert all(rows(images) == train | made for images in choice)
    more = train | rows(given.spare.images)
    expected = [train, train | made, made]
    assert [rows(images) for images in arms[:6:2]] == [rows(images) for images in arms[1:6:2]] == expected
    assert all(train < rows(images) < more for images in arms[6:])
    assert all(not rows(images) & test for images in arms)


ARMS = ("real_only", "real_plus_generated", "generated_only", "real_x2")


def measured(seed=0, n=40, seeds=3, rates=(0.5, 0.7, 0.4, 0.8)):
    rng = np.random.default_rng(seed)
    correct = {name: rng.random((seeds, n)) < rate for name, rate in zip(ARMS, rates, strict=True)}
    paths = tuple(f"ID_{1 + i // 20}/{seed}-{i}.png" for i in range(n))
    return Outcomes(correct, np.arange(n) // 4, paths, 1 + np.arange(n) // 20)


def test_outcomes_read_back_as_they_were():
    outcomes = measured()
    back = Outcomes.from_json(json.loads(json.dumps(outcomes.to_json())))
    assert back.paths == outcomes.paths and (back.blocks == outcomes.blocks).all()
    assert (back.users == outcomes.users).all()
    assert back.correct.keys() == outcomes.correct.keys()
    assert all(
        (back.correct[name] == rows).all() and back.correct[name].dtype == bool
        for name, rows in outcomes.correct.items()
    )


def test_folds_count_by_their_windows_and_keep_their_own_blocks():
    first, second = measured(0, n=40), measured(1, n=120)
    both = joined([first, second])
    assert len(np.unique(both.blocks)) == 10 + 30 and both.paths == first.paths + second.paths
    found = compared(both, 10.0, "none", 10)
    gains = [np.subtract(*(one.correct[name].mean() for name in ARMS[1::-1])) for one in (first, second)]
    assert found["gain"]["value"] == pytest.approx((40 * gains[0] + 120 * gains[1]) / 160)
    assert found["real_only"]["n"] == 160 and found["seeds"] == 3


def test_a_window_in_two_folds_counts_once():
    first, second = measured(0), measured(1)
    again = Outcomes(second.correct, second.blocks, first.paths[-3:] + second.paths[3:], second.users)
    both = joined([first, again])
    assert both.paths == first.paths + second.paths[3:]
    assert (both.correct["real_only"][:, :40] == first.correct["real_only"]).all()
    assert (both.correct["real_only"][:, 40:] == second.correct["real_only"][:, 3:]).all() and len(both.blocks) == 77


def test_more_folds_narrow_the_interval_as_more_windows_do():
    wide, narrow = (compared(joined([measured(seed) for seed in range(n)]), 10.0, "none", 10) for n in (1, 8))
    width = [np.diff(found["gain"]["ci95"])[0] for found in (wide, narrow)]
    assert width[1] < 0.7 * width[0]


def test_users_who_gain_unlike_one_another_widen_what_other_people_could_expect():
    outcomes = measured(n=200, rates=(0.5, 0.5, 0.4, 0.8))
    own = outcomes.correct["real_only"].copy()
    own[:, outcomes.users <= 5] = True  # five users lose all, five win all
    both = ~own
    found = compared(Outcomes({"real_only": own, "real_plus_generated": both}, *_where(outcomes)), 10.0, "none", 10)
    low, high = found["gain_other_users"]["ci95"]
    assert found["gain_other_users"]["n"] == 10 and high - low > 1.5 * np.diff(found["gain"]["ci95"])[0]
    assert [row["real_only"] for row in found["per_user"][:5]] == [1.0] * 5 and found["per_user"][0]["n"] == 20
    assert found["gain_other_users"]["value"] == pytest.approx(
        np.mean([row["real_plus_generated"] - row["real_only"] for row in found["per_user"]])
    )


def _where(outcomes):
    return outcomes.blocks, outcomes.paths, outcomes.users


def test_an_arm_that_one_fold_lacks_is_left_out():
    short = measured(1)
    del short.correct["real_x2"]
    both = joined([measured(0), short])
    assert set(both.correct) == set(ARMS) - {"real_x2"}
    assert compared(both, 10.0, "too few", 10)["gain_over_x2"] == {"value": None, "reason": "too few"}


def test_folds_of_other_numbers_of_seeds_are_refused():
    with pytest.raises(
        DataError, match="the folds used different numbers of seeds .2 and 3.: evaluate all with the same number"
    ):
        joined([measured(seeds=3), measured(seeds=2)])


def test_pretrained_arms_start_from_the_backbone_and_the_total_is_the_sum_of_its_parts(tmp_path):
    base = hard(windows(20, 7, of=blurred))
    case = replace(base, spare=windows(6, 5, 20, of=blurred))
    train_classifier(windows(40, 9, of=blurred).images, windows(40, 9).labels, 4, 150).save_pretrained(tmp_path)
    found = studied(case, replace(ONCE, evaluation_steps=20, backbone=str(tmp_path)))
    value = lambda name: found[name]["value"]
    assert value("pretraining_gain") > 0.1, "a backbone of these very walkers knows them"
    both = value("pretrained_real_plus_generated")
    assert value("pretraining_gain") + value("pretrained_gain") == pytest.approx(both - value("real_only"))
    assert value("chosen") in (value("pretrained_real_only"), both), "validation windows see what helps"
    assert value("total_gain") == pytest.approx(value("chosen") - value("real_only"))
    assert 3 <= value("total_real_windows") <= 6 and found["total_real_windows"]["between"] == [3, 6]
    answer = verdict(found)
    assert "The best setup, chosen on validation windows, reaches" in answer["sentence"]
    low, high = found["pretrained_gain"]["ci95"]
    assert answer["word"] == ("helps" if low > 0 else "hurts" if high < 0 else "no evidence")


def test_codec_copies_are_the_real_windows_after_the_codec(monkeypatch):
    class Half(torch.nn.Module):
        """A codec that darkens."""

        conditional, device = False, torch.device("cpu")
        encode = staticmethod(lambda images, labels: images)
        decode = staticmethod(lambda images, labels: (images - 1) / 2)

    case = evidence(windows(5, 7), codec=Half())
    arms = augmentation_study._sets(case, ONCE, 0.5)
    assert not len(set(map(len, arms["codec_copies"].images.unbind())) - {1})
    mean = lambda name: float(arms[name].images.double().mean())
    assert mean("codec_copies") == pytest.approx(0.75 * mean("real_only"), rel=0.02)
    white = dict(
        intensities=[[255.0] * 2] * 2, correlation=[[0.0] * 7] * 3 + [[0.0] * 3 + [1.0] + [0.0] * 3] + [[0.0] * 7] * 3
    )
    with_speckle = augmentation_study._sets(replace(case, speckle=white), ONCE, 0.5)["codec_copies"].images
    assert float(with_speckle.double().mean()) == pytest.approx((mean("real_only") + 255) / 2, rel=0.02)


def test_brightness_alone_names_users_only_where_they_differ_in_it():
    case = evidence(windows(5, 7), train=windows(12, 1))
    darker = lambda part: replace(part, images=(part.images * (0.4 + 0.2 * part.labels[:, None, None, None])).byte())
    told = augmentation_study.not_gait(replace(case, train=darker(case.train), test=darker(case.test))).mean()
    assert told > 0.9 and augmentation_study.not_gait(case).mean() < 0.7
