"""Acceptance of the walking simulator: every check with its bound and the value measured. Two minutes on one core.

OMP_NUM_THREADS=1 python benchmarks/simulator.py [--quick]
"""

import argparse
import tempfile
import time

import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier

from mdlib.evaluation import gait_metrics
from mdlib.simulation import dataset
from mdlib.simulation.radar import velocity_axis

# Mean, SD between and SD within persons of 1,595 published windows of ten walkers, same metrics.
REAL = {
    "v_torso": (0.779, 0.099, 0.073),
    "v_foot": (2.60, 0.28, 0.25),
    "foot_ratio": (3.37, 0.21, 0.27),
    "v_osc": (0.079, 0.013, 0.017),
    "bw_total": (3.02, 0.32, 0.33),
    "v_min": (-0.44, 0.14, 0.18),
    "acf_step": (0.483, 0.039, 0.095),
    "fill": (0.330, 0.019, 0.059),
    "e_torso": (0.361, 0.020, 0.046),
    "e_hump": (0.220, 0.016, 0.023),
    "e_low": (0.283, 0.021, 0.027),
    "e_spike": (0.088, 0.016, 0.026),
}
# Reference accuracies of PCA80 + shrinkage LDA for 5, 10, 20, 40, 80 windows a user, unseen session.
CURVE = {5: 0.496, 10: 0.602, 20: 0.680, 40: 0.744, 80: 0.778}


def read(images, velocity, column_s):
    """Metrics of `gait_metrics.read` and of `_more`, 64 images at a time, for memory; the top row is the fastest."""
    column_s = np.broadcast_to(column_s, len(images))
    parts = []
    for first in range(0, len(images), 64):
        some, seconds = images[first : first + 64], column_s[first : first + 64]
        parts.append(gait_metrics.read(some, velocity, seconds) | _more(some[:, ::-1], velocity[::-1], seconds))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _more(images, velocity, column_s):
    """v_osc: amplitude of the trunk's speed oscillation at the step rate, m/s; v_min: 5th percentile of the lower
    envelope, m/s; fill: fraction of cells above the threshold; e_low, e_torso, e_hump, e_spike: fraction of intensity
    from 0 to .2 m/s below the trunk, within .2 m/s of it, from there to 2.2 trunk speeds, above. `velocity` rises."""
    t, torso = np.arange(images.shape[2]), gait_metrics.ridge(images, velocity)
    period, _ = gait_metrics.step_period(images, column_s)
    hann, centred, flat = np.hanning(len(t)), t - t.mean(), torso - torso.mean(1, keepdims=True)
    flat = flat - (flat @ centred)[:, None] / (centred @ centred) * centred
    wave = flat * hann * np.exp(-2j * np.pi * t / period[:, None])
    lower = gait_metrics.envelopes(images, velocity)[1]
    on = images > gait_metrics.threshold(images)[:, None, None]
    x, vt, total = velocity[None, :, None], torso[:, None], images.sum((1, 2))
    bands = {
        "e_low": (x >= 0) & (x < vt - 0.2),
        "e_torso": np.abs(x - vt) <= 0.2,
        "e_hump": (x > vt + 0.2) & (x <= 2.2 * vt),
        "e_spike": x > 2.2 * vt,
    }
    return {
        "v_osc": 2 * np.abs(wave.sum(1)) / hann.sum(),
        "v_min": np.percentile(np.where(np.isnan(lower), 0.0, lower), 5, axis=1),
        "fill": on.mean((1, 2)),
        **{name: (images * where).sum((1, 2)) / total for name, where in bands.items()},
    }


def report(check, value, bound, ok):
    print(f"{'pass' if ok else 'FAIL'}  {check:<44} {value:<34} {bound}", flush=True)


def calibration(recordings):
    users = len(recordings)
    images = np.concatenate([r[0][::4] for r in recordings])
    dt = np.concatenate([r[1]["dt"][::4] for r in recordings])
    user = np.repeat(np.arange(users), [len(r[0][::4]) for r in recordings])
    metrics = read(images / 255, velocity_axis(), dt)
    for name, (mean, between, within) in REAL.items():
        m = np.array([np.nanmean(metrics[name][user == u]) for u in range(users)])
        s = np.array([np.nanstd(metrics[name][user == u], ddof=1) for u in range(users)])
        got = m.mean(), m.std(ddof=1), np.sqrt((s**2).mean())
        ok = abs(got[0] - mean) <= between and all(
            0.5 <= g / r <= 2 for g, r in zip(got[1:], (between, within), strict=True)
        )
        value = " / ".join(f"{x:.3f}" for x in got)
        report(f"calibration {name}", value, f"{mean} / {between} / {within}: mean ± between, SDs × 2", ok)
    floor = np.concatenate([(r[0] == 0).mean((1, 2)) for r in recordings])
    inside = ((floor >= 0.44) & (floor <= 0.80)).mean()
    value = f"median {np.median(floor):.3f}, {inside:.1%} inside"
    report(
        "floor pixels",
        value,
        "median .60-.72, 95 % within .44-.80",
        0.60 <= np.median(floor) <= 0.72 and inside >= 0.95,
    )


def residual(images):
    """Images less the recording's mean image, unit norm: what is this window's own."""
    x = images.astype(np.float32)
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=(1, 2), keepdims=True)


def continuity(recordings):
    shifts, best, near, far = [], [], [], []
    for images, _, numbers in recordings:
        x = images.astype(np.float32)
        columns = x.shape[2]
        own = [residual(images[k::2]) for k in (0, 1)]  # starts with the same foot
        for i in np.flatnonzero(np.diff(numbers) == 1)[::5]:
            r = [np.corrcoef(x[i][:, s:].ravel(), x[i + 1][:, : columns - s].ravel())[0, 1] for s in range(8, 20)]
            shifts.append(8 + int(np.argmax(r)))
            best.append(max(r))
        n = len(images) - 4
        together = numbers[4:] - numbers[:-4] == 4
        for i in np.flatnonzero(together):
            a = own[i % 2]
            far.append((a[i // 2] * a[i // 2 + 2]).sum())
        near += [(own[i % 2][i // 2] * own[i % 2][i // 2 + 1]).sum() for i in np.flatnonzero(together[:n])]
    ok = abs(np.mean(shifts) - 13.76) <= 1
    report(
        "shift from window n to n+1",
        f"mean {np.mean(shifts):.2f} ± {np.std(shifts):.2f}",
        "13.76 ± 1 columns",
        ok,
    )
    report("correlation at that shift", f"median {np.median(best):.3f}", ">= .85", np.median(best) >= 0.85)
    value = f"median {np.median(far):.3f} (n, n+2 unshifted: {np.median(near):.3f})"
    report("own part of windows n and n+4", value, "|r| < .15", abs(np.median(far)) < 0.15)


def recovery(users, windows):
    data = [dataset.simulate_recording(u, r, n_windows=windows, clock=True) for u in users for r in (1, 2)]
    truth = {k: np.concatenate([d[1][k][::4] for d in data]) for k in data[0][1]}
    user = np.repeat(np.repeat(list(users), 2), [len(d[0][::4]) for d in data])
    images = np.concatenate([d[0][::4] for d in data]) / 255
    got = read(images, velocity_axis(), truth["dt"])
    for metric, name, image_bound, user_bound in (
        ("v_torso", "v_torso", 0.99, 0.99),
        ("f_step", "step_hz", 0.88, 0.98),
        ("step_len", "step_len", 0.83, 0),
        ("v_foot", "v_foot", 0, 0.90),
        ("v_osc", "v_osc", 0, 0.88),
        ("v_min", "v_min", 0, 0),
    ):
        x, y = got[metric], truth[name]
        ok = np.isfinite(x)
        each = np.corrcoef(x[ok], y[ok])[0, 1]
        means = [[np.nanmean(a[user == u]) for u in users] for a in (x, y)]
        per_user = np.corrcoef(*means)[0, 1]
        value = f"r {each:.3f}, per user {per_user:.3f}, bias {np.nanmean(x) / y.mean() - 1:+.1%}"
        bound = f">= {image_bound}, per user >= {user_bound}"
        report(f"truth recovered: {metric}", value, bound, each >= image_bound and per_user >= user_bound)


def flat(images):
    """(…, rows, columns) uint8 → features, cells of 2 × 2 averaged."""
    x = images[..., : images.shape[-2] // 2 * 2, : images.shape[-1] // 2 * 2].astype(np.float32) / 255
    x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.reshape(*x.shape[:-2], -1)


def learning_curve(users, draws=4):
    """PCA80 of all training windows + LDA of shrinkage .2; sessions 1-3 train, session 4 tests; every 4th window."""
    sessions = np.stack([
        np.stack([flat(dataset.simulate_recording(u, r, n_windows=108)[0][::4]) for r in (1, 2, 3, 4)]) for u in users
    ])  # fmt: skip
    n = len(sessions)
    train, test = sessions[:, :3].reshape(n, 81, -1), sessions[:, 3]
    pca = PCA(80, random_state=0).fit(train.reshape(n * 81, -1))
    train = pca.transform(train.reshape(n * 81, -1)).reshape(n, 81, -1)
    test, truth = pca.transform(test.reshape(n * 27, -1)), np.repeat(np.arange(n), 27)
    for k, reference in CURVE.items():
        scores = []
        for draw in range(draws):
            rng = np.random.default_rng(draw)
            x = np.concatenate([t[rng.permutation(81)[:k]] for t in train])
            lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2).fit(x, np.repeat(np.arange(n), k))
            scores.append(lda.score(test, truth))
        report(
            f"LDA, {k} windows a user",
            f"{np.mean(scores):.3f}",
            f"{reference} ± .06",
            abs(np.mean(scores) - reference) <= 0.06,
        )


def thumbnails(images, size=32):
    y = np.arange(size) * images.shape[1] // size
    x = np.arange(size) * images.shape[2] // size
    return images[:, y][:, :, x].reshape(len(images), -1).astype(np.float32)


def leak(recordings, per_user=50):
    """1-NN of 32 × 32 thumbnails, `per_user` windows to train on: drawn at random, or the first in time."""
    scores = []
    for random in (True, False):
        rng = np.random.default_rng(0)
        train, test, y_train, y_test = [], [], [], []
        for u, (images, _, _) in enumerate(recordings):
            order = rng.permutation(len(images)) if random else np.arange(len(images))
            x = thumbnails(images)[order]
            gap = 0 if random else 4
            train.append(x[:per_user])
            test.append(x[per_user + gap :])
            y_train += [u] * per_user
            y_test += [u] * len(test[-1])
        knn = KNeighborsClassifier(1).fit(np.concatenate(train), y_train)
        scores.append(knn.score(np.concatenate(test), y_test))
    value = f"random {scores[0]:.3f}, time block {scores[1]:.3f}"
    report(
        f"1-NN 32×32, {len(recordings)} users, {per_user} to train",
        value,
        "random higher",
        scores[0] > scores[1],
    )


def speed(windows):
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time(), time.perf_counter()
        dataset.simulate_dataset(f"{folder}/set", users=4, windows=windows, progress=False)
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    rate = 4 * windows / cpu
    report(
        "windows/s, 256², colour, PNG, CPU time",
        f"{rate:.0f} (wall {4 * windows / wall:.0f})",
        ">= 30",
        rate >= 30,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 users: shows that it runs, the bounds are for 31")
    users = range(1, 9 if parser.parse_args().quick else 32)
    speed(100)
    recordings = [dataset.simulate_recording(u) for u in users]
    calibration(recordings)
    continuity(recordings)
    leak(recordings)
    leak(recordings[:10])
    recovery(users, 48)
    learning_curve(users)


if __name__ == "__main__":
    main()
