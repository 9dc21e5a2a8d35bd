"""Figures of a report, and their 95 % intervals by bootstraps over blocks of windows, seeds or users."""

import numpy as np


def figure(value: float, n: int, ci95: list[float] | None = None) -> dict:
    return {"value": value, "n": n} | ({"ci95": ci95} if ci95 else {})


def absent(reason: str) -> dict:
    """A figure that was not measured."""
    return {"value": None, "reason": reason}


def missing(*names: str, reason: str) -> dict:
    return {name: absent(reason) for name in names}


def bootstrapped(values: np.ndarray, blocks: np.ndarray) -> dict:
    """Mean of values (N,), one a window; the interval resamples blocks (N,) of windows."""
    return figure(float(values.mean()), len(values), interval(block_bootstrap(values, blocks)))


def over_users(values: np.ndarray) -> dict:
    """Mean of values (users,), one a user; the interval resamples users and needs three or more."""
    means = block_bootstrap(values, np.arange(len(values)))
    return figure(float(values.mean()), len(values), interval(means) if len(values) > 2 else None)


def scored(correct: np.ndarray, blocks: np.ndarray) -> dict:
    """Accuracy of classifiers whose correctness is (seeds, N); the interval resamples seeds and blocks of windows."""
    return figure(float(correct.mean()), correct.shape[1], interval(paired_bootstrap(correct[None], blocks)[:, 0]))


def paired_gain(first: np.ndarray, second: np.ndarray, blocks: np.ndarray) -> dict:
    """Difference second − first of two arms' correctness (seeds, N) on the same test windows."""
    difference = second.astype(float) - first.astype(float)
    means = paired_bootstrap(difference[None], blocks)[:, 0]
    return figure(float(difference.mean()), difference.shape[1], interval(means))


def p_value(first: np.ndarray, second: np.ndarray, blocks: np.ndarray) -> float:
    """Two-sided bootstrap p-value of `paired_gain`."""
    means = paired_bootstrap(second.astype(float)[None] - first.astype(float), blocks)[:, 0]
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return float(min(1.0, 2 * tail + 1 / len(means)))


def interval(draws: np.ndarray) -> list[float]:
    """95 % percentile interval of bootstrap draws."""
    tail = 100 * (1 - 0.95) / 2
    return np.percentile(draws, [tail, 100 - tail]).tolist()


def block_bootstrap(values: np.ndarray, blocks: np.ndarray, draws: int = 2000) -> np.ndarray:
    """Bootstrap means (draws,) of values (N,). Whole blocks are resampled (Künsch 1989), because neighbouring windows
    overlap and count almost as one."""
    names, index = np.unique(blocks, return_inverse=True)
    sums = np.bincount(index, values, len(names))
    sizes = np.bincount(index, minlength=len(names))
    chosen = np.random.default_rng(0).integers(len(names), size=(draws, len(names)))
    return sums[chosen].sum(1) / sizes[chosen].sum(1)


def paired_bootstrap(correct: np.ndarray, blocks: np.ndarray, draws: int = 4000) -> np.ndarray:
    """Bootstrap means (draws, arms) of arms' correctness (arms, seeds, N) on the same windows. Seeds and blocks of
    windows are resampled, the same ones for every arm."""
    rng = np.random.default_rng(0)
    names, index = np.unique(blocks, return_inverse=True)
    sums = np.stack([[np.bincount(index, row, len(names)) for row in arm] for arm in correct])  # (arms, seeds, blocks)
    sizes = np.bincount(index, minlength=len(names))
    seeds = rng.integers(sums.shape[1], size=(draws, sums.shape[1]))
    chosen = rng.integers(len(names), size=(draws, len(names)))
    means = [sums[:, s].mean(1)[:, b].sum(1) / sizes[b].sum() for s, b in zip(seeds, chosen, strict=True)]
    return np.stack(means)


def equivalent_count(counts: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
    """Real windows a user (draws,) at which real alone reaches an arm's accuracy, clipped to the measured counts.

    Args:
        counts: real windows a user (A,), rising.
        accuracies: (draws, 1 + A): of the arm, then of real alone at each count. Where a larger count scores lower, the
            smaller count's accuracy is used.
    """
    rising = np.maximum.accumulate(accuracies[:, 1:], axis=1) + 1e-9 * np.arange(len(counts))
    found = [np.interp(arm, line, np.log(counts)) for arm, line in zip(accuracies[:, 0], rising, strict=True)]
    return np.exp(found)
