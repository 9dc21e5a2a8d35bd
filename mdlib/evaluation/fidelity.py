"""Are generated windows spread like real ones? Distances and diversity in the features of classifiers that saw neither.

Distances between sets are measured thrice, see `evidence.COMPARED`.
"""

import numpy as np
import torch
from sklearn.manifold import TSNE

from mdlib.data.windows import WindowSet, to_float
from mdlib.evaluation import metrics
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.evidence import COMPARED, Evidence, absent, alike, compared_sets, figure, missing, over_users
from mdlib.models.classifier import SmallCNN, features
from mdlib.models.perceptual import load_inception, load_lpips, lpips_weights
from mdlib.utils import best_device

NAMES = ("fd", "kid", "precision", "recall", "density", "coverage")
FLAT = {"value": "fd", "real_vs_real": "fd_real_vs_real", "train": "fd_train"}  # the Fréchet distances' own keys
DRAWS = 4  # of as many windows of each set
PAIRS = 2000  # of a user's windows, at most
LPIPS_NET, LPIPS_PAIRS = "squeeze", 20  # likewise


def fidelity(evidence: Evidence, arms: Arms) -> dict:
    """Figures in the features of the real-only classifiers, mean over them.

    The distances of `distances`; diversity: mean distance between two windows of one user that share no step, real: of
    unseen ones, ratio: value over real; inception_score: of the classifiers' probabilities; fd_inception and
    lpips_diversity: by published networks, where their weights are on this machine; map: see `neighbourhood_map`.
    """
    judges, sets, rows = arms.real_only, *compared_sets(evidence)
    each = [_features_of_all(judge, sets, rows) for judge in judges]
    return {
        **_compared(each, sets),
        "fd_inception": _fd_inception(sets),
        "diversity": _diversity(each, sets, evidence.gap),
        "inception_score": _inception_score(judges, sets),
        "lpips_diversity": _lpips_diversity(sets, evidence.gap),
        "map": neighbourhood_map(each[0], sets),
    }


def distances(evidence: Evidence, arms: Arms) -> dict:
    """Sets of windows compared in the features of the real-only classifiers, mean over them and over draws.

    fd: Fréchet distance; fd_ratio: fd over fd_real_vs_real. kid: kernel distance, unbiased. precision, recall, density,
    coverage: see `metrics.manifold_figures`. All but kid depend on the number of windows, so all sets give as many of
    each user.
    """
    sets, rows = compared_sets(evidence)
    return _compared([_features_of_all(judge, sets, rows) for judge in arms.real_only], sets)


def _compared(each: list[dict[str, torch.Tensor]], sets: dict[str, WindowSet]) -> dict:
    """each: a judge's features of each set."""
    draws = [alike(sets, seed) for seed in range(DRAWS)]
    n = len(draws[0]["unseen"])
    if n < 2:
        why = "no user has generated windows, training windows and windows in both halves of the unseen"
        return missing(*FLAT.values(), "fd_ratio", *NAMES[1:], reason=why)
    found, reach = {name: {} for name in NAMES}, _reach(sets["unseen"], draws[0]["unseen"])
    for key, (one, other) in COMPARED.items():
        pairs = [(features[one][rows[one]], features[other][rows[other]]) for features in each for rows in draws]
        for name, values in _mean([_figures(*pair, reach) for pair in pairs]).items():
            found[name][key] = values
    distance = found.pop("fd")
    flat = {FLAT[key]: figure(value, n) for key, value in distance.items()}
    ratio = distance["value"] / max(distance["real_vs_real"], 1e-9)
    return {**flat, "fd_ratio": figure(ratio, n), **{name: {**values, "n": n} for name, values in found.items()}}


def _figures(made: torch.Tensor, real: torch.Tensor, k: int) -> dict[str, float]:
    kernel = metrics.kernel_distance(made, real)
    return {"fd": metrics.frechet_distance(made, real), "kid": kernel, **metrics.manifold_figures(real, made, k)}


def _reach(windows: WindowSet, rows: torch.Tensor) -> int:
    """To which neighbour the balls of `metrics.manifold_figures` reach: to the fifth, but not beyond a user's own
    windows, or anything between two users would lie in them."""
    counts = torch.bincount(windows.labels[rows])
    return max(1, min(5, int(counts[counts > 0].min()) - 1))


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _features_of_all(
    judge: SmallCNN, sets: dict[str, WindowSet], rows: dict[str, list[int]]
) -> dict[str, torch.Tensor]:
    """A judge's features of each set; the halves' are rows of the unseen windows'."""
    found = {name: features(judge, part.images) for name, part in sets.items() if name not in rows}
    return found | {name: found["unseen"][half] for name, half in rows.items()}


def neighbourhood_map(
    features_of: dict[str, torch.Tensor], sets: dict[str, WindowSet], users: int = 8, each: int = 12
) -> list[dict]:
    """Some generated and unseen windows of the first users by t-SNE (van der Maaten & Hinton 2008) of one judge's
    features: user, generated (or real), x and y. To look at only: distances in it mean nothing."""
    points, rows = [], []
    for name in ("generated", "unseen"):
        part = sets[name]
        for label in range(min(users, part.num_users)):
            mine = torch.nonzero(part.labels == label).flatten()
            chosen = mine[torch.linspace(0, len(mine) - 1, min(each, len(mine))).round().long()]
            rows.append(features_of[name][chosen])
            points += [{"user": part.users[label], "generated": name == "generated"} for _ in chosen]
    if len(points) < 8:
        return []
    perplexity = min(20, (len(points) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(torch.cat(rows).numpy())
    return [{**point, "x": float(x), "y": float(y)} for point, (x, y) in zip(points, places, strict=True)]


# Diversity -------------------------------------------------------------------------------------------------------


def _diversity(each: list[dict[str, torch.Tensor]], sets: dict[str, WindowSet], gap: int) -> dict:
    """Mean distance between windows of one user, the mean over judges and then over users."""
    spread = {}
    for name, apart in (("generated", 0), ("unseen", gap)):
        pairs = [_some(mine, PAIRS) for mine in pairs_apart(sets[name], apart)]
        spread[name] = _spread([found[name] for found in each], pairs)
    return _beside_real(spread)


def _spread(each: list[torch.Tensor], pairs: list[torch.Tensor]) -> np.ndarray:
    """Mean distance (users,) of each user's pairs of rows, NaN where a user has none."""
    distance = lambda features, some: float((features[some[0]] - features[some[1]]).norm(dim=1).mean())
    return np.array([np.mean([distance(one, some) for one in each]) if some.numel() else np.nan for some in pairs])


def _beside_real(spread: dict[str, np.ndarray]) -> dict:
    """A figure of each user's spread among generated windows beside that among unseen ones, of users who have both."""
    made, real = spread["generated"], spread["unseen"]
    both = np.isfinite(made) & np.isfinite(real)
    if not both.any():
        return absent("no user has two generated windows and two unseen ones that share no step")
    value, of_real = float(made[both].mean()), float(real[both].mean())
    return over_users(made[both]) | {"real": of_real, "ratio": value / max(of_real, 1e-9)}


def pairs_apart(windows: WindowSet, gap: int) -> list[torch.Tensor]:
    """Rows (2, P) of all pairs of windows of each user that share no step: of different recordings, or `gap` apart."""
    names: dict[tuple, int] = {}
    recording = torch.tensor([names.setdefault((f.condition, f.recording), len(names)) for f in windows.files])
    number = torch.tensor([f.number for f in windows.files], dtype=torch.float64)
    found = []
    for label in range(windows.num_users):
        mine = torch.nonzero(windows.labels == label).flatten()
        one, other = mine[torch.triu_indices(len(mine), len(mine), offset=1)]
        apart = (recording[one] != recording[other]) | ((number[one] - number[other]).abs() >= gap)
        found.append(torch.stack([one, other])[:, apart])
    return found


def _inception_score(judges: list[SmallCNN], sets: dict[str, WindowSet]) -> dict:
    """The score (Salimans et al. 2016) of generated windows beside that of unseen ones, at equal numbers."""
    rows = alike({name: sets[name] for name in ("generated", "unseen")}, seed=0)
    n = len(rows["unseen"])
    if not n:
        return absent("no user has both generated and unseen windows")
    score = lambda name: [metrics.inception_score(j.probabilities(sets[name].images[rows[name]])) for j in judges]
    return {**figure(float(np.mean(score("generated"))), n), "real": float(np.mean(score("unseen")))}


# By published networks -------------------------------------------------------------------------------------------


def _fd_inception(sets: dict[str, WindowSet]) -> dict:
    """Fréchet distance in the features of torchvision's Inception v3, one draw of windows."""
    try:
        network = load_inception().to(best_device())
    except FileNotFoundError as error:
        return absent(str(error))
    drawn = alike(sets, seed=0)
    n = len(drawn["unseen"])
    if n < 2:
        return absent("too few windows of a user in one of the sets")
    found = {name: _inception_features(network, sets[name].images[some]) for name, some in drawn.items()}
    distances = {key: metrics.frechet_distance(found[one], found[other]) for key, (one, other) in COMPARED.items()}
    return {**distances, "n": n}


@torch.no_grad()
def _inception_features(network: torch.nn.Module, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    device = next(network.parameters()).device
    return torch.cat([network(to_float(part.to(device))).cpu() for part in images.split(batch_size)])


@torch.no_grad()
def _lpips_diversity(sets: dict[str, WindowSet], gap: int) -> dict:
    """Mean LPIPS between two windows of one user that share no step."""
    weights, spread = lpips_weights(LPIPS_NET), {}
    if not weights.exists():
        return absent(f"{weights.name} is not on this machine")
    try:
        network = load_lpips(LPIPS_NET).to(best_device())
    except FileNotFoundError as error:
        return absent(str(error))
    for name, apart in (("generated", 0), ("unseen", gap)):
        images = sets[name].images
        chosen = [_some(pairs, LPIPS_PAIRS) for pairs in pairs_apart(sets[name], apart)]
        means = [_lpips(network, images[pairs[0]], images[pairs[1]]) if pairs.numel() else np.nan for pairs in chosen]
        spread[name] = np.array(means)
    return _beside_real(spread)


def _some(pairs: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the pairs, drawn at random, the same on each call."""
    return pairs[:, torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(0))[:count]]


def _lpips(network: torch.nn.Module, first: torch.Tensor, second: torch.Tensor) -> float:
    device = next(network.parameters()).device
    return float(network(to_float(first.to(device)), to_float(second.to(device))).mean())
