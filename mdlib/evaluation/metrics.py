"""Metrics and their 95 % intervals by bootstraps over blocks of windows, seeds or users; and the formulas of images,
tokens, features and probabilities."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit

from mdlib.data.windows import WindowSet

DISTINCTIVE_RATIO = 1.5  # a distinctive code is this many times as frequent in a user's windows as in the others'
SIDE = 32  # pixels a side at which windows are compared with training windows: speckle is finer


def metric(value: float, n: int, ci95: list[float] | None = None) -> dict:
    return {"value": value, "n": n} | ({"ci95": ci95} if ci95 else {})


def unmeasured(reason: str) -> dict:
    """A metric that was not measured."""
    return {"value": None, "reason": reason}


def missing(*names: str, reason: str) -> dict:
    return {name: unmeasured(reason) for name in names}


def bootstrapped(values: np.ndarray, blocks: np.ndarray) -> dict:
    """Mean of values (N,), one a window; the interval resamples blocks (N,) of windows."""
    return scored(values[None], blocks)


def over_users(values: np.ndarray) -> dict:
    """Mean of values (users,), one a user; Student's t interval over users (three or more), because a bootstrap
    over so few would be too narrow."""
    count, mean = len(values), float(np.mean(values))
    if count < 3:
        return metric(mean, count)
    reach = float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / count**0.5)
    return metric(mean, count, [mean - reach, mean + reach])


def scored(correct: np.ndarray, blocks: np.ndarray) -> dict:
    """Accuracy of classifiers whose correctness is (seeds, N); the interval resamples seeds and blocks of windows."""
    return metric(float(correct.mean()), correct.shape[1], interval(paired_bootstrap(correct[None], blocks)[:, 0]))


def paired_gain(first: np.ndarray, second: np.ndarray, blocks: np.ndarray) -> dict:
    """Difference second − first of two arms' correctness (seeds, N) on the same test windows."""
    return scored(second.astype(float) - first, blocks)


def p_value(first: np.ndarray, second: np.ndarray, blocks: np.ndarray) -> float:
    """Two-sided bootstrap p-value of `paired_gain`."""
    means = paired_bootstrap(second.astype(float)[None] - first, blocks)[:, 0]
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return float(min(1.0, 2 * tail + 1 / len(means)))


def interval(draws: np.ndarray) -> list[float]:
    """95 % percentile interval of bootstrap draws."""
    return np.percentile(draws, [2.5, 97.5]).tolist()


def paired_bootstrap(correct: np.ndarray, blocks: np.ndarray, draws: int = 4000) -> np.ndarray:
    """Bootstrap means (draws, arms) of arms' correctness (arms, seeds, N) on the same windows. Seeds and whole
    blocks of windows (Künsch 1989: neighbours overlap) are resampled, the same ones for every arm."""
    rng = np.random.default_rng(0)
    names, index = np.unique(blocks, return_inverse=True)
    sums = np.stack([[np.bincount(index, row, len(names)) for row in arm] for arm in correct])  # (arms, seeds, blocks)
    sizes = np.bincount(index, minlength=len(names))
    seeds = rng.integers(sums.shape[1], size=(draws, sums.shape[1]))
    chosen = rng.integers(len(names), size=(draws, len(names)))
    means = [sums[:, s].mean(1)[:, b].sum(1) / sizes[b].sum() for s, b in zip(seeds, chosen, strict=True)]
    return np.stack(means)


def equivalent_count(counts: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
    """Real windows per user (draws,) at which real alone reaches an arm's accuracy, clipped to the rising counts (A,).

    accuracies: (draws, 1 + A), of the arm, then of real alone at each count; not below that of a smaller count.
    """
    rising = np.maximum.accumulate(accuracies[:, 1:], axis=1) + 1e-9 * np.arange(len(counts))
    found = [np.interp(arm, line, np.log(counts)) for arm, line in zip(accuracies[:, 0], rising, strict=True)]
    return np.exp(found)


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image (B, C, H, W); the peak is the width of the range, 2."""
    mse = (images - references).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of each image (B, C, H, W) in [−1, 1], by Gaussian windows of 11 × 11
    pixels with σ = 1.5."""
    weights = torch.exp(-torch.arange(-5, 6, device=images.device).double().square() / 4.5)
    window = (weights.outer(weights) / weights.sum().square()).repeat(images.shape[1], 1, 1, 1)
    local = lambda values: F.conv2d(F.pad(values, (5, 5, 5, 5), mode="reflect"), window, groups=len(window))
    images, references = images.double(), references.double()  # differences of squares below
    x, y, c1, c2 = local(images), local(references), 0.02**2, 0.06**2
    spread = local(images.square()) - x.square() + local(references.square()) - y.square()
    shared = local(images * references) - x * y
    return ((2 * x * y + c1) * (2 * shared + c2) / ((x.square() + y.square() + c1) * (spread + c2))).mean((1, 2, 3))


def code_counts(tokens: torch.Tensor, labels: torch.Tensor, num_codes: int, num_users: int) -> torch.Tensor:
    """Counts (num_users, num_codes) of each code in each user's tokens (B, h, w)."""
    cell = labels.view(-1, 1, 1) * num_codes + tokens
    return torch.bincount(cell.flatten(), minlength=num_users * num_codes).view(num_users, num_codes)


def codebook_metrics(counts: torch.Tensor, images_per_user: torch.Tensor) -> dict[str, float]:
    """Use of a codebook from counts (num_users, num_codes) and windows per user (num_users,), see
    docs/evaluation.md."""
    total = counts.sum(0).double()
    shown = images_per_user > 0
    own, images_per_user = counts[shown].double(), images_per_user[shown]
    rate = own / own.sum(1, keepdim=True).clamp_min(1)
    others = (total - own) / (total.sum() - own.sum(1, keepdim=True)).clamp_min(1)
    often = own >= images_per_user.view(-1, 1) / 4
    distinctive = ((rate >= DISTINCTIVE_RATIO * others) & often & (own > 0)).sum(1).double()
    return {
        "usage": float((total > 0).double().mean()),
        "perplexity": float(torch.special.entr(total / total.sum()).sum().exp()),
        "codes_per_user": float((own > 0).sum(1).double().mean()),
        "distinctive_codes_per_user": float(distinctive.mean()),
        "distinctive_codes_least": float(distinctive.min()),
    }


def control_ratio(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean of probabilities (N, n) of the users in labels (N,) over that of the other users."""
    own = probabilities.gather(1, labels.unsqueeze(1)).mean()
    others = (1 - own) / (probabilities.shape[1] - 1)
    return float(own / others.clamp_min(1e-9))


def equal_error_rate(false: np.ndarray, true: np.ndarray) -> float:
    """The rate at which false acceptance equals false rejection, both rates (T,) rising; linear between thresholds."""
    return float(np.interp(0, false + true - 1, false))


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017), in float64.

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½. With Σ = RᵀR the eigenvalues of (Σ₁Σ₂)^½ are the singular values of
    R₁R₂ᵀ, so no root of a singular matrix is taken where there are fewer samples than features.
    """
    means = [part.double().mean(0) for part in (first, second)]
    scaled = [(part - mean) / (len(part) - 1) ** 0.5 for part, mean in zip((first, second), means, strict=True)]
    root, other = (torch.linalg.qr(part, mode="r").R for part in scaled)
    shared = torch.linalg.svdvals(root @ other.mT).sum()
    distance = (means[0] - means[1]).square().sum() + root.square().sum() + other.square().sum() - 2 * shared
    return float(distance.clamp_min(0))


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Kernel distance (Bińkowski et al. 2018) of features (N, D) and (N, D): unbiased squared maximum mean discrepancy
    with the kernel (xᵀy/D + 1)³."""
    kernel = lambda x, y: (x @ y.mT / x.shape[1] + 1) ** 3
    first, second = first.double(), second.double()
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(first, first), kernel(second, second))]
    return float(sum(own) - 2 * kernel(first, second).mean())


def manifold_metrics(real: torch.Tensor, generated: torch.Tensor, k: int) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of features (N, D) and
    (M, D), with balls that reach to the k-th neighbour within each set."""
    between = torch.cdist(real, generated)  # (N, M)
    radius, generated_radius = (torch.cdist(part, part).kthvalue(k + 1).values for part in (real, generated))
    within = between < radius[:, None]
    return {
        "precision": float(within.any(0).double().mean()),
        "recall": float((between < generated_radius).any(1).double().mean()),
        "density": float(within.sum(0).double().mean() / k),
        "coverage": float(within.any(1).double().mean()),
    }


def inception_score(probabilities: torch.Tensor) -> float:
    """exp of the mean Kullback-Leibler divergence of rows (N, n) from their mean (Salimans et al. 2016), in [1, n]."""
    rows = probabilities.double()
    each = torch.special.entr(rows.mean(0)).sum() - torch.special.entr(rows).sum(1).mean()
    return float(each.exp())


def nearest_train(queries: WindowSet, train: WindowSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance (N,) of each window to the nearest training window of its user, at the best circular shift in time, and
    that one's row (N,). Every user has training windows, see `apply_split`."""
    distance, row = torch.empty(len(queries)), torch.empty(len(queries), dtype=torch.long)
    small = (torch.nn.functional.interpolate(part.float(), size=(SIDE, SIDE), mode="area") for part in (queries, train))
    windows, references = (part.double().flatten(1, 2) for part in small)  # distances are differences of large sums
    for user in queries.labels.unique():
        asked, known = (torch.nonzero(labels == user).flatten() for labels in (queries.labels, train.labels))
        parts = [_shifted_distance(part, references[known]).min(1) for part in windows[asked].split(64)]
        distance[asked] = torch.cat([part.values for part in parts]).float()
        row[asked] = known[torch.cat([part.indices for part in parts])]
    return distance, row


def _shifted_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Root mean square (N, M) of the differences of (N, rows, SIDE) and (M, rows, SIDE) at the best shift, by the
    correlation theorem."""
    products = torch.einsum("nrf,mrf->nmf", torch.fft.rfft(one), torch.fft.rfft(other).conj())
    correlation = torch.fft.irfft(products, SIDE).amax(2)
    energy = one.square().sum((1, 2))[:, None] + other.square().sum((1, 2))
    return ((energy - 2 * correlation).clamp_min(0) / one[0].numel()).sqrt()
