"""The ruler itself: what is fed in decides what it says."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdlib.data.windows import DataError, WindowFile, WindowSet
from mdlib.evaluation import augmentation_study as arms_file
from mdlib.evaluation import classifiers as classifiers_file
from mdlib.evaluation import fidelity as fidelity_file
from mdlib.evaluation import verification as verification_file
from mdlib.evaluation.augmentation_study import (
    Arms,
    _mixed,
    augmentation,
    correctness,
    count_classifiers,
    real_only_classifiers,
    times,
    train_arms,
)
from mdlib.evaluation.classifiers import train_resnet, trained_once
from mdlib.evaluation.evidence import (
    Evidence,
    Protocol,
    alike,
    bootstrapped,
    chance_blocks,
    concatenate,
    first_of_each,
    halves,
)
from mdlib.evaluation.fidelity import fidelity, pairs_apart
from mdlib.evaluation.protocol import evaluate, memorisation, other_label, verdict
from mdlib.evaluation.verification import Trials, folds, verification
from mdlib.models.classifier import Embedder, ResNet18, SmallCNN, features
from mdlib.models.perceptual import INCEPTION, LPIPS_BACKBONES
from mdlib.models.vavae import VAVAE
from mdlib.models.vqvae import VQVAE
from mdlib.reports import plots
from mdlib.reports.report import load_generated, write_report
from mdlib.training.fit import read_history, write_history

USERS = (2, 5, 9, 11)


def gait(label: int, n: int, seed: int, spread: float = 0.8) -> torch.Tensor:
    """Toy windows uint8 (n, 1, 32, 32): a bright ridge that swings four times; height and swing tell the user."""
    rng = np.random.default_rng([seed, label])
    time = np.arange(32) / 8
    height = 10 + 3.0 * label + spread * rng.normal(size=(n, 1))
    ridge = height + (1 + label % 2 + 0.3 * rng.normal(size=(n, 1))) * np.sin(2 * np.pi * time)
    image = np.exp(-((np.arange(32)[None, :, None] - ridge[:, None, :]) ** 2) / 4) + 0.08 * rng.random((n, 32, 32))
    return torch.from_numpy((255 * image.clip(0, 1)).astype(np.uint8)).unsqueeze(1)


def windows(n: int, seed: int, start: int = 0, of=gait) -> WindowSet:
    images = torch.cat([of(label, n, seed) for label in range(len(USERS))])
    files = tuple(
        WindowFile(f"ID_{user}/w{start + i}.png", user, "", "w", start + i) for user in USERS for i in range(n)
    )
    labels = torch.arange(len(USERS)).repeat_interleave(n)
    return WindowSet(images=images, labels=labels, users=USERS, files=files, colormap="jet", root="toy")


def evidence(generated: WindowSet, **changes) -> Evidence:
    parts = dict(train=windows(3, 1), val=windows(12, 2, 40), test=windows(25, 3, 80), generated=generated, gap=4)
    parts["spare"] = windows(9, 5, 20)
    return Evidence(**{**parts, **changes})


QUICK = Protocol(evaluation_steps=60, seeds=2, reference="none")
ONCE = replace(QUICK, seeds=1, fractions=(0.25,))


@pytest.fixture(scope="module")
def honest():
    """Held-out real windows fed in as generated."""
    return evaluate(evidence(windows(20, 7)), QUICK)


def test_every_key_of_the_protocol_is_there(honest):
    keys = {"reconstruction", "codebook", "identity", "augmentation", "fidelity", "statistics", "memorisation"}
    keys |= {"physics", "verdict"}
    assert keys <= honest.keys()
    for section in keys - {"verdict"}:
        for name, value in honest[section].items():
            if isinstance(value, dict):
                assert value["value"] is not None and value["n"] > 0 or value["reason"], (section, name)
    assert honest["reconstruction"]["psnr_db"]["reason"] == "no codec was given"
    assert all(figure["value"] is not None for figure in honest["physics"].values())
    json.dumps(honest, allow_nan=False)


def test_real_windows_fed_in_as_generated_pass(honest):
    fidelity, verified = honest["fidelity"], honest["identity"]["verification_eer"]
    assert fidelity["precision"]["value"] > 0.7 and fidelity["coverage"]["value"] > 0.7
    assert 0.7 < fidelity["diversity"]["ratio"] < 1.4
    assert fidelity["inception_score"]["value"] == pytest.approx(fidelity["inception_score"]["real"], rel=0.2)
    assert verified["value"] < 0.35 and abs(verified["value"] - verified["real"]) < 0.2
    assert honest["identity"]["classifier_accuracy"]["value"] > 0.6
    assert honest["identity"]["accuracy"]["value"] > 0.8 * honest["identity"]["classifier_accuracy"]["value"]
    assert honest["augmentation"]["gain"]["value"] > -0.02
    assert 0.5 < honest["memorisation"]["nearest_train_ratio"]["value"] < 1.5
    assert honest["memorisation"]["copies"]["value"] < 0.2
    assert 0.5 < honest["fidelity"]["fd_ratio"]["value"] < 2
    assert {honest["fidelity"][name]["n"] for name in ("fd", "fd_real_vs_real", "fd_train")} == {12}


def blurred(label: int, n: int, seed: int) -> torch.Tensor:
    """Users who are hard to tell apart by few windows."""
    return gait(label, n, seed, spread=2.5)


def hard(made: WindowSet) -> Evidence:
    parts = dict(train=windows(3, 1, of=blurred), val=windows(12, 2, 40, of=blurred))
    return evidence(made, **parts, test=windows(40, 3, 80, of=blurred), spare=None)


def told(case: Evidence) -> dict:
    arms = train_arms(case, ONCE, SimpleNamespace(update=lambda: None))
    return verdict(augmentation(case, ONCE, arms))


def test_more_windows_of_the_same_walkers_help():
    assert told(hard(windows(60, 7, of=blurred)))["word"] == "helps"


def test_copies_of_training_windows_do_not_help():
    train = windows(3, 1, of=blurred)
    assert told(hard(train.select(torch.arange(len(train)).repeat_interleave(4))))["word"] == "no evidence"


def test_shuffled_labels_teach_nothing():
    train = windows(4, 1)
    case = evidence(windows(5, 7), train=replace(train, labels=torch.arange(16) % 4))
    assert correctness(real_only_classifiers(case, ONCE), case.test.images, case.test.labels).mean() < 0.45


def test_a_random_split_reports_its_leak(honest):
    assert honest["split"]["test_share_overlapping"] == 0
    leaking = evaluate(evidence(windows(5, 7), test=windows(6, 1)), Protocol(evaluation_steps=1, seeds=1))
    assert leaking["split"]["test_share_overlapping"] > 0.9 and leaking["split"]["nearest_train_ratio"] < 0.7
    assert "% of the test windows overlap a training window" in leaking["verdict"]["sentence"]


def test_noise_fails_everything():
    noise = windows(20, 0, of=lambda label, n, seed: torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8))
    report = evaluate(evidence(noise), ONCE)
    assert report["identity"]["accuracy"]["value"] < 0.5
    assert report["augmentation"]["generated_only"]["value"] < 0.6
    assert report["verdict"]["word"] in ("hurts", "no evidence")
    assert report["fidelity"]["fd_ratio"]["value"] > 5
    assert report["fidelity"]["fd"]["value"] > 5 * report["fidelity"]["fd_train"]["value"]
    assert report["fidelity"]["kid"]["value"] > 3 * abs(report["fidelity"]["kid"]["real_vs_real"])
    assert report["fidelity"]["precision"]["value"] == report["fidelity"]["coverage"]["value"] == 0
    assert report["identity"]["verification_eer"]["value"] > 0.35


def test_windows_of_another_user_fail_identity(honest):
    swapped = windows(20, 7, of=lambda label, n, seed: gait((label + 1) % 4, n, seed))
    report = evaluate(evidence(swapped), ONCE)
    assert report["identity"]["accuracy"]["value"] < 0.3
    assert report["identity"]["control_ratio"]["value"] < 1 < honest["identity"]["control_ratio"]["value"]
    assert report["identity"]["verification_eer"]["value"] > honest["identity"]["verification_eer"]["value"] + 0.2


def test_the_same_window_over_and_over_lacks_diversity(honest):
    made = windows(20, 7)
    same = replace(made, images=made.images[torch.arange(len(made)) // 20 * 20])
    judges = Arms(real_only_classifiers(evidence(same), QUICK), {}, 0.5)
    found = fidelity(evidence(same), judges)
    assert found["diversity"]["value"] == 0 and found["recall"]["value"] < 0.2
    assert len(found["map"]) == 4 * (12 + 12) and {point["user"] for point in found["map"]} == set(USERS)
    assert found["coverage"]["value"] < honest["fidelity"]["coverage"]["value"]


def test_more_real_windows_are_the_yardstick(honest):
    found = honest["augmentation"]
    assert found["real_x2"]["n"] == 100 and len(found["real_x2"]["per_seed"]) == 2
    assert found["gain_over_x2"]["value"] == pytest.approx(
        found["real_plus_generated"]["value"] - found["real_x2"]["value"]
    )
    equivalent = found["equivalent_real_windows"]
    assert equivalent["between"] == [3, 6] and 3 <= equivalent["ci95"][0] <= equivalent["value"] <= 6 + 1e-9


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
    names = ("real_only", "real_plus_generated", "generated_only", "real_unaugmented")
    return Arms([], {name: right for name in names}, 0.5)


def test_pairs_of_a_user_share_no_step():
    pairs = pairs_apart(windows(10, 0, 40), gap=4)
    assert [mine.shape[1] for mine in pairs] == [21] * 4, "6 + 5 + 4 + 3 + 2 + 1 of ten in a row"
    assert all((mine[1] - mine[0] >= 4).all() for mine in pairs)
    assert pairs_apart(windows(1, 0), gap=0)[0].shape == (2, 0)


def test_verification_needs_users_to_hold_out():
    assert folds(3) is None
    for users in (4, 5, 8, 31):
        held = folds(users)
        assert sorted(np.concatenate(held)) == list(range(users))
        assert all(2 <= len(fold) <= users - 2 for fold in held)


def test_embedders_do_not_meet_the_users_they_verify(monkeypatch):
    met = []

    def fake(images, labels, *_):
        met.append(set(labels.tolist()))
        return Embedder().eval()

    monkeypatch.setattr(verification_file, "train_embedder", fake)
    monkeypatch.setattr(verification_file, "DRAWS", 5)
    found = verification(evidence(windows(5, 7)), QUICK, SimpleNamespace(update=lambda: None))
    assert met == [set(range(4)) - set(held.tolist()) for held in folds(4)]
    assert 0 <= found["verification_eer"]["ci95"][0] <= found["verification_eer"]["ci95"][1] <= 1
    for curve in found["roc"]:
        low, true, high = (np.array(curve[name]) for name in ("low", "true", "high"))
        assert all(np.all(np.diff(rates) >= 0) for rates in (low, true, high)), "acceptance grows with the threshold"
        assert np.all(low <= true) and np.all(true <= high)


def test_the_curve_holds_the_equal_error_rate():
    """Half of one user's claims lie below every impostor's, no claim of the other's: 1/4 at an equal rate."""
    genuine = np.tile([True, True, False, False], 2)
    named = np.array([3, 3, 4, 4, 4, 4, 3, 3])
    trials = Trials(np.array([0.9, 0.1, 0.5, 0.4, 0.9, 0.9, 0.5, 0.4]), genuine, np.repeat([3, 4], 4), named)
    error, curve = verification_file._read(trials)
    assert error == pytest.approx(0.25)
    assert curve[0] == pytest.approx(0.75) and curve[-1] == 1
    errors, curves = verification_file._redrawn([trials])
    assert set(errors) == {error} and np.all(curves == curve), "one user twice tells nothing: both were drawn"


def verified(rng: np.random.Generator, users: int = 8) -> list[Trials]:
    """Trials of three folds whose scores depend on the user shown, and on the pair of an impostor and his victim."""
    own, pairs, folds_of = 2 + 0.6 * rng.normal(size=users), 0.5 * rng.normal(size=(users, users)), []
    pairs += 0.4 * rng.normal(size=(users, 1))
    for held in np.array_split(rng.permutation(users), 3):
        shown = np.repeat(held, 10 * len(held))
        named = np.tile(held, 10 * len(held))
        scores = np.where(shown == named, own[shown], pairs[shown, named]) + 0.5 * rng.normal(size=len(shown))
        folds_of.append(Trials(scores, shown == named, shown, named))
    return folds_of


def test_intervals_of_verification_are_as_wide_as_chance(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(verification_file, "DRAWS", 60)
    drawn = [np.mean([verification_file._read(fold)[0] for fold in verified(rng)]) for _ in range(200)]
    spreads = [verification_file._redrawn(verified(rng))[0].std() for _ in range(15)]
    assert 0.9 < np.mean(spreads) / np.std(drawn) < 1.4, "folds apart, and one side of a claim alone: 0.56"


def test_published_networks_measure_where_their_weights_are(tmp_path, monkeypatch):
    from torchvision.models import inception_v3

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    small = evidence(windows(2, 7), val=windows(4, 2, 40), test=windows(6, 3, 50))
    judges = Arms([SmallCNN(len(USERS))], {}, 0.5)
    absent = fidelity(small, judges)
    assert absent["fd_inception"]["reason"].startswith("inception_v3_google-0cc3c7bd.pth is not on")
    assert absent["lpips_diversity"]["reason"].startswith("squeezenet1_1-b8a52dc0.pth is not on")
    (tmp_path / "checkpoints").mkdir()
    torch.save(inception_v3(weights=None, init_weights=False).state_dict(), tmp_path / "checkpoints" / INCEPTION)
    (tmp_path / "checkpoints" / LPIPS_BACKBONES["squeeze"]).touch()
    apart = lambda first, second: (first - second).abs().mean((1, 2, 3))
    monkeypatch.setattr(fidelity_file, "load_lpips", lambda net: Distance(apart))
    found = fidelity(small, judges)
    assert found["fd_inception"]["value"] > 0 and found["fd_inception"]["n"] == 8
    assert found["lpips_diversity"]["ratio"] == pytest.approx(1, abs=0.3)


class Distance(torch.nn.Module):
    """A stand-in for LPIPS."""

    def __init__(self, between):
        super().__init__()
        self.between, self.weight = between, torch.nn.Parameter(torch.zeros(1))

    def forward(self, first, second):
        return self.between(first, second)


def test_copies_of_training_windows_are_told():
    train = windows(3, 1)
    copied = train.select(torch.arange(len(train)).repeat_interleave(4))
    found = memorisation(evidence(copied))
    assert found["nearest_train_ratio"]["value"] < 0.01 and found["copies"]["value"] == 1.0
    assert len(found["nearest"]) == 6 and all(pair["generated"] == pair["train"] for pair in found["nearest"])
    for shift in (2, 8, 16):
        shifted = memorisation(evidence(replace(copied, images=copied.images.roll(shift, dims=-1))))
        assert shifted["copies"]["value"] == 1.0
        assert all(pair["generated"] == pair["train"] for pair in shifted["nearest"]), "found where it was shifted from"


def test_the_share_of_generated_windows_is_what_it_says():
    of = lambda value, n: replace(
        windows(20, 0).select(range(n)), images=torch.full((n, 1), value), labels=torch.full((n,), value)
    )
    real, made = of(0.0, 10), of(1.0, 70)
    for share in (0.125, 0.25, 0.5):
        images, labels = _mixed(real, made, share)
        assert float(images.mean()) == pytest.approx(share, abs=0.01) and torch.equal(images.flatten(), labels)
        assert int(images.sum()) >= 70, "every generated window takes part"


@pytest.mark.parametrize(
    "real, made, share", [(20, 50, 0.5), (20, 30, 0.5), (50, 30, 0.5), (10, 5, 0.125), (3, 7, 0.25)]
)
def test_no_user_is_seen_more_often_than_another(real, made, share):
    _, labels = _mixed(windows(real, 1), windows(made, 2), share)
    counts = labels.bincount()
    assert counts.max() - counts.min() <= 2, "one for the real windows, one for the generated ones"
    images, _ = _mixed(windows(real, 1), windows(made, 2), share)
    often = images.flatten(1).unique(dim=0, return_counts=True)[1]
    assert often.min() >= 1 and len(often) == 4 * (real + made), "every window takes part"


def test_a_filters_choice_keeps_its_shares_of_users():
    kept = windows(8, 2).select([0, 1, 2, 8, 16, 17, 18, 19, 24])  # 3, 1, 4 and 1 of four users
    _, labels = _mixed(windows(3, 1), kept, 0.5)
    assert (labels.bincount() - torch.tensor([6, 4, 7, 4])).abs().max() <= 1


def test_intervals_hold_the_truth_where_windows_overlap():
    case, rng, held = windows(100, 0), np.random.default_rng(0), 0
    blocks = chance_blocks(case, gap=4)
    for _ in range(200):  # windows that share three of their four steps with the next: a moving mean of four
        steps = rng.standard_normal((4, 103))
        values = sum(steps[:, i : i + 100] for i in range(4)).ravel()
        low, high = bootstrapped(values, blocks)["ci95"]
        held += low <= 0 <= high
    assert held >= 0.9 * 200


def test_halves_of_real_windows_share_no_step():
    unseen = concatenate(windows(12, 2, 40), windows(25, 3, 80))
    first, second = halves(unseen, gap=4)
    assert not set(first) & set(second)
    for label in range(len(USERS)):
        one, other = (
            np.array([unseen.files[row].number for row in rows if unseen.labels[row] == label])
            for rows in (first, second)
        )
        assert len(one) >= 5 and len(other) >= 5
        assert abs(one[:, None] - other).min() >= 4


def test_sets_are_compared_at_equal_numbers_of_each_user():
    sets = {"few": windows(3, 1).select(range(1, 12)), "many": windows(9, 2)}
    rows = alike(sets, seed=0)
    drawn = {name: part.labels[rows[name]].bincount().tolist() for name, part in sets.items()}
    assert drawn == {"few": [2, 3, 3, 3], "many": [2, 3, 3, 3]}
    assert len(set(rows["many"].tolist())) == 11
    assert rows["many"].tolist() == alike(sets, seed=0)["many"].tolist() != alike(sets, seed=1)["many"].tolist()


def test_the_first_windows_of_each_user_are_taken():
    few = first_of_each(windows(5, 7).select(torch.randperm(20)), 2)
    assert few.labels.bincount().tolist() == [2, 2, 2, 2]


def test_few_windows_are_taken_from_all_conditions():
    every = windows(6, 7)
    files = tuple(replace(file, condition="backpack" if row % 6 < 4 else "bag") for row, file in enumerate(every.files))
    few = first_of_each(replace(every, files=files), 4)
    assert [file.condition for file in few.files] == ["backpack", "backpack", "bag", "bag"] * 4
    assert few.labels.bincount().tolist() == [4, 4, 4, 4]


def test_the_gain_is_told_for_as_many_generated_windows_as_real_ones_and_more():
    found = evaluate(evidence(windows(7, 7)), Protocol(evaluation_steps=2, seeds=2))["augmentation"]
    assert [row["windows_per_user"] for row in found["gain_by_windows"]] == [3, 6, 7], "five times three were not made"
    assert found["gain_2_to_1"]["value"] == found["gain_by_windows"][1]["value"]
    assert found["gain_5_to_1"]["reason"] == "15 generated windows a user are not among the numbers measured"


def test_a_resnet_learns_users_and_is_kept(tmp_path):
    real, others = windows(8, 1), windows(8, 2, 40)
    how = (train_resnet, ResNet18, tmp_path, real.images, real.labels, real.num_users, 40)
    found = trained_once(*how)
    assert (found.probabilities(others.images).argmax(1) == others.labels).float().mean() > 0.5, "chance is a quarter"
    again = trained_once(None, *how[1:])
    torch.testing.assert_close(found.probabilities(others.images), again.probabilities(others.images))


def test_the_reference_classifier_is_beside_the_small_one(monkeypatch):
    small = evidence(windows(5, 7))
    monkeypatch.setattr(arms_file, "best_device", lambda: "cpu")
    done = []
    counted = SimpleNamespace(update=lambda: done.append(1))
    protocol = Protocol(evaluation_steps=1, seeds=2, counts=(), reference="resnet18")
    arms = train_arms(small, protocol, counted)
    assert len(done) == count_classifiers(small, protocol) - 2, "two judge identity"
    found = augmentation(small, protocol, arms)
    assert {name for name in found if name.startswith("resnet18")} == {
        *("resnet18_real_only", "resnet18_real_plus_generated", "resnet18_real_x2"),
        *("resnet18_generated_only", "resnet18_gain"),
    }
    real, both = (found[f"resnet18_{name}"] for name in ("real_only", "real_plus_generated"))
    assert found["resnet18_gain"]["value"] == pytest.approx(both["value"] - real["value"])
    assert len(plots.arms(found).axes[0].get_yticks()) == 9
    counts = {
        name: count_classifiers(small, replace(protocol, reference=name)) for name in ("auto", "none", "resnet18")
    }
    assert counts["resnet18"] - counts["none"] == 8 and counts["auto"] == counts["none"]
    monkeypatch.setattr(arms_file, "best_device", lambda: "cuda")
    assert count_classifiers(small, replace(protocol, reference="auto")) == counts["resnet18"]
    with pytest.raises(DataError, match="reference must be one of auto, resnet18, none, got 'resnet'"):
        Protocol(reference="resnet")


def test_the_gain_is_told_for_fewer_generated_windows():
    protocol = Protocol(evaluation_steps=2, seeds=2, counts=(2, 4, 9))
    found = evaluate(evidence(windows(5, 7)), protocol)["augmentation"]
    assert [row["windows_per_user"] for row in found["gain_by_windows"]] == [2, 4, 5], "nine were not made"
    assert found["gain_by_windows"][-1]["value"] == found["gain"]["value"]


def test_judges_of_real_windows_are_kept_for_other_runs(tmp_path, monkeypatch):
    protocol, case = Protocol(evaluation_steps=2, seeds=2), evidence(windows(5, 7))
    trained = real_only_classifiers(case, protocol, tmp_path)
    monkeypatch.setattr(arms_file, "train_classifier", None)
    again = real_only_classifiers(case, protocol, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for one, other in zip(trained, again, strict=True):
        torch.testing.assert_close(one.probabilities(case.test.images), other.probabilities(case.test.images))
    for changed in (replace(case, train=windows(3, 9)), case):
        with pytest.raises(TypeError):
            real_only_classifiers(
                changed, protocol if changed is not case else replace(protocol, evaluation_steps=3), tmp_path
            )


def test_judges_of_another_version_are_not_taken(tmp_path, monkeypatch):
    protocol, case = Protocol(evaluation_steps=2, seeds=2), evidence(windows(5, 7))
    real_only_classifiers(case, protocol, tmp_path)
    monkeypatch.setattr(classifiers_file, "_how", lambda kind: "changed")
    real_only_classifiers(case, protocol, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_judges_that_train_side_by_side_are_the_same(monkeypatch, tmp_path):
    protocol, case = Protocol(evaluation_steps=3, seeds=3), evidence(windows(5, 7))
    monkeypatch.setattr("mdlib.evaluation.classifiers.training_at_once", lambda: 2)
    beside = real_only_classifiers(case, protocol, tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr("mdlib.evaluation.classifiers.training_at_once", lambda: 1)
    torch.set_num_threads(1)  # as each of them had
    alone = real_only_classifiers(case, protocol)
    torch.set_num_threads(threads)
    assert len(list(tmp_path.iterdir())) == 3
    for one, other in zip(beside, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_fidelity_needs_windows_in_every_set():
    judges = Arms([SmallCNN(len(USERS))], {}, 0.5)
    found = fidelity(evidence(windows(5, 7), val=windows(2, 2, 40), test=windows(2, 3, 42)), judges)
    assert found["fd"]["value"] is None and "both halves" in found["fd_ratio"]["reason"]


def test_features_come_in_batches():
    judge, images = SmallCNN(len(USERS)), windows(4, 0).images
    assert features(judge, images).shape[0] == 16
    torch.testing.assert_close(features(judge, images), features(judge, images, batch_size=5))


CODEC = dict(image_size=32, patch_size=(2, 2), block_out_channels=(8,), norm_num_groups=4)


class Stamp(VAVAE):
    """Told a user, it draws that user's brightness over whatever it is shown."""

    def encode(self, images, labels=None):
        return images[:, :, :1, :1]

    def decode(self, latents, labels=None):
        return (labels.float() / 2 - 0.75).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)


class Brightness(SmallCNN):
    """Names the user whose brightness a window has."""

    def forward(self, images):
        return -(images.mean((1, 2, 3)).unsqueeze(1) - (torch.arange(len(USERS)) / 2 - 0.75)).abs()


def test_a_codec_that_draws_the_user_it_is_told_is_found_out():
    torch.manual_seed(0)
    codec, made = Stamp(**CODEC, num_users=len(USERS)), windows(5, 7)
    arms = Arms([Brightness(len(USERS))], {}, 0.5)
    found = other_label(evidence(made, codec=codec), arms)
    assert found["taken_for_other_label"]["value"] == 1 and found["psnr_db_other_label"]["value"] < 30
    with pytest.raises(DataError, match="the codec was trained with 3 users, these windows have 4"):
        evidence(made, codec=Stamp(**CODEC, num_users=3))
    plain = other_label(evidence(made, codec=VAVAE(**CODEC)), arms)
    assert {figure["reason"] for figure in plain.values()} == {"this codec is told no users"}


@pytest.mark.parametrize(
    "ci95, word", [([0.01, 0.05], "helps"), ([-0.02, 0.03], "no evidence"), ([-0.05, -0.01], "hurts")]
)
def test_the_verdict_comes_from_the_interval(honest, ci95, word):
    told = verdict({**honest["augmentation"], "gain_ci95": ci95})
    assert told["word"] == word and "real windows a user" in told["sentence"] and "copies" not in told["sentence"]
    others = {"gain_other_users": {"value": 0.03, "ci95": [-0.01, 0.07]}}
    others["resnet18_gain"] = {"value": -0.02, "ci95": [-0.04, 0]}
    told = verdict({**honest["augmentation"], "gain_ci95": ci95, **others})["sentence"]
    assert ("would gain is open (+3.0 points, -1.0 to +7.0)." in told) == (word == "helps")
    assert told.endswith(" By ResNet-18 the gain is -2.0 points, -4.0 to +0.0.")
    warned = verdict({**honest["augmentation"], "gain_ci95": ci95}, copied=0.96)
    assert warned["sentence"].endswith(" 96 % of the generated windows are copies of training windows.")


def test_the_report_is_one_page_that_opens_offline(honest, tmp_path):
    codec = VQVAE(image_size=32, patch_size=(2, 2), block_out_channels=(8,), norm_num_groups=4, num_codes=8, code_dim=4)
    given = evidence(windows(20, 7), codec=codec.eval())
    protocol = Protocol(evaluation_steps=2, seeds=2, keep=(0.5,))
    report = evaluate(given, protocol, about={"data": "<toy> & more"})
    assert report["reconstruction"]["psnr_db"]["value"] < 30 and report["codebook"]["usage"]["n"] == 4 * 37
    assert "no training logs" in write_report(report, given, tmp_path)["training"]
    for part in ("codec", "prior"):
        rows = [{"step": 10 * row, "seconds": row, "mse": 1 / row, "held_out_mse": 1.1 / row} for row in (1, 2)]
        (tmp_path / part).mkdir()
        write_history(rows, tmp_path / part / "history.csv")
        assert read_history(tmp_path / part) == rows
    sections = write_report(report, given, tmp_path)
    assert {name: text.count("<img") for name, text in sections.items() if "<img" in text} == {
        **{"augmentation": 2, "identity": 3, "reconstruction": 1, "codebook": 1, "memorisation": 1},
        **{"fidelity": 1, "physics": 2, "training": 2},
    }
    page = (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert page.index(report["verdict"]["sentence"].split(" (gain")[0]) < page.index("<table>")
    assert "&lt;toy&gt; &amp; more" in page and page.count("data:image/png;base64,") == 13
    assert "http" not in page.replace("http-equiv", "")
    users = [row for row in page.split("<tr>") if row.startswith("<th>ID_")]
    assert len(users) == 4 and users[0].startswith("<th>ID_2</th><td class=n>25</td>")


def test_judges_do_not_see_what_they_are_asked_about(monkeypatch):
    seen = []

    def fake(images, labels, num_users, *_):
        seen.append(images)
        return SmallCNN(num_users).eval()

    monkeypatch.setattr(verification_file, "train_embedder", lambda *_: Embedder().eval())

    monkeypatch.setattr(arms_file, "train_classifier", fake)
    given = evidence(windows(5, 7))
    evaluate(given, Protocol(evaluation_steps=1, seeds=2, counts=()))
    rows = lambda images: {image.numpy().tobytes() for image in images}
    train, test, made = rows(given.train.images), rows(given.test.images), rows(given.generated.images)
    unseen = rows(given.val.images) | test
    judges, choice, arms = seen[:2], seen[2:5], seen[5:]
    assert all(rows(images) == unseen for images in judges)
    assert all(rows(images) == train | made for images in choice)
    more = train | rows(given.spare.images)
    expected = [train, train, train | made, made]
    assert [rows(images) for images in arms[:8:2]] == [rows(images) for images in arms[1:8:2]] == expected
    assert all(train < rows(images) < more for images in arms[8:])
    assert all(not rows(images) & test for images in arms)


def test_generated_users_without_real_windows_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "ID_4").mkdir()
    Image.new("RGB", (32, 32), (0, 0, 143)).save(tmp_path / "ID_4" / "x_1.png")
    with pytest.raises(DataError, match="ID_4"):
        load_generated(tmp_path, windows(2, 0))
