"""Checks by content: identical files, columns shared across parts, what weights have seen, and whole folders."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import listed, message, picture, random_split, write_image, write_set
from PIL import Image

from mdlib.data.checks import (
    check_identical,
    check_split,
    data_fingerprint,
    inspect,
    seen_beyond,
    seen_of_test,
    split_folder,
)
from mdlib.data.files import WindowFile, find_windows
from mdlib.data.overlap import neighbours, overlap, residuals, similarity
from mdlib.data.reading import hashes
from mdlib.data.splits import PARTS, apply_split, make_split, write_split
from mdlib.data.windows import WindowSet, load_windows
from mdlib.simulation.dataset import simulate_dataset, simulate_recording


def simulated(users=3, n=40, seed=0, size=64, clock=False) -> WindowSet:
    images, files = [], []
    for user in range(1, users + 1):
        found, _, numbers = simulate_recording(user, 1, seed, n, clock=clock)
        found = torch.from_numpy(found)[:, None].float()
        images.append(torch.nn.functional.interpolate(found, size=(size, size), mode="area").round().byte())
        files += listed(map(int, numbers), user)
    labels = torch.arange(users).repeat_interleave(n)
    return WindowSet(torch.cat(images), labels, tuple(range(1, users + 1)), tuple(files), "jet", "data")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return simulate_dataset(tmp_path_factory.mktemp("checks") / "people", users=3, windows=40, size=64, progress=False)


@pytest.fixture
def copy(people, tmp_path):
    return shutil.copytree(people, tmp_path / "copy")


def renamed(people, out, name):
    """Names by `name(user, place in time)`."""
    for file in find_windows(people):
        target = out / f"ID_{file.user}" / name(file.user, file.number)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(people / file.path, target)
    return out


def test_shared_columns_are_found_at_their_shift_and_copies_are_one():
    walk = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 160))).float()
    a, b = (walk[:, start : start + 64][None] for start in (16, 0))
    score, shift = similarity(a, b)
    assert float(score) == pytest.approx(0.75**0.5, abs=0.05) and int(shift) == 16
    assert int(similarity(b, a)[1]) == -16
    assert float(similarity(a, a)[0]) == pytest.approx(1) and float(similarity(a, a.roll(30, -1))[0]) == pytest.approx(
        1
    )
    assert float(similarity(a, torch.randn(1, 64, 64, generator=torch.manual_seed(0)))[0]) < 0.2


@pytest.mark.parametrize("seed, size, clock", [(1, 64, False), (2, 128, False), (3, 64, True)])
def test_proper_splits_pass_and_random_ones_are_caught_whatever_the_numbers(seed, size, clock):
    windows = simulated(4, 60, seed, size, clock)
    for fold in range(4):
        found = overlap(apply_split(windows, make_split(windows, fold=fold)))
        assert found["test_share_near"] < 0.1
    few = overlap(apply_split(windows, make_split(windows, windows_per_user=5)))
    assert few["test_share_near"] < 0.1
    split = random_split(windows)
    lying = tuple(replace(file, recording=file.path, number=1) for file in windows.files)
    leaking = overlap(apply_split(replace(windows, files=lying), split))
    assert leaking["min_distance"] is None and leaking["test_share_overlapping"] == 0
    assert leaking["test_share_near"] > 0.5


def test_windows_without_overlap_leak_nowhere():
    windows = simulated(3, 120)
    windows = windows.select(range(0, 360, 4))
    assert overlap(apply_split(windows, random_split(windows)))["test_share_near"] < 0.1
    assert neighbours(windows).ordered


def test_altered_copies_are_near_and_neighbours_are_not():
    windows = simulated(2, 30)
    assert neighbours(windows).copies == [] and neighbours(windows).gap == 4
    image = windows.images[5].float()
    for altered in (image * 0.8, image.roll(3, -1), image + 2 * torch.randn(image.shape), image.roll(20, -1)):
        images = windows.images.clone()
        images[25] = altered.clamp(0, 255).byte()
        assert neighbours(replace(windows, images=images)).copies == [(windows.paths[5], windows.paths[25])]
    assert residuals(windows).shape == (60, 64, 64)


def test_identical_files_are_reported_in_a_part_and_refused_across(copy):
    files = find_windows(copy)
    mine = [file for file in files if file.user == 1]
    split = make_split(files)
    shutil.copyfile(copy / split["train"][0], copy / split["train"][1])
    found = hashes(copy, [file.path for file in files])
    assert check_identical(files, found, split) == [tuple(split["train"][:2])]
    last = next(path for path in split["test"] if "ID_1/" in path)
    shutil.copyfile(copy / split["train"][0], copy / last)
    text = message(check_split, load_windows(copy, size=64), split)
    assert split["train"][0] in text and last in text and "identical files in test and train" in text
    thinned = make_split(files, windows_per_user=5)
    spare = next(path for path in thinned["spare"] if "ID_1/" in path)
    shutil.copyfile(copy / spare, copy / last)  # spare windows train the classifiers of more real data
    assert "identical files in test and train" in message(check_split, load_windows(copy, size=64), thinned)
    shutil.copyfile(copy / mine[0].path, copy / "ID_3" / "ID3_case1_1_Doppler999.png")
    files = find_windows(copy)
    found = hashes(copy, [file.path for file in files])
    assert "identical files of two users" in message(check_identical, files, found)


def test_identical_files_in_folders_of_parts_are_refused(tmp_path):
    files = [WindowFile(f"{part}/ID_1/w{n}.png", 1, "", "w", n, part) for part, n in (("train", 1), ("test", 9))]
    for file in files:
        write_image(tmp_path / file.path, np.zeros((8, 8), np.uint8))
    assert "identical files in test and train" in message(
        check_identical, files, hashes(tmp_path, [f.path for f in files])
    )


def test_names_that_are_no_order_in_time_are_refused(people, tmp_path):
    shuffled = np.random.default_rng(0).permutation(400).tolist()
    folder = renamed(people, tmp_path / "shuffled", lambda user, n: f"walk{shuffled[n]}.png")
    windows = load_windows(folder, size=64)
    text = message(check_split, windows, make_split(windows))
    assert "test windows show the same steps as a training window, such as ID_" in text
    assert any("file names do not give the order in time" in problem for problem in inspect(folder).problems)


def test_a_split_keeps_the_contents_of_its_windows(copy):
    windows = load_windows(copy, size=64)
    split = check_split(windows, make_split(windows))
    assert split["hashes"].keys() == set(windows.paths)
    path = split["test"][0]
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(copy / path)
    assert f"{path} is not the image that the split was made for" in message(
        check_split, load_windows(copy, size=64, colormap="jet"), split
    )


def a_run(folder, data, split):
    write_split(split, folder / "split.json")
    (folder / "run.json").write_text(json.dumps({"settings": {"data": str(data)}}))
    return folder / "codec"


def test_what_weights_have_seen_is_found_by_content(people, copy, tmp_path):
    windows = load_windows(people, size=64)
    split = check_split(windows, make_split(windows))
    swapped = {**split, "train": split["test"], "test": split["train"]}
    codec = a_run(tmp_path / "run", people, split)
    plain = a_run(tmp_path / "early", people, {key: value for key, value in split.items() if key != "hashes"})
    for weights in (codec, plain):
        for data in (people, copy):
            assert seen_of_test(weights, split, data) == 0 and seen_beyond(weights, split, data) == 0
            assert seen_of_test(weights, swapped, data) == len(split["train"])
    moved = renamed(people, tmp_path / "named", lambda user, n: f"other{n}.png")
    names = {path: path.replace(f"ID{path[3]}_case1_1_Doppler", "other") for path in windows.paths}
    other = {part: [names[path] for path in swapped[part]] for part in ("train", "val", "test")}
    assert seen_of_test(codec, other, moved) == len(split["train"])
    generated = tmp_path / "elsewhere" / "made"
    generated.mkdir(parents=True)
    (generated / "generation.json").write_text(json.dumps({"trained_on": sorted(split["hashes"].values())}))
    assert seen_of_test(generated, split, copy) == len(split["test"])
    assert seen_of_test(tmp_path / "elsewhere", split, copy) == 0
    write_split(split, tmp_path / "elsewhere" / "split.json")  # of no run
    assert seen_of_test(tmp_path / "elsewhere" / "other", swapped, copy) == 0


def test_a_fingerprint_is_of_contents_and_names_below_the_folder(people, copy):
    paths = [file.path for file in find_windows(people)]
    before = data_fingerprint(hashes(people, paths))
    assert before == data_fingerprint(hashes(copy, reversed(paths)))
    shutil.copyfile(copy / paths[0], copy / paths[1])
    assert before != data_fingerprint(hashes(copy, paths))
    assert "cannot be read" in message(hashes, copy, ["ID_1/none.png"])


def test_inspect_finds_a_simulated_set_ready(people):
    found = inspect(people)
    assert found.problems == [] and found.alike.gap == 4 and found.alike.ordered
    assert found.scan.found == len(found.scan.files) == len(found.windows) == 120


def test_inspect_goes_on_after_a_problem(tmp_path):
    write_set(tmp_path, users=(1, 2), numbers=range(1, 6))
    found = inspect(tmp_path)
    assert len(found.problems) == 1 and "too few for train, val and test" in found.problems[0]
    shutil.copyfile(tmp_path / "ID_1" / "ID1_case1_1_Doppler1.png", tmp_path / "ID_2" / "ID2_case1_1_Doppler9.png")
    (tmp_path / "ID_1" / "ID1_case1_1_Doppler3.png").write_bytes(b"no image")
    problems = inspect(tmp_path).problems
    assert "identical files of two users" in problems[0] and "cannot be read" in problems[1]


@pytest.mark.parametrize("order", ["number", "name"])
def test_a_split_written_as_folders_is_read_as_that_split(order, tmp_path):
    data, out = tmp_path / "people", tmp_path / "split"
    for seed, path in enumerate(
        f"{place}/day2_walk" for place in ("normal/ID_1/a", "normal/ID_1/b", "bag/ID_2", "bag/ID_1")
    ):
        for n in range(40):
            write_image(data / f"{path}{n:02d}.png", picture(seed, n))
    options = dict(windows_per_user=12, val=0.2)
    split = split_folder(data, tmp_path / "split.json", {"order": order}, out, **options)
    read = make_split(find_windows(out))
    of = lambda root, paths: sorted((root / path).read_bytes() for path in paths)
    for part in PARTS:
        assert of(out, read[part]) == of(data, split[part]), part
        assert {path.split("/")[0] for path in read[part]} == {part}
    assert split["spare"] and split["dropped"] and not read["dropped"]
    info = (out / "split_info.txt").read_text()
    assert f"{len(split['train'])} train, " in info and " dropped (in the gaps between parts)" in info
    for taken in (out, data / "split"):
        assert "give a new folder outside of it" in message(split_folder, data, tmp_path / "x.json", {}, taken)
    assert not (tmp_path / "x.json").exists()
