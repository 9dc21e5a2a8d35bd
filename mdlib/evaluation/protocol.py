"""The evaluation protocol: computes the report of generated windows. docs/evaluation.md defines the metrics.

Metrics of whole sets (Fréchet distance, precision, ratios of medians, codes used …) have no interval,
because resampling windows would bias them.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, roc_curve

from mdlib import __version__
from mdlib.data.checks import LEAK
from mdlib.data.overlap import overlap
from mdlib.data.splits import PARTS
from mdlib.data.windows import to_uint8
from mdlib.evaluation import augmentation_study as study
from mdlib.evaluation import metrics
from mdlib.evaluation.evidence import (
    FOLDS,
    Evidence,
    Protocol,
    bootstrap_blocks,
    concatenate,
    through_codec,
    train_each,
)
from mdlib.evaluation.fidelity import fidelity, statistics
from mdlib.evaluation.gait_metrics import physics
from mdlib.evaluation.identifier import best_identifier
from mdlib.evaluation.metrics import bootstrapped, interval, metric, missing, scored, unmeasured
from mdlib.models.classifier import Embedder, SmallCNN, features
from mdlib.training.latents import encode_all

NEAR_CHANCE = 0.1  # accuracy of real only, corrected for chance, below which the verdict says that it is near chance
PAIRS_SHOWN = 6  # generated windows shown with their nearest training window
COPY_QUANTILE = 0.01  # a copy is nearer to a training window than all but 1 % of the test windows are
COPIED = 0.1  # fraction of copies from which the verdict warns
FEW_BLOCKS = 12  # independent blocks of test windows, below which intervals are too narrow
OTHER_LABEL = ("psnr_db_other_label", "taken_for_other_label")
EMBEDDING = 64  # numbers an embedding
PROBES = ("generated", "real")
RATES = np.linspace(0, 1, 101)  # false acceptance rates at which curves are given
DRAWS = 200  # of users, for the intervals of verification


def evaluate(
    evidence: Evidence,
    protocol: Protocol = Protocol(),
    about: dict | None = None,
    classifiers_folder: str | Path | None = None,
    identifier_folder: str | Path | None = None,
) -> dict:
    """The report as a dictionary, see docs/evaluation.md.

    Args:
        about: what the reader should know of the run (system, preset, data …), copied into the report.
        classifiers_folder: saves the classifiers of real windows; runs on the same split use them again.
        identifier_folder: where the best classifiers go, see `mdlib.evaluation.identifier`.
    """
    study.check_request(evidence, protocol)
    classifiers = study.unseen_classifiers(evidence, protocol, classifiers_folder)
    arms = study.train_arms(evidence, protocol, classifiers_folder)
    verified = verification(evidence, protocol, classifiers_folder)
    identifier, identified = best_identifier(evidence, arms, protocol, classifiers_folder)
    if identifier_folder:
        identifier.save_pretrained(identifier_folder)
    report = {
        "mdlib": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "about": about or {},
        "windows": {name: len(getattr(evidence, name)) for name in ("train", "val", "test", "generated")},
        "split": overlap({name: getattr(evidence, name) for name in PARTS}, gap=evidence.gap),
        "users": list(evidence.train.users),
        "reconstruction": reconstruction(evidence, arms),
        "codebook": codebook(evidence),
        "identity": {**identity(evidence, classifiers), **verified},
        "augmentation": study.augmentation(evidence, protocol, arms),
        "identifier": identified,
        "conditions": study.conditions(evidence, arms),
        "fidelity": fidelity(evidence, arms),
        "statistics": statistics(evidence),
        "memorisation": memorisation(evidence),
        "physics": physics(evidence),
        "outcomes": study.outcomes(evidence, arms).to_json(),
    }
    leak, near = (report["split"][name] for name in ("test_share_overlapping", "test_share_near"))
    leak, copied = max(leak, near if (near or 0) > LEAK else 0), report["memorisation"]["copies"]["value"]
    return report | {"verdict": verdict(report["augmentation"], leak, copied)}


def reconstruction(evidence: Evidence, arms: study.Arms) -> dict:
    names = ("psnr_db", "ssim", "identity_accuracy", "identity_accuracy_before")
    codec, test, blocks = evidence.codec, evidence.test, evidence.blocks
    if codec is None:
        return missing(*names, *OTHER_LABEL, reason="no codec was given")
    outputs = through_codec(codec, test.images, test.labels)
    after = study.correctness(arms.networks["real_only"], to_uint8(outputs), test.labels)
    return {
        "psnr_db": bootstrapped(metrics.psnr(outputs, test.float()).numpy(), blocks),
        "ssim": bootstrapped(metrics.ssim(outputs, test.float()).numpy(), blocks),
        "identity_accuracy": scored(after, blocks),
        "identity_accuracy_before": scored(arms.correct["real_only"], blocks),
        **other_label(evidence, arms),
    }


def other_label(evidence: Evidence, arms: study.Arms) -> dict:
    """Metrics of a conditional codec that is given a wrong user. If its output is often classified as that user, the
    identity comes from the label, and a good reconstruction does not show that the latents retain it."""
    codec, test = evidence.codec, evidence.test
    if not codec.conditional:
        return missing(*OTHER_LABEL, reason="this codec is not conditioned on users")
    other = (test.labels + 1) % test.num_users
    outputs = through_codec(codec, test.images, other)
    taken = study.correctness(arms.networks["real_only"], to_uint8(outputs), other).mean(0)
    found = (metrics.psnr(outputs, test.float()).numpy(), taken)
    return {name: bootstrapped(values, evidence.blocks) for name, values in zip(OTHER_LABEL, found, strict=True)}


@torch.no_grad()
def codebook(evidence: Evidence) -> dict:
    names = ("usage", "perplexity", "codes_per_user", "distinctive_codes_per_user", "distinctive_codes_least")
    codec, unseen = evidence.codec, evidence.unseen
    if not hasattr(codec, "encode_tokens"):
        return missing(*names, reason="no codec was given" if codec is None else "this codec has no codebook")
    tokens = encode_all(codec, unseen.images, "tokens")
    counts = metrics.code_counts(tokens, unseen.labels, codec.num_codes, unseen.num_users)
    found = metrics.codebook_metrics(counts, torch.bincount(unseen.labels, minlength=unseen.num_users))
    return {name: metric(found[name], len(unseen)) for name in names} | {"counts": counts.sum(0).tolist()}


def identity(evidence: Evidence, classifiers: list[SmallCNN]) -> dict:
    """The section `identity` without verification, by classifiers of unseen windows."""
    generated, train, users = evidence.generated, evidence.train, evidence.generated.num_users
    probabilities = torch.stack([one.probabilities(generated.images) for one in classifiers])  # (classifiers, N, n)
    named = probabilities.argmax(2)
    correct = (named == generated.labels).numpy()
    own = study.correctness(classifiers, train.images, train.labels)
    every = (generated.labels.repeat(len(named)), named.flatten())
    per_user = [(user, correct[:, generated.labels == label]) for label, user in enumerate(generated.users)]
    return {
        "accuracy": scored(correct, np.arange(len(generated))),
        "classifier_accuracy": scored(own, bootstrap_blocks(train, evidence.gap)),
        "control_ratio": metric(metrics.control_ratio(probabilities.mean(0), generated.labels), len(generated)),
        "confusion": confusion_matrix(*every, labels=range(users), normalize="true").tolist(),
        "per_user": [
            {"user": user, "n": own.shape[1], "accuracy": float(own.mean())} for user, own in per_user if own.size
        ],
    }


@dataclass(frozen=True)
class Trials:
    """Comparisons of one kind of probe in one fold, each (T,)."""

    scores: np.ndarray  # cosines
    users: np.ndarray  # labels of the probes' users
    named: np.ndarray  # labels of the users they are compared with

    @property
    def genuine(self) -> np.ndarray:
        return self.users == self.named


def verification(evidence: Evidence, protocol: Protocol, folder: str | Path | None = None) -> dict:
    """verification_eer and roc of the section `identity`, means over folds.

    Each fold's users are held out of the training of its embedder. The mean embedding of a held-out user's unseen
    windows is enrolled; probes are compared with it by cosine: generated windows, and the generator's training windows,
    which they imitate. A probe against its own user is genuine, against another held-out user an impostor.
    """
    groups = folds(evidence.train.num_users)
    if not groups:
        return {"verification_eer": unmeasured("users are held out, which needs four or more of them")}
    real, jobs = concatenate(evidence.train, evidence.unseen), []
    for seed, held in enumerate(groups):
        others = real.select(~torch.isin(real.labels, torch.from_numpy(held)))
        jobs.append((Embedder, folder, others.images, others.labels, EMBEDDING, protocol.evaluation_steps, seed))
    embedders = train_each(jobs, "embedders that verify users")
    trials = [_trials(embedder, evidence, held) for held, embedder in zip(groups, embedders, strict=True)]
    if not all(one.genuine.any() and not one.genuine.all() for fold in trials for one in fold.values()):
        return {"verification_eer": unmeasured("a fold has fewer than two users with windows to enrol and to probe")}
    errors, curves = {}, []
    for name in PROBES:
        of_folds = [fold[name] for fold in trials]
        error, *true = np.mean([rates_of(one) for one in of_folds], axis=0).tolist()
        draws = resampled(of_folds)
        low, high = np.percentile(draws[:, 1:], [2.5, 97.5], axis=0).tolist()
        curves.append({"probes": name, "false": RATES.tolist(), "true": true, "low": low, "high": high})
        errors[name] = metric(error, sum(int(one.genuine.sum()) for one in of_folds), interval(draws[:, 0]))
    of_real = {"real": errors["real"]["value"], "real_ci95": errors["real"]["ci95"]}
    return {"verification_eer": {**errors["generated"], **of_real}, "roc": curves}


def folds(num_users: int) -> list[np.ndarray]:
    """Labels of each fold's held-out users: two or more, with two or more others left; [] with fewer than 4 users."""
    if num_users < 4:
        return []
    return np.array_split(np.random.default_rng(0).permutation(num_users), min(FOLDS, num_users // 2))


def _trials(embedder: Embedder, evidence: Evidence, held: np.ndarray) -> dict[str, Trials]:
    """Each probe of a held-out user against each held-out user who has unseen windows."""
    unseen, found = evidence.unseen, {}
    held = np.intersect1d(held, unseen.labels.numpy())
    of_held = lambda windows: windows.select(torch.isin(windows.labels, torch.from_numpy(held)))
    enrolled = of_held(unseen)
    embeddings = features(embedder, enrolled.images)
    means = [embeddings[enrolled.labels == label].mean(0) for label in held.tolist()]
    for name, windows in zip(PROBES, (evidence.generated, evidence.train), strict=True):
        probes = of_held(windows)
        found[name] = Trials(*np.zeros((3, 0)))
        if len(probes):
            scores = features(embedder, probes.images) @ F.normalize(torch.stack(means), dim=1).T
            users = np.repeat(probes.labels.numpy(), len(held))
            found[name] = Trials(scores.numpy().ravel(), users, np.tile(held, len(probes)))
    return found


def rates_of(trials: Trials, weights: np.ndarray | None = None) -> np.ndarray:
    """The equal error rate, and after it true acceptance at each of RATES."""
    false, true, _ = roc_curve(trials.genuine, trials.scores, sample_weight=weights, drop_intermediate=False)
    return np.array([metrics.equal_error_rate(false, true), *np.interp(RATES, false, true)])


def resampled(of_folds: list[Trials]) -> np.ndarray:
    """Bootstrap `rates_of` (DRAWS, 1 + RATES) over users of all folds. A comparison is weighted by how often both of
    its users were sampled (Owen 2007, the pigeonhole bootstrap), a fold by its number of sampled users; a fold with
    fewer than two different ones is left out."""
    rng, found = np.random.default_rng(0), []
    users = np.unique(np.concatenate([one.named for one in of_folds]))
    while len(found) < DRAWS:
        times, counts, read = rng.multinomial(len(users), np.full(len(users), 1 / len(users))), [], []
        for one in of_folds:
            shown, named = (times[np.searchsorted(users, labels)] for labels in (one.users, one.named))
            weights = np.where(one.genuine, shown, shown * named)
            if weights[one.genuine].any() and weights[~one.genuine].any():
                counts.append(int(times[np.isin(users, one.named)].sum()))
                read.append(rates_of(one, weights))
        if counts:
            found.append(np.array(counts) / sum(counts) @ np.stack(read))
    return np.stack(found)


def memorisation(evidence: Evidence) -> dict:
    generated, rows = metrics.nearest_train(evidence.generated, evidence.train)
    test, _ = metrics.nearest_train(evidence.test, evidence.train)
    copies = (generated < torch.quantile(test, COPY_QUANTILE)).double().numpy()
    typical, made, train = test.median().clamp_min(1e-9), evidence.generated.paths, evidence.train.paths
    labels, size = evidence.generated.labels.numpy(), len(evidence.test)
    per_user = [(user, copies[labels == k]) for k, user in enumerate(evidence.generated.users)]
    return {
        "nearest_train_ratio": metric(float(generated.median() / typical), len(generated)),
        "copies": bootstrapped(copies, np.arange(len(generated))),
        # For further real windows: this quantile of a small sample lies above that of the distribution.
        "copies_expected": (1 + COPY_QUANTILE * (size - 1)) / (size + 1),
        "per_user": [{"user": user, "n": len(own), "copies": float(own.mean())} for user, own in per_user if len(own)],
        "nearest": [
            {"generated": made[row], "train": train[rows[row]], "ratio": float(generated[row] / typical)}
            for row in generated.argsort()[:PAIRS_SHOWN].tolist()
        ],
    }


def verdict(augmentation: dict, leak: float = 0.0, copied: float = 0.0) -> dict:
    """The verdict: a word (helps, no evidence or hurts) by the interval of the generated windows' gain, of pretrained
    classifiers if there are any, and a sentence that explains it. leak: fraction of test windows that overlap a
    training window; copied: fraction of generated windows that are copies of one."""
    pretrained = augmentation.get("total_gain", unmeasured(""))["value"] is not None
    gain = augmentation["pretrained_gain" if pretrained else "gain"]
    low, high = gain["ci95"]
    word = "helps" if low > 0 else "hurts" if high < 0 else "no evidence"
    meaning = f"Generated windows {word.removesuffix('s')}"
    if word == "no evidence":
        meaning = "No evidence that generated windows help or hurt"
    real = augmentation["real_only"]
    both = augmentation["chosen" if pretrained else "real_plus_generated"]
    seeds = f"{augmentation['seeds']} seeds" if augmentation["seeds"] > 1 else "1 seed, without seed variation"
    of_folds = f" of {augmentation['folds']} folds" if augmentation.get("folds", 1) > 1 else ""
    measured = f"{seeds}, {real['n']} test windows{of_folds}"
    given = f"{augmentation['real_windows_per_user']:.3g} real windows per user"
    before, after = (f"{100 * one['value']:.1f} %" for one in (real, both))
    if pretrained:
        worth, equal = augmentation["total_real_windows"], ""
        if worth["value"] is not None:  # measured up to the most real windows of any arm
            most = worth["between"][1]
            number = f"at least {most:.3g}" if worth["value"] > 0.995 * most else f"{worth['value']:.3g}"
            equal = f", which from scratch takes {number} real windows per user"
        arms = (augmentation[f"pretrained_{name}"]["value"] for name in ("real_only", "real_plus_generated"))
        without, added = (f"{100 * value:.1f} %" for value in arms)
        sentence = (
            f"{meaning}: with {given}, pretrained classifiers reach an accuracy of {without} on test windows, and "
            f"{added} when generated windows are added ({_points(gain)}, {measured}). From scratch, real windows alone "
            f"reach {before}. The best setup, chosen on validation windows, reaches {after}{equal}."
        )
    else:
        sentence = (
            f"{meaning}: with {given}, accuracy on test windows goes from {before} to {after} when generated windows "
            f"are added ({_points(gain)}, {measured})."
        )
    users, best = max(2, augmentation["num_users"]), both if pretrained else real
    if (best["value"] - 1 / users) / (1 - 1 / users) < NEAR_CHANCE:
        reached = f"even the best setup reaches {after}" if pretrained else f"real windows alone reach {before}"
        sentence = (
            f"Inconclusive: {reached}, where chance is {100 / users:.1f} % ({users} users); train the classifiers "
            f"longer or give more real windows. {sentence}"
        )
    if augmentation["blocks"] < FEW_BLOCKS:
        sentence += f" Only {augmentation['blocks']} independent blocks of test windows: the interval is unreliable."
    others, reference = (augmentation.get(name, {}) for name in ("gain_other_users", "resnet18_gain"))
    excludes_zero = others.get("ci95") and not others["ci95"][0] <= 0 <= others["ci95"][1]
    if pretrained:
        others = {}  # of classifiers from scratch
    if word == "helps" and others.get("ci95") and not excludes_zero:
        sentence += f" It is unclear whether other people would gain as well ({_points(others)})."
    if word == "no evidence" and others and excludes_zero:
        sentence += (
            f" The interval of the gain for other people ({_points(others)}) does exclude 0: it resamples users, whose "
            "gains are similar here; the verdict's interval resamples test windows and classifier seeds."
        )
    if reference.get("value") is not None:
        sentence += f" With ResNet-18, trained from scratch, the gain is {_points(reference)}."
    if leak:
        sentence += (
            f" {100 * leak:.2g} % of the test windows overlap a training window: accuracies are too high, and copies "
            "of training windows count as gain."
        )
    if copied > COPIED:
        sentence += f" {100 * copied:.2g} % of the generated windows are copies of training windows."
    return {"word": word, "sentence": sentence}


def _points(gain: dict) -> str:
    low, high = gain["ci95"]
    return f"{100 * gain['value']:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
