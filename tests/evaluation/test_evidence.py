"""Sets that are compared share no step and have equal numbers of each user's windows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import USERS, windows

from mdlib.evaluation.evidence import Protocol, alike, concatenate, first_of_each, halves
from mdlib.utils import DataError


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


def test_fractions_are_checked():
    with pytest.raises(DataError, match="keep must be fractions between 0 and 1"):
        Protocol(keep=(0.5, 1.5))
