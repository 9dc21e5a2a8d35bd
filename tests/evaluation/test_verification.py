"""Claims are verified by embedders that never met the users, with intervals as wide as chance."""

import numpy as np
import pytest
from toys import QUICK, SILENT, evidence, windows

from mdlib.evaluation import verification as verification_file
from mdlib.evaluation.verification import Trials, folds, rates_of, resampled, verification
from mdlib.models.classifier import Embedder


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
    found = verification(evidence(windows(5, 7)), QUICK, SILENT)
    assert met == [set(range(4)) - set(held.tolist()) for held in folds(4)]
    assert 0 <= found["verification_eer"]["ci95"][0] <= found["verification_eer"]["ci95"][1] <= 1
    for curve in found["roc"]:
        low, true, high = (np.array(curve[name]) for name in ("low", "true", "high"))
        assert all(np.all(np.diff(rates) >= 0) for rates in (low, true, high)), "acceptance grows with the threshold"
        assert np.all(low <= true) and np.all(true <= high)


def test_the_curve_holds_the_equal_error_rate():
    """Half of one user's claims lie below every impostor's, no claim of the other's: 1/4 at an equal rate."""
    named = np.array([3, 3, 4, 4, 4, 4, 3, 3])
    trials = Trials(np.array([0.9, 0.1, 0.5, 0.4, 0.9, 0.9, 0.5, 0.4]), np.repeat([3, 4], 4), named)
    error, curve = rates_of(trials)
    assert error == pytest.approx(0.25)
    assert curve[0] == pytest.approx(0.75) and curve[-1] == 1
    errors, curves = resampled([trials])
    assert set(errors) == {error} and np.all(curves == curve), "one user twice tells nothing: both were drawn"


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
    monkeypatch.setattr(verification_file, "DRAWS", 60)
    drawn = [np.mean([rates_of(fold)[0] for fold in verified(rng)]) for _ in range(200)]
    spreads = [resampled(verified(rng))[0].std() for _ in range(15)]
    assert 0.9 < np.mean(spreads) / np.std(drawn) < 1.4, "folds apart, and one side of a claim alone: 0.56"
