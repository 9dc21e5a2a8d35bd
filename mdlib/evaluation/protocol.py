"""The evaluation protocol: real and generated windows in, the report out.

Every figure is measured here on windows the generator was not trained on, carries its n and, where it is a mean,
a 95 % interval; those of whole sets (Fréchet distance, precision, silhouette, ratios of medians, codes used …) have
none, because redrawing windows would bias them. What was not measured is null with its reason.
"""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from mdlib import __version__
from mdlib.data.splits import PARTS, overlap
from mdlib.data.windows import to_float, to_uint8
from mdlib.evaluation import gait_metrics, metrics
from mdlib.evaluation.augmentation_study import (
    Arms,
    augmentation,
    correctness,
    count_classifiers,
    outcomes,
    train_arms,
    unseen_classifiers,
)
from mdlib.evaluation.conditions import conditions
from mdlib.evaluation.evidence import (
    Evidence,
    Protocol,
    bootstrapped,
    chance_blocks,
    concatenate,
    figure,
    halves,
    missing,
    scored,
)
from mdlib.evaluation.fidelity import fidelity
from mdlib.evaluation.image_statistics import statistics
from mdlib.evaluation.neighbours import nearest_train
from mdlib.evaluation.verification import folds, verification
from mdlib.models.classifier import SmallCNN
from mdlib.models.layers import parts as batches
from mdlib.training.latents import encode_all
from mdlib.utils import bar

PAIRS_SHOWN = 6  # generated windows shown beside their nearest training window
NEAR_CHANCE = 0.1  # accuracy of real only, corrected for chance, below which the verdict says that it is near chance
COPIED = 0.1  # share of copies from which the verdict warns; one in a hundred is expected by chance
OTHER_LABEL = ("psnr_db_other_label", "taken_for_other_label")


def evaluate(
    evidence: Evidence,
    protocol: Protocol = Protocol(),
    about: dict | None = None,
    classifiers_folder: str | Path | None = None,
) -> dict:
    """The report as a dictionary with the protocol's stable keys.

    Args:
        about: what the reader should know of the run (system, preset, data …), copied into the report.
        classifiers_folder: keeps the classifiers of real windows: runs on the same split are then measured by
            the very same ones.
    """
    total = count_classifiers(evidence, protocol) + len(folds(evidence.train.num_users) or ())
    with bar(total, "judges", unit="judge") as progress:
        judges = unseen_classifiers(evidence, protocol, progress, classifiers_folder)
        arms = train_arms(evidence, protocol, progress, classifiers_folder)
        verified = verification(evidence, protocol, progress, classifiers_folder)
    report = {
        "mdlib": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "about": about or {},
        "windows": {name: len(getattr(evidence, name)) for name in ("train", "val", "test", "generated")},
        "split": overlap({name: getattr(evidence, name) for name in PARTS}, gap=evidence.gap),
        "users": list(evidence.train.users),
        "reconstruction": reconstruction(evidence, arms),
        "codebook": codebook(evidence),
        "identity": {**identity(evidence, judges), **verified},
        "augmentation": augmentation(evidence, protocol, arms),
        "conditions": conditions(evidence, arms),
        "fidelity": fidelity(evidence, arms),
        "statistics": statistics(evidence),
        "memorisation": memorisation(evidence),
        "physics": physics(evidence),
        "outcomes": outcomes(evidence, arms).to_json(),
    }
    leak, copied = report["split"]["test_share_overlapping"], report["memorisation"]["copies"]["value"]
    report["verdict"] = verdict(report["augmentation"], leak, copied)
    return report


@torch.no_grad()
def through_codec(
    codec: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None, batch_size: int = 64
) -> torch.Tensor:
    """uint8 images → the codec's reconstructions, float in [−1, 1]; labels (N,) are told to a conditional codec."""
    encode, decode = (codec.encode_tokens, codec.decode_tokens) if _has_tokens(codec) else (codec.encode, codec.decode)
    outputs = []
    for part, *users in batches(codec.device, batch_size, images, labels):
        outputs.append(decode(encode(to_float(part), *users), *users).cpu())
    return torch.cat(outputs)


def reconstruction(evidence: Evidence, arms: Arms) -> dict:
    """PSNR, SSIM and identity on test windows. Identity: accuracy of the real-only classifiers, which saw the windows
    the codec was trained on and no others, before and after the codec's round trip."""
    names = ("psnr_db", "ssim", "identity_accuracy", "identity_accuracy_before")
    if evidence.codec is None:
        return missing(*names, *OTHER_LABEL, reason="no codec was given")
    test, blocks = evidence.test, chance_blocks(evidence.test, evidence.gap)
    outputs = through_codec(evidence.codec, test.images, test.labels)
    after = correctness(arms.real_only, to_uint8(outputs), test.labels)
    return {
        "psnr_db": bootstrapped(metrics.psnr(outputs, test.float()).numpy(), blocks),
        "ssim": bootstrapped(metrics.ssim(outputs, test.float()).numpy(), blocks),
        "identity_accuracy": scored(after, blocks),
        "identity_accuracy_before": scored(arms.correct["real_only"], blocks),
        **other_label(evidence, arms),
    }


def other_label(evidence: Evidence, arms: Arms) -> dict:
    """A codec that is told users, told a wrong one: what it then makes of test windows. Where the label alone decides
    whom a window looks like, the codec puts the user in itself, and its round trip says nothing of the window."""
    codec, test = evidence.codec, evidence.test
    if not codec.conditional:
        return missing(*OTHER_LABEL, reason="this codec is told no users")
    blocks, other = chance_blocks(test, evidence.gap), (test.labels + 1) % test.num_users
    outputs = through_codec(codec, test.images, other)
    taken = correctness(arms.real_only, to_uint8(outputs), other).mean(0)
    found = (metrics.psnr(outputs, test.float()).numpy(), taken)
    return {name: bootstrapped(values, blocks) for name, values in zip(OTHER_LABEL, found, strict=True)}


@torch.no_grad()
def codebook(evidence: Evidence) -> dict:
    """Codebook use on unseen windows (val and test), counted from real indices."""
    names = ("usage", "perplexity", "codes_per_user", "distinctive_codes_per_user", "distinctive_codes_least")
    codec = evidence.codec
    if codec is None or not _has_tokens(codec):
        return missing(*names, reason="this codec has no codebook" if codec is not None else "no codec was given")
    unseen = concatenate(evidence.val, evidence.test)
    tokens = encode_all(codec, unseen.images, "tokens")
    counts = metrics.code_counts(tokens, unseen.labels, codec.num_codes, unseen.num_users)
    per_user = torch.bincount(unseen.labels, minlength=unseen.num_users)
    figures = metrics.codebook_figures(counts, per_user)
    return {name: figure(figures[name], len(unseen)) for name in names} | {"counts": counts.sum(0).tolist()}


def identity(evidence: Evidence, judges: list[SmallCNN]) -> dict:
    """How often the judges name the user a window was generated for, beside how often they name that of a real one."""
    generated, train = evidence.generated, evidence.train
    probabilities = torch.stack([judge.probabilities(generated.images) for judge in judges])  # (judges, N, n)
    named = probabilities.argmax(2)
    correct = (named == generated.labels).double().mean(0).numpy()  # (N,)
    own = correctness(judges, train.images, train.labels)
    table = sum(metrics.confusion(row, generated.labels, generated.num_users) for row in named)
    share = table / table.sum(1, keepdim=True).clamp_min(1)
    each = np.arange(len(generated))  # generated windows are drawn one by one: each is its own block
    ratio = metrics.control_ratio(probabilities.mean(0), generated.labels)
    return {
        "accuracy": bootstrapped(correct, each),
        "classifier_accuracy": scored(own, chance_blocks(train, evidence.gap)),
        "control_ratio": figure(ratio, len(generated)),
        "confusion": share.tolist(),
        "per_user": [
            {"user": user, "n": int(own.sum()), "accuracy": float(correct[own].mean())}
            for label, user in enumerate(generated.users)
            if (own := (generated.labels == label).numpy()).any()
        ],
    }


def memorisation(evidence: Evidence, copy_quantile: float = 0.01) -> dict:
    """Is a generated window nearer to the training windows than a real unseen one is?

    Distance: root mean square over 32×32 pixels in [−1, 1], to the nearest training window of the same user, over
    circular shifts in time. nearest_train_ratio: median over generated windows by median over test windows; well below
    1 smells of copying. copies: share of generated windows nearer than all but 1 % of the test windows are. nearest:
    the generated windows nearest to a training one, with that one.
    """
    generated, rows = nearest_train(evidence.generated, evidence.train)
    test, _ = nearest_train(evidence.test, evidence.train)
    closest = generated.argsort()[:PAIRS_SHOWN].tolist()
    threshold = torch.quantile(test, copy_quantile)
    ratio = float(generated.median() / test.median().clamp_min(1e-9))
    return {
        "nearest_train_ratio": figure(ratio, len(generated)),
        "copies": bootstrapped((generated < threshold).double().numpy(), np.arange(len(generated))),
        "copies_expected": copy_quantile,
        "nearest": [
            {
                "generated": evidence.generated.files[row].path,
                "train": evidence.train.files[int(rows[row])].path,
                "ratio": float(generated[row] / test.median().clamp_min(1e-9)),
            }
            for row in closest
        ],
    }


def physics(evidence: Evidence) -> dict:
    """Do generated windows move like their user? See `kinematics.compare`."""
    if evidence.train.images.shape[1] != 1:
        return missing(*gait_metrics.NAMES, reason="not read off RGB windows: take channels=1")
    unseen = concatenate(evidence.val, evidence.test)
    parts = {"generated": evidence.generated, "unseen": unseen, "train": evidence.train}
    gaits = {name: gait_metrics.measure(part) for name, part in parts.items()}
    for name, rows in zip(("first", "second"), halves(unseen, evidence.gap), strict=True):
        gaits[name] = gaits["unseen"].select(rows)
    return gait_metrics.compare(gaits, unseen.num_users)


def verdict(augmentation: dict, leak: float = 0.0, copied: float = 0.0) -> dict:
    """helps / no evidence / hurts, from the interval of the gain, and one sentence a person can read.

    The sentence also names chance where real windows alone come near it, explains an interval for other people that
    disagrees with the verdict, and gives the gain by the reference classifier.
    leak: share of test windows that overlap a training window; copied: share of generated windows that are copies of
    training windows, where one in a hundred is chance. The sentence warns of either.
    """
    low, high = augmentation["gain_ci95"]
    word = "helps" if low > 0 else "hurts" if high < 0 else "no evidence"
    meaning = {
        "helps": "Generated windows help",
        "hurts": "Generated windows hurt",
        "no evidence": "No evidence that generated windows help or hurt",
    }[word]
    real, both = augmentation["real_only"], augmentation["real_plus_generated"]
    gain = augmentation["gain"]["value"]
    seeds = f"{augmentation['seeds']} seeds" if augmentation["seeds"] > 1 else "1 seed, whose chance it leaves out"
    of_folds = f" of {augmentation['folds']} folds" if augmentation.get("folds", 1) > 1 else ""
    sentence = (
        f"{meaning}: with {augmentation['real_windows_per_user']:.3g} real windows a user, accuracy on unseen windows "
        f"goes from {100 * real['value']:.1f} % to {100 * both['value']:.1f} % when generated windows are added "
        f"(gain {100 * gain:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"{seeds}, {real['n']} test windows{of_folds})."
    )
    users = max(2, len(augmentation["per_user"]))
    if (real["value"] - 1 / users) / (1 - 1 / users) < NEAR_CHANCE:
        sentence = (
            f"Too early to say: real windows alone reach {100 * real['value']:.1f} %, where chance is "
            f"{100 / users:.1f} % ({users} users); train the classifiers longer or give more real windows. {sentence}"
        )
    others, reference = (augmentation.get(name, {}) for name in ("gain_other_users", "resnet18_gain"))
    excludes_zero = others.get("ci95") and not others["ci95"][0] <= 0 <= others["ci95"][1]
    if word == "helps" and others.get("ci95") and not excludes_zero:
        sentence += f" Whether other people than these would gain is open ({_points(others)})."
    if word == "no evidence" and excludes_zero:
        sentence += (
            f" The gain for other people ({_points(others)}) excludes 0 all the same, because its interval resamples "
            "users, whose gains are alike here, and the verdict's resamples test windows and classifier seeds."
        )
    if reference.get("value") is not None:
        sentence += f" By ResNet-18 the gain is {_points(reference)}."
    if leak:
        sentence += (
            f" {100 * leak:.2g} % of the test windows overlap a training window: accuracies are too high, and copies "
            "of training windows look like help."
        )
    if copied > COPIED:
        sentence += f" {100 * copied:.2g} % of the generated windows are copies of training windows."
    return {"word": word, "sentence": sentence}


def _points(gain: dict) -> str:
    """A gain in points with its interval."""
    low, high = gain["ci95"]
    return f"{100 * gain['value']:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"


def _has_tokens(codec: torch.nn.Module) -> bool:
    return hasattr(codec, "encode_tokens")
