"""What classifiers made of test windows, written, read again, and put together over folds."""

import json

import numpy as np
import pytest

from mdlib.data.windows import DataError
from mdlib.evaluation.outcomes import Outcomes, compared, joined

ARMS = ("real_only", "real_plus_generated", "generated_only", "real_x2")


def made(seed=0, n=40, seeds=3, rates=(0.5, 0.7, 0.4, 0.8)):
    rng = np.random.default_rng(seed)
    correct = {name: rng.random((seeds, n)) < rate for name, rate in zip(ARMS, rates, strict=True)}
    paths = tuple(f"ID_{1 + i // 20}/{seed}-{i}.png" for i in range(n))
    return Outcomes(correct, np.arange(n) // 4, paths, 1 + np.arange(n) // 20)


def test_outcomes_read_back_as_they_were():
    outcomes = made()
    back = Outcomes.from_json(json.loads(json.dumps(outcomes.to_json())))
    assert back.paths == outcomes.paths and (back.blocks == outcomes.blocks).all()
    assert (back.users == outcomes.users).all()
    assert back.correct.keys() == outcomes.correct.keys()
    assert all(
        (back.correct[name] == rows).all() and back.correct[name].dtype == bool
        for name, rows in outcomes.correct.items()
    )


def test_folds_count_by_their_windows_and_keep_their_own_blocks():
    first, second = made(0, n=40), made(1, n=120)
    both = joined([first, second])
    assert len(np.unique(both.blocks)) == 10 + 30 and both.paths == first.paths + second.paths
    found = compared(both, 10.0, "none")
    gains = [np.subtract(*(one.correct[name].mean() for name in ARMS[1::-1])) for one in (first, second)]
    assert found["gain"]["value"] == pytest.approx((40 * gains[0] + 120 * gains[1]) / 160)
    assert found["real_only"]["n"] == 160 and found["seeds"] == 3


def test_a_window_in_two_folds_counts_once():
    first, second = made(0), made(1)
    again = Outcomes(second.correct, second.blocks, first.paths[-3:] + second.paths[3:], second.users)
    both = joined([first, again])
    assert both.paths == first.paths + second.paths[3:]
    assert (both.correct["real_only"][:, :40] == first.correct["real_only"]).all()
    assert (both.correct["real_only"][:, 40:] == second.correct["real_only"][:, 3:]).all() and len(both.blocks) == 77


def test_more_folds_narrow_the_interval_as_more_windows_do():
    wide, narrow = (compared(joined([made(seed) for seed in range(n)]), 10.0, "none") for n in (1, 8))
    width = [np.diff(found["gain_ci95"])[0] for found in (wide, narrow)]
    assert width[1] < 0.7 * width[0]


def test_users_who_gain_unlike_one_another_widen_what_other_people_could_expect():
    outcomes = made(n=200, rates=(0.5, 0.5, 0.4, 0.8))
    own = outcomes.correct["real_only"].copy()
    own[:, outcomes.users <= 5] = True  # five users lose all, five win all
    both = ~own
    found = compared(Outcomes({"real_only": own, "real_plus_generated": both}, *_where(outcomes)), 10.0, "none")
    low, high = found["gain_other_users"]["ci95"]
    assert found["gain_other_users"]["n"] == 10 and high - low > 1.5 * np.diff(found["gain_ci95"])[0]
    assert [row["real_only"] for row in found["per_user"][:5]] == [1.0] * 5 and found["per_user"][0]["n"] == 20
    assert found["gain_other_users"]["value"] == pytest.approx(
        np.mean([row["real_plus_generated"] - row["real_only"] for row in found["per_user"]])
    )


def _where(outcomes):
    return outcomes.blocks, outcomes.paths, outcomes.users


def test_an_arm_that_one_fold_lacks_is_left_out():
    short = made(1)
    del short.correct["real_x2"]
    both = joined([made(0), short])
    assert set(both.correct) == set(ARMS) - {"real_x2"}
    assert compared(both, 10.0, "too few")["gain_over_x2"] == {"value": None, "reason": "too few"}


def test_folds_of_other_numbers_of_seeds_are_refused():
    with pytest.raises(DataError, match="folds of 2 and 3 seeds: evaluate all with the same number"):
        joined([made(seeds=3), made(seeds=2)])
