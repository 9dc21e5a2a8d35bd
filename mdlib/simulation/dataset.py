"""Radar recordings of simulated walking people (`walker`) before a `radar`, cut into overlapping windows.

Speckle, clutter and gait drift are continuous over a walk, so windows overlap as in real recordings.
"""

import json
import os
import shutil
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import maximum_filter1d
from scipy.signal import detrend

from mdlib.simulation import walker as gait
from mdlib.simulation.radar import CHEST, FEET, RADAR_HEIGHT, SNR, echoes, receive, short_time_spectrum, speckle
from mdlib.simulation.walker import CONDITIONS
from mdlib.utils import bar

STEP_CUT = 13.76, 56  # columns from one window to the next, which is one step, and columns of a window
CLOCK_CUT, CLOCK_S = (15, 60), 3.0 / 60  # the same of windows 3 s long; seconds a column
DYNAMIC, THRESHOLD = 38, 0.17  # dB shown; intensities below are set to 0
HALF_STEP = 0.006  # s, half the base of the range derivatives
MARGIN = 4  # columns before and after the windows of a run
CUT_SD, STRETCH_SD = 0.5, 0.015  # windows cut at the steps: error of the cut in columns, relative error of the length


def simulate_recording(user, recording=1, seed=0, n_windows=150, condition="normal", clock=False):
    """Simulate the windows of one recording of one user, who walks back and forth for about two minutes, without turns.

    Args:
        user, recording, seed: numbers from 1, the seed from 0; user k of a seed is the same person in every call.
        n_windows: number of windows; the first ones do not depend on it.
        condition: one of `CONDITIONS`.
        clock: windows of 3 s, which show the cadence, instead of four steps each.

    Returns:
        images: uint8 (n_windows, rows, columns); 0 … 255 span the displayed dynamic range, the top row is the highest
            velocity (`radar.velocity_axis`).
        truth: dict of arrays (n_windows,) in SI units, speeds as the radar sees them; dt is the time of a column,
            v_foot the peak speed of the fastest point of the foot, v_osc the amplitude of the trunk's once-a-step
            oscillation.
        numbers: int (n_windows,), positions in time: consecutive in a walk, gaps of 3 to 17 at the turns. A window
            shares three quarters with the next.
    """
    person, height = gait.draw_person(np.random.default_rng([seed, 0, user]))
    key = [user, recording, CONDITIONS.index(condition), 0]
    session_rng = np.random.default_rng([seed, 1, *key])
    walker = {name: person[name] + z for name, z in gait.draw(session_rng, "session").items()}
    away = bool(session_rng.integers(2))

    images, truths, numbers, number, run = [], [], [], 1, 0
    while sum(map(len, numbers)) < n_windows:
        rng = np.random.default_rng([seed, 2, *key, run])
        windows = int(rng.integers(14, 26))
        power, truth = _simulate_run(rng, walker, height, condition, windows, away, clock)
        cut, truth = _cut(rng, power, truth, windows, clock)
        same = {"run": run + 1, "away": int(away), "height": height}
        truths.append(truth | {name: np.full(windows, value) for name, value in same.items()})
        images.append(cut)
        numbers.append(number + np.arange(windows))
        number += windows + int(rng.integers(3, 18))
        run, away = run + 1, not away
    truth = {name: np.concatenate([t[name] for t in truths])[:n_windows] for name in truths[0]}
    return np.concatenate(images)[:n_windows], truth, np.concatenate(numbers)[:n_windows]


def simulate_dataset(out, users=31, windows=150, size=256, seed=0, condition="normal", recordings=1, progress=True):
    """Write `out/ID_k/ID{k}_case{c}_{r}_Doppler{n}.png` for users 1 … `users`, and the truth to `out/parameters.csv`.

    The folder appears when it is complete; a second call with the same arguments returns at once.

    Args:
        windows: windows per user and condition, spread over the `recordings`; r is the recording, n the position in
            time.
        size: pixels a side of the jet-coloured PNGs.
        condition: one of `CONDITIONS` (case 1 to 4), or "all" for all of them, in `out/<condition>/ID_k/…`.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `out` holds anything else.
    """
    out = Path(out)
    arguments = dict(users=users, windows=windows, size=size, seed=seed, condition=condition, recordings=recordings)
    if condition not in (*CONDITIONS, "all"):
        raise ValueError(f"condition={condition!r}: choose one of {', '.join(CONDITIONS)} or all")
    for name, least in dict(users=1, size=1, recordings=1, seed=0, windows=recordings).items():
        if arguments[name] < least:
            hint = ", one for each recording" if name == "windows" else ""
            raise ValueError(f"{name}={arguments[name]}: must be at least {least}{hint}")
    if _already_there(out, arguments):
        return out
    conditions = CONDITIONS if condition == "all" else (condition,)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        work, rows = Path(temporary) / "set", []
        with bar(users * windows * len(conditions), "simulate", unit="window", show=progress) as done:
            for name, user, recording in product(conditions, range(1, users + 1), range(1, recordings + 1)):
                number = windows // recordings + (recording <= windows % recordings)
                found = simulate_recording(user, recording, seed, number, name)
                folder = work / (name if condition == "all" else "") / f"ID_{user}"
                rows += _write(work, folder, user, recording, name, size, *found)
                done.update(number)
        pd.DataFrame(rows).to_csv(work / "parameters.csv", index=False)
        (work / "simulation.json").write_text(json.dumps(arguments, indent=1))
        if not out.exists():
            os.replace(work, out)
        else:  # empty; it may be the working directory or a mount point, which cannot be replaced
            for path in sorted(work.iterdir(), key=lambda path: path.name == "simulation.json"):
                shutil.move(path, out)
    return out


def colour(image, size):
    """Intensities uint8 (rows, columns) → jet RGB (size, size, 3), each cell enlarged to a block."""
    from mdlib.data.colormaps import colormap_table  # imports torch, which takes a second

    y, x = (np.arange(size) * cells // size for cells in image.shape)
    return colormap_table("jet")[image[np.ix_(y, x)]]


def _already_there(out, arguments):
    """Whether `out` is a complete earlier result."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        earlier = json.loads((out / "simulation.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{out} is not empty and not a simulated data set: choose another folder") from None
    different = ", ".join(k for k in arguments if earlier.get(k) != arguments[k])
    if different:
        raise FileExistsError(f"{out} holds people simulated with another {different}: choose another folder")
    return True


def _write(root, folder, user, recording, condition, size, images, truth, numbers):
    """Write the windows of one recording and yield their rows of parameters.csv, with paths below `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, number in enumerate(numbers):
        path = folder / f"ID{user}_case{CONDITIONS.index(condition) + 1}_{recording}_Doppler{number}.png"
        Image.fromarray(colour(images[i], size)).save(path, compress_level=1)
        row = dict(path=path.relative_to(root).as_posix(), user=user, recording=recording, condition=condition)
        yield row | {"window": number} | {name: f"{values[i]:.6g}" for name, values in truth.items()}


# ---- one walk


def _simulate_run(rng, walker, height, condition, windows, away, clock):
    """Simulate one straight walk: power (columns, rows), lowest velocity first, and truth {name: (columns,)}. The gait
    drifts between knots a hop apart."""
    hop, columns = CLOCK_CUT if clock else STEP_CUT
    n = int(np.ceil((windows - 1) * hop)) + columns + 2 * MARGIN
    position = (np.arange(n) + 0.5) / hop
    knots = np.arange(int(position[-1]) + 2)
    values = gait.combine(walker, gait.draw_window(rng, len(knots)))
    values["speed"] = values["speed"] * np.interp(knots, position, _slow_down(rng, n, hop))
    g = {name: gait.between(a, position) for name, a in gait.make_gait(values, height, condition).items()}
    now = {k: np.interp(position, knots, v) for k, v in values.items() if v.ndim == 1}
    rcs = np.stack([np.interp(position, knots, v) for v in values["rcs"].T], 1)
    rcs[:, gait.SEGMENTS.index("torso")] += 1.5 if condition == "backpack" else 0.0

    if clock:
        dt = np.full(n, CLOCK_S)
        phase = rng.random() + np.cumsum(dt / g["stride_time"]) + now["phase"]
    else:  # columns follow the steps
        dt = g["stride_time"] / (2 * hop)
        phase = (position - MARGIN / hop) / 2 + now["phase"] + 0.5 * rng.integers(2)
    rate = np.gradient(phase) / dt

    heading = np.radians(now["aspect"]) + (0 if away else np.pi)
    moments = np.array([-HALF_STEP, 0.0, HALF_STEP])
    joints = gait.skeleton(g, phase[:, None] + rate[:, None] * moments)
    _seen_from_radar(rng, joints, g["speed"], dt, heading, moments, away)

    distance, amplitude = echoes(joints, rcs, now["girth"], "bag" in condition)
    trunk = distance[:, 1, CHEST]
    up = 1.0 if away else -1.0  # walking direction is up whether the walker comes or goes
    speed = up * (distance[:, 2] - distance[:, 0]) / (2 * HALF_STEP)
    acceleration = up * (distance[:, 2] - 2 * distance[:, 1] + distance[:, 0]) / HALF_STEP**2
    weights = speckle(rng, n, amplitude.shape[1], dt.mean()) * amplitude[:, None]
    spectrum = short_time_spectrum(distance[:, 1], speed, acceleration, weights)
    snr = SNR + now["snr"] - 20 * np.log10(trunk / 8)  # gain control makes up for half of the loss
    power = receive(rng, spectrum, snr)

    stride = int(round(1 / np.diff(phase).mean()))  # columns
    feet = maximum_filter1d(speed[:, FEET].max(2), stride, axis=0)  # the peak of the stride
    return power, {k: now[k] for k in ("arm", "armasym", "legasym", "tasym", "aspect")} | dict(
        dt=dt, phase=phase, v_torso=speed[:, CHEST], v_low=speed.min(1), v_right=feet[:, 0], v_left=feet[:, 1],
        step_hz=2 * rate, speed=g["speed"], snr=snr, range=trunk, dynamic=DYNAMIC + now["dynamic"],
    )  # fmt: skip


def _slow_down(rng, columns, hop):
    """Speed factor over a run: the walker gets under way and slows down for the turn, partly inside the windows."""
    c = np.arange(columns) / hop
    factor = np.ones(columns)
    for end, outwards in ((0, -1), (columns / hop, 1)):
        turn = end + outwards * rng.uniform(-0.5, 2.0)
        factor *= 1 - rng.uniform(0.4, 0.9) * np.exp(-0.5 * ((c - turn) / 0.5) ** 2)
    return factor


def _seen_from_radar(rng, joints, speed, dt, heading, moments, away):
    """Move joints from the body frame into the radar's, in place, along a walk that stays about 3 m away or more:
    speed, dt, heading (F,), `moments` in s about the columns' centres."""
    direction = np.stack([np.cos(heading), np.sin(heading)], 1)
    walk = np.cumsum((speed * dt)[:, None] * direction, 0)
    walk -= walk[len(walk) // 2]
    near = 3.0 + rng.uniform(0, 0.8)
    floor = walk + (near + np.abs(walk[0 if away else -1, 0]), 0.0)
    origin = floor[:, None] + (speed[:, None] * moments)[..., None] * direction[:, None]
    cos, sin = direction[:, None, :1], direction[:, None, 1:]
    for name, q in joints.items():
        x, y, z = q[..., :1], q[..., 1:2], q[..., 2:]
        horizontal = origin + np.concatenate([cos * x - sin * y, sin * x + cos * y], -1)
        joints[name] = np.concatenate([horizontal, z - RADAR_HEIGHT], -1)


def _cut(rng, power, truth, windows, clock):
    """Cut a run into windows: uint8 images (N, rows, columns), top row = highest velocity, and their truth (N,)."""
    hop, columns = CLOCK_CUT if clock else STEP_CUT
    starts, stretch = MARGIN + hop * np.arange(windows), np.ones(windows)
    if not clock:  # every window is cut at the detected steps and scaled to the same length on its own
        starts = starts + np.clip(CUT_SD * rng.standard_normal(windows), -1, 1)
        stretch += np.clip(STRETCH_SD * rng.standard_normal(windows), -0.03, 0.03)
    index = np.round(starts[:, None] + stretch[:, None] * np.arange(columns)).astype(int)
    t = {name: values[index] for name, values in truth.items()}
    t["dt"] = t["dt"] * stretch[:, None]
    db = 10 * np.log10(power + 1e-20)[index]
    dynamic = t.pop("dynamic").mean(1)[:, None, None]
    intensity = np.clip((db - db.max((1, 2), keepdims=True)) / dynamic + 1, 0, 1)
    intensity[intensity < THRESHOLD] = 0
    images = np.ascontiguousarray((intensity * 255 + 0.5).astype(np.uint8)[..., ::-1].transpose(0, 2, 1))

    phase, torso = t.pop("phase"), t.pop("v_torso")
    right, left = t.pop("v_right").mean(1), t.pop("v_left").mean(1)
    hann = np.hanning(columns)  # v_osc: of the trunk's speed without its linear trend
    v_osc = 2 * np.abs((detrend(torso) * hann * np.exp(-4j * np.pi * phase)).sum(1)) / hann.sum()
    rows = dict(
        v_torso=torso.mean(1), v_osc=v_osc, v_foot=(right + left) / 2, v_foot_right=right, v_foot_left=left,
        v_min=t.pop("v_low").min(1), span=t["dt"].sum(1), start_phase=phase[:, 0] % 1.0,
    )  # fmt: skip
    rows |= {name: values.mean(1) for name, values in t.items()}
    return images, rows | {"step_len": rows["speed"] / rows["step_hz"], "stride_t": 2 / rows["step_hz"]}
