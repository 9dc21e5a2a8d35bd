"""Gait: control points, series, and feet that stand."""

import numpy as np
import pytest

from mdlib.simulation import walker


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


@pytest.mark.parametrize("user", range(5))
def test_standing_foot_stands_and_the_foot_keeps_up_with_the_body(user):
    person, height = walker.draw_person(np.random.default_rng([0, 0, user]))
    values = walker.combine({name: np.asarray(z)[None] for name, z in person.items()})
    walk = walker.make_gait(values, height)
    n = 512
    phase = np.arange(n) / n
    joints = walker.skeleton({name: np.repeat(value, n, 0) for name, value in walk.items()}, phase[:, None])
    speed, stride = walk["speed"][0], walk["stride_time"][0]
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
    draws = walker.draw_window(np.random.default_rng(0), 40_000)["speed"]
    over_windows = np.convolve(draws, np.full(4, 0.25), "valid")
    assert over_windows.std() == pytest.approx(walker.KNOBS["speed"].window, rel=0.05)
    correlation = [np.corrcoef(draws[:-lag], draws[lag:])[0, 1] for lag in (1, 4, 8)]
    assert correlation[0] > 0.7 and correlation[1] < 0.2 and abs(correlation[2]) < 0.05
