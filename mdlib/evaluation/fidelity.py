"""Are generated windows spread like real ones? Distances and diversity in the features of classifiers that saw neither.

Distances are measured three times, see `evidence.COMPARED`.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.manifold import TSNE

from mdlib.data.windows import WindowSet, to_float
from mdlib.evaluation import metrics
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.codec_quality import find_lpips
from mdlib.evaluation.evidence import COMPARED, Evidence, alike, compared_sets
from mdlib.evaluation.intervals import absent, figure, missing, over_users
from mdlib.models.classifier import SmallCNN, features
from mdlib.models.layers import parts
from mdlib.models.pretrained import load_inception
from mdlib.utils import best_device

NAMES = ("fd", "kid", "precision", "recall", "density", "coverage")
FLAT = {"value": "fd", "real_vs_real": "fd_real_vs_real", "train": "fd_train"}  # the Fréchet distances' own keys
DRAWS = 4  # samples of equally many windows of each set
PAIRS = 2000  # of a user's windows, at most
LPIPS_PAIRS = 20
MAP_USERS, MAP_WINDOWS = 8, 12  # shown in the map: users, and windows of each in either set


def fidelity(evidence: Evidence, arms: Arms) -> dict:
    """The section `fidelity` of the report, in the features of the real-only classifiers, mean over them."""
    sets, each = _features(evidence, arms)
    between = lambda found, one, other: float((found[one] - found[other]).norm(dim=1).mean())
    mean = lambda name, *rows: np.mean([between(found[name], *rows) for found in each])
    return {
        **_distances(sets, each),
        "fd_inception": _fd_inception(sets),
        "diversity": _diversity(sets, evidence.gap, PAIRS, mean),
        "inception_score": _inception_score(arms.real_only, sets),
        "lpips_diversity": _lpips_diversity(sets, evidence.gap),
        "map": neighbourhood_map(each[0], sets),
    }


def distances(evidence: Evidence, arms: Arms) -> dict:
    """The part of `fidelity` that compares sets: Fréchet and kernel distance, precision, recall, density, coverage."""
    return _distances(*_features(evidence, arms))


def _features(evidence: Evidence, arms: Arms) -> tuple[dict[str, WindowSet], list[dict[str, torch.Tensor]]]:
    """The compared sets, and each classifier's features (N, D) of them; a half's are rows of the unseen ones'."""
    sets, rows = compared_sets(evidence)
    each = []
    for classifier in arms.real_only:
        found = {name: features(classifier, part.images) for name, part in sets.items() if name not in rows}
        each.append(found | {name: found["unseen"][half] for name, half in rows.items()})
    return sets, each


def _distances(sets: dict[str, WindowSet], each: list[dict[str, torch.Tensor]]) -> dict:
    """Means over classifiers and over samples. All but kid depend on the number of windows: all sets give as many of
    each user."""
    draws = [alike(sets, seed) for seed in range(DRAWS)]
    n = len(draws[0]["unseen"])
    if n < 2:
        why = "no user has generated windows, training windows and windows in both halves of the unseen"
        return missing(*FLAT.values(), "fd_ratio", *NAMES[1:], reason=why)
    counts = torch.bincount(sets["unseen"].labels[draws[0]["unseen"]])
    k = max(1, min(5, int(counts[counts > 0].min()) - 1))  # balls must not reach beyond a user's own windows
    found = {name: {} for name in NAMES}
    for key, (one, other) in COMPARED.items():
        pairs = [(own[one][rows[one]], own[other][rows[other]]) for own in each for rows in draws]
        figures = [metrics.manifold_figures(second, first, k) for first, second in pairs]
        for values, pair in zip(figures, pairs, strict=True):
            values |= {"fd": metrics.frechet_distance(*pair), "kid": metrics.kernel_distance(*pair)}
        for name in NAMES:
            found[name][key] = float(np.mean([values[name] for values in figures]))
    fd = found.pop("fd")
    ratio = figure(fd["value"] / max(fd["real_vs_real"], 1e-9), n)
    return {
        **{FLAT[key]: figure(value, n) for key, value in fd.items()},
        "fd_ratio": ratio,
        **{name: {**values, "n": n} for name, values in found.items()},
    }


def neighbourhood_map(features_of: dict[str, torch.Tensor], sets: dict[str, WindowSet]) -> list[dict]:
    """Some generated and unseen windows of the first users by t-SNE (van der Maaten & Hinton 2008) of one classifier's
    features: user, generated (or real), x and y. Distances in it mean nothing."""
    points, rows = [], []
    for name in ("generated", "unseen"):
        part = sets[name]
        for label in range(min(MAP_USERS, part.num_users)):
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
        return absent("no user has two generated windows and two unseen ones that share no step")
    value, real = over_users(spread["generated"][both]), float(spread["unseen"][both].mean())
    return {**value, "real": real, "ratio": value["value"] / max(real, 1e-9)}


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


def _inception_score(classifiers: list[SmallCNN], sets: dict[str, WindowSet]) -> dict:
    """The score of generated windows and of as many unseen ones, by the classifiers' probabilities."""
    rows = alike({name: sets[name] for name in ("generated", "unseen")}, seed=0)
    n = len(rows["unseen"])
    if not n:
        return absent("no user has both generated and unseen windows")
    of = lambda name: [metrics.inception_score(one.probabilities(sets[name].images[rows[name]])) for one in classifiers]
    return {**figure(float(np.mean(of("generated"))), n), "real": float(np.mean(of("unseen")))}


@torch.no_grad()
def _fd_inception(sets: dict[str, WindowSet]) -> dict:
    """Fréchet distance in the features of torchvision's Inception v3, one sample of windows."""
    try:
        network = load_inception().to(best_device())
    except FileNotFoundError as error:
        return absent(str(error))
    rows = alike(sets, seed=0)
    n = len(rows["unseen"])
    if n < 2:
        return absent("too few windows of a user in one of the sets")
    batches = {name: parts(best_device(), 32, sets[name].images[some]) for name, some in rows.items()}
    found = {name: torch.cat([network(to_float(part)).cpu() for (part,) in some]) for name, some in batches.items()}
    return {key: metrics.frechet_distance(found[one], found[other]) for key, (one, other) in COMPARED.items()} | {
        "n": n
    }


@torch.no_grad()
def _lpips_diversity(sets: dict[str, WindowSet], gap: int) -> dict:
    device = best_device()
    network, why = find_lpips(device)
    if network is None:
        return absent(why)
    images = lambda name, rows: to_float(sets[name].images[rows].to(device))
    mean = lambda name, one, other: float(network(images(name, one), images(name, other)).mean())
    return _diversity(sets, gap, LPIPS_PAIRS, mean)
