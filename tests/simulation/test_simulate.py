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

from mdlib.simulation import dataset, radar, walker
from mdlib.simulation.dataset import simulate_dataset, simulate_recording


@pytest.fixture(scope="module")
def recordings():
    """One recording each of six people: [(images, truth, numbers)]."""
    return [simulate_recording(user, n_windows=100) for user in range(1, 7)]


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*.png")}


# ---------------------------------------------------------------------------------------------------------- files


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
    from mdlib.data.colormaps import colormap_table

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


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "colour", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        simulate_dataset(tmp_path / "set", users=1, windows=2, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        dict(users=0),
        dict(windows=0),
        dict(size=0),
        dict(recordings=0),
        dict(windows=2, recordings=3),
        dict(seed=-1),
        dict(condition="umbrella"),
        dict(condition=[]),
        dict(condition=["bag", "bag"]),
        dict(preset="sonar"),
        dict(route="round"),
        dict(difficulty="impossible"),
    ],
)
def test_bad_arguments_are_named_in_one_line(tmp_path, arguments):
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


# ----------------------------------------------------------------------------------------------------- recordings


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


@pytest.mark.parametrize("preset", dataset.PRESETS)
def test_presets(preset):
    p = dataset.PRESETS[preset]
    images, truth, _ = simulate_recording(4, n_windows=8, preset=preset, route="free", difficulty="hard")
    assert images.shape == (8, p.rows, p.columns)
    velocity = dataset.velocity_axis(preset)
    assert len(velocity) == p.rows and (np.diff(velocity) < 0).all() and np.abs(velocity).min() < 1e-9
    if p.column_s:
        assert truth["span"] == pytest.approx(p.column_s * p.columns)
        assert np.ptp(truth["start_phase"]) > 0.2
    bright = velocity[images.mean((0, 2)).argmax()]
    assert bright == pytest.approx(truth["v_torso"].mean(), abs=0.25)


def test_conditions_change_the_gait():
    def mean(name, condition):
        return np.mean([simulate_recording(u, n_windows=14, condition=condition)[1][name] for u in range(1, 9)])

    normal, phone = mean("v_min", "normal"), mean("v_min", "bag_phone")
    assert normal < phone < 0  # arms that are held do not swing back
    assert mean("speed", "bag_phone") < 0.98 * mean("speed", "normal")


def test_sessions_differ_less_than_people():
    def speeds(user, recording):
        return simulate_recording(user, recording, n_windows=60)[1]["speed"].mean()

    table = np.array([[speeds(u, r) for r in (1, 2, 3)] for u in (1, 2, 3, 4)])
    assert (np.ptp(table, axis=1) > 0).all()
    assert table.mean(1).std() > table.std(1).mean()


# ----------------------------------------------------------------------------------------------------- radar, gait


@pytest.mark.parametrize("preset", dataset.PRESETS)
@pytest.mark.parametrize("speed", [0.4, 1.11, 2.5])
def test_a_steady_scatterer_shows_at_twice_its_speed_over_the_wavelength(preset, speed):
    p = dataset.PRESETS[preset]
    one = np.ones((1, 1))
    spectrum = radar.short_time_spectrum(5 * one, speed * one, 0 * one, np.ones((1, 1, 1)), preset)[0, 0]
    power = np.abs(spectrum) ** 2
    doppler = 2 * speed * p.carrier / radar.SPEED_OF_LIGHT
    bins, _ = radar.velocity_bins(preset)
    assert bins[power.argmax()] == pytest.approx(doppler / p.prf * p.fft, abs=1)
    if p.taper == "blackman":  # main lobe: three bins of the window's own resolution either side
        outside = np.abs(bins - bins[power.argmax()]) > 3 * p.fft / p.samples + 1
        assert power[outside].sum() < 1e-4 * power.sum()


def test_velocity_axis_is_half_a_wavelength_times_doppler():
    velocity = dataset.velocity_axis("ti77_cycle")
    assert -np.diff(velocity) == pytest.approx(5263.2 / 256 * 299792458 / 78.5e9 / 2)
    assert velocity[0] == pytest.approx(3.85, abs=0.05) and velocity[-1] == pytest.approx(-0.90, abs=0.05)


def test_curves_pass_through_boulics_control_points():
    hip, knee, ankle, shoulder, elbow, thorax = walker.boulic_curves(0.9)  # 0.5 <= rv < 1.3
    at = lambda curve, phase: curve[round(phase * walker.N_PHASE)]
    assert at(hip, 0.5) == pytest.approx(-15) and at(knee, 0.75) == pytest.approx(70)
    assert at(ankle, 0.0) == pytest.approx(-3) and at(ankle, 0.5) == pytest.approx(8)
    assert at(elbow, 0.5) == pytest.approx(20 + 24 * 0.5, abs=0.1)
    assert np.ptp(shoulder) == pytest.approx(2 * 9.88 * 0.9)
    assert thorax.mean() == pytest.approx(0, abs=0.3)


def test_series_are_the_curves():
    rng = np.random.default_rng(0)
    series = rng.normal(size=(3, 2, walker.HARMONICS + 1)) + 1j * rng.normal(size=(3, 2, walker.HARMONICS + 1))
    series[..., 0] = series[..., 0].real
    curves = walker.to_curve(series)
    assert walker.to_series(curves) == pytest.approx(series)
    phases = np.array([[0.0, 0.25], [0.5, 1.5], [0.75, -0.25]])
    values = walker.evaluate(series, phases)
    for f in range(3):
        expected = curves[f][:, (phases[f] * walker.N_PHASE).astype(int) % walker.N_PHASE]
        assert values[f] == pytest.approx(expected)


def repeat(walk, n):
    return walker.Gait(**{name: np.repeat(value, n, 0) for name, value in vars(walk).items()})


@pytest.mark.parametrize("user", range(5))
def test_standing_foot_stands_and_the_foot_keeps_up_with_the_body(user):
    person, height = walker.draw_person(np.random.default_rng([0, 0, user]), 1.0)
    values = walker.combine({name: np.asarray(z)[None] for name, z in person.items()})
    walk = walker.make_gait(values, height)
    n = 512
    phase = np.arange(n) / n
    joints = walker.skeleton(repeat(walk, n), phase[:, None])
    speed, stride = walk.speed[0], walk.stride_time[0]
    for side, lead in (("R", 0.0), ("L", 0.5 + values["tasym"][0])):
        relative = joints[f"toe{side}"][:, 0, 0]
        toe = speed + (np.roll(relative, -1) - np.roll(relative, 1)) * n / (2 * stride)
        own = (phase + lead) % 1
        stance = (own > 0.12) & (own < values["toe_off"][0] - 0.03)
        assert np.abs(toe[stance]).max() < 0.05
        assert toe.mean() == pytest.approx(speed, rel=0.01)
        assert 3 < toe.max() / speed < 6
        length = np.linalg.norm(joints[f"knee{side}"] - joints[f"ankle{side}"], axis=-1)
        assert length == pytest.approx(walker.SHANK * height * values["leg"][0], rel=0.02)


def test_drift_has_the_sd_of_the_table_and_forgets_in_a_window():
    draws = walker.draw_window(np.random.default_rng(0), 40_000, 1.0)["speed"]
    over_windows = np.convolve(draws, np.full(4, 0.25), "valid")
    assert over_windows.std() == pytest.approx(walker.KNOBS["speed"].window, rel=0.05)
    correlation = [np.corrcoef(draws[:-lag], draws[lag:])[0, 1] for lag in (1, 4, 8)]
    assert correlation[0] > 0.7 and correlation[1] < 0.2 and abs(correlation[2]) < 0.05
