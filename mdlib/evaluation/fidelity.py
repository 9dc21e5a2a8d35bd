"""Whether generated windows are distributed like real ones, in the features of classifiers of real windows (`fidelity`)
and in image statistics (`statistics`), see docs/evaluation.md. Distances compare the pairs in `evidence.COMPARED`."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy.stats import ks_2samp
from sklearn.manifold import TSNE

from mdlib.data.windows import WindowSet
from mdlib.evaluation import metrics
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.codec_quality import find_lpips
from mdlib.evaluation.evidence import COMPARED, Evidence, balanced_rows, compared_sets
from mdlib.evaluation.metrics import metric, missing, over_users, unmeasured
from mdlib.models.classifier import SmallCNN, features
from mdlib.models.layers import parts
from mdlib.models.pretrained import load_inception
from mdlib.utils import best_device, to_float

DISTANCES = ("kid", "precision", "recall", "density", "coverage")
FRECHET = {"value": "fd", "real_vs_real": "fd_real_vs_real", "train": "fd_train"}  # the Fréchet distances' own keys
DRAWS = 4  # samples of equally many windows of each set
PAIRS = 2000  # of a user's windows, at most
LPIPS_PAIRS = 20
MAP_USERS, MAP_WINDOWS = 8, 12  # shown in the map: users, and windows of each in either set
LEVELS = 32  # grey levels of the co-occurrence matrix
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows and columns to the neighbour: four directions, one pixel
BANDS = (0.0, 0.05, 0.1, 0.2, 0.5)  # edges of the spectrum's bands, cycles a pixel
FEATURES = "mean deviation skewness kurtosis contrast dissimilarity homogeneity energy".split()
FEATURES += [f"spectrum_{band}" for band in range(1, len(BANDS))]
STATISTICS = ("ks", "mahalanobis", "typical")


def fidelity(evidence: Evidence, arms: Arms) -> dict:
    """The section `fidelity` of the report."""
    sets = compared_sets(evidence)
    each = [{name: features(one, part.images) for name, part in sets.items()} for one in arms.networks["real_only"]]
    of = lambda found, one, other: float((found[one] - found[other]).norm(dim=1).mean())
    apart = lambda name, one, other: np.mean([of(found[name], one, other) for found in each])
    return {
        **_distances(sets, each),
        "fd_inception": _fd_inception(sets),
        "diversity": _diversity(sets, evidence.gap, PAIRS, apart),
        "inception_score": _inception_score(arms.networks["real_only"], sets),
        "lpips_diversity": _lpips_diversity(sets, evidence.gap),
        "map": neighbourhood_map(each[0], sets),
    }


def _distances(sets: dict[str, WindowSet], each: list[dict[str, torch.Tensor]]) -> dict:
    """Means over classifiers and samples. All but kid depend on the number of windows, which is that of each user in
    the smallest set."""
    draws = [balanced_rows(sets, seed) for seed in range(DRAWS)]
    n = len(draws[0]["unseen"])
    if n < 2:
        why = "no user has generated windows, training windows and windows in both halves of the unseen"
        return missing(*FRECHET.values(), "fd_ratio", *DISTANCES, reason=why)
    counts = torch.bincount(sets["unseen"].labels[draws[0]["unseen"]])
    k = max(1, min(5, int(counts[counts > 0].min()) - 1))  # balls must not reach beyond a user's own windows
    found = {name: {} for name in ("fd", *DISTANCES)}
    for key, (one, other) in COMPARED.items():
        pairs = [(own[one][rows[one]], own[other][rows[other]]) for own in each for rows in draws]
        manifolds = [metrics.manifold_metrics(second, first, k) for first, second in pairs]
        for values, pair in zip(manifolds, pairs, strict=True):
            values |= {"fd": metrics.frechet_distance(*pair), "kid": metrics.kernel_distance(*pair)}
        for name, means in found.items():
            means[key] = float(np.mean([values[name] for values in manifolds]))
    fd = found.pop("fd")
    return {
        **{FRECHET[key]: metric(value, n) for key, value in fd.items()},
        "fd_ratio": metric(fd["value"] / max(fd["real_vs_real"], 1e-9), n),
        **{name: {**values, "n": n} for name, values in found.items()},
    }


def neighbourhood_map(features_of: dict[str, torch.Tensor], sets: dict[str, WindowSet]) -> list[dict]:
    """Some generated and unseen windows of the first users that have both, by t-SNE (van der Maaten & Hinton 2008) of
    one classifier's features: user, generated (or real), x and y."""
    points, rows = [], []
    known = np.intersect1d(sets["generated"].labels, sets["unseen"].labels)[:MAP_USERS].tolist()
    for name in ("generated", "unseen"):
        part = sets[name]
        for label in known:
            mine = torch.nonzero(part.labels == label).flatten()
            chosen = mine[torch.linspace(0, len(mine) - 1, min(MAP_WINDOWS, len(mine))).round().long()]
            rows.append(features_of[name][chosen])
            points += [{"user": part.users[label], "generated": name == "generated"} for _ in chosen]
    if len(points) < 8:
        return []
    perplexity = min(20, (len(points) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(torch.cat(rows).numpy())
    return [{**point, "x": float(x), "y": float(y)} for point, (x, y) in zip(points, places, strict=True)]


def _diversity(sets: dict[str, WindowSet], gap: int, most: int, distance: Callable) -> dict:
    """Mean distance(name of a set, rows, other rows) of at most `most` pairs of generated windows of a user, mean over
    users; real: of unseen windows that share no step."""
    spread = {}
    for name, apart in (("generated", 0), ("unseen", gap)):
        order = lambda pairs: torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(0))
        some = [pairs[:, order(pairs)[:most]] for pairs in pairs_apart(sets[name], apart)]
        spread[name] = np.array([distance(name, *pairs) if pairs.numel() else np.nan for pairs in some])
    both = np.isfinite(spread["generated"]) & np.isfinite(spread["unseen"])
    if not both.any():
        return unmeasured("no user has two generated windows and two unseen ones that share no step")
    value, real = over_users(spread["generated"][both]), float(spread["unseen"][both].mean())
    return {**value, "real": real, "ratio": value["value"] / max(real, 1e-9)}


def pairs_apart(windows: WindowSet, gap: int) -> list[torch.Tensor]:
    """Rows (2, P) of all pairs of windows of each user that share no step: of different recordings, or `gap` apart."""
    files, found = pd.DataFrame(list(windows.files)), []
    recording = torch.from_numpy(files.groupby(["condition", "recording"]).ngroup().to_numpy())
    number = torch.from_numpy(files["number"].to_numpy(float))
    for label in range(windows.num_users):
        mine = torch.nonzero(windows.labels == label).flatten()
        one, other = mine[torch.triu_indices(len(mine), len(mine), offset=1)]
        apart = (recording[one] != recording[other]) | ((number[one] - number[other]).abs() >= gap)
        found.append(torch.stack([one, other])[:, apart])
    return found


def _inception_score(classifiers: list[SmallCNN], sets: dict[str, WindowSet]) -> dict:
    rows = balanced_rows({name: sets[name] for name in ("generated", "unseen")}, seed=0)
    n = len(rows["unseen"])
    if not n:
        return unmeasured("no user has both generated and unseen windows")
    of = lambda name: [metrics.inception_score(one.probabilities(sets[name].images[rows[name]])) for one in classifiers]
    return {**metric(float(np.mean(of("generated"))), n), "real": float(np.mean(of("unseen")))}


@torch.no_grad()
def _fd_inception(sets: dict[str, WindowSet]) -> dict:
    """Fréchet distance in the features of torchvision's Inception v3, one sample of windows."""
    try:
        network = load_inception().to(best_device())
    except FileNotFoundError as error:
        return unmeasured(str(error))
    rows = balanced_rows(sets, seed=0)
    n = len(rows["unseen"])
    if n < 2:
        return unmeasured("too few windows of a user in one of the sets")
    batches = {name: parts(best_device(), 32, sets[name].images[some]) for name, some in rows.items()}
    found = {name: torch.cat([network(to_float(part)).cpu() for (part,) in some]) for name, some in batches.items()}
    values = {key: metrics.frechet_distance(found[one], found[other]) for key, (one, other) in COMPARED.items()}
    return {**values, "n": n}


@torch.no_grad()
def _lpips_diversity(sets: dict[str, WindowSet], gap: int) -> dict:
    try:
        network = find_lpips(best_device())
    except FileNotFoundError as error:
        return unmeasured(str(error))
    images = lambda name, rows: to_float(sets[name].images[rows].to(best_device()))
    mean = lambda name, one, other: float(network(images(name, one), images(name, other)).mean())
    return _diversity(sets, gap, LPIPS_PAIRS, mean)


def statistics(evidence: Evidence) -> dict:
    """The section `statistics` of the report: how alike generated and real windows are in FEATURES. A window can be
    right in all of them and show no gait."""
    sets = compared_sets(evidence)
    rows = balanced_rows(sets, seed=0)
    if len(rows["unseen"]) < 2:
        why = "no user has windows in all sets: generated, training, both halves of the unseen"
        return missing(*STATISTICS, reason=why)
    every = {name: (describe(part.images), part.labels.numpy()) for name, part in sets.items()}
    some = {name: (found[rows[name]], labels[rows[name]]) for name, (found, labels) in every.items()}
    return {**_kolmogorov(some), **_mahalanobis(every)}


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


def _kolmogorov(sets: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict:
    """The metric ks of (features, labels), with equally many rows per user in all sets, because it depends on n."""
    of = lambda name, user: sets[name][0][sets[name][1] == user]
    users = [user for user in np.unique(sets["unseen"][1]) if len(of("unseen", user)) > 1]
    if not users:
        return missing("ks", reason="no user has two windows in every set")
    each = {
        key: np.array([ks_2samp(of(one, user), of(other, user), axis=0, method="asymp").statistic for user in users])
        for key, (one, other) in COMPARED.items()
    }  # (users, features)
    means = {key: float(values.mean()) for key, values in each.items() if key != "value"}
    return {"ks": over_users(each["value"].mean(1)) | means}


def _mahalanobis(sets: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict:
    """Distance to the mean of the user's first half with the covariance within users; real: of the second half.
    typical: fraction of generated windows between the 5 and 95 % quantiles of the real distances."""
    of = lambda name, user: sets[name][0][sets[name][1] == user]
    users = np.unique(sets["first"][1])
    apart = lambda name: np.concatenate([of(name, user) - of("first", user).mean(0) for user in users])
    rows = apart("first")
    if len(rows) - len(users) < len(FEATURES):
        return missing("mahalanobis", "typical", reason=f"too few unseen windows for {len(FEATURES)} features")
    within = rows.T @ rows / (len(rows) - len(users))
    distance = lambda rows: np.sqrt(np.einsum("nf,fg,ng->n", rows, np.linalg.pinv(within), rows))
    generated, real = distance(apart("generated")), distance(apart("second"))
    low, high = np.quantile(real, [0.05, 0.95])
    return {
        "mahalanobis": {**metric(float(generated.mean()), len(generated)), "real": float(real.mean())},
        "typical": metric(float(((generated >= low) & (generated <= high)).mean()), len(generated)),
    }
