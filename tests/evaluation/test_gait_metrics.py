"""Gait read off windows: what was simulated is recovered; another user's windows, noise and blank ones are far."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import interpolate

from mdlib.data.files import WindowFile
from mdlib.data.windows import WindowSet
from mdlib.evaluation import gait_metrics
from mdlib.evaluation.evidence import Evidence, halves
from mdlib.evaluation.gait_metrics import compare, image_axis, measure, of_user, physics, plausible, read
from mdlib.reports import charts, plots
from mdlib.simulation import dataset
from mdlib.simulation.dataset import simulate_recording
from mdlib.simulation.radar import velocity_axis

USERS = (1, 2, 3, 4, 5)
VELOCITY = np.linspace(-1.0, 4.0, 126)  # 4 cm/s
DT = 0.05


def walker(torso=1.0, swing=0.10, step_s=0.6, peaks=(3.0, 3.0), columns=60):
    """A drawn spectrogram: a bright trunk line, a foot spike every step, peaks alternating left and right."""
    t = np.arange(columns) * DT
    line = torso + swing * np.cos(2 * np.pi * t / step_s)
    image = 0.9 * np.exp(-(((VELOCITY[:, None] - line) / 0.06) ** 2))
    step = np.floor(t / step_s).astype(int)
    height = np.sin(np.pi * (t / step_s - step)) ** 2
    top = torso + (np.array(peaks)[step % 2] - torso) * height
    image = np.maximum(image, 0.4 * ((VELOCITY[:, None] > line) & (VELOCITY[:, None] <= top)))
    return image


@pytest.fixture(scope="module")
def recordings():
    data = [dataset.simulate_recording(u, n_windows=40, clock=True) for u in range(1, 32)]
    truth = {k: np.concatenate([d[1][k][::2] for d in data]) for k in data[0][1]}
    images = np.concatenate([d[0][::2] for d in data]) / 255
    return images, truth, read(images, velocity_axis(), truth["dt"])


def test_a_drawn_walker_is_measured():
    m = read(walker()[None], VELOCITY, DT)
    assert all(v.shape == (1,) for v in m.values())
    m = {k: v[0] for k, v in m.items()}
    assert m["v_torso"] == pytest.approx(1.0, abs=0.02)
    assert m["f_step"] == pytest.approx(1 / 0.6, rel=0.02)
    assert m["step_len"] == pytest.approx(0.6, rel=0.03)
    assert m["v_foot"] == pytest.approx(3.0, abs=0.15)
    assert m["foot_ratio"] == pytest.approx(3.0, rel=0.06)
    assert m["e_outside"] < 1e-3 and m["acf_step"] > 0.6


def test_rows_either_way_up_and_batches_agree():
    images = np.stack([walker(torso=v, step_s=s) for v in (0.8, 1.2) for s in (0.5, 0.7)])
    up = read(images, VELOCITY, DT)
    down = read(images[:, ::-1], VELOCITY[::-1], DT)
    alone = [read(i[None], VELOCITY, DT) for i in images]
    for name in up:
        assert down[name] == pytest.approx(up[name], nan_ok=True)
        assert [a[name][0] for a in alone] == pytest.approx(up[name], nan_ok=True)


def test_ridge_is_the_best_path():
    rng = np.random.default_rng(1)
    velocity = np.arange(8) + 1.0  # away from zero, one row apart
    for _ in range(5):
        image = rng.random((8, 5)) ** 3
        smooth = image.copy()
        smooth[1:-1] = image[:-2] / 4 + image[1:-1] / 2 + image[2:] / 4

        def score(path, smooth=smooth):
            jumps = np.abs(np.diff(path))
            return -np.inf if jumps.max() > 3 else smooth[path, range(5)].sum() - 0.06 * jumps.sum()

        best = np.array(max(itertools.product(range(8), repeat=5), key=lambda p: score(np.array(p))))
        for t, row in enumerate(best):
            rows = np.arange(max(row - 2, 0), min(row + 3, 8))
            weight = image[rows, t] ** 4 + 1e-9
            expected = (weight * velocity[rows]).sum() / weight.sum()
            assert gait_metrics.ridge(image[None], velocity)[0, t] == pytest.approx(expected)


def test_autocorrelation_is_the_sum_it_stands_for():
    image = walker(columns=40)
    _, acf = gait_metrics.step_period(image[None], np.array([DT]))
    x = image - image.mean(1, keepdims=True)
    expected = np.array([(x[:, : 40 - lag] * x[:, lag:]).sum() / (40 - lag) for lag in range(40)])
    assert acf[0] == pytest.approx(expected / expected[0])


def test_envelopes_bound_what_is_bright():
    image = np.zeros((1, 126, 10))
    image[0, 40:90] = 0.5
    image[0, 110] = 0.9  # a single row is no echo
    upper, lower, u97, l03 = gait_metrics.envelopes(image, VELOCITY)
    assert upper == pytest.approx(VELOCITY[89]) and lower == pytest.approx(VELOCITY[40])
    assert (l03 <= VELOCITY[42]).all() and (u97 >= VELOCITY[87]).all()


def test_noise_floor_lifts_the_threshold():
    noise = np.random.default_rng(0).uniform(0.2, 0.3, (1, 64, 64))
    assert np.percentile(noise, 75) < gait_metrics.threshold(noise)[0] < 0.5
    assert gait_metrics.threshold(np.zeros((1, 64, 64)))[0] == 0.18


@pytest.mark.parametrize(
    ("metric", "truth", "each", "per_user"),
    [
        ("v_torso", "v_torso", 0.99, 0.99),
        ("f_step", "step_hz", 0.88, 0.97),
        ("step_len", "step_len", 0.83, 0.97),
        ("v_foot", "v_foot", 0.70, 0.90),
        ("u97", "v_foot", 0.70, 0.91),
    ],
)
def test_truth_of_the_simulator_is_recovered(recordings, metric, truth, each, per_user):
    _, t, m = recordings
    ok = np.isfinite(m[metric])
    assert ok.mean() > 0.99
    assert np.corrcoef(m[metric][ok], t[truth][ok])[0, 1] > each
    means = [np.nanmean(a.reshape(31, -1), axis=1) for a in (m[metric], t[truth])]
    assert np.corrcoef(*means)[0, 1] > per_user


def test_walkers_are_plausible_and_noise_is_not(recordings):
    images, truth, metrics = recordings
    assert plausible(metrics).mean() > 0.8
    shuffled = np.random.default_rng(0).permuted(images, axis=2)
    noise = read(shuffled, velocity_axis(), truth["dt"])
    assert plausible(noise).mean() < 0.05


def test_an_image_without_contrast_gives_nan_and_leaves_the_others_alone():
    images = np.stack([np.zeros((126, 60)), walker(), np.ones((126, 60))])
    m = read(images, VELOCITY, DT)
    assert all(np.isnan(v[[0, 2]]).all() for v in m.values())
    assert np.isfinite(m["v_torso"][1])
    assert plausible(m)[[0, 2]].sum() == 0


@pytest.fixture(scope="module")
def simulated():
    """Walkers as 64 px windows, eighty in time order of each user, and the true trunk speed of each window."""
    data = [simulate_recording(user, n_windows=80) for user in USERS]
    native = torch.from_numpy(np.concatenate([images for images, _, _ in data])).unsqueeze(1).float()
    images = interpolate(interpolate(native, (256, 256)), (64, 64), mode="area").round().to(torch.uint8)
    files = tuple(
        WindowFile(f"ID_{user}/w{number}.png", user, "", "w", int(number))
        for user, (_, _, numbers) in zip(USERS, data, strict=True)
        for number in numbers
    )
    labels = torch.arange(len(USERS)).repeat_interleave(80)
    speeds = np.stack([truth["v_torso"] for _, truth, _ in data])
    return WindowSet(images, labels, USERS, files, "jet", "simulated"), speeds


@pytest.fixture(scope="module")
def evidence(simulated):
    """Held-out real windows stand for generated ones; the sets share no step."""
    place = torch.arange(400) % 80
    part = lambda first, end: simulated[0].select(torch.where((place >= first) & (place < end))[0])
    return Evidence(train=part(24, 32), val=part(36, 48), test=part(48, 80), generated=part(0, 20), gap=4)


@pytest.fixture(scope="module")
def real(evidence):
    """What was read off the real windows."""
    unseen = measure(evidence.unseen)
    first, second = halves(evidence.unseen, evidence.gap)
    return {
        "unseen": unseen,
        "train": measure(evidence.train),
        "first": unseen.iloc[first],
        "second": unseen.iloc[second],
    }


@pytest.fixture(scope="module")
def honest(evidence):
    return physics(evidence)


def changed(windows: WindowSet, rows, images) -> WindowSet:
    """The windows with other images (uint8, or 0 for blank) in some rows."""
    new = windows.images.clone()
    new[rows] = images
    return replace(windows, images=new)


def gaits(values: list[list[float]], name="torso_speed") -> pd.DataFrame:
    """One metric's values of each user, the others unread."""
    flat = np.concatenate([np.array(own, float) for own in values])
    every = {other: np.full(len(flat), np.nan) for other in gait_metrics.METRICS} | {name: flat}
    labels = np.repeat(np.arange(len(values)), [len(own) for own in values])
    return pd.DataFrame({**every, "plausible": True, "label": labels})


def test_the_rows_of_an_image_span_the_radars_velocities():
    native = velocity_axis()
    assert image_axis(len(native)) == pytest.approx(native)
    assert image_axis(61) == pytest.approx(native.reshape(61, 2).mean(1))


@pytest.mark.parametrize("size, tolerance", [(64, 0.04), (32, 0.08)])
def test_trunk_speed_is_that_of_the_simulator(simulated, size, tolerance):
    windows, speeds = simulated
    some = windows.select(range(0, 400, 4))
    small = replace(some, images=interpolate(some.images.float(), (size, size), mode="area").to(torch.uint8))
    found = measure(small)["torso_speed"]
    assert np.abs(found / speeds.flatten()[::4] - 1).mean() < tolerance


def test_distances_are_means_over_users_at_equal_counts():
    rng = np.random.default_rng(0)
    own = {name: rng.normal(size=(2, 6)) for name in ("generated", "unseen", "train", "first", "second")}
    sets = {name: gaits(values.tolist()) for name, values in own.items()}
    found = compare(sets, num_users=2)["torso_speed"]
    apart = lambda one, other: np.abs(np.sort(own[one]) - np.sort(own[other])).mean()
    assert found["value"] == pytest.approx(apart("generated", "unseen"))
    assert found["real_vs_real"] == pytest.approx(apart("first", "second"))
    assert found["train"] == pytest.approx(apart("train", "unseen"))
    assert np.mean(found["per_user"]) == pytest.approx(found["value"]) and len(found["per_user"]) == 2
    assert found["ratio"] == pytest.approx(found["value"] / found["real_vs_real"]) and found["n"] == 12
    assert found["user_correlation"] is None and "ci95" not in found, "two users"
    expected = np.percentile(of_user(sets["unseen"], "torso_speed", 1), gait_metrics.SPREAD)
    assert found["unseen_spread"][1] == pytest.approx(expected.tolist())
    sets["first"] = gaits([own["first"][0, :2].tolist(), own["first"][1, :3].tolist()])
    assert compare(sets, num_users=2)["torso_speed"]["n"] == 5


def test_what_is_generated_leaves_the_yardstick_alone():
    rng = np.random.default_rng(0)
    sets = {name: gaits(rng.normal(size=(3, 9)).tolist()) for name in ("unseen", "train", "first", "second")}
    few, many = (compare({"generated": gaits(rng.normal(size=(3, n)).tolist()), **sets}, 3) for n in (9, 40))
    assert few["torso_speed"]["real_vs_real"] == many["torso_speed"]["real_vs_real"]


def test_the_report_compares_held_out_windows_their_halves_and_the_training_windows(evidence, real, honest):
    assert compare({"generated": measure(evidence.generated), **real}, len(USERS)) == honest
    assert tuple(honest) == gait_metrics.NAMES


def test_held_out_real_windows_are_as_near_as_real_ones(honest):
    for name in ("torso_speed", "step_length", "upper_envelope", "bandwidth"):
        assert 0.4 < honest[name]["ratio"] < 1.7, name
    assert honest["torso_speed"]["user_correlation"] > 0.9
    assert abs(honest["plausible"]["value"] - honest["plausible"]["real"]) < 0.15
    assert honest["plausible"]["real"] > 0.7
    json.dumps(honest, allow_nan=False)


def test_users_are_told_apart_by_their_speed(simulated, evidence, honest):
    truth = simulated[1].mean(1)
    speed = honest["torso_speed"]
    assert np.corrcoef(truth, speed["generated_means"])[0, 1] > 0.95
    order = lambda values: np.argsort(values)[[0, -1]].tolist()
    assert order(speed["generated_means"]) == order(speed["unseen_means"]) == order(truth)


def test_windows_of_another_user_are_far(evidence, real, honest):
    shifted = changed(evidence.generated, slice(None), evidence.generated.images.roll(20, 0))
    found = compare({**real, "generated": measure(shifted)}, len(USERS))
    for name in ("torso_speed", "step_length", "upper_envelope"):
        assert found[name]["value"] > 1.5 * honest[name]["value"], name
        assert found[name]["train"] == pytest.approx(honest[name]["train"])
    assert found["torso_speed"]["user_correlation"] < 0.5


def test_noise_is_not_plausible(evidence, real, honest):
    noise = np.random.default_rng(0).integers(0, 256, evidence.generated.images.shape).astype(np.uint8)
    noisy = changed(evidence.generated, slice(None), torch.from_numpy(noise))
    found = compare({**real, "generated": measure(noisy)}, len(USERS))
    assert found["plausible"]["value"] < 0.05 and found["plausible"]["real"] == honest["plausible"]["real"]
    assert found["bandwidth"]["ratio"] > 3
    json.dumps(found, allow_nan=False)


def test_blank_windows_and_a_user_without_any_do_not_spoil_the_others(evidence, real, honest):
    blank = changed(evidence.generated, slice(0, 20, 2), 0)  # half of the first user's
    some = blank.select(torch.where(blank.labels != 2)[0])
    found = compare({**real, "generated": measure(some)}, len(USERS))
    speed = found["torso_speed"]
    of_first = measure(evidence.generated.select(range(1, 20, 2)))["torso_speed"]
    assert speed["generated_means"][0] == pytest.approx(of_first.mean())
    assert speed["generated_means"][2] is None and speed["unseen_means"][2] is not None
    assert speed["generated_means"][3:] == honest["torso_speed"]["generated_means"][3:]
    assert speed["n"] == honest["torso_speed"]["n"] * 4 / 5 and speed["user_correlation"] > 0.9
    assert found["plausible"]["value"] < honest["plausible"]["value"] and found["plausible"]["n"] == 80
    json.dumps(found, allow_nan=False)
    assert len(plots.to_png(charts.user_means(found))) > 1000


def test_what_cannot_be_read_is_null_with_its_reason(evidence, real):
    blank = changed(evidence.generated, slice(None), 0)
    found = compare({**real, "generated": measure(blank)}, len(USERS))
    assert found["plausible"]["value"] == 0
    for name in set(gait_metrics.NAMES) - {"plausible"}:
        assert found[name]["value"] is None and "from which it can be measured" in found[name]["reason"], name
    rgb = {name: getattr(evidence, name) for name in ("train", "val", "test", "generated")}
    rgb = {name: replace(part, images=part.images.expand(-1, 3, -1, -1)) for name, part in rgb.items()}
    found = physics(replace(evidence, **rgb))
    assert found.keys() == set(gait_metrics.NAMES)
    assert {metric["reason"] for metric in found.values()} == {"not measured on RGB windows: set channels=1"}
    with pytest.raises(ValueError, match="3 channels"):
        measure(rgb["train"])


def test_the_chart_shows_every_metric(honest):
    panels = [axis for axis in charts.user_means(honest).axes if axis.get_title()]
    labels = [charts.describe("physics", name)["label"] for name in gait_metrics.METRICS]
    assert [axis.get_title() for axis in panels] == labels
    _, dots = panels[0].get_lines()
    assert dots.get_ydata() == pytest.approx(honest["torso_speed"]["generated_means"])
