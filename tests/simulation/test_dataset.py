"""Simulated data sets: files, seeds, and recordings that overlap and differ as real ones do."""

import csv
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdlib.data.colormaps import colormap_table
from mdlib.simulation import dataset, radar
from mdlib.simulation.dataset import simulate_dataset, simulate_recording


@pytest.fixture(scope="module")
def recordings():
    """One recording each of six people: [(images, truth, numbers)]."""
    return [simulate_recording(user, n_windows=100) for user in range(1, 7)]


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*.png")}


# ---- files


def test_data_set_on_disk(tmp_path):
    out = simulate_dataset(tmp_path / "new" / "set", users=2, windows=20, recordings=2, progress=False)
    names = sorted(files(out))
    assert len(names) == 40
    assert all(re.fullmatch(r"ID_[12]/ID[12]_case1_[12]_Doppler\d+\.png", n) for n in names)
    with Image.open(out / names[0]) as picture:
        assert (picture.size, picture.mode) == ((256, 256), "RGB")
    with open(out / "parameters.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert sorted(r["path"] for r in rows) == names
    for row in rows:
        assert row["path"].startswith(
            f"ID_{row['user']}/ID{row['user']}_case1_{row['recording']}_Doppler{row['window']}."
        )
        assert 0.2 < float(row["v_torso"]) < 1.6 and 1.5 < float(row["height"]) < 2.0
        assert float(row["step_len"]) == pytest.approx(float(row["speed"]) / float(row["step_hz"]), rel=1e-4)


def test_pictures_are_jet_coloured_blocks_of_the_native_grid(tmp_path):
    out = simulate_dataset(tmp_path / "set", users=1, windows=2, size=244, progress=False)
    images, _, numbers = simulate_recording(1, n_windows=2)
    for image, number in zip(images, numbers, strict=True):
        with Image.open(out / f"ID_1/ID1_case1_1_Doppler{number}.png") as picture:
            pixels = np.array(picture)
        expected = colormap_table("jet")[image]  # 122 rows, every row twice
        assert (pixels[::2][:, np.arange(56) * 244 // 56 + 1] == expected).all()


def test_same_seed_same_bytes_whatever_the_number_of_users(tmp_path):
    two, three, other = (
        files(simulate_dataset(tmp_path / name, users=users, windows=4, size=64, seed=seed, progress=False))
        for name, users, seed in (("a", 2, 5), ("b", 3, 5), ("c", 2, 6))
    )
    assert {name: three[name] for name in two} == two
    assert not set(two.values()) & set(other.values())


@pytest.mark.parametrize(
    "user, recording, seed, windows, condition, total",
    [
        (1, 1, 0, 30, "normal", 7508505),
        (3, 2, 5, 20, "backpack", 4728258),
        (2, 1, 7, 20, "bag", 5535139),
        (2, 1, 7, 20, "bag_phone", 4789201),
    ],
)
def test_a_seed_gives_the_same_images_as_in_earlier_versions(user, recording, seed, windows, condition, total):
    images, _, _ = simulate_recording(user, recording, seed, windows, condition)
    assert images.sum(dtype=int) == pytest.approx(total, abs=20)  # other processors round some pixels otherwise


def test_same_bytes_whatever_the_number_of_threads():
    code = (
        "import hashlib; from mdlib.simulation.dataset import simulate_recording;"
        "print(hashlib.sha256(simulate_recording(3, n_windows=30)[0].tobytes()).hexdigest())"
    )
    here = hashlib.sha256(simulate_recording(3, n_windows=30)[0].tobytes()).hexdigest()
    for threads in "14":
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == here


def test_complete_result_is_kept_and_anything_else_is_refused(tmp_path):
    arguments = dict(users=1, windows=2, size=32, progress=False)
    out = simulate_dataset(tmp_path / "set", **arguments)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert simulate_dataset(out, **arguments) == out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(FileExistsError, match="another seed"):
        simulate_dataset(out, **arguments, seed=1)
    (out / "simulation.json").unlink()
    with pytest.raises(FileExistsError, match="choose another folder"):
        simulate_dataset(out, **arguments)
    (tmp_path / "empty").mkdir()
    assert len(files(simulate_dataset(tmp_path / "empty", **arguments))) == 2


def test_an_empty_folder_is_filled_also_where_it_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    simulate_dataset(".", users=1, windows=2, size=8, progress=False)
    assert sorted(path.name for path in Path().iterdir()) == ["ID_1", "parameters.csv", "simulation.json"]
    assert simulate_dataset(tmp_path / "empty", users=1, windows=2, size=8) == tmp_path / "empty", "it is complete"


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "colour", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        simulate_dataset(tmp_path / "set", users=1, windows=2, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named_in_one_line(tmp_path):
    wrong = (
        dict(users=0),
        dict(windows=0),
        dict(size=0),
        dict(recordings=0),
        dict(windows=2, recordings=3),
        dict(seed=-1),
        dict(condition="umbrella"),
    )
    for arguments in wrong:
        with pytest.raises(ValueError, match=f"^{list(arguments)[0]}.*") as error:
            simulate_dataset(tmp_path / "set", **{"users": 1, "windows": 2, "progress": False} | arguments)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_all_conditions(tmp_path):
    out = simulate_dataset(tmp_path / "set", users=1, windows=3, size=32, condition="all", progress=False)
    cases = {(p.split("/")[0], re.search(r"case(\d)", p)[1]) for p in files(out)}
    assert cases == {("normal", "1"), ("backpack", "2"), ("bag", "3"), ("bag_phone", "4")}
    with open(out / "parameters.csv", newline="") as f:
        assert {r["path"] for r in csv.DictReader(f)} == set(files(out))


# ---- recordings


def test_windows_are_numbered_in_time_with_gaps_at_the_turns(recordings):
    for images, truth, numbers in recordings:
        assert images.shape == (100, 122, 56) and images.dtype == np.uint8
        assert {len(v) for v in truth.values()} == {100} and len(numbers) == 100
        assert all(np.isfinite(v).all() for v in truth.values())
        steps = np.diff(numbers)
        turns = np.flatnonzero(steps > 1)
        assert all(4 <= steps[turns]) and all(steps[turns] <= 18)  # 3 to 17 missing
        walks = np.diff(np.concatenate([[-1], turns]))
        assert all(14 <= walks) and all(walks <= 25)
        assert set(np.diff(truth["away"])[turns]) <= {-1, 1}  # to and fro


def test_a_longer_recording_starts_alike(recordings):
    images, truth, numbers = simulate_recording(2, n_windows=9)
    assert (images == recordings[1][0][:9]).all() and (numbers == recordings[1][2][:9]).all()
    assert all((values == recordings[1][1][name][:9]).all() for name, values in truth.items())


def test_next_window_is_one_step_later_and_the_one_after_four_is_new(recordings):
    shifts, aligned, own = [], [], []
    for images, _, numbers in recordings:
        x = images.astype(float)
        for i in np.flatnonzero(np.diff(numbers) == 1)[::4]:
            r = [np.corrcoef(x[i][:, s:].ravel(), x[i + 1][:, :-s].ravel())[0, 1] for s in range(8, 20)]
            shifts.append(8 + np.argmax(r))
            aligned.append(max(r))
        same_foot = np.stack([x[k::2].mean(0) for k in (0, 1)])
        x = x - same_foot[np.arange(len(x)) % 2]
        for i in np.flatnonzero(numbers[4:] - numbers[:-4] == 4):
            own.append(np.corrcoef(x[i].ravel(), x[i + 4].ravel())[0, 1])
    assert np.mean(shifts) == pytest.approx(13.76, abs=0.5)
    assert np.median(aligned) >= 0.85
    assert abs(np.median(own)) < 0.15


def test_random_split_leaks(recordings):
    thumbnails = [r[0][:, ::4, ::2].reshape(100, -1).astype(np.float32) for r in recordings]

    def accuracy(orders, gap):
        train = np.concatenate([t[o[:50]] for t, o in zip(thumbnails, orders, strict=True)])
        test = np.concatenate([t[o[50 + gap :]] for t, o in zip(thumbnails, orders, strict=True)])
        distance = (train**2).sum(1) - 2 * test @ train.T
        return (distance.argmin(1) // 50 == np.repeat(np.arange(6), 50 - gap)).mean()

    rng = np.random.default_rng(0)
    assert accuracy([rng.permutation(100) for _ in range(6)], 0) > accuracy([np.arange(100)] * 6, 4) > 1 / 6


def test_people_differ_more_than_their_windows(recordings):
    height = [r[1]["height"][0] for r in recordings]
    speed = np.array([r[1]["speed"] for r in recordings])
    assert len(set(height)) == 6
    assert speed.mean(1).std() > 0.5 * speed.std(1).mean()


def test_looks_like_published_windows(recordings):
    floor = np.concatenate([(r[0] == 0).mean((1, 2)) for r in recordings])
    assert 0.60 < np.median(floor) < 0.72
    assert ((floor > 0.44) & (floor < 0.80)).mean() > 0.95
    truth = {k: np.concatenate([r[1][k] for r in recordings]) for k in recordings[0][1]}
    assert 0.65 < truth["v_torso"].mean() < 0.95
    assert 3.0 < (truth["v_foot"] / truth["v_torso"]).mean() < 4.5
    assert 0.40 < truth["step_len"].mean() < 0.75
    assert 1.1 < truth["step_hz"].mean() < 1.8
    start = truth["start_phase"] * 2 % 1  # windows start at the same phase of a step
    assert np.abs(np.exp(2j * np.pi * start).mean()) > 0.8


def test_windows_of_three_seconds_show_the_cadence():
    images, truth, _ = simulate_recording(4, n_windows=8, clock=True)
    assert images.shape == (8, 122, 60)
    assert truth["span"] == pytest.approx(3.0) and np.ptp(truth["start_phase"]) > 0.2
    velocity = radar.velocity_axis()
    bright = velocity[images.mean((0, 2)).argmax()]
    assert bright == pytest.approx(truth["v_torso"].mean(), abs=0.25)


def test_conditions_change_the_gait():
    def means(condition):
        found = [simulate_recording(user, n_windows=14, condition=condition)[1] for user in range(1, 9)]
        return {name: np.mean([truth[name] for truth in found]) for name in ("v_min", "speed")}

    normal, phone = means("normal"), means("bag_phone")
    assert normal["v_min"] < phone["v_min"] < 0  # arms that are held do not swing back
    assert phone["speed"] < 0.98 * normal["speed"]


def test_sessions_differ_less_than_people():
    def speeds(user, recording):
        return simulate_recording(user, recording, n_windows=40)[1]["speed"].mean()

    table = np.array([[speeds(u, r) for r in (1, 2, 3)] for u in (1, 2, 3, 4)])
    assert (np.ptp(table, axis=1) > 0).all()
    assert table.mean(1).std() > table.std(1).mean()
