import json

import numpy as np
import pytest
import torch
from helpers import listed, message, picture, random_split, small_set

from mdlib.data.files import WindowFile
from mdlib.data.overlap import overlap
from mdlib.data.splits import (
    PARTS,
    apply_split,
    folds,
    make_split,
    read_split,
    write_split,
)
from mdlib.data.windows import WindowSet


def part_numbers(split, part, recording="walk"):
    return [int(p.split(recording)[1][:-4]) for p in split[part] if recording in p]


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_blocks_in_time_with_a_gap(seed):
    numbers = np.flatnonzero(np.random.default_rng(seed).random(150) < 0.8).tolist()
    files = listed(numbers) + listed(numbers[:100], user=2)
    split = make_split(files)
    train, val, test = (part_numbers({"x": [p for p in split[k] if "ID_1/" in p]}, "x") for k in PARTS)
    assert val[0] - train[-1] >= 4 and test[0] - val[-1] >= 4
    assert train + val + test == sorted(train + val + test)
    assert len(val) / len(numbers) == pytest.approx(0.15, abs=0.05)
    assert len(test) / len(numbers) == pytest.approx(0.25, abs=0.05)
    assert sorted(f.path for f in files) == sorted(sum((split[k] for k in (*PARTS, "dropped")), []))
    assert split["users"] == [1, 2] and split["gap"] == 4


def test_cuts_move_to_natural_gaps():
    numbers = [*range(0, 57), *range(65, 80), *range(90, 120)]  # two turns, near 60 % and 75 %
    split = make_split(listed(numbers))
    assert split["dropped"] == []
    assert (part_numbers(split, "train")[-1], part_numbers(split, "val")[0]) == (56, 65)
    assert (part_numbers(split, "val")[-1], part_numbers(split, "test")[0]) == (79, 90)


def test_every_recording_and_condition_is_split():
    recordings = [("a", ""), ("b", ""), ("a", "Bag")]
    split = make_split([f for r, c in recordings for f in listed(range(60), recording=r + c, condition=c)])
    for recording in ("a", "b", "aBag"):
        for part in PARTS:
            assert any(f"/{recording}" in p for p in split[part])


def test_short_recordings_are_split_as_one():
    files = [f for letter in "abcdefghij" for f in listed(range(20), recording=letter)]
    split = make_split(files, val=0.2, test=0.2)
    assert split["dropped"] == []  # cut between recordings
    whole = {part: {p.split("/")[1][0] for p in split[part]} for part in PARTS}
    assert [len(whole[part]) for part in PARTS] == [6, 2, 2]
    assert not (whole["train"] & whole["val"] or whole["val"] & whole["test"])


def test_windows_per_user_thins_only_the_training_part():
    files = listed(range(100)) + listed(range(100), user=2)
    full, few = make_split(files), make_split(files, windows_per_user=5)
    assert few["val"] == full["val"] and few["test"] == full["test"]
    assert set(few["train"]) < set(full["train"])
    assert sorted(few["spare"] + few["train"]) == sorted(full["train"])
    mine = part_numbers({"train": few["train"][:5]}, "train")
    assert len(few["train"]) == 10 and np.ptp(np.diff(mine)) <= 1
    assert "user ID_1 has" in message(make_split, files, windows_per_user=99)


@pytest.mark.parametrize("per_user", [None, 10])
@pytest.mark.parametrize("seed", range(3))
def test_every_window_is_in_the_test_of_about_one_fold_and_parts_share_no_step(seed, per_user):
    numbers = np.flatnonzero(np.random.default_rng(seed).random(150) < 0.9).tolist()
    files = listed(numbers) + [f for letter in "abcdefgh" for f in listed(range(20), recording=letter, user=2)]
    number, seen = {file.path: (file.user, file.recording, file.number) for file in files}, []
    for fold in range(folds()):
        split = make_split(files, fold=fold, windows_per_user=per_user)
        assert sorted(f.path for f in files) == sorted(sum((split[k] for k in (*PARTS, "dropped", "spare")), []))
        placed = [(number[path], part) for part in PARTS for path in split[part]]
        for (user, recording, a), part in placed:
            others = [b for (u, r, b), other in placed if other != part and (u, r) == (user, recording)]
            assert all(abs(a - b) >= 4 for b in others), "the beginning of a recording touches its end in no fold"
        seen += split["test"]
    assert len(set(seen)) >= 0.85 * len(files) and len(seen) <= 1.1 * len(set(seen))


def test_thinning_leaves_windows_of_every_condition():
    files = [f for c in ("backpack", "bag", "phone") for f in listed(range(60), recording=c, condition=c)]
    assert len(make_split(files, windows_per_user=3)["train"]) == 3
    assert message(make_split, files, windows_per_user=2) == (
        "windows_per_user=2 leaves no training window of bag: choose more, or take a folder of one condition"
    )


@pytest.mark.parametrize("fold, test, last", [(4, 0.25, 3), (-1, 0.25, 3), (3, 0.3, 2)])
def test_a_fold_that_there_is_not(fold, test, last):
    assert f"folds 0 to {last}" in message(make_split, listed(range(60)), fold=fold, test=test)


def test_what_is_too_short_to_split_loses_nothing_in_a_fold():
    files = listed(range(60)) + listed(range(4), recording="Bag", condition="Bag")
    for fold in range(4):
        split = make_split(files, fold=fold)
        assert sum("Bag" in path for path in split["train"]) == 4
    text = message(make_split, listed(range(60)) + listed(range(11), user=6), fold=3)
    assert "ID_6 has 11 windows" in text and "in fold 3: 12 in a row are needed" in text
    assert make_split(listed(range(60)) + listed(range(12), user=6), fold=3)["test"]


def test_too_few_windows_to_split():
    good = listed(range(50))
    text = message(make_split, good + listed(range(8), user=6))
    assert "ID_6 has 8 windows" in text and "9 in a row" in text
    split = make_split(good + listed(range(9), user=6))
    assert all(any("ID_6/" in p for p in split[part]) for part in PARTS)


@pytest.mark.parametrize("wrong", [{"val": 0}, {"test": -0.1}, {"val": 0.6, "test": 0.4}, {"gap": 0}])
def test_split_arguments(wrong):
    assert next(iter(wrong)) in message(make_split, listed(range(50)), **wrong)


def test_split_file_round_trip(tmp_path):
    windows = small_set(n=40)
    split = make_split(windows)
    write_split(split, tmp_path / "new" / "split.json")
    assert read_split(tmp_path / "new" / "split.json") == split
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["split.json"]
    parts = apply_split(windows, split)
    assert {k: list(part.paths) for k, part in parts.items()} == {k: split[k] for k in PARTS}
    assert parts["test"].users == windows.users


def hand_written(path, **parts):
    named = {
        "train": ["ID_4/walk0.png", "ID_7/walk0.png"],
        "val": ["ID_4/walk1.png"],
        "test": ["ID_4/walk2.png"],
    }
    path.write_text(json.dumps(named | parts))
    return path


def test_hand_written_split(tmp_path):
    path = hand_written(tmp_path / "s.json", val=[".\\ID_4\\walk1.png", "./ID_7/walk1.png"])
    parts = apply_split(small_set(), read_split(path))
    assert [len(parts[k]) for k in PARTS] == [2, 2, 1]


def test_bad_split_files(tmp_path):
    path = tmp_path / "s.json"
    assert "cannot be read" in message(read_split, path)
    path.write_text('{"train": [')
    assert "not a JSON file" in message(read_split, path)
    path.write_text("[1, 2]")
    assert "'train' must be a list" in message(read_split, path)
    for wrong in ({"val": []}, {"val": "ID_4/walk1.png"}, {"val": [3]}):
        assert "'val' must be a list" in message(read_split, hand_written(path, **wrong))
    text = message(read_split, hand_written(path, test=["ID_4/walk0.png"]))
    assert "ID_4/walk0.png is in train and in test" in text


def test_splits_that_do_not_fit_the_data(tmp_path):
    windows = small_set()
    unknown = read_split(hand_written(tmp_path / "s.json", test=["ID_4/walk9.png"]))
    assert "no ID_4/walk9.png, listed in the split's test" in message(apply_split, windows, unknown)
    untrained = read_split(hand_written(tmp_path / "s.json", train=["ID_4/walk0.png"]))
    assert "no training window of user ID_7" in message(apply_split, windows, untrained)


def test_a_random_split_leaks_and_blocks_do_not():
    files = tuple(f for user in (1, 2) for f in listed(range(60), user))
    images = np.stack([picture(f.user, f.number) for f in files])[:, None]
    labels = torch.tensor([f.user - 1 for f in files])
    windows = WindowSet(torch.from_numpy(images), labels, (1, 2), files, "jet", "data")

    blocks = overlap(apply_split(windows, make_split(windows)))
    assert blocks["min_distance"] == 4 and blocks["test_share_overlapping"] == 0

    split = random_split(windows)
    leaky = overlap(apply_split(windows, split))
    assert leaky["min_distance"] == 1 and leaky["test_share_overlapping"] > 0.8
    assert leaky["test_windows"] == len(split["test"])


def in_folders(numbers: dict[str, range], users=(1, 2)) -> list[WindowFile]:
    return [
        WindowFile(f"{part}/ID_{user}/walk{n}.png", user, "", "walk", n, part)
        for part, some in numbers.items()
        for user in users
        for n in some
    ]


def test_folders_of_parts_are_the_split_without_windows_next_to_another_part():
    split = make_split(in_folders({"train": range(20), "val": range(20, 30), "test": range(30, 40)}))
    assert [len(split[part]) for part in (*PARTS, "dropped")] == [40, 14, 14, 12]
    assert all(path.startswith(f"{part}/") for part in PARTS for path in split[part])
    assert part_numbers(split, "val")[0] == 23 and part_numbers(split, "test")[0] == 33
    few = make_split(in_folders({"train": range(20), "val": range(30, 36), "test": range(50, 60)}), windows_per_user=5)
    assert [len(few[part]) for part in (*PARTS, "dropped", "spare")] == [10, 12, 20, 0, 30]


def test_folders_of_parts_that_leave_too_little_are_refused():
    mixed = in_folders({"train": range(0, 40, 2), "val": range(60, 70), "test": range(1, 40, 2)})
    assert "user ID_1 has no window in test/" in message(make_split, mixed)
    assert "--split" in message(make_split, in_folders({"train": range(20), "test": range(40, 60)}))
    assert "not yet split" in message(make_split, mixed, fold=1)
