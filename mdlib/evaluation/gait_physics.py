"""Gait physics read off a micro-Doppler image alone: speeds, cadence, envelopes, bandwidth, asymmetry, energy shares.

Input are intensities in [0, 1] over the displayed dynamic range (dB), rows along a velocity axis in m/s, columns
`column_s` seconds apart. Where the time scale of the images is unknown, give a nominal one (`column_s = 0.58 * 4 /
columns` for windows of four steps): then read metrics per step (step_len, foot_ratio, …) relative to other such images.

Envelopes by percentiles and a threshold after P. van Dorp and F. C. A. Groen, "Feature-based human motion parameter
estimation with radar", IET Radar Sonar Navig. 2 (2008); bandwidth set after Y. Kim and H. Ling, "Human activity
classification based on micro-Doppler signatures using a support vector machine", IEEE TGRS 47 (2009); step asymmetry
after A.-K. Seifert, M. Amin, A. Zoubir, "Toward unobtrusive in-home gait analysis based on radar micro-Doppler
signatures", IEEE TBME 66 (2019).
"""

import numpy as np

STEP_S = (0.28, 1.10)  # a step takes no less and no more, s
METRICS = {  # name: what it is and its unit
    "v_torso": "mean speed of the trunk, m/s",
    "v_osc": "amplitude of the trunk's once-a-step speed oscillation, m/s",
    "f_step": "step rate from the autocorrelation, Hz",
    "f_step_cvd": "step rate from the cadence-velocity diagram, Hz",
    "acf_step": "autocorrelation at one step",
    "asym_acf": "autocorrelation at one stride less that at one step; 0 = symmetric",
    "step_len": "trunk speed over step rate, m",
    "v_foot": "mean peak speed of a step, m/s",
    "foot_ratio": "peak foot speed over trunk speed",
    "v_min": "5th percentile of the lower envelope, m/s",
    "bw_total": "95th percentile of the upper less 5th of the lower envelope, m/s",
    "bw_torso": "mean width of the bright part, m/s",
    "u97": "95th percentile over time of the velocity below which 97 % of a column lies, m/s",
    "l03": "mean velocity below which 3 % of a column lies, m/s",
    "asym_v": "difference of alternate steps' peak speeds over their sum; the sign is arbitrary",
    "asym_t": "difference of alternate steps' durations over twice their mean; the sign is arbitrary",
    "drop": "steepest fall of the upper envelope, m/s²",
    "swing_duty": "share of time the upper envelope is above 1.6 trunk speeds",
    "e_neg": "share of the intensity below -.08 m/s",
    "e_low": "… from 0 to .2 m/s below the trunk",
    "e_torso": "… within .2 m/s of the trunk",
    "e_hump": "… from there to 2.2 trunk speeds",
    "e_spike": "… above 2.2 trunk speeds",
    "e_outside": "… below -1.2 m/s or above 5.5 trunk speeds",
    "fill": "share of cells above the threshold",
    "mean_on": "their mean intensity",
}
GATES = {  # what a walking adult cannot leave, (lowest, highest)
    "step_len": (0.30, 0.95),
    "foot_ratio": (2.4, 5.0),
    "f_step": (1.2, 2.4),
    "acf_step": (0.15, np.inf),
    "e_outside": (-np.inf, 0.02),
    "drop": (-np.inf, 60.0),
}


def measure(images, velocity, column_s, chunk=64):
    """All METRICS of each image: dict name → float (N,).

    images (N, rows, columns) in [0, 1], at least 8 × 8; velocity (rows,) in m/s, evenly spaced, rising or falling;
    column_s: seconds a column, a number or (N,). An image without contrast gives NaN. Raises ValueError on shapes.
    """
    images = np.asarray(images, float)
    velocity = np.asarray(velocity, float)
    if images.ndim != 3 or min(images.shape[1:]) < 8:
        raise ValueError(f"images of shape {images.shape}: expected (N, rows, columns), 8 or more rows and columns")
    if velocity.shape != images.shape[1:2]:
        raise ValueError(
            f"velocity of shape {velocity.shape}: expected one value for each of the {images.shape[1]} rows"
        )
    if images.size and (images.min() < 0 or images.max() > 1):
        raise ValueError("images outside [0, 1]: divide uint8 intensities by 255")
    column_s = np.broadcast_to(np.asarray(column_s, float), len(images))
    if velocity[0] > velocity[-1]:
        images, velocity = images[:, ::-1], velocity[::-1]
    out = {name: np.full(len(images), np.nan) for name in METRICS}
    seen = np.flatnonzero(np.ptp(images, axis=(1, 2)) > 0)
    for i in range(0, len(seen), chunk):
        part = seen[i : i + chunk]
        for name, values in _measure(images[part], velocity, column_s[part]).items():
            out[name][part] = values
    return out


def plausible(metrics, gates=GATES):
    """Whether each image passes every gate: bool (N,); NaN fails.

    Where the time scale is nominal, leave f_step, step_len and drop out.
    """
    passed = [(metrics[name] >= low) & (metrics[name] <= high) for name, (low, high) in gates.items()]
    return np.all(passed, axis=0)


def threshold(images):
    """Intensity above which a cell counts as echo, (N,): .18, lifted above the noise where that is not cut off."""
    p5, p25 = np.percentile(images, [5, 25], axis=(1, 2))
    return np.where(p25 > 0.02, np.maximum(0.18, p25 + 3 * (p25 - p5)), 0.18)


def ridge(images, velocity):
    """Trunk speed in every column (N, columns), m/s: the brightest smooth path, then the centroid of five rows.

    The path maximises Σ S - .06 |Δrow| with |Δrow| <= 3 a column (Viterbi); `velocity` rises.
    """
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


def _peak_between(y, low, high):
    """Index of the maximum of each row of y within [low, high), per row."""
    i = np.arange(y.shape[1])
    return np.where((i >= low[:, None]) & (i < high[:, None]), y, -np.inf).argmax(1)


def step_period(images, column_s):
    """Step period in columns (N,), sub-column, and the image's normalised autocorrelation over lags (N, columns).

    Unbiased autocorrelation of the rows about their means, summed over rows; its highest crest within STEP_S, or half
    that lag where the correlation there is nearly as high (a stride had been picked).
    """
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
    k = _peak_between(crest, low, high)
    half = _peak_between(crest, np.maximum(k // 2 - 1, low), k // 2 + 2)
    row = np.arange(len(acf))
    k = np.where((crest[row, half] > 0.85 * acf[row, k]) & (half >= low), half, k)
    a, b, c = acf[row, k - 1], acf[row, k], acf[row, k + 1]
    bend = a - 2 * b + c
    bend = np.where(np.abs(bend) < 1e-12, -np.inf, bend)
    return k + np.clip((a - c) / 2 / bend, -0.5, 0.5), acf


def _cadence(images, velocity, column_s, v_torso):
    """Step rate from the cadence-velocity diagram above the trunk (harmonic product of the fundamental), Hz."""
    columns = images.shape[2]
    diagram = np.abs(np.fft.rfft((images - images.mean(2, keepdims=True)) * np.hanning(columns), 16 * columns, axis=2))
    limbs = (diagram * (velocity > v_torso[:, None] + 0.3)[:, :, None]).sum(1)
    bins = np.arange((limbs.shape[1] - 1) // 2 + 1)
    product = limbs[:, bins] * np.sqrt(limbs[:, 2 * bins])
    bin_hz = 1 / (16 * columns * column_s)
    return _peak_between(product, 1 / STEP_S[1] / bin_hz, 1 / STEP_S[0] / bin_hz) * bin_hz


def envelopes(images, velocity):
    """Velocities (N, columns): upper and lower edge (two adjacent cells above the threshold), 97 % and 3 % of a column.

    `velocity` rises. A column without echo gives NaN in the edges.
    """
    on = images > threshold(images)[:, None, None]
    pair = np.zeros_like(on)
    pair[:, 1:] |= on[:, 1:] & on[:, :-1]
    pair[:, :-1] |= on[:, 1:] & on[:, :-1]
    lit = pair.any(1)
    upper = np.where(lit, velocity[len(velocity) - 1 - pair[:, ::-1].argmax(1)], np.nan)
    lower = np.where(lit, velocity[pair.argmax(1)], np.nan)
    c = np.cumsum(np.where(on, images, 0), axis=1)
    total = c[:, -1:] + 1e-9
    top = len(velocity) - 1
    u97 = velocity[np.minimum((c < 0.97 * total).sum(1), top)]
    l03 = velocity[np.minimum((c <= 0.03 * total).sum(1), top)]
    return upper, lower, u97, l03


def _steps(upper, start, period):
    """Peak speed and time (columns) of each whole step of one window, split at `start` + (j ± ½) `period`."""
    peaks, times = [], []
    for j in range(-1, int(len(upper) / period) + 2):
        a, b = (int(round(start + (j + half) * period)) for half in (-0.5, 0.5))
        if a < 0 or b > len(upper) or b - a < 3:
            continue
        step = upper[a:b]
        peaks.append(np.sort(step)[-2:].mean())
        weight = np.clip(step - np.percentile(step, 60), 0, None) + 1e-9
        times.append(a + (np.arange(b - a) * weight).sum() / weight.sum())
    return np.array(peaks), np.array(times)


def _alternate(peaks, times):
    """asym_v and asym_t of a window's steps; NaN with fewer than three."""
    if len(peaks) < 3:
        return np.nan, np.nan
    odd, even = peaks[::2].mean(), peaks[1::2].mean()
    gaps = np.diff(times)
    return (odd - even) / (odd + even), (gaps[::2].mean() - gaps[1::2].mean()) / (2 * gaps.mean())


def _measure(images, velocity, column_s):
    n, _, columns = images.shape
    t = np.arange(columns)
    o = {}
    torso = ridge(images, velocity)
    o["v_torso"] = v = torso.mean(1)
    period, acf = step_period(images, column_s)
    o["f_step"] = 1 / (period * column_s)
    o["acf_step"] = np.array([np.interp(p, t, a) for p, a in zip(period, acf, strict=True)])
    stride = np.round(2 * period).astype(int)
    at_stride = acf[np.arange(n), _peak_between(acf, stride - 1, stride + 2)]
    o["asym_acf"] = np.where(stride + 1 < columns, at_stride - o["acf_step"], np.nan)
    o["f_step_cvd"] = _cadence(images, velocity, column_s, v)
    o["step_len"] = v / o["f_step"]

    once_a_step = np.exp(-2j * np.pi * t / period[:, None])
    hann, centred = np.hanning(columns), t - t.mean()
    flat = torso - v[:, None]
    flat = flat - (flat @ centred)[:, None] / (centred @ centred) * centred
    o["v_osc"] = 2 * np.abs((flat * hann * once_a_step).sum(1)) / hann.sum()

    upper, lower, u97, l03 = envelopes(images, velocity)
    upper = np.where(np.isnan(upper), v[:, None], upper)
    lower = np.where(np.isnan(lower), 0.0, lower)
    padded = np.pad(upper, ((0, 0), (1, 1)), mode="edge")
    smooth = np.median(np.stack([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]]), 0)
    o["u97"], o["l03"] = np.percentile(u97, 95, axis=1), l03.mean(1)
    o["v_min"] = np.percentile(lower, 5, axis=1)
    o["bw_total"] = np.percentile(smooth, 95, axis=1) - o["v_min"]
    o["drop"] = -np.diff(smooth).min(1) / column_s
    o["swing_duty"] = (smooth > 1.6 * v[:, None]).mean(1)

    angle = np.angle(((u97 - u97.mean(1, keepdims=True)) * once_a_step).sum(1))
    steps = [_steps(u, -a / (2 * np.pi) * p, p) for u, a, p in zip(upper, angle, period, strict=True)]
    o["v_foot"] = np.array([peaks.mean() if len(peaks) else np.nan for peaks, _ in steps])
    o["foot_ratio"] = o["v_foot"] / np.maximum(v, 0.1)
    o["asym_v"], o["asym_t"] = np.array([_alternate(*s) for s in steps]).T

    limit = threshold(images)
    on = images > limit[:, None, None]
    o["fill"] = on.mean((1, 2))
    o["mean_on"] = (images * on).sum((1, 2)) / np.maximum(on.sum((1, 2)), 1)
    o["bw_torso"] = (images > 0.75).sum(1).mean(1) * (velocity[1] - velocity[0])
    x, vt = velocity[None, :, None], torso[:, None]
    total = images.sum((1, 2))
    for name, where in (
        ("e_neg", x < -0.08),
        ("e_low", (x >= 0) & (x < vt - 0.2)),
        ("e_torso", np.abs(x - vt) <= 0.2),
        ("e_hump", (x > vt + 0.2) & (x <= 2.2 * vt)),
        ("e_spike", x > 2.2 * vt),
        ("e_outside", (x < -1.2) | (x > 5.5 * np.maximum(vt, 0.1))),
    ):
        o[name] = (images * where).sum((1, 2)) / total
    return o
