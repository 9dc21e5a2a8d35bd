import itertools

import numpy as np
import pytest

from mdlib.evaluation import gait_physics
from mdlib.simulation import dataset
from mdlib.simulation.radar import velocity_axis

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
def simulated():
    data = [dataset.simulate_recording(u, n_windows=40, clock=True) for u in range(1, 32)]
    truth = {k: np.concatenate([d[1][k][::2] for d in data]) for k in data[0][1]}
    images = np.concatenate([d[0][::2] for d in data]) / 255
    return images, truth, gait_physics.measure(images, velocity_axis(), truth["dt"])


def test_a_drawn_walker_is_measured():
    m = gait_physics.measure(walker()[None], VELOCITY, DT)
    assert set(m) == set(gait_physics.METRICS) and all(v.shape == (1,) for v in m.values())
    m = {k: v[0] for k, v in m.items()}
    assert m["v_torso"] == pytest.approx(1.0, abs=0.02)
    assert m["v_osc"] == pytest.approx(0.10, abs=0.015)
    assert m["f_step"] == pytest.approx(1 / 0.6, rel=0.02)
    assert m["f_step_cvd"] == pytest.approx(1 / 0.6, rel=0.05)
    assert m["step_len"] == pytest.approx(0.6, rel=0.03)
    assert m["v_foot"] == pytest.approx(3.0, abs=0.15)
    assert m["foot_ratio"] == pytest.approx(3.0, rel=0.06)
    assert abs(m["asym_v"]) < 0.02
    assert m["e_outside"] < 1e-3 and m["acf_step"] > 0.6


def test_alternating_peaks_are_an_asymmetry():
    even, uneven = (gait_physics.measure(walker(peaks=p)[None], VELOCITY, DT) for p in ((3.0, 3.0), (3.4, 2.6)))
    assert abs(uneven["asym_v"][0]) == pytest.approx(0.8 / 6.0, rel=0.2)
    assert uneven["asym_acf"] > even["asym_acf"]


def test_energy_shares_sum_to_what_lies_between():
    image = walker()[None] * 0.9 + 0.1 * np.random.default_rng(0).random((1, 126, 60))
    m = gait_physics.measure(image, VELOCITY, DT)
    gap = image[0, (VELOCITY >= -0.08) & (VELOCITY < 0)].sum() / image.sum()
    shares = sum(m[k][0] for k in ("e_neg", "e_low", "e_torso", "e_hump", "e_spike"))
    assert shares == pytest.approx(1 - gap, abs=0.01)


def test_rows_either_way_up_and_batches_agree():
    images = np.stack([walker(torso=v, step_s=s) for v in (0.8, 1.2) for s in (0.5, 0.7)])
    up = gait_physics.measure(images, VELOCITY, DT)
    down = gait_physics.measure(images[:, ::-1], VELOCITY[::-1], DT, chunk=3)
    alone = [gait_physics.measure(i[None], VELOCITY, DT) for i in images]
    for name in gait_physics.METRICS:
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
            assert gait_physics.ridge(image[None], velocity)[0, t] == pytest.approx(expected)


def test_autocorrelation_is_the_sum_it_stands_for():
    image = walker(columns=40)
    _, acf = gait_physics.step_period(image[None], np.array([DT]))
    x = image - image.mean(1, keepdims=True)
    expected = np.array([(x[:, : 40 - lag] * x[:, lag:]).sum() / (40 - lag) for lag in range(40)])
    assert acf[0] == pytest.approx(expected / expected[0])


def test_envelopes_bound_what_is_bright():
    image = np.zeros((1, 126, 10))
    image[0, 40:90] = 0.5
    image[0, 110] = 0.9  # a single row is no echo
    upper, lower, u97, l03 = gait_physics.envelopes(image, VELOCITY)
    assert upper == pytest.approx(VELOCITY[89]) and lower == pytest.approx(VELOCITY[40])
    assert (l03 <= VELOCITY[42]).all() and (u97 >= VELOCITY[87]).all()


def test_noise_floor_lifts_the_threshold():
    noise = np.random.default_rng(0).uniform(0.2, 0.3, (1, 64, 64))
    assert np.percentile(noise, 75) < gait_physics.threshold(noise)[0] < 0.5
    assert gait_physics.threshold(np.zeros((1, 64, 64)))[0] == 0.18


@pytest.mark.parametrize(
    ("metric", "truth", "each", "per_user"),
    [
        ("v_torso", "v_torso", 0.99, 0.99),
        ("f_step", "step_hz", 0.88, 0.97),
        ("f_step_cvd", "step_hz", 0.75, 0.90),
        ("step_len", "step_len", 0.83, 0.97),
        ("v_foot", "v_foot", 0.70, 0.90),
        ("u97", "v_foot", 0.70, 0.91),
        ("v_osc", "v_osc", 0.75, 0.85),
    ],
)
def test_truth_of_the_simulator_is_recovered(simulated, metric, truth, each, per_user):
    _, t, m = simulated
    ok = np.isfinite(m[metric])
    assert ok.mean() > 0.99
    assert np.corrcoef(m[metric][ok], t[truth][ok])[0, 1] > each
    means = [np.nanmean(a.reshape(31, -1), axis=1) for a in (m[metric], t[truth])]
    assert np.corrcoef(*means)[0, 1] > per_user


def test_walkers_are_plausible_and_noise_is_not(simulated):
    images, truth, metrics = simulated
    assert gait_physics.plausible(metrics).mean() > 0.8
    shuffled = np.random.default_rng(0).permuted(images, axis=2)
    noise = gait_physics.measure(shuffled, velocity_axis(), truth["dt"])
    assert gait_physics.plausible(noise).mean() < 0.05


def test_an_image_without_contrast_gives_nan_and_leaves_the_others_alone():
    images = np.stack([np.zeros((126, 60)), walker(), np.ones((126, 60))])
    m = gait_physics.measure(images, VELOCITY, DT)
    assert all(np.isnan(v[[0, 2]]).all() for v in m.values())
    assert np.isfinite(m["v_torso"][1])
    assert gait_physics.plausible(m)[[0, 2]].sum() == 0
    assert all(len(v) == 0 for v in gait_physics.measure(np.zeros((0, 126, 60)), VELOCITY, DT).values())


@pytest.mark.parametrize(
    ("images", "velocity", "message"),
    [
        (np.zeros((126, 60)), VELOCITY, "expected"),
        (np.zeros((1, 126, 60)), VELOCITY[:-1], "velocity"),
        (np.full((1, 126, 60), 200.0), VELOCITY, "255"),
    ],
)
def test_wrong_input_is_named(images, velocity, message):
    with pytest.raises(ValueError, match=message):
        gait_physics.measure(images, velocity, DT)
