"""Pure functions of images in [−1, 1], tokens, features and probabilities; and the nearest training window."""

import numpy as np
import torch
from sklearn.metrics import roc_curve
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.kid import poly_mmd

from mdlib.data.windows import WindowSet

DISTINCTIVE_RATIO = 1.5  # a distinctive code is this many times as frequent in a user's windows as in the others'
SIDE = 32  # pixels a side at which windows are compared with training windows: speckle is finer


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image (B, C, H, W); the peak is the width of the range, 2."""
    mse = (images - references).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of each image (B, C, H, W)."""
    return structural_similarity_index_measure(images, references, data_range=2.0, reduction="none")


def code_counts(tokens: torch.Tensor, labels: torch.Tensor, num_codes: int, num_users: int) -> torch.Tensor:
    """Counts (num_users, num_codes) of each code in each user's tokens (B, h, w)."""
    cell = labels.view(-1, 1, 1) * num_codes + tokens
    return torch.bincount(cell.flatten(), minlength=num_users * num_codes).view(num_users, num_codes)


def codebook_figures(counts: torch.Tensor, images_per_user: torch.Tensor) -> dict[str, float]:
    """Use of a codebook from counts (num_users, num_codes). A distinctive code is used at least 1.5 times as often by a
    user as by the other users together, and at least once in four windows."""
    total = counts.sum(0).double()
    own = counts.double()
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
    """Mean of probabilities (N, n) of the users in labels (N,) over that of the other users; 1: no control."""
    own = probabilities.gather(1, labels.unsqueeze(1)).mean()
    others = (1 - own) / (probabilities.shape[1] - 1)
    return float(own / others.clamp_min(1e-9))


def roc(scores: np.ndarray, genuine: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """False and true acceptance rates, both rising, as the threshold on scores (N,) falls; genuine: bool (N,)."""
    false, true, _ = roc_curve(genuine, scores, sample_weight=weights, drop_intermediate=False)
    return false, true


def equal_error_rate(false: np.ndarray, true: np.ndarray) -> float:
    """The rate at which false acceptance equals false rejection on a curve of `roc`, linear between thresholds."""
    above = int(np.argmax(false >= 1 - true))
    if above == 0:
        return float(false[0])
    before, after = (1 - true - false)[above - 1 : above + 1]
    part = before / (before - after)
    return float(false[above - 1] + part * (false[above] - false[above - 1]))


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017), in float64.

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½. With Σ = RᵀR the eigenvalues of (Σ₁Σ₂)^½ are the singular values of
    R₁R₂ᵀ, so no root of a singular matrix is taken where there are fewer samples than features. The smaller the sets,
    the larger the upward bias: compare distances at equal N and M only.

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
    """Mean (D,) of features (N, D) and R (min(N, D), D) with RᵀR their covariance."""
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Kernel distance (Bińkowski et al. 2018) of features (N, D) and (N, D): unbiased squared maximum mean discrepancy
    with the kernel (xᵀy/D + 1)³; it scatters around 0 for sets of one distribution."""
    return float(poly_mmd(first.double(), second.double()))


def manifold_figures(real: torch.Tensor, generated: torch.Tensor, k: int) -> dict[str, float]:
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
    """Distance (N,) of each window to the nearest training window of its user, and that one's row (N,).

    Distance: root mean square over 32×32 pixels in [−1, 1], the smallest over all circular shifts in time; inf (and row
    0) where the user has no training window.
    """
    distance, row = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.long)
    windows, references = _small(queries), _small(train)
    for user in queries.labels.unique():
        asked, known = (torch.nonzero(labels == user).flatten() for labels in (queries.labels, train.labels))
        if len(known):
            parts = [_shifted_distance(part, references[known]).min(1) for part in windows[asked].split(64)]
            distance[asked] = torch.cat([part.values for part in parts]).float()
            row[asked] = known[torch.cat([part.indices for part in parts])]
    return distance, row


def _small(windows: WindowSet) -> torch.Tensor:
    """(N, C·SIDE, SIDE), float64 because distances are differences of large sums."""
    small = torch.nn.functional.interpolate(windows.float(), size=(SIDE, SIDE), mode="area")
    return small.double().flatten(1, 2)


def _shifted_distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Root mean square (N, M) of the differences of (N, rows, SIDE) and (M, rows, SIDE) at the best shift, by the
    correlation theorem."""
    products = torch.einsum("nrf,mrf->nmf", torch.fft.rfft(one), torch.fft.rfft(other).conj())
    correlation = torch.fft.irfft(products, SIDE).amax(2)
    energy = one.square().sum((1, 2))[:, None] + other.square().sum((1, 2))
    return ((energy - 2 * correlation).clamp_min(0) / one[0].numel()).sqrt()
