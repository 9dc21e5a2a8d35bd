"""Verification: is a window of the user it claims? By an embedder trained on other users.

Users are held out in folds. The mean embedding of a held-out user's unseen windows (validation and test) is enrolled;
probes are compared with it by cosine: generated windows, and the generator's training windows, the real ones that they
imitate. A probe against its own user is genuine, against another held-out user of the fold an impostor.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mdlib.data.windows import WindowSet
from mdlib.evaluation import metrics
from mdlib.evaluation.classifiers import train_each, train_embedder
from mdlib.evaluation.evidence import Evidence, Protocol, concatenate
from mdlib.evaluation.intervals import absent, interval
from mdlib.models.classifier import Embedder

FOLDS = 3
PROBES = ("generated", "real")
RATES = np.linspace(0, 1, 101)  # false acceptance rates at which curves are given
DRAWS = 200


@dataclass(frozen=True)
class Trials:
    """Comparisons of one kind of probe in one fold, each (T,)."""

    scores: np.ndarray  # cosines
    users: np.ndarray  # labels of the probes' users
    named: np.ndarray  # labels of the users they are compared with

    @property
    def genuine(self) -> np.ndarray:
        return self.users == self.named


def verification(evidence: Evidence, protocol: Protocol, progress, folder: str | Path | None = None) -> dict:
    """The figures verification_eer (equal error rate) and roc of the section `identity`: means over folds."""
    groups = folds(evidence.train.num_users)
    if groups is None:
        return {"verification_eer": absent("users are held out: it takes four or more")}
    trials, jobs = {name: [] for name in PROBES}, []
    real = concatenate(evidence.train, evidence.unseen)
    for seed, held in enumerate(groups):
        others = real.select(~torch.isin(real.labels, torch.from_numpy(held)))
        jobs.append((train_embedder, Embedder, folder, others.images, others.labels, protocol.evaluation_steps, seed))
    for held, embedder in zip(groups, train_each(jobs), strict=True):
        for name, found in _trials(embedder, evidence, held).items():
            trials[name].append(found)
        progress.update()
    if not all(found.genuine.any() and not found.genuine.all() for name in PROBES for found in trials[name]):
        return {"verification_eer": absent("a fold has fewer than two users with windows to enrol and to probe with")}
    rates, spread, curves = {}, {}, []
    for name, of_folds in trials.items():
        errors, true = zip(*(rates_of(one) for one in of_folds), strict=True)
        redrawn, redrawn_true = resampled(of_folds)
        rates[name], spread[name] = float(np.mean(errors)), interval(redrawn)
        low, high = np.percentile(redrawn_true, [2.5, 97.5], axis=0)
        curve = {"false": RATES, "true": np.mean(true, axis=0), "low": low, "high": high}
        curves.append({"probes": name, **{key: values.tolist() for key, values in curve.items()}})
    return {
        "verification_eer": {
            "value": rates["generated"],
            "n": int(sum(one.genuine.sum() for one in trials["generated"])),
            "ci95": spread["generated"],
            "real": rates["real"],
            "real_ci95": spread["real"],
        },
        "roc": curves,
    }


def folds(num_users: int) -> list[np.ndarray] | None:
    """Labels of the held-out users of each fold, two or more, two or more others left; None with fewer than 4 users."""
    if num_users < 4:
        return None
    return np.array_split(np.random.default_rng(0).permutation(num_users), min(FOLDS, num_users // 2))


def _trials(embedder: Embedder, evidence: Evidence, held: np.ndarray) -> dict[str, Trials]:
    """Each probe of a held-out user against each held-out user who has unseen windows."""
    unseen, found = evidence.unseen, {}
    held = np.intersect1d(held, unseen.labels.numpy())
    of_held = lambda windows: windows.select(torch.isin(windows.labels, torch.from_numpy(held)))
    enrolled = of_held(unseen)
    embeddings = embedder.embeddings(enrolled.images)
    means = [embeddings[enrolled.labels == label].mean(0) for label in held.tolist()]
    for name, windows in zip(PROBES, (evidence.generated, evidence.train), strict=True):
        probes: WindowSet = of_held(windows)
        found[name] = Trials(*np.zeros((3, 0)))
        if len(probes):
            scores = embedder.embeddings(probes.images) @ F.normalize(torch.stack(means), dim=1).T
            users = np.repeat(probes.labels.numpy(), len(held))
            found[name] = Trials(scores.numpy().ravel(), users, np.tile(held, len(probes)))
    return found


def rates_of(trials: Trials, weights: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """The equal error rate, and true acceptance at RATES."""
    false, true = metrics.roc(trials.scores, trials.genuine, weights)
    return metrics.equal_error_rate(false, true), np.interp(RATES, false, true)


def resampled(of_folds: list[Trials]) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap equal error rates (DRAWS,) and curves (DRAWS, RATES) over users of all folds. A comparison counts as
    often as both its users were drawn (Owen 2007, the pigeonhole bootstrap), a fold by its users drawn, and not at all
    with fewer than two different ones."""
    rng, found = np.random.default_rng(0), []
    users = np.unique(np.concatenate([one.users for one in of_folds]))
    while len(found) < DRAWS:
        times, counts, read = rng.multinomial(len(users), np.full(len(users), 1 / len(users))), [], []
        for one in of_folds:
            present = np.isin(users, one.users) & (times > 0)
            if present.sum() > 1:
                shown, named = (times[np.searchsorted(users, labels)] for labels in (one.users, one.named))
                counts.append(int(times[present].sum()))
                read.append(rates_of(one, np.where(one.genuine, shown, shown * named)))
        if counts:
            part = np.array(counts) / sum(counts)
            found.append((part @ [error for error, _ in read], part @ np.stack([curve for _, curve in read])))
    return np.array([error for error, _ in found]), np.stack([curve for _, curve in found])
