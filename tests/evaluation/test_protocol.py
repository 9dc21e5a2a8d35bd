"""The report: what is fed in decides what it says. Claims are verified by embedders that never met the users."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import ONCE, QUICK, USERS, evidence, gait, real_only_classifiers, windows

from mdlib.evaluation import evidence as evidence_file
from mdlib.evaluation import protocol as protocol_file
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.evidence import Protocol
from mdlib.evaluation.fidelity import fidelity
from mdlib.evaluation.protocol import (
    Trials,
    evaluate,
    folds,
    memorisation,
    other_label,
    rates_of,
    resampled,
    verdict,
    verification,
)
from mdlib.models.classifier import Embedder, SmallCNN
from mdlib.models.kl import VAVAE
from mdlib.utils import DataError

CODEC = dict(image_size=32, patch_size=(2, 2), block_out_channels=(8,), norm_num_groups=4)


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
    assert all(metric["value"] is not None for metric in honest["physics"].values())
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


def test_a_random_split_reports_its_leak(honest):
    assert honest["split"]["test_share_overlapping"] == 0
    train = windows(3, 1)
    test = replace(train, images=train.images.roll(4, -1))
    quick = dict(evaluation_steps=1, seeds=1, fractions=(0.5,), counts=(), reference="none", backbone="none")
    leaking = evaluate(evidence(windows(5, 7), test=test), Protocol(**quick))
    assert leaking["split"]["test_share_overlapping"] > 0.9
    assert leaking["split"]["test_share_near"] > 0.5
    assert "% of the test windows overlap a training window" in leaking["verdict"]["sentence"]


def test_noise_fails_everything():
    chance = torch.Generator().manual_seed(0)
    noise = lambda label, n, seed: torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=chance)
    noise = windows(20, 0, of=noise)
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
    arms = Arms({"real_only": real_only_classifiers(evidence(same), QUICK)}, {}, 0.5)
    found = fidelity(evidence(same), arms)
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


def test_windows_that_copy_nothing_are_as_often_copies_as_expected():
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        test, others = rng.random(20), rng.random(20)
        found.append((others < np.quantile(test, 0.01)).mean())
    case = evidence(windows(5, 7))
    section = memorisation(replace(case, test=case.test.select(slice(0, 20))))
    assert section["copies_expected"] == pytest.approx(np.mean(found), abs=0.005)
    one = memorisation(replace(case, generated=case.generated.select([0])))
    assert [row["n"] for row in one["per_user"]] == [1]


def test_copies_of_training_windows_are_found():
    train = windows(3, 1)
    copied = train.select(torch.arange(len(train)).repeat_interleave(4))
    found = memorisation(evidence(copied))
    assert found["nearest_train_ratio"]["value"] < 0.01 and found["copies"]["value"] == 1.0
    assert len(found["nearest"]) == 6 and all(pair["generated"] == pair["train"] for pair in found["nearest"])
    for shift in (2, 8, 16):
        shifted = memorisation(evidence(replace(copied, images=copied.images.roll(shift, dims=-1))))
        assert shifted["copies"]["value"] == 1.0
        assert all(pair["generated"] == pair["train"] for pair in shifted["nearest"]), "found where it was shifted from"


class Stamp(VAVAE):
    """Draws the brightness of the user it is given over any window."""

    def encode(self, images, labels=None):
        return images[:, :, :1, :1]

    def decode(self, latents, labels=None):
        return (labels.float() / 2 - 0.75).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)


class Brightness(SmallCNN):
    """Names the user whose brightness a window has."""

    def forward(self, images):
        return -(images.mean((1, 2, 3)).unsqueeze(1) - (torch.arange(len(USERS)) / 2 - 0.75)).abs()


def test_a_codec_that_draws_the_user_it_is_given_is_found_out():
    torch.manual_seed(0)
    codec, made = Stamp(**CODEC, num_users=len(USERS)), windows(5, 7)
    arms = Arms({"real_only": [Brightness(len(USERS))]}, {}, 0.5)
    found = other_label(evidence(made, codec=codec), arms)
    assert found["taken_for_other_label"]["value"] == 1 and found["psnr_db_other_label"]["value"] < 30
    with pytest.raises(DataError, match="the codec was trained with 3 users, these windows have 4"):
        evidence(made, codec=Stamp(**CODEC, num_users=3))
    plain = other_label(evidence(made, codec=VAVAE(**CODEC)), arms)
    assert {metric["reason"] for metric in plain.values()} == {"this codec is not conditioned on users"}


@pytest.mark.parametrize(
    "ci95, word", [([0.01, 0.05], "helps"), ([-0.02, 0.03], "no evidence"), ([-0.05, -0.01], "hurts")]
)
def test_the_verdict_comes_from_the_interval(honest, ci95, word):
    found = {**honest["augmentation"], "gain": {**honest["augmentation"]["gain"], "ci95": ci95}}
    told = verdict(found)
    assert told["word"] == word and "real windows per user" in told["sentence"] and "copies" not in told["sentence"]
    others = {"gain_other_users": {"value": 0.03, "ci95": [-0.01, 0.07]}}
    others["resnet18_gain"] = {"value": -0.02, "ci95": [-0.04, 0]}
    told = verdict({**found, **others})["sentence"]
    assert ("would gain as well (+3.0 points, 95 % interval -1.0 to +7.0)." in told) == (word == "helps")
    assert told.endswith(" With ResNet-18, trained from scratch, the gain is -2.0 points, 95 % interval -4.0 to +0.0.")
    assert "independent blocks" in verdict({**found, "blocks": 5})["sentence"]
    few = {**found, "real_only": {**found["real_only"], "value": 0.2}, "num_users": 4}
    assert verdict(few)["sentence"].startswith("Inconclusive: real windows alone reach 20.0 %, where chance is 25.0 %")
    metric = {"value": 0.5, "ci95": ci95, "n": 9}
    names = "chosen total_gain pretrained_gain pretrained_real_only pretrained_real_plus_generated"
    arms = dict.fromkeys(names.split(), metric)
    told = verdict({**few, **arms, "total_real_windows": {"value": None}})["sentence"]
    assert "Inconclusive" not in told and "alone reach 20.0 %" in told, "pretrained classifiers are far above chance"
    warned = verdict(found, copied=0.96)
    assert warned["sentence"].endswith(" 96 % of the generated windows are copies of training windows.")


def test_verification_needs_users_to_hold_out():
    assert folds(3) == []
    for users in (4, 5, 8, 31):
        held = folds(users)
        assert sorted(np.concatenate(held)) == list(range(users))
        assert all(2 <= len(fold) <= users - 2 for fold in held)


def test_embedders_do_not_meet_the_users_they_verify(monkeypatch):
    met = []

    def fake(images, labels, *_, **__):
        met.append(set(labels.tolist()))
        return Embedder().eval()

    monkeypatch.setattr(evidence_file, "train_classifier", fake)
    monkeypatch.setattr(protocol_file, "DRAWS", 5)
    found = verification(evidence(windows(5, 7)), QUICK)
    assert met == [set(range(4)) - set(held.tolist()) for held in folds(4)]
    assert 0 <= found["verification_eer"]["ci95"][0] <= found["verification_eer"]["ci95"][1] <= 1
    for curve in found["roc"]:
        low, true, high = (np.array(curve[name]) for name in ("low", "true", "high"))
        assert all(np.all(np.diff(rates) >= 0) for rates in (low, true, high)), "acceptance grows with the threshold"
        assert np.all(low <= true) and np.all(true <= high)


@pytest.mark.parametrize("probed", [[0], [0, 3], [3]])
def test_users_without_generated_windows_do_not_stop_verification(probed, monkeypatch):
    """As after generating some users only: in each fold one user or none has probes."""
    monkeypatch.setattr(protocol_file, "DRAWS", 5)
    named = np.tile([0, 3], 10 * len(probed))
    shown = np.repeat(probed, 20)
    draws = resampled([Trials(np.random.default_rng(0).normal(size=len(named)), shown, named)])
    assert draws.shape == (5, 102) and np.isfinite(draws).all()


def test_the_curve_holds_the_equal_error_rate():
    """Half of one user's claims lie below every impostor's, no claim of the other's: 1/4 at an equal rate."""
    named = np.array([3, 3, 4, 4, 4, 4, 3, 3])
    trials = Trials(np.array([0.9, 0.1, 0.5, 0.4, 0.9, 0.9, 0.5, 0.4]), np.repeat([3, 4], 4), named)
    error, *curve = rates_of(trials)
    assert error == pytest.approx(0.25)
    assert curve[0] == pytest.approx(0.75) and curve[-1] == 1
    assert np.all(resampled([trials]) == [error, *curve]), "one user twice tells nothing: both were drawn"


def verified(rng: np.random.Generator, users: int = 8) -> list[Trials]:
    """Trials of three folds whose scores depend on the user shown, and on the pair of an impostor and his victim."""
    own, pairs, folds_of = 2 + 0.6 * rng.normal(size=users), 0.5 * rng.normal(size=(users, users)), []
    pairs += 0.4 * rng.normal(size=(users, 1))
    for held in np.array_split(rng.permutation(users), 3):
        shown = np.repeat(held, 10 * len(held))
        named = np.tile(held, 10 * len(held))
        scores = np.where(shown == named, own[shown], pairs[shown, named]) + 0.5 * rng.normal(size=len(shown))
        folds_of.append(Trials(scores, shown, named))
    return folds_of


def test_intervals_of_verification_are_as_wide_as_chance(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(protocol_file, "DRAWS", 60)
    drawn = [np.mean([rates_of(fold)[0] for fold in verified(rng)]) for _ in range(200)]
    spreads = [resampled(verified(rng))[:, 0].std() for _ in range(15)]
    assert 0.9 < np.mean(spreads) / np.std(drawn) < 1.4, "folds apart, and one side of a claim alone: 0.56"
