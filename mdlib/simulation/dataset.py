"""Radar recordings of simulated walking people: the data set that needs no data.

A person (`walker`) walks to and fro before a radar (`radar`) for about two minutes; windows four steps long
are cut one step apart and brought to dB of the display. Speckle, clutter and gait drift run on through a walk, so that
overlapping windows share what they share in real recordings, and a random split leaks.

`simulate_dataset` writes a folder of PNG windows, `simulate_recording` returns the windows of one recording.
"""

import csv
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter1d

from mdlib.simulation import walker as gait
from mdlib.simulation.radar import CHEST, FEET, PRESETS, echoes, receive, short_time_spectrum, speckle, velocity_axis
from mdlib.simulation.walker import CONDITIONS
from mdlib.utils import bar

__all__ = ["CONDITIONS", "DIFFICULTIES", "PRESETS", "ROUTES", "simulate_dataset", "simulate_recording", "velocity_axis"]

ROUTES = ("line", "free")
DIFFICULTIES = {  # multipliers of the SDs: between persons, between sessions, within a session
    "easy": (1.4, 0.7, 0.7),
    "default": (1.0, 1.0, 1.0),
    "hard": (0.8, 2.0, 1.0),
}
HALF_STEP = 0.006  # s, half the base of the range derivatives
MARGIN = 4  # columns before and after the windows of a run
CUT_SD, STRETCH_SD = 0.5, 0.015  # windows that follow the gait: error of the cut in columns, of their length


def _slow_down(rng, columns, hop):
    """Speed factor over a run: the walker gets under way and slows down for the turn, partly inside the windows."""
    c = np.arange(columns) / hop
    factor = np.ones(columns)
    for end, outwards in ((0, -1), (columns / hop, 1)):
        turn = end + outwards * rng.uniform(-0.5, 2.0)
        factor *= 1 - rng.uniform(0.4, 0.9) * np.exp(-0.5 * ((c - turn) / 0.5) ** 2)
    return factor


def _path(rng, speed, dt, heading, away):
    """Floor positions (F, 2), seen from the radar at the origin, of a walk that stays about 3 m off or more."""
    step = (speed * dt)[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1)
    walk = np.cumsum(step, 0)
    walk -= walk[len(walk) // 2]
    near = 3.0 + rng.uniform(0, 0.8)
    return walk + (near + np.abs(walk[0 if away else -1, 0]), 0.0)


def _seen_from_radar(joints, floor, heading, speed, moments, radar_height):
    """Joints from the body frame into the radar's, in place; `moments` are about the columns' centres, s."""
    direction = np.stack([np.cos(heading), np.sin(heading)], 1)
    origin = floor[:, None] + (speed[:, None] * moments)[..., None] * direction[:, None]
    cos, sin = direction[:, None, :1], direction[:, None, 1:]
    for name, q in joints.items():
        x, y, z = q[..., :1], q[..., 1:2], q[..., 2:]
        horizontal = origin + np.concatenate([cos * x - sin * y, sin * x + cos * y], -1)
        joints[name] = np.concatenate([horizontal, z - radar_height], -1)


def _simulate_run(rng, walker, height, within, preset, condition, route, windows, away):
    """One straight walk: power (columns, rows), lowest velocity first, and truth {name: (columns,)}.

    Columns are computed once and shared by the windows cut from them. The gait drifts between knots a hop apart.
    """
    p = PRESETS[preset]
    n = int(np.ceil((windows - 1) * p.hop)) + p.columns + 2 * MARGIN
    position = (np.arange(n) + 0.5) / p.hop
    knots = np.arange(int(position[-1]) + 2)
    values = gait.combine(walker, gait.draw_window(rng, len(knots), within))
    values["speed"] = values["speed"] * np.interp(knots, position, _slow_down(rng, n, p.hop))
    g = gait.make_gait(values, height, condition).at(position)
    now = {k: np.interp(position, knots, v) for k, v in values.items() if v.ndim == 1}
    rcs = np.stack([np.interp(position, knots, v) for v in values["rcs"].T], 1)
    rcs[:, gait.SEGMENTS.index("torso")] += 1.5 if condition == "backpack" else 0.0

    if p.column_s is None:  # columns follow the steps
        dt = g.stride_time / (2 * p.hop)
        phase = (position - MARGIN / p.hop) / 2 + now["phase"] + 0.5 * rng.integers(2)
    else:
        dt = np.full(n, p.column_s)
        phase = rng.random() + np.cumsum(dt / g.stride_time) + now["phase"]
    rate = np.gradient(phase) / dt

    heading = np.radians(now["aspect"]) + (0 if away else np.pi)
    if route == "free":  # weaves through ±45°, at 12° a metre in the mean square
        heading = heading + np.radians(45) * np.sin(rng.uniform(0, 2 * np.pi) + np.cumsum(g.speed * dt) / 2.65)
    moments = np.array([-HALF_STEP, 0.0, HALF_STEP])
    joints = gait.skeleton(g, phase[:, None] + rate[:, None] * moments)
    floor = _path(rng, g.speed, dt, heading, away)
    _seen_from_radar(joints, floor, heading, g.speed, moments, p.radar_height)

    distance, amplitude = echoes(joints, rcs, now["girth"], preset, "bag" in condition)
    trunk = distance[:, 1, CHEST]
    up = 1.0 if away else -1.0  # walking direction is up whether the walker comes or goes
    speed = up * (distance[:, 2] - distance[:, 0]) / (2 * HALF_STEP)
    acceleration = up * (distance[:, 2] - 2 * distance[:, 1] + distance[:, 0]) / HALF_STEP**2
    weights = speckle(rng, n, amplitude.shape[1], dt.mean()) * amplitude[:, None]
    spectrum = short_time_spectrum(distance[:, 1], speed, acceleration, weights, preset)
    snr = p.snr + now["snr"] - 20 * np.log10(trunk / 8)  # gain control makes up for half of the loss
    power = receive(rng, spectrum, snr, preset)

    stride = int(round(1 / np.diff(phase).mean()))  # columns
    feet = maximum_filter1d(speed[:, FEET].max(2), stride, axis=0)  # the peak of the stride
    same = {k: now[k] for k in ("arm", "armasym", "legasym", "tasym", "aspect")}
    return power, same | dict(
        dt=dt, phase=phase, v_torso=speed[:, CHEST], v_low=speed.min(1), v_right=feet[:, 0], v_left=feet[:, 1],
        step_hz=2 * rate, speed=g.speed, snr=snr, range=trunk, dynamic=p.dynamic + now["dynamic"],
    )  # fmt: skip


def _oscillation(v, phase):
    """Amplitude of the once-a-step oscillation of `v` (windows, columns), linear trend removed, Hann weighted."""
    c = np.arange(v.shape[1]) - (v.shape[1] - 1) / 2
    v = v - v.mean(1, keepdims=True)
    v = v - (v @ c)[:, None] / (c @ c) * c
    w = np.hanning(v.shape[1])
    return 2 * np.abs((v * w * np.exp(-4j * np.pi * phase)).sum(1)) / w.sum()


def _cut(rng, power, truth, windows, preset):
    """Windows of a run as uint8 images (N, rows, columns), top row = highest velocity, and their truth (N,)."""
    p = PRESETS[preset]
    starts, stretch = MARGIN + p.hop * np.arange(windows), np.ones(windows)
    if p.column_s is None:  # every window is cut at the steps found and brought to the same length on its own
        starts = starts + np.clip(CUT_SD * rng.standard_normal(windows), -1, 1)
        stretch += np.clip(STRETCH_SD * rng.standard_normal(windows), -0.03, 0.03)
    index = np.round(starts[:, None] + stretch[:, None] * np.arange(p.columns)).astype(int)
    t = {name: values[index] for name, values in truth.items()}
    t["dt"] = t["dt"] * stretch[:, None]
    db = 10 * np.log10(power + 1e-20)[index]
    dynamic = t.pop("dynamic").mean(1)[:, None, None]
    intensity = np.clip((db - db.max((1, 2), keepdims=True)) / dynamic + 1, 0, 1)
    intensity[intensity < p.threshold] = 0
    images = np.ascontiguousarray((intensity * 255 + 0.5).astype(np.uint8)[..., ::-1].transpose(0, 2, 1))

    phase, torso = t.pop("phase"), t.pop("v_torso")
    right, left = t.pop("v_right").mean(1), t.pop("v_left").mean(1)
    rows = dict(
        v_torso=torso.mean(1), v_osc=_oscillation(torso, phase), v_foot=(right + left) / 2, v_foot_right=right,
        v_foot_left=left, v_min=t.pop("v_low").min(1), span=t["dt"].sum(1), start_phase=phase[:, 0] % 1.0,
    )  # fmt: skip
    rows |= {name: values.mean(1) for name, values in t.items()}
    return images, rows | {"step_len": rows["speed"] / rows["step_hz"], "stride_t": 2 / rows["step_hz"]}


def _check(preset, conditions, route, difficulty, **least_one):
    """One clear line for the first argument that does not fit."""
    choices = [("preset", preset, PRESETS), ("route", route, ROUTES), ("difficulty", difficulty, DIFFICULTIES)]
    for name, value, allowed in choices + [("condition", c, CONDITIONS) for c in conditions]:
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")
    for name, value in least_one.items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")


def simulate_recording(
    user,
    recording=1,
    seed=0,
    n_windows=150,
    preset="ti77_cycle",
    condition="normal",
    route="line",
    difficulty="default",
):
    """Windows of one recording of one user: the person walks to and fro, turns are left out.

    Returns:
        images: uint8 (n_windows, rows, columns), the native grid; 0 … 255 span the displayed dynamic range, the top row
            is the highest velocity (`velocity_axis`).
        truth: dict of arrays (n_windows,) in SI units, speeds as the radar sees them; dt is the time a column stands
            for, v_foot the peak speed of the fastest point of the foot, v_osc the amplitude of the trunk's once-a-step
            oscillation.
        numbers: int (n_windows,), the windows' places in time: consecutive in a walk, gaps of 3 to 17 at the turns. A
            window shares three quarters with the next.

    User k of a seed is the same person in every call, and the first windows do not depend on `n_windows`. Raises
    ValueError on an unknown preset, condition, route or difficulty and on numbers below 1 (seed: 0).
    """
    _check(preset, [condition], route, difficulty, user=user, recording=recording, n_windows=n_windows, seed=seed)
    between, session, within = DIFFICULTIES[difficulty]
    person, height = gait.draw_person(np.random.default_rng([seed, 0, user]), between)
    key = [user, recording, CONDITIONS.index(condition), ROUTES.index(route)]
    session_rng = np.random.default_rng([seed, 1, *key])
    walker = {name: person[name] + z for name, z in gait.draw(session_rng, "session", session).items()}
    away = bool(session_rng.integers(2))

    images, truths, numbers, number, run = [], [], [], 1, 0
    while sum(map(len, numbers)) < n_windows:
        rng = np.random.default_rng([seed, 2, *key, run])
        windows = int(rng.integers(14, 26))
        power, truth = _simulate_run(rng, walker, height, within, preset, condition, route, windows, away)
        pictures, truth = _cut(rng, power, truth, windows, preset)
        for name, value in (("run", run + 1), ("away", int(away)), ("height", height)):
            truth[name] = np.full(windows, value)
        images.append(pictures)
        truths.append(truth)
        numbers.append(number + np.arange(windows))
        number += windows + int(rng.integers(3, 18))
        run, away = run + 1, not away
    truth = {name: np.concatenate([t[name] for t in truths])[:n_windows] for name in truths[0]}
    return np.concatenate(images)[:n_windows], truth, np.concatenate(numbers)[:n_windows]


# ---------------------------------------------------------------------------------------------------------- files


def jet():
    """MATLAB's jet(256): uint8 (256, 3). As in `mdlib.data.colormaps`, which needs torch."""
    x = np.arange(1, 257)[:, None] / 256
    return np.round(255 * np.clip(1.5 - np.abs(4 * x - (3, 2, 1)), 0, 1)).astype(np.uint8)


def colour(images, size=256):
    """Intensities uint8 (N, rows, columns) → jet RGB (N, size, size, 3), each cell enlarged to a block."""
    _, rows, columns = images.shape
    y, x = np.arange(size) * rows // size, np.arange(size) * columns // size
    return jet()[images[:, y][:, :, x]]


def simulate_dataset(
    out,
    users=31,
    windows=150,
    size=256,
    seed=0,
    condition="normal",
    preset="ti77_cycle",
    recordings=1,
    route="line",
    difficulty="default",
    progress=True,
):
    """Write `out/ID_k/ID{k}_case{c}_{r}_Doppler{n}.png` for users 1 … `users`, and `out/parameters.csv` with the truth.

    The PNGs are `size` × `size` pixels and jet-coloured, r is the recording, n the window's place in time. `windows`
    are per user and condition, spread over the `recordings`. case1 = normal, case2 = backpack, case3 = bag, case4 =
    bag_phone; with `condition` "all" or a list the files go to `out/<condition>/ID_k/…`. The folder appears when it
    is complete; a second call with the same arguments returns at once. Returns the Path of `out`. Raises ValueError on
    arguments that do not fit and FileExistsError when `out` holds anything else.
    """
    out = Path(out)
    several = condition == "all" or not isinstance(condition, str)
    conditions = list(CONDITIONS if condition == "all" else condition if several else [condition])
    _check(preset, conditions, route, difficulty, users=users, size=size, recordings=recordings, seed=seed)
    if not conditions or len(set(conditions)) < len(conditions):
        raise ValueError(f"condition={conditions}: name each condition once, at least one")
    if windows < recordings:
        raise ValueError(f"windows={windows}: must be at least one for each of the {recordings} recordings")
    arguments = dict(
        users=users, windows=windows, size=size, seed=seed, condition=conditions if several else condition,
        preset=preset, recordings=recordings, route=route, difficulty=difficulty,
    )  # fmt: skip
    if _already_there(out, arguments):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        total = users * windows * len(conditions)
        with bar(total, "simulate", unit="window", show=progress) as done:
            rows = []
            for name in conditions:
                folder = work / name if several else work
                for user in range(1, users + 1):
                    rows += _write_user(folder, work, user, name, arguments, done)
        with open(work / "parameters.csv", "w", newline="") as f:
            table = csv.DictWriter(f, rows[0])
            table.writeheader()
            table.writerows(rows)
        (work / "simulation.json").write_text(json.dumps(arguments, indent=1))
        if out.is_dir():
            out.rmdir()  # empty, or _already_there had refused
        work.chmod(0o755)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _already_there(out, arguments):
    """Whether `out` is a complete earlier result; FileExistsError when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        earlier = json.loads((out / "simulation.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{out} is not empty and not a simulated data set: choose another folder") from None
    different = ", ".join(k for k in arguments if earlier.get(k) != arguments[k])
    if different:
        raise FileExistsError(f"{out} holds a data set simulated with another {different}: choose another folder")
    return True


def _write_user(folder, root, user, condition, arguments, done):
    """Write one user's windows in one condition; returns the rows for parameters.csv."""
    directory = folder / f"ID_{user}"
    directory.mkdir(parents=True)
    rows, n = [], arguments["recordings"]
    for recording in range(1, n + 1):
        share = arguments["windows"] // n + (recording <= arguments["windows"] % n)
        knobs = {k: arguments[k] for k in ("seed", "preset", "route", "difficulty")}
        images, truth, numbers = simulate_recording(user, recording, n_windows=share, condition=condition, **knobs)
        for i, number in enumerate(numbers):
            path = directory / f"ID{user}_case{CONDITIONS.index(condition) + 1}_{recording}_Doppler{number}.png"
            picture = colour(images[i : i + 1], arguments["size"])[0]
            Image.fromarray(picture).save(path, compress_level=1)
            where = path.relative_to(root).as_posix()
            row = dict(path=where, user=user, recording=recording, condition=condition, window=number)
            rows.append(row | {name: f"{values[i]:.6g}" for name, values in truth.items()})
            done.update()
    return rows
