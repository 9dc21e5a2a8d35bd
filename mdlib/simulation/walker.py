"""How people walk: the kinematics of one walker, and how walkers, days and steps vary.

Joint curves: R. Boulic, N. Magnenat-Thalmann, D. Thalmann, "A global human walking model with real-time kinematic
personification", The Visual Computer 6 (1990), 344-358. Two corrections, because a radar would show limbs that are not
there: the standing foot stands still (the hip angle is solved for it), and the trunk is fastest just after double
support. Every curve is a Fourier series over the gait cycle, phase 0 = heel strike of that leg; SI units, radians.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

CONDITIONS = ("normal", "backpack", "bag", "bag_phone")
SEGMENTS = ("head", "torso", "shoulders", "upper arm", "forearm", "hip", "thigh", "shank", "foot")

N_PHASE = 128  # points of the phase grid on which curves are built
HARMONICS = 16  # enough for the standing foot to stand still within 5 cm/s
PHASE = np.arange(N_PHASE) / N_PHASE

# Segment lengths as fractions of the stature (Chen 2011).
HEAD, TORSO, SHOULDER, PELVIS, THIGH, SHANK, FOOT, UPPER_ARM, FOREARM = (
    *(0.130, 0.288, 0.1295, 0.0955),
    *(0.245, 0.246, 0.143, 0.188, 0.152),
)


class Knob(NamedTuple):
    """A gait parameter (angles in degrees): its centre, and its SDs between persons, between sessions and within a
    session. `log` parameters are log-normal, their SDs relative; arrays hold a value for each segment or harmonic."""

    centre: float | np.ndarray
    between: float | np.ndarray
    session: float | np.ndarray
    window: float | np.ndarray
    log: bool = False


# RMS of a person's own deviation from the Boulic curves, degrees, spread over harmonics 1-4 falling as 1/k^1.3;
# first axis: common to both sides, opposite on the two sides; second axis: real and imaginary part.
_DECAY = np.arange(1, 5) ** -1.3 / np.sqrt((np.arange(1, 5) ** -2.6).sum())
_JOINT_RMS = np.array([2.2, 3.5, 3.0, 3.5, 5.0, 1.2])  # hip, knee, ankle, shoulder, elbow, thorax


def _curve_sd(common, opposite):
    sd = np.array([common, opposite])[:, None, None, None] * _JOINT_RMS[:, None] * _DECAY
    return np.broadcast_to(sd, (2, 2, 6, 4))


_RCS = np.array([0.9, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.6])  # dB; the torso sets the display's maximum

# fmt: off
KNOBS = {  #                 centre   person  session  window
    "speed":       Knob(      0.80,   0.118,  0.0315,  0.070, log=True),  # m/s at 1.70 m stature
    "cadence":     Knob(      1.00,   0.035,  0.0105,  0.020, log=True),  # over Boulic's
    "leg":         Knob(      1.00,   0.022,  0.0,     0.0,   log=True),  # leg length over .491 stature
    "arm":         Knob(      1.35,   0.30,   0.105,   0.20,  log=True),  # arm-swing gain over Boulic's
    "armasym":     Knob(      0.0,    0.20,   0.042,   0.08),             # arm swing (L-R)/(L+R)
    "legasym":     Knob(      0.0,    0.030,  0.0084,  0.012),            # leg swing (L-R)/(L+R)
    "tasym":       Knob(      0.0,    0.012,  0.0,     0.008),            # step-time asymmetry, fraction of a stride
    "knee":        Knob(      0.97,   0.05,   0.0175,  0.030, log=True),
    "hip":         Knob(      1.00,   0.05,   0.014,   0.024, log=True),
    "toe_off":     Knob(      0.562,  0.010,  0.0042,  0.008),            # phase at which the toe leaves the ground
    "landing":     Knob(      0.962,  0.010,  0.0,     0.008),            # phase at which it is back
    "rise":        Knob(      1.05,   0.10,   0.0,     0.08,  log=True),  # swing pulse s^rise (1-s)^fall
    "fall":        Knob(      0.62,   0.12,   0.0,     0.10,  log=True),
    "fore_aft":    Knob(      1.00,   0.22,   0.056,   0.15,  log=True),  # trunk speed oscillation
    "crest":       Knob(      0.058,  0.018,  0.0,     0.012),            # phase of the fastest trunk
    "cusp":        Knob(      0.50,   0.30,   0.0,     0.0,   log=True),
    "loading":     Knob(     10.0,    3.5,    0.0,     2.0),              # knee flexion under load, deg
    "sway":        Knob(      1.00,   0.25,   0.0,     0.16,  log=True),
    "bob":         Knob(      1.00,   0.20,   0.0,     0.16,  log=True),
    "torsion":     Knob(      1.00,   0.20,   0.0,     0.16,  log=True),
    "lean":        Knob(      0.0,    2.0,    0.7,     1.2),              # deg
    "elbow":       Knob(      0.0,    8.0,    2.1,     0.0),              # deg
    "girth":       Knob(      1.00,   0.10,   0.0,     0.0,   log=True),
    "rcs":         Knob(np.zeros(9),  _RCS,   0.5 * _RCS, 0.7 * _RCS),    # dB a segment
    "curves":      Knob(np.zeros((2, 2, 6, 4)), _curve_sd(1.0, 0.25), _curve_sd(0.24, 0.07), _curve_sd(0.34, 0.12)),
    "aspect":      Knob(      0.0,    0.0,    3.5,     4.5),              # heading off the line of sight, deg
    "phase":       Knob(      0.530,  0.0,    0.0,     0.025),            # gait phase at which a window starts
    "snr":         Knob(      0.0,    0.0,    1.05,    1.5),              # dB
    "dynamic":     Knob(      0.0,    0.0,    0.0,     2.4),              # dynamic range of the display, dB
}
# fmt: on


def draw(rng, column):
    """Sample every parameter's deviation with the SDs of `column` ("between" or "session")."""
    return {name: getattr(knob, column) * rng.standard_normal(np.shape(knob.centre)) for name, knob in KNOBS.items()}


def draw_person(rng):
    """Sample a person: deviations, and stature in metres (101 adults: men 1.755 ± .064, women 1.635 ± .052)."""
    mean, sd = (1.755, 0.064) if rng.random() < 0.5 else (1.635, 0.052)
    height = mean + sd * rng.standard_normal()
    return draw(rng, "between"), height


def draw_window(rng, knots):
    """Sample every parameter's slow drift at `knots` points, four of them per window: name → (knots, …).

    A Gaussian moving average: neighbours are alike, points a window apart are nearly unrelated. The mean over a window
    has the SD of the table.
    """
    lag = np.arange(-6, 7)
    kernel = np.exp(-((lag / 1.5) ** 2))
    kernel /= np.sqrt((np.convolve(kernel, np.full(4, 0.25)) ** 2).sum())
    deviations = {}
    for name, knob in KNOBS.items():
        noise = rng.standard_normal((knots + len(lag) - 1, np.size(knob.centre)))
        smooth = np.lib.stride_tricks.sliding_window_view(noise, len(lag), axis=0) @ kernel
        deviations[name] = knob.window * smooth.reshape(knots, *np.shape(knob.centre))
    return deviations


def combine(*deviations):
    """Parameter values from deviations that add up (person + session + window)."""
    values = {}
    for name, knob in KNOBS.items():
        z = sum(d[name] for d in deviations)
        values[name] = knob.centre * np.exp(z) if knob.log else knob.centre + z
    return values


def to_series(curve):
    """(…, N_PHASE) → complex (…, HARMONICS + 1) with curve(p) = Re Σ c_k exp(2πi k p)."""
    series = np.fft.rfft(curve, axis=-1)[..., : HARMONICS + 1] * (2 / N_PHASE)
    series[..., 0] /= 2
    return series


def to_curve(series):
    """The inverse of `to_series`: (…, harmonics + 1) → (…, N_PHASE)."""
    return np.real(series @ np.exp(2j * np.pi * np.outer(np.arange(series.shape[-1]), PHASE)))


def evaluate(series, phase):
    """Series (F, J, harmonics + 1) at phases (F, D) → (F, J, D)."""
    basis = np.exp(2j * np.pi * phase[:, None, :] * np.arange(series.shape[-1])[:, None])
    return np.real(series @ basis)


def _periodic(points):
    """Periodic monotone cubic through (phase, degrees) pairs, on PHASE."""
    x, y = np.array(sorted((p % 1.0, a) for p, a in points)).T
    x, y = np.concatenate([x + k for k in (-2, -1, 0, 1, 2)]), np.tile(y, 5)
    return PchipInterpolator(x, y)(PHASE)


def boulic_curves(rv):
    """Joint angles in degrees, (6, N_PHASE): hip, knee, ankle, shoulder, elbow, thorax.

    `rv` is the relative velocity, walking speed over hip height, 1/s, 0 < rv <= 3 (Boulic et al. 1990, section 4).
    """
    cycle = 1.346 / np.sqrt(rv)
    dm = (0.752 * cycle - 0.143) / cycle  # fraction of the cycle with the foot on the ground
    r, p, q = min(rv, 0.5), min(max((rv - 0.5) / 0.8, 0.0), 1.0), max((rv - 1.3) / 1.7, 0.0)  # slow, medium, fast
    hip = [(0.2 * q - 0.1, 50 * r + 5 * q), (0.5, -30 * r)]
    hip += [(0.9, 6 * q + 25)] if q > 5e-6 else []  # at rv = 1.3 the first and the last point are one
    knee = [(0.17 - 0.05 * q, 22 * q + 3), (0.4, 3), (0.75 - 0.05 * q, 140 * r - 5 * q), (1 - 0.03 * q, 3 * q + 3)]
    ankle = [(0, 5 * q - 3), (0.08, -30 * r - 3 + 4 * q), (0.5 - 0.1 * q, 22 * r - 3 - 3 * q)]
    ankle += [(dm, -34 * r - 3 - 8 * q), (0.85, 5 * q - 3)]
    elbow = [(0.05, 6 * r + 3 + 8 * p - 6 * q), (0.5 + 0.01 * p + 0.04 * q, 34 * r + 3 + 24 * p + 26 * q)]
    elbow += [(0.9 - 0.1 * q, 10 * r + 3 + 9 * p - 6 * q)]
    swing = 9.88 * rv
    shoulder = 3 - swing / 2 - swing * np.cos(2 * np.pi * PHASE)
    thorax = [(0.1, 4 / 3 * rv), (0.4, -4.5 / 3 * rv), (0.6, -4 / 3 * rv), (0.9, 4.5 / 3 * rv)]
    return np.stack([*map(_periodic, (hip, knee, ankle)), shoulder, _periodic(elbow), _periodic(thorax)])


@cache
def _boulic_table():
    """Relative velocities (56,) and their curves (56, 6, N_PHASE)."""
    rv = np.linspace(0.40, 2.6, 56)
    return rv, np.stack([boulic_curves(r) for r in rv])


def between(values, position):
    """Values (K, …) of K moments at fractional moments `position` (F,), linear in between: (F, …)."""
    i = np.clip(position.astype(int), 0, len(values) - 2)
    f = (position - i).reshape(-1, *[1] * (values.ndim - 1))
    return values[i] * (1 - f) + values[i + 1] * f


def _toe_speed(toe_off, landing, rise, fall):
    """Toe speed over body speed, (K, N_PHASE): 0 on the ground, s^rise (1-s)^fall in swing, mean 1 a stride, so that
    the foot keeps up with the body exactly. Landing may lie beyond the end of the cycle."""
    s = ((PHASE - toe_off[:, None]) % 1.0) / (landing - toe_off)[:, None]
    swing = np.minimum(s, 1)
    pulse = swing ** rise[:, None] * (1 - swing) ** fall[:, None]  # 0 once the toe has landed
    return pulse / pulse.mean(1, keepdims=True)


def _leg(p, side, boulic, speed, stride_time, fore_aft, height, rv):
    """Hip, knee and world foot pitch, radians, (K, 3, N_PHASE): `boulic` with the foot put where it must stand."""
    col = {k: v[:, None] for k, v in p.items() if v.ndim == 1}
    gain = 1 + side * col["legasym"]
    centred = ((PHASE + 0.45) % 1.0) - 0.45  # -.45 … .55, 0 = heel strike
    knee = boulic[:, 1] * col["knee"] * gain + col["loading"] * np.exp(-0.5 * ((centred - 0.13) / 0.05) ** 2)
    knee = np.maximum(knee, 1.0)
    hip = boulic[:, 0] * col["hip"] * gain
    flat = 1 / (1 + np.exp((0.05 - centred) / 0.02)) / (1 + np.exp((centred - 0.42) / 0.03))
    pitch = (1 - flat) * 0.85 * (boulic[:, 2] + hip - knee)
    hip, knee, pitch = np.radians(hip), np.radians(knee), np.radians(pitch)

    skew = np.exp(4 * side * p["legasym"])
    toe = to_series(_toe_speed(p["toe_off"], p["landing"], p["rise"] * skew, p["fall"] * skew))
    toe[:, 1:] /= 2j * np.pi * np.arange(1, HARMONICS + 1)
    toe[:, 0] = 0
    thigh, shank = THIGH * height * col["leg"], SHANK * height * col["leg"]
    # Ankle ahead of the hip joint: where the toe is (body moving on evenly), less what the trunk and the pelvis do,
    # less the foot's own reach; before foot-flat the foot turns about the heel, which is below the ankle.
    late = p["tasym"] if side > 0 else np.zeros_like(p["tasym"])  # the left leg's clock is ahead by this
    shift = np.exp(-2j * np.pi * late[:, None] * np.arange(HARMONICS + 1))
    torsion = np.radians(4 * rv * p["torsion"])[:, None] * np.cos(2 * np.pi * (PHASE - late[:, None]))
    pelvis = -PELVIS * height * np.sin(torsion)
    reach = FOOT * height * (1 - np.cos(np.minimum(pitch, 0)))
    target = (speed * stride_time)[:, None] * to_curve(toe) - to_curve(fore_aft * shift) - pelvis + reach
    boulic_ankle = thigh * np.sin(hip) + shank * np.sin(hip - knee)
    target += (boulic_ankle - target).mean(1, keepdims=True) + 0.02
    for _ in range(6):  # Newton: thigh sin h + shank sin(h - knee) = target
        error = thigh * np.sin(hip) + shank * np.sin(hip - knee) - target
        hip = hip - error / np.maximum(thigh * np.cos(hip) + shank * np.cos(hip - knee), 0.2)
    return np.stack([hip, knee, pitch], 1)


def _arm(p, side, boulic, condition):
    """Shoulder and elbow angle, radians, (K, 2, N_PHASE)."""
    gain = p["arm"] * (1 + side * np.clip(p["armasym"], -0.7, 0.7))
    elbow = boulic[:, 4] + p["elbow"][:, None]
    if condition in ("bag", "bag_phone") and side < 0:
        gain, elbow = 0.25 * gain, 8 + 0.2 * elbow  # the right hand carries
    if condition == "bag_phone" and side > 0:
        gain, elbow = 0.15 * gain, np.full_like(elbow, 125.0)  # the left hand holds a phone at the ear
    mean = boulic[:, 3].mean(1, keepdims=True)
    shoulder = mean + (boulic[:, 3] - mean) * gain[:, None]
    return np.radians(np.stack([shoulder, np.maximum(elbow, 2.0)], 1))


def make_gait(p, height, condition="normal"):
    """The gait of a walker of stature `height` m at K moments, from parameter values `p` (`combine`, each (K, …)).

    Returns:
        dict of arrays with first axis K: "right" and "left", series (K, 6, HARMONICS + 1) in radians of hip, knee, foot
        pitch, shoulder, elbow and thorax; "fore_aft", series of the trunk's displacement in m; "stride_time" in s;
        "rv", the relative velocity in 1/s; "speed", "height" and the parameters that `skeleton` needs.
    """
    p = p | {"speed": p["speed"] * np.sqrt(height / 1.70)}
    if condition == "backpack":
        p |= dict(speed=0.97 * p["speed"], cadence=1.02 * p["cadence"], arm=0.85 * p["arm"], lean=p["lean"] + 6.0)
    if condition == "bag_phone":
        p["speed"] = 0.93 * p["speed"]
    hip_height = (THIGH + SHANK) * height * p["leg"]
    rv = p["speed"] / hip_height
    stride_time = 1.346 / np.sqrt(np.maximum(rv, 0.2)) / p["cadence"]

    # Trunk: fastest just after double support with a cusped crest.
    slow = np.minimum(rv, 0.5)
    amplitude = 0.34 * p["fore_aft"] * 0.084 * slow * (1 - slow) * hip_height
    fore_aft = np.zeros((len(rv), HARMONICS + 1), complex)
    fore_aft[:, 2] = -1j * amplitude * np.exp(-4j * np.pi * p["crest"])
    fore_aft[:, 4] = -1j * amplitude * p["cusp"] / 2 * np.exp(-8j * np.pi * p["crest"])

    grid, table = _boulic_table()
    curves = between(table, np.clip((rv - grid[0]) / (grid[1] - grid[0]), 0, len(grid) - 1.001))
    own = p["curves"][:, :, 0] + 1j * p["curves"][:, :, 1]  # (K, 2, 6, 4)
    own = to_curve(np.concatenate([np.zeros_like(own[..., :1]), own], -1))
    sides = []
    for side in (-1, 1):  # right, left
        mine = curves + own[:, 0] + side * own[:, 1]
        leg = _leg(p, side, mine, p["speed"], stride_time, fore_aft, height, rv)
        arm = _arm(p, side, mine, condition)
        sides.append(to_series(np.concatenate([leg, arm, np.radians(mine[:, 5:6])], 1)))
    gait = {k: p[k] for k in ("speed", "leg", "tasym", "sway", "bob", "torsion", "lean")}
    gait |= dict(right=sides[0], left=sides[1], height=np.full_like(rv, height))
    return gait | dict(fore_aft=fore_aft, stride_time=stride_time, rv=rv)


def _vector(x, y, z):
    return np.stack(np.broadcast_arrays(x, y, z), -1)


def skeleton(gait, phase):
    """Joint positions in the body frame (x forward, y left, z up from the floor; origin moves at body speed), metres.

    `gait` has F moments, `phase` (F, D) gait phases of the right leg in cycles → {joint: (F, D, 3)}.
    """
    g = {name: value[:, None] for name, value in gait.items() if value.ndim == 1}
    h, tau = g["height"], 2 * np.pi
    thigh, shank = THIGH * h * g["leg"], SHANK * h * g["leg"]
    hip_height = thigh + shank
    left_phase = phase + 0.5 + g["tasym"]
    right, left = evaluate(gait["right"], phase), evaluate(gait["left"], left_phase)

    forward = evaluate(gait["fore_aft"][:, None], phase)[:, 0]
    lateral = -0.032 * g["sway"] * hip_height * np.sin(tau * (phase - 0.1))
    vertical = 0.015 * g["bob"] * g["rv"] * hip_height * (np.sin(tau * (2 * phase - 0.35)) - 1)
    pelvis = np.radians(4 * g["torsion"] * g["rv"]) * -np.cos(tau * phase)
    thorax = right[:, 5] * g["torsion"]
    lean = np.radians(g["lean"] + np.sin(tau * (2 * phase - 0.1)) - 1)

    up = _vector(np.sin(lean), 0.0, np.cos(lean))
    base = _vector(forward, lateral, hip_height + 0.04 * h + vertical)
    neck = base + TORSO * h[..., None] * up
    joints = {"base": base, "neck": neck, "head": neck + HEAD * h[..., None] * up}
    for name, side, angles in (("R", -1, right), ("L", 1, left)):
        hip_a, knee_a, pitch, shoulder_a, elbow_a = (angles[:, i] for i in range(5))
        hip = base + side * PELVIS * h[..., None] * _vector(-np.sin(pelvis), np.cos(pelvis), 0.0)
        knee = hip + _vector(thigh * np.sin(hip_a), 0.0, -thigh * np.cos(hip_a))
        ankle = knee + _vector(shank * np.sin(hip_a - knee_a), 0.0, -shank * np.cos(hip_a - knee_a))
        ankle[..., 1] = side * PELVIS * h  # the foot keeps its track while the trunk sways over it
        knee[..., 1] = (hip[..., 1] + ankle[..., 1]) / 2
        toe = ankle + _vector(FOOT * h * np.cos(pitch), 0.0, FOOT * h * np.sin(pitch) - 0.03)
        shoulder = neck + side * SHOULDER * h[..., None] * _vector(-np.sin(thorax), np.cos(thorax), 0.0)
        bend = shoulder_a + elbow_a
        elbow = shoulder + UPPER_ARM * h[..., None] * _vector(np.sin(shoulder_a), 0.0, -np.cos(shoulder_a))
        hand = elbow + FOREARM * h[..., None] * _vector(np.sin(bend), 0.0, -np.cos(bend))
        joints |= {f"hip{name}": hip, f"knee{name}": knee, f"ankle{name}": ankle, f"toe{name}": toe}
        joints |= {f"shoulder{name}": shoulder, f"elbow{name}": elbow, f"hand{name}": hand}
    return joints
