"""Gait metrics of windows: does a generated window move like its user?

Envelopes after van Dorp & Groen, IET Radar Sonar Navig. 2 (2008); bandwidth after Kim & Ling, IEEE TGRS 47 (2009).
Windows carry no axes, see docs/evaluation.md.
"""

import numpy as np
import pandas as pd
from scipy.ndimage import median_filter
from scipy.stats import wasserstein_distance

from mdlib.data.windows import WindowSet
from mdlib.evaluation.evidence import COMPARED, Evidence, compared_sets
from mdlib.evaluation.metrics import bootstrapped, missing, over_users, unmeasured

STEP_S = (0.28, 1.10)  # shortest and longest duration of a step, s
WINDOW_S = 4 * 0.58  # nominal length of a window, s
VELOCITIES = (-0.922568922328, 3.866937823376)  # nominal edges of a window, m/s: the simulated radar's
CHUNK = 16  # windows measured at once: at 256 px more would take gigabytes
METRICS = {  # of the report: the metric that `read` returns, and its unit
    "torso_speed": ("v_torso", "m/s"),
    "cadence": ("f_step", "relative steps/s"),
    "step_length": ("step_len", "relative m"),
    "foot_speed": ("v_foot", "m/s"),
    "upper_envelope": ("u97", "m/s"),
    "lower_envelope": ("l03", "m/s"),
    "bandwidth": ("bw_total", "m/s"),
}
NAMES = (*METRICS, "plausible")
GATES = {"foot_ratio": (2.4, 5.0), "acf_step": (0.15, np.inf), "e_outside": (-np.inf, 0.02)}  # range of a walking adult
DRAWS = 8  # samples of equally many windows of each set
SPREAD = (5, 25, 50, 75, 95)  # percentiles of a user's windows


def physics(evidence: Evidence) -> dict:
    """The section `physics` of the report, see `compare`."""
    if evidence.train.images.shape[1] != 1:
        return missing(*NAMES, reason="not measured on RGB windows: set channels=1")
    gaits = {name: measure(part) for name, part in compared_sets(evidence).items()}
    return compare(gaits, evidence.train.num_users)


def measure(windows: WindowSet) -> pd.DataFrame:
    """Gait of intensity windows of 8 × 8 pixels or more, the top row the highest velocity. A row a window: METRICS (NaN
    where it cannot be read), plausible (within all GATES) and label."""
    channels, rows, columns = windows.images.shape[1:]
    if channels != 1:
        raise ValueError(f"windows of {channels} channels: gait needs intensities, load them with channels=1")
    if not len(windows):
        return pd.DataFrame(columns=[*METRICS, "plausible", "label"])
    axis, images = image_axis(rows), windows.images[:, 0].numpy()
    parts = [read(images[i : i + CHUNK] / 255, axis, WINDOW_S / columns) for i in range(0, len(images), CHUNK)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    frame = pd.DataFrame({name: found[metric] for name, (metric, _) in METRICS.items()})
    return frame.assign(plausible=plausible(found), label=windows.labels.numpy())


def of_user(gaits: pd.DataFrame, name: str, label: int) -> np.ndarray:
    """The values of one metric that could be measured from a user's windows."""
    return gaits.loc[gaits["label"] == label, name].dropna().to_numpy()


def image_axis(rows: int) -> np.ndarray:
    """Velocity (rows,) of the rows of an image that spans VELOCITIES, highest first."""
    low, high = VELOCITIES
    return high - (np.arange(rows) + 0.5) * (high - low) / rows


def compare(sets: dict[str, pd.DataFrame], num_users: int) -> dict:
    """The metrics NAMES of the sets generated, unseen, train, first and second (see `evidence.COMPARED`), with as many
    windows of a user in all of them; see docs/evaluation.md."""
    found = {name: _metric(name, sets, num_users) for name in METRICS}
    inside, real = (sets[part]["plausible"].to_numpy(float) for part in ("generated", "unseen"))
    more = {"real": float(real.mean()), "gates": list(GATES)}
    return found | {"plausible": bootstrapped(inside, np.arange(len(inside))) | more}


def _metric(name: str, sets: dict[str, pd.DataFrame], num_users: int) -> dict:
    own = [{part: of_user(gaits, name, label) for part, gaits in sets.items()} for label in range(num_users)]
    least = [min(len(values) for values in user.values()) for user in own]
    if not any(least):
        return unmeasured("no user has windows in every set from which it can be measured")
    distances = [_distances(user, n) if n else None for user, n in zip(own, least, strict=True)]
    each = np.array([row for row in distances if row is not None])  # (users, comparisons)
    means = {part: [float(user[part].mean()) if len(user[part]) else None for user in own] for part in sets}
    spread = lambda values: np.percentile(values, SPREAD).tolist() if len(values) else None
    found = dict(zip(COMPARED, each.mean(0).tolist(), strict=True))
    return {
        **over_users(each[:, 0]),
        **found,
        "unit": METRICS[name][1],
        "n": sum(least),
        "ratio": found["value"] / found["real_vs_real"] if found["real_vs_real"] else None,
        "user_correlation": _correlation(means["generated"], means["unseen"]),
        "user_correlation_real": _correlation(means["first"], means["second"]),
        "per_user": [None if row is None else float(row[0]) for row in distances],
        **{f"{part}_means": means[part] for part in ("generated", "unseen")},
        **{f"{part}_spread": [spread(user[part]) for user in own] for part in ("generated", "unseen")},
    }


def _distances(own: dict[str, np.ndarray], n: int) -> np.ndarray:
    """One user's distances in the order of COMPARED: n windows sampled from each set, mean over DRAWS."""
    total = np.zeros(len(COMPARED))
    for seed in range(DRAWS):
        rngs = np.random.default_rng(seed).spawn(len(own))  # a set's sample must not depend on another set's size
        sample = {part: rng.choice(own[part], n, replace=False) for part, rng in zip(sorted(own), rngs, strict=True)}
        total += [wasserstein_distance(sample[one], sample[other]) for one, other in COMPARED.values()]
    return total / DRAWS


def _correlation(first: list, second: list) -> float | None:
    """Pearson's r over users who have both; None with fewer than three of them or without any spread."""
    pairs = [pair for pair in zip(first, second, strict=True) if None not in pair]
    if len(pairs) < 3 or not np.ptp(pairs, axis=0).all():
        return None
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


def plausible(metrics: dict[str, np.ndarray]) -> np.ndarray:
    """Whether each image is within all GATES: bool (N,); NaN is not."""
    return np.all([(metrics[name] >= low) & (metrics[name] <= high) for name, (low, high) in GATES.items()], axis=0)


def threshold(images: np.ndarray) -> np.ndarray:
    """Intensity (N,) above which a cell counts as echo: 0.18, or above the noise floor where there is one."""
    p5, p25 = np.percentile(images, [5, 25], axis=(1, 2))
    return np.where(p25 > 0.02, np.maximum(0.18, p25 + 3 * (p25 - p5)), 0.18)


def ridge(images: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Trunk speed in every column (N, columns), m/s: the path that maximises Σ S − .06 |Δrow| with |Δrow| ≤ 3 a column
    (Viterbi), then the centroid of five rows. `velocity` rises."""
    s = images.copy()
    s[:, 1:-1] = images[:, :-2] / 4 + images[:, 1:-1] / 2 + images[:, 2:] / 4
    s[:, np.abs(velocity) < 0.15] *= 0.6  # clutter and standing feet
    n, rows, columns = s.shape
    moves = np.arange(-3, 4)
    score, back = s[:, :, 0], np.empty((columns, n, rows), int)
    for t in range(1, columns):
        padded = np.pad(score, ((0, 0), (3, 3)), constant_values=-np.inf)
        reach = np.stack([padded[:, 3 + m : 3 + m + rows] - 0.06 * abs(m) for m in moves])
        best = reach.argmax(0)
        back[t] = np.arange(rows) + moves[best]
        score = np.take_along_axis(reach, best[None], 0)[0] + s[:, :, t]
    path = np.empty((n, columns), int)
    path[:, -1] = score.argmax(1)
    for t in range(columns - 1, 0, -1):
        path[:, t - 1] = back[t, np.arange(n), path[:, t]]
    near = path[:, None] + np.arange(-2, 3)[:, None]  # (n, 5, columns)
    inside = (near >= 0) & (near < rows)
    near = np.clip(near, 0, rows - 1)
    weight = (np.take_along_axis(images, near, 1) ** 4 + 1e-9) * inside
    return (weight * velocity[near]).sum(1) / weight.sum(1)


def step_period(images: np.ndarray, column_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step period in columns (N,), sub-column, and the normalised autocorrelation over lags (N, columns): unbiased, of
    the rows about their means, summed over rows. The period is its highest crest within STEP_S, or half that lag where
    the correlation there is nearly as high (then the crest was that of a stride)."""
    columns = images.shape[2]
    spectrum = np.fft.rfft(images - images.mean(2, keepdims=True), 2 * columns, axis=2)
    power = (spectrum.real**2 + spectrum.imag**2).sum(1)
    acf = np.fft.irfft(power, axis=1)[:, :columns] / (columns - np.arange(columns))
    acf /= np.maximum(acf[:, :1], 1e-12)
    low = np.minimum(np.ceil(STEP_S[0] / column_s).astype(int), columns - 5)
    high = np.maximum(np.minimum((STEP_S[1] / column_s).astype(int), columns - 3), low + 1)
    crest = np.full_like(acf, -1.0)  # a slope that leaves the range is no period
    inner = (acf[:, 1:-1] >= acf[:, :-2]) & (acf[:, 1:-1] >= acf[:, 2:])
    crest[:, 1:-1][inner] = acf[:, 1:-1][inner]
    lag, row = np.arange(columns), np.arange(len(acf))
    highest = lambda low, high: np.where((lag >= low[:, None]) & (lag < high[:, None]), crest, -np.inf).argmax(1)
    k = highest(low, high)
    half = highest(np.maximum(k // 2 - 1, low), k // 2 + 2)
    k = np.where((crest[row, half] > 0.85 * acf[row, k]) & (half >= low), half, k)
    a, b, c = acf[row, k - 1], acf[row, k], acf[row, k + 1]
    bend = a - 2 * b + c  # of the parabola through the crest
    bend = np.where(np.abs(bend) < 1e-12, -np.inf, bend)
    return k + np.clip((a - c) / 2 / bend, -0.5, 0.5), acf


def envelopes(images: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, ...]:
    """Velocities (N, columns): upper and lower edge (two adjacent cells above the threshold, NaN without echo), and
    those below which 97 % and 3 % of a column lie. `velocity` rises."""
    on = images > threshold(images)[:, None, None]
    pair, top = on[:, 1:] & on[:, :-1], len(velocity) - 1
    lit = pair.any(1)
    upper = np.where(lit, velocity[top - pair[:, ::-1].argmax(1)], np.nan)
    lower = np.where(lit, velocity[pair.argmax(1)], np.nan)
    c = np.cumsum(np.where(on, images, 0), axis=1)
    total = c[:, -1:] + 1e-9
    u97 = velocity[np.minimum((c < 0.97 * total).sum(1), top)]
    l03 = velocity[np.minimum((c <= 0.03 * total).sum(1), top)]
    return upper, lower, u97, l03


def step_peak(upper: np.ndarray, start: float, period: float) -> float:
    """Mean peak speed of the whole steps of a window's upper envelope, split at `start` + (j ± ½) `period` columns."""
    edges = [int(round(start + (j - 0.5) * period)) for j in range(-1, int(len(upper) / period) + 3)]
    whole = [upper[a:b] for a, b in zip(edges, edges[1:], strict=False) if a >= 0 and b <= len(upper) and b - a > 2]
    return np.mean([np.sort(step)[-2:].mean() for step in whole]) if whole else np.nan


def read(images: np.ndarray, velocity: np.ndarray, column_s: float | np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each image: name → float (N,), NaN for an image without contrast.

    Args:
        images: (N, rows, columns) in [0, 1] over the displayed range in dB, 8 × 8 or more.
        velocity: (rows,) in m/s, evenly spaced, rising or falling.
        column_s: seconds a column, a number or (N,).
    """
    if velocity[0] > velocity[-1]:
        images, velocity = images[:, ::-1], velocity[::-1]
    column_s, t = np.broadcast_to(column_s, len(images)), np.arange(images.shape[2])
    torso = ridge(images, velocity)
    v_torso = torso.mean(1)
    period, acf = step_period(images, column_s)
    f_step = 1 / (period * column_s)
    upper, lower, u97, l03 = envelopes(images, velocity)
    upper, lower = np.where(np.isnan(upper), v_torso[:, None], upper), np.where(np.isnan(lower), 0.0, lower)
    smooth = median_filter(upper, size=(1, 3), mode="nearest")
    once_a_step = np.exp(-2j * np.pi * t / period[:, None])
    angle = np.angle(((u97 - u97.mean(1, keepdims=True)) * once_a_step).sum(1))
    v_foot = np.array([step_peak(*own) for own in zip(upper, -angle / (2 * np.pi) * period, period, strict=True)])
    row_speed = velocity[None, :, None]
    outside = (row_speed < -1.2) | (row_speed > 5.5 * np.maximum(torso[:, None], 0.1))
    found = {
        "v_torso": v_torso,  # mean speed of the trunk, m/s
        "f_step": f_step,  # step rate, Hz
        "acf_step": np.array([np.interp(p, t, a) for p, a in zip(period, acf, strict=True)]),  # at one step
        "step_len": v_torso / f_step,  # m
        "v_foot": v_foot,  # mean peak speed of a step, m/s
        "foot_ratio": v_foot / np.maximum(v_torso, 0.1),
        "bw_total": np.percentile(smooth, 95, axis=1) - np.percentile(lower, 5, axis=1),  # between the envelopes, m/s
        "u97": np.percentile(u97, 95, axis=1),  # 95th percentile of the velocity below which 97 % of a column lies, m/s
        "l03": l03.mean(1),  # mean velocity below which 3 % of a column lies, m/s
        "e_outside": (images * outside).sum((1, 2)) / np.maximum(images.sum((1, 2)), 1e-9),  # fraction of the intensity
    }
    flat = np.ptp(images, axis=(1, 2)) == 0
    return {name: np.where(flat, np.nan, values) for name, values in found.items()}
