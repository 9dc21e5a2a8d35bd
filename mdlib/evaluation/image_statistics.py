"""Are generated windows like real ones as plain images? Moments, texture and spectrum, user by user.

A window can be right in all of them and show no gait. `ks` is measured three times, see `evidence.COMPARED`.
"""

import numpy as np
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import silhouette_score

from mdlib.data.windows import WindowSet
from mdlib.evaluation.evidence import COMPARED, Evidence, alike, compared_sets
from mdlib.evaluation.intervals import absent, figure, missing, over_users

LEVELS = 32  # grey levels of the co-occurrence matrix
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows and columns to the neighbour: four directions, one pixel
BANDS = (0.0, 0.05, 0.1, 0.2, 0.5)  # edges of the spectrum's bands, cycles a pixel
FEATURES = (
    *("mean", "deviation", "skewness", "kurtosis"),
    *("contrast", "dissimilarity", "homogeneity", "energy"),
    *(f"spectrum_{band}" for band in range(1, len(BANDS))),
)
NAMES = ("ks", "mahalanobis", "typical", "silhouette")


def statistics(evidence: Evidence) -> dict:
    """The section `statistics` of the report: how alike generated and real windows are in FEATURES."""
    sets, _ = compared_sets(evidence)
    found = {name: describe(part.images) for name, part in sets.items()}
    rows = alike(sets, seed=0)
    if len(rows["unseen"]) < 2:
        return missing(*NAMES, reason="no user has windows in all sets: generated, training, both halves of the unseen")
    return {
        **_kolmogorov(sets, found, rows),
        **_mahalanobis(sets, found),
        "silhouette": _silhouette(sets, found, rows),
    }


def describe(images: torch.Tensor, batch_size: int = 256) -> np.ndarray:
    """FEATURES (N, 12) of uint8 images (N, C, S, S), RGB ones as the mean over channels."""
    grey = [part.float().mean(1) / 255 for part in images.split(batch_size)]
    return torch.cat([torch.cat([_moments(part), texture(part), _spectrum(part)], 1) for part in grey]).numpy()


def _moments(images: torch.Tensor) -> torch.Tensor:
    """Mean, deviation, skewness and kurtosis (N, 4) of intensities (N, S, S); 0 but for the mean where flat."""
    pixels = images.flatten(1)
    mean, deviation = pixels.mean(1), pixels.std(1, correction=0)
    scaled = (pixels - mean[:, None]) / deviation[:, None].clamp_min(1e-6)
    return torch.stack([mean, deviation, (scaled**3).mean(1), (scaled**4).mean(1)], 1)


def texture(images: torch.Tensor, levels: int = LEVELS) -> torch.Tensor:
    """Contrast Σ p (i−j)², dissimilarity Σ p |i−j|, homogeneity Σ p / (1 + (i−j)²) and energy (Σ p²)^½ (N, 4) of
    intensities (N, S, S) in [0, 1].

    p: symmetric grey-level co-occurrence matrix (Haralick et al. 1973) of neighbours; mean over four directions.
    """
    grey = (images * levels).long().clamp(0, levels - 1)
    away = (torch.arange(levels)[:, None] - torch.arange(levels)).abs().double()
    found, size = [], grey.shape[-1]
    image = torch.arange(len(grey)).view(-1, 1, 1) * levels**2
    for down, right in NEIGHBOURS:
        here = grey[:, : size - down, max(0, -right) : size - max(0, right)]
        there = grey[:, down:, max(0, right) : size - max(0, -right)]
        pairs = torch.cat([image + here * levels + there, image + there * levels + here], 1)
        counts = torch.bincount(pairs.flatten(), minlength=len(grey) * levels**2).view(-1, levels, levels).double()
        p = counts / counts.sum((1, 2), keepdim=True)
        sums = [(p * weight).sum((1, 2)) for weight in (away**2, away, 1 / (1 + away**2))]
        found.append(torch.stack([*sums, p.square().sum((1, 2)).sqrt()], 1))
    return torch.stack(found).mean(0).float()


def _spectrum(images: torch.Tensor) -> torch.Tensor:
    """Fraction (N, bands) of the power, without the mean's, in bands of the radial frequency."""
    centred = images - images.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred).abs().square()
    frequency = torch.fft.fftfreq(images.shape[-1])
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    bands = [power[:, (radius > low) & (radius <= high)].sum(1) for low, high in zip(BANDS, BANDS[1:], strict=False)]
    return torch.stack(bands, 1) / power.sum((1, 2)).clamp_min(1e-9)[:, None]


def _kolmogorov(sets: dict[str, WindowSet], found: dict[str, np.ndarray], rows: dict[str, torch.Tensor]) -> dict:
    """With as many windows of a user in all sets: the statistic grows when they are fewer."""
    labels = {name: part.labels[rows[name]].numpy() for name, part in sets.items()}
    sample = {name: found[name][rows[name].numpy()] for name in sets}
    users = [user for user in np.unique(labels["unseen"]) if (labels["unseen"] == user).sum() > 1]
    if not users:
        return missing("ks", reason="no user has two windows in every set")
    of = lambda name, user: sample[name][labels[name] == user]
    each = {
        key: np.array([ks_2samp(of(one, user), of(other, user), axis=0).statistic for user in users])
        for key, (one, other) in COMPARED.items()
    }  # (users, features)
    means = {key: float(values.mean()) for key, values in each.items() if key != "value"}
    by_feature = [
        {"feature": name, "value": float(each["value"][:, k].mean()), "real": float(each["real_vs_real"][:, k].mean())}
        for k, name in enumerate(FEATURES)
    ]
    return {"ks": over_users(each["value"].mean(1)) | means, "ks_by_feature": by_feature}


def _mahalanobis(sets: dict[str, WindowSet], found: dict[str, np.ndarray]) -> dict:
    """Distance to the mean of the user's first half with the covariance within users; real: of the second half.
    typical: fraction of generated windows between the 5 and 95 % quantiles of the real distances."""
    labels = {name: part.labels.numpy() for name, part in sets.items()}
    users = np.unique(labels["first"])
    centre = {user: found["first"][labels["first"] == user].mean(0) for user in users}
    apart = lambda name: np.concatenate([found[name][labels[name] == user] - centre[user] for user in users])
    rows = apart("first")
    if len(rows) - len(users) < len(FEATURES):
        return missing("mahalanobis", "typical", reason=f"too few unseen windows for {len(FEATURES)} features")
    within = rows.T @ rows / (len(rows) - len(users))
    distance = lambda rows: np.sqrt(np.einsum("nf,fg,ng->n", rows, np.linalg.pinv(within), rows))
    generated, real = distance(apart("generated")), distance(apart("second"))
    low, high = np.quantile(real, [0.05, 0.95])
    return {
        "mahalanobis": {**figure(float(generated.mean()), len(generated)), "real": float(real.mean())},
        "typical": figure(float(((generated >= low) & (generated <= high)).mean()), len(generated)),
    }


def _silhouette(sets: dict[str, WindowSet], found: dict[str, np.ndarray], rows: dict[str, torch.Tensor]) -> dict:
    """How far users lie apart in features; real: of as many unseen windows."""
    scale = found["unseen"].std(0) + 1e-9
    value = {}
    for name in ("generated", "unseen"):
        labels = sets[name].labels[rows[name]].numpy()
        if not 1 < len(np.unique(labels)) < len(labels):
            return absent("too few windows a user")
        value[name] = float(silhouette_score(found[name][rows[name].numpy()] / scale, labels))
    return {**figure(value["generated"], len(rows["generated"])), "real": value["unseen"]}
