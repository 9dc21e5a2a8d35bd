"""Pure functions: images, tokens, probabilities in, numbers out. Images are float tensors in [−1, 1]."""

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

DISTINCTIVE_RATIO = 1.5  # a distinctive code is this many times as frequent in a user's windows as in the others'


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image (B, C, H, W); the peak is the range's width, 2."""
    mse = (images - references).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of each image (B, C, H, W)."""
    return structural_similarity_index_measure(images, references, data_range=2.0, reduction="none")


def code_counts(tokens: torch.Tensor, labels: torch.Tensor, num_codes: int, num_users: int) -> torch.Tensor:
    """How often user u uses code c: counts (num_users, num_codes) of tokens (B, h, w)."""
    cell = labels.view(-1, 1, 1) * num_codes + tokens
    return torch.bincount(cell.flatten(), minlength=num_users * num_codes).view(num_users, num_codes)


def codebook_figures(counts: torch.Tensor, images_per_user: torch.Tensor) -> dict[str, float]:
    """Use of the codebook from counts (num_users, num_codes).

    usage: share of codes used at least once; perplexity: exp of the entropy of all indices; codes_per_user: codes a
    user uses, mean over users; distinctive_codes_per_user: codes a user uses at least 1.5 times as often as the other
    users taken together and at least once in every four of the user's windows, mean over users (and the least of it).
    The four: neighbouring windows share three of their four steps, so this is once in each independent stretch.
    """
    total = counts.sum(0).double()
    share = total / total.sum()
    own = counts.double()
    rate = own / own.sum(1, keepdim=True).clamp_min(1)
    others = (total - own) / (total.sum() - own.sum(1, keepdim=True)).clamp_min(1)
    often = own >= images_per_user.view(-1, 1) / 4
    distinctive = ((rate >= DISTINCTIVE_RATIO * others) & often & (own > 0)).sum(1).double()
    return {
        "usage": float((total > 0).double().mean()),
        "perplexity": float(torch.special.entr(share).sum().exp()),
        "codes_per_user": float((own > 0).sum(1).double().mean()),
        "distinctive_codes_per_user": float(distinctive.mean()),
        "distinctive_codes_least": float(distinctive.min()),
    }


def confusion(predicted: torch.Tensor, labels: torch.Tensor, num_users: int) -> torch.Tensor:
    """Counts (num_users, num_users): row the true user, column the one that was named."""
    return torch.bincount(labels * num_users + predicted, minlength=num_users**2).view(num_users, num_users)


def control_ratio(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean P(k) of windows conditioned on user k over mean P(k) of windows conditioned on others, all users alike.

    1 means the condition does nothing; probabilities (N, n), labels (N,).
    """
    own = probabilities.gather(1, labels.unsqueeze(1)).mean()
    others = (1 - own) / (probabilities.shape[1] - 1)
    return float(own / others.clamp_min(1e-9))


def roc(scores: np.ndarray, genuine: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rates of false and of true acceptance, both rising, as the threshold on scores (N,) falls; genuine: bool (N,)."""
    false, true, _ = roc_curve(genuine, scores, sample_weight=weights, drop_intermediate=False)
    return false, true


def equal_error_rate(false: np.ndarray, true: np.ndarray) -> float:
    """The rate at which as many impostors are accepted as genuine ones are refused, on a curve of `roc`: between the
    two thresholds around it by a straight line. 0.5 is chance."""
    above = int(np.argmax(false >= 1 - true))  # the first threshold at which no fewer impostors come in
    if above == 0:
        return float(false[0])
    before, after = (1 - true - false)[above - 1 : above + 1]
    part = before / (before - after)
    return float(false[above - 1] + part * (false[above] - false[above - 1]))


def block_bootstrap(values: np.ndarray, blocks: np.ndarray, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Bootstrap means (draws,) of values (N,) that are alike within a block (Künsch 1989): whole blocks are redrawn,
    because neighbouring windows overlap and count almost as one."""
    names, index = np.unique(blocks, return_inverse=True)
    sums = np.bincount(index, values, len(names))
    sizes = np.bincount(index, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    return sums[drawn].sum(1) / sizes[drawn].sum(1)


def interval(draws: np.ndarray, level: float = 0.95) -> list[float]:
    """Percentile interval of bootstrap draws."""
    tail = 100 * (1 - level) / 2
    return [float(value) for value in np.percentile(draws, [tail, 100 - tail])]


def paired_bootstrap(correct: np.ndarray, blocks: np.ndarray, draws: int = 4000, seed: int = 0) -> np.ndarray:
    """Bootstrap means (draws, arms) of arms' correctness (arms, seeds, N) on the same windows. Seeds and blocks of
    windows are both redrawn, the same ones for every arm: both are chance."""
    rng = np.random.default_rng(seed)
    names, index = np.unique(blocks, return_inverse=True)
    sums = np.stack([[np.bincount(index, row, len(names)) for row in arm] for arm in correct])  # (arms, seeds, blocks)
    sizes = np.bincount(index, minlength=len(names))
    seeds = rng.integers(sums.shape[1], size=(draws, sums.shape[1]))
    chosen = rng.integers(len(names), size=(draws, len(names)))
    means = [sums[:, s].mean(1)[:, b].sum(1) / sizes[b].sum() for s, b in zip(seeds, chosen, strict=True)]
    return np.stack(means)


def paired_gain(first: np.ndarray, second: np.ndarray, blocks: np.ndarray, draws: int = 4000, seed: int = 0) -> dict:
    """Difference second − first of two arms' correctness (seeds, N) on the same test windows, with a 95 % interval
    and a two-sided bootstrap p-value."""
    difference = second.astype(float) - first.astype(float)  # (seeds, N)
    means = paired_bootstrap(difference[None], blocks, draws, seed)[:, 0]
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return {
        "gain": float(difference.mean()),
        "ci95": interval(means),
        "p_value": float(min(1.0, 2 * tail + 1 / draws)),
    }


def equivalent_count(counts: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
    """Number of real windows (draws,) at which real alone reaches an arm, never outside the measured numbers.

    Args:
        counts: real windows a user (A,), rising.
        accuracies: (draws, 1 + A): of the arm in question, then of real alone at each count. More windows cannot do
            harm: where a larger count scored less, the smaller one's accuracy stands.
    """
    rising = np.maximum.accumulate(accuracies[:, 1:], axis=1) + 1e-9 * np.arange(len(counts))
    found = [np.interp(arm, line, np.log(counts)) for arm, line in zip(accuracies[:, 0], rising, strict=True)]
    return np.exp(found)


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017), in float64.

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½. With Σ = RᵀR the eigenvalues of (Σ₁Σ₂)^½ are the singular values of
    R₁R₂ᵀ: no root of a singular matrix is taken where there are fewer samples than features. Biased upwards, the more
    the smaller the sets: compare distances of equal N and M only.

    Raises:
        ValueError: fewer than two rows, or features of different widths.
    """
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"a Fréchet distance needs two sets of two rows or more, equally wide; got {shapes}")
    (mean, root), (other_mean, other_root) = (_gaussian(part.double()) for part in (first, second))
    shared = torch.linalg.svdvals(root @ other_root.mT).sum()
    distance = (mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * shared
    return float(distance.clamp_min(0))


def _gaussian(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) of features (N, D) and R (min(N, D), D), whose RᵀR is their covariance."""
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Kernel distance (Bińkowski et al. 2018) of features (N, D) and (N, D): unbiased squared maximum mean discrepancy
    with the cubic kernel (xᵀy/D + 1)³. Around 0, and as often below it, for sets of one distribution."""
    return float(poly_mmd(first.double(), second.double()))


def manifold_figures(real: torch.Tensor, made: torch.Tensor, k: int) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of features (N, D) and
    (M, D), with balls that reach to the k-th neighbour within each set.

    precision: share of made windows in a ball of a real one; recall: share of real windows in a ball of a made one;
    density: real balls a made window lies in, over k (above 1 where it keeps to the crowd); coverage: share of real
    balls that hold a made window.
    """
    between = torch.cdist(real, made)  # (N, M)
    radius, made_radius = (_neighbour_distance(part, k) for part in (real, made))
    within = between < radius[:, None]
    return {
        "precision": float(within.any(0).double().mean()),
        "recall": float((between < made_radius).any(1).double().mean()),
        "density": float(within.sum(0).double().mean() / k),
        "coverage": float(within.any(1).double().mean()),
    }


def _neighbour_distance(features: torch.Tensor, k: int) -> torch.Tensor:
    """Distance (N,) of each row to its k-th neighbour in the same set."""
    return torch.cdist(features, features).kthvalue(k + 1).values


def inception_score(probabilities: torch.Tensor) -> float:
    """exp of the mean Kullback-Leibler divergence of rows (N, n) from their mean (Salimans et al. 2016): between 1 and
    n, high where every window is surely somebody and all are somebody else."""
    rows = probabilities.double()
    each = torch.special.entr(rows.mean(0)).sum() - torch.special.entr(rows).sum(1).mean()
    return float(each.exp())
