"""Verification: is a window who it claims to be? By an embedder that has never met the users in question.

Users are held out in folds. Of each held-out user, unseen windows (validation and test) are enrolled as their mean
embedding, and probes are compared with it by cosine: generated windows, and beside them the generator's training
windows, the real ones that generated windows imitate. A probe against its own user is genuine, against another held-out
user of the fold an impostor.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mdlib.data.windows import WindowSet
from mdlib.evaluation import metrics
from mdlib.evaluation.classifiers import train_each, train_embedder
from mdlib.evaluation.evidence import Evidence, Protocol, absent, concatenate
from mdlib.models.classifier import Embedder

FOLDS = 3
PROBES = ("generated", "real")
RATES = np.linspace(0, 1, 101)  # false acceptance at which the curves are given
DRAWS = 200


@dataclass(frozen=True)
class Trials:
    """Comparisons of one kind of probe in one fold."""

    scores: np.ndarray  # float (T,): cosines
    genuine: np.ndarray  # bool (T,)
    users: np.ndarray  # int (T,): whom the probe shows
    named: np.ndarray  # int (T,): whom it is claimed to show


def verification(evidence: Evidence, protocol: Protocol, progress, folder: str | Path | None = None) -> dict:
    """verification_eer: equal error rate of generated probes, `real`: of real ones; roc: for either kind of probe its
    rates of false and of true acceptance. Means over folds, with intervals that redraw users."""
    groups = folds(evidence.train.num_users)
    if groups is None:
        reason = "users are held out: it takes four or more"
        return {"verification_eer": absent(reason)}
    trials = {name: [] for name in PROBES}
    jobs = [_job(evidence, held, seed, protocol, folder) for seed, held in enumerate(groups)]
    for held, embedder in zip(groups, train_each(jobs), strict=True):
        for name, found in _trials(embedder, evidence, held).items():
            trials[name].append(found)
        progress.update()
    if not all(found.genuine.any() and not found.genuine.all() for name in PROBES for found in trials[name]):
        return {"verification_eer": absent("a fold has fewer than two users with windows to enrol and to probe with")}
    rates = {name: np.mean([_read(one)[0] for one in trials[name]]) for name in PROBES}
    redrawn = {name: _redrawn(trials[name]) for name in PROBES}
    return {
        "verification_eer": {
            "value": float(rates["generated"]),
            "n": int(sum(one.genuine.sum() for one in trials["generated"])),
            "ci95": metrics.interval(redrawn["generated"][0]),
            "real": float(rates["real"]),
            "real_ci95": metrics.interval(redrawn["real"][0]),
        },
        "roc": [{"probes": name, **_curve(trials[name], redrawn[name][1])} for name in PROBES],
    }


def folds(num_users: int, count: int = FOLDS) -> list[np.ndarray] | None:
    """Labels of the held-out users of each fold, two or more, two or more others left; None where that cannot be."""
    if num_users < 4:
        return None
    order = np.random.default_rng(0).permutation(num_users)
    return np.array_split(order, min(count, num_users // 2))


def _job(evidence: Evidence, held: np.ndarray, seed: int, protocol: Protocol, folder) -> tuple:
    """For `train_each`: an embedder of all real windows of the users that are not held out."""
    real = concatenate(evidence.train, concatenate(evidence.val, evidence.test))
    others = real.select(~torch.isin(real.labels, torch.from_numpy(held)))
    return train_embedder, Embedder, folder, others.images, others.labels, protocol.evaluation_steps, seed


def _trials(embedder: Embedder, evidence: Evidence, held: np.ndarray) -> dict[str, Trials]:
    unseen = concatenate(evidence.val, evidence.test)
    held = np.intersect1d(held, unseen.labels.numpy())  # a split of one's own may leave a user without unseen windows
    of_held = lambda windows: windows.select(torch.isin(windows.labels, torch.from_numpy(held)))
    enrolled = of_held(unseen)
    found = embedder.embeddings(enrolled.images)
    means = [found[enrolled.labels == label].mean(0) for label in held.tolist()]
    prototypes = F.normalize(torch.stack(means), dim=1) if means else found
    probes = dict(zip(PROBES, (evidence.generated, evidence.train), strict=True))
    return {name: _compared(embedder, of_held(windows), prototypes, held) for name, windows in probes.items()}


def _compared(embedder: Embedder, probes: WindowSet, prototypes: torch.Tensor, held: np.ndarray) -> Trials:
    """Each probe against each prototype."""
    if not len(probes) or not len(held):
        return Trials(np.zeros(0), np.zeros(0, dtype=bool), *np.zeros((2, 0), dtype=int))
    scores = (embedder.embeddings(probes.images) @ prototypes.T).numpy()
    users = np.repeat(probes.labels.numpy()[:, None], len(held), axis=1)
    named = np.broadcast_to(held, users.shape)
    return Trials(scores.ravel(), (users == named).ravel(), users.ravel(), named.ravel())


def _read(trials: Trials, weights: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """The equal error rate, and true acceptance at RATES."""
    false, true = metrics.roc(trials.scores, trials.genuine, weights)
    return metrics.equal_error_rate(false, true), np.interp(RATES, false, true)


def _curve(folds_of: list[Trials], redrawn: np.ndarray) -> dict[str, list[float]]:
    """True against false acceptance, and between which rates 95 % of the redrawn curves (DRAWS, RATES) lie."""
    low, high = np.percentile(redrawn, [2.5, 97.5], axis=0)
    found = {"false": RATES, "true": np.mean([_read(one)[1] for one in folds_of], axis=0), "low": low, "high": high}
    return {name: rates.tolist() for name, rates in found.items()}


def _redrawn(folds_of: list[Trials]) -> tuple[np.ndarray, np.ndarray]:
    """Equal error rates (DRAWS,) and curves (DRAWS, RATES), with users redrawn: those of all folds at once, and of a
    claim both the user it shows and the one it names count as often as they were drawn (Owen 2007, the pigeonhole
    bootstrap). A fold counts by its users drawn, and not where fewer than two different ones were."""
    rng, found = np.random.default_rng(0), []
    users = np.unique(np.concatenate([one.users for one in folds_of]))
    while len(found) < DRAWS:
        times = rng.multinomial(len(users), np.full(len(users), 1 / len(users)))
        folds_drawn = [_drawn(one, users, times) for one in folds_of]
        counts = [count for count, _ in folds_drawn]
        if not any(counts):
            continue
        read = [_read(one, weights) for one, (count, weights) in zip(folds_of, folds_drawn, strict=True) if count]
        shares = np.array([count for count in counts if count]) / sum(counts)
        error = shares @ [error for error, _ in read]
        found.append((error, shares @ np.stack([curve for _, curve in read])))
    return np.array([error for error, _ in found]), np.stack([curve for _, curve in found])


def _drawn(trials: Trials, users: np.ndarray, times: np.ndarray) -> tuple[int, np.ndarray]:
    """How many users of a fold were drawn, 0 where no two different ones were, and how often each trial counts."""
    shown, named = (times[np.searchsorted(users, one)] for one in (trials.users, trials.named))
    present = np.isin(users, trials.users) & (times > 0)
    weights = np.where(trials.genuine, shown, shown * named)
    return int(times[present].sum()) * (present.sum() > 1), weights
