"""Judges, and the augmentation study: classifiers from scratch in arms that differ in their training windows alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mdlib.data.windows import WindowSet
from mdlib.evaluation import metrics
from mdlib.evaluation.classifiers import train_classifier, train_each, train_resnet
from mdlib.evaluation.evidence import Evidence, Protocol, absent, chance_blocks, concatenate, figure, first_of_each
from mdlib.evaluation.filters import FILTERS, keep_best, keep_plausible, scores
from mdlib.evaluation.outcomes import Outcomes, compared
from mdlib.models.classifier import Classifier, ResNet18, SmallCNN
from mdlib.utils import best_device

REFERENCED = ("real_only", "real_plus_generated", "generated_only", "real_x2")  # arms of the reference classifier too
TIMES = (1, 2, 5, 10)  # as many generated windows as real ones: where the gain is measured by default


@dataclass(frozen=True)
class Arms:
    """What the augmentation study found: the correctness of each arm's classifiers, one a seed, on test windows."""

    real_only: list[SmallCNN]  # the classifiers of that arm
    correct: dict[str, np.ndarray]  # arm → (seeds, N) bool
    share: float  # of generated windows in real_plus_generated
    by_count: dict[int, np.ndarray] = field(
        default_factory=dict
    )  # real_plus_generated with so many generated windows a user → (seeds, N) bool
    by_selection: dict[tuple[str, float], np.ndarray] = field(
        default_factory=dict
    )  # real_plus_generated with the generated windows that a filter keeps (its name, share kept) → (seeds, N) bool


def unseen_classifiers(
    evidence: Evidence, protocol: Protocol, progress, folder: str | Path | None = None
) -> list[SmallCNN]:
    """Judges trained on validation and test windows: real ones the generator was not trained on. Their own accuracy is
    read on the generator's training windows, which they have not seen and which generated windows imitate."""
    unseen = concatenate(evidence.val, evidence.test)
    return list(_train(_every_seed(_whole(unseen), unseen.num_users, protocol, folder), progress))


def count_classifiers(evidence: Evidence, protocol: Protocol) -> int:
    """How many `unseen_classifiers` and `train_arms` train together."""
    arms = 4 + len(_multiples(evidence, protocol)) + len(_counts(evidence, protocol)) + _references(evidence, protocol)
    filtered = len(FILTERS) * len(protocol.keep) + _sifts(evidence) if protocol.keep else 0
    return (1 + arms + filtered) * protocol.seeds + len(protocol.fractions) + bool(protocol.keep)


def train_arms(evidence: Evidence, protocol: Protocol, progress, folder: str | Path | None = None) -> Arms:
    """Classifiers from scratch in every arm, with equal steps, the test windows untouched. All but real_unaugmented get
    the same classical augmentation.

    real_only: the generator's own training windows; real_unaugmented: the same as they are; real_plus_generated,
    generated_only; real_x2 …: so many times as many real windows, where the evidence has spare ones; resnet18_…: the
    reference classifier on the same windows as the arm that follows in the name.
    """
    train, test = evidence.train, evidence.test
    share = _chosen_share(evidence, protocol, progress)
    filtered = _filtered(evidence, protocol, progress)
    names, jobs = [], []
    for name, windows in _sets(evidence, protocol, share, filtered):
        kept = folder if str(name).startswith("real_") and name != "real_plus_generated" else None
        names.append(name)
        jobs += _every_seed(windows, train.num_users, protocol, kept, augment=name != "real_unaugmented")
        if name in REFERENCED and _references(evidence, protocol):
            names.append(f"resnet18_{name}")
            jobs += [_resnet_job(windows, train.num_users, seed, protocol, kept) for seed in range(protocol.seeds)]
    trained, correct, real_only = _train(jobs, progress), {}, []
    for name in names:
        judges = [next(trained) for _ in range(protocol.seeds)]
        correct[name] = correctness(judges, test.images, test.labels)
        if name == "real_only":
            real_only = judges
    by_count, by_selection = (
        {name: correct.pop(name) for name in list(correct) if isinstance(name, kind)} for kind in (int, tuple)
    )
    return Arms(real_only, correct, share, by_count, by_selection)


def _filtered(evidence: Evidence, protocol: Protocol, progress) -> dict[tuple[str, float], WindowSet]:
    """The generated windows that each filter keeps, by its name and the share kept. The filter's classifier saw the
    generator's training windows only, and measures nothing."""
    made, train = evidence.generated, evidence.train
    if not protocol.keep:
        return {}
    (judge,) = _train([_job(_whole(train), train.num_users, protocol.seeds + 1, protocol)], progress)
    masks = {
        (name, share): keep_best(made, score, share)
        for name, score in scores(made, judge).items()
        for share in protocol.keep
    }
    if _sifts(evidence):
        mask = keep_plausible(made, train)
        masks[("kinematics", float(mask.mean()))] = mask
    return {name: made.select(torch.from_numpy(mask)) for name, mask in masks.items() if mask.any()}


def _sifts(evidence: Evidence) -> bool:
    """Whether physics can be read off the windows."""
    return evidence.train.images.shape[1] == 1


def _sets(
    evidence: Evidence, protocol: Protocol, share: float, filtered: dict[tuple[str, float], WindowSet]
) -> Iterator[tuple]:
    """An arm's name with the (images, labels) it is trained on, one after the other. A number stands for
    real_plus_generated with that many generated windows a user; a filter's name and share for that with the windows it
    keeps."""
    train, made = evidence.train, evidence.generated
    yield "real_only", _whole(train)
    yield "real_unaugmented", _whole(train)
    yield "real_plus_generated", _mixed(train, made, share)
    yield "generated_only", _whole(made)
    for factor in _multiples(evidence, protocol):
        yield f"real_x{factor}", _whole(times(evidence, factor))
    few = {count: first_of_each(made, count) for count in _counts(evidence, protocol)}
    for name, some in {**few, **filtered}.items():
        yield name, _mixed(train, some, share)


def _multiples(evidence: Evidence, protocol: Protocol) -> list[int]:
    """The protocol's multiples for which every user has spare real windows."""
    return [factor for factor in sorted(set(protocol.multiples)) if times(evidence, factor) is not None]


def times(evidence: Evidence, factor: int) -> WindowSet | None:
    """The training windows and (factor − 1) times as many spare ones of each user, evenly spaced in time; None where a
    user has too few."""
    train, spare = evidence.train, evidence.spare
    if spare is None:
        return None
    chosen = []
    for label, count in enumerate(torch.bincount(train.labels, minlength=train.num_users).tolist()):
        rows, wanted = torch.nonzero(spare.labels == label).flatten().tolist(), (factor - 1) * count
        if len(rows) < wanted:
            return None
        chosen += evenly_spaced(spare, rows, wanted)
    return concatenate(train, spare.select(chosen))


def evenly_spaced(windows: WindowSet, rows: list[int], count: int) -> list[int]:
    """`count` of some rows, evenly spaced in time within their conditions and recordings one after the other."""
    file_of = windows.files
    ordered = sorted(rows, key=lambda row: (file_of[row].condition, file_of[row].recording, file_of[row].number))
    return [ordered[place] for place in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def _counts(evidence: Evidence, protocol: Protocol) -> list[int]:
    """The protocol's counts below the number of generated windows of any user."""
    users = evidence.train.num_users
    fewest = int(torch.bincount(evidence.generated.labels, minlength=users).min())
    counts = protocol.counts
    if counts is None:
        counts = [round(len(evidence.train) / users * times) for times in TIMES]
    return [count for count in counts if 0 < count < fewest]


def _references(evidence: Evidence, protocol: Protocol) -> int:
    """How many arms the reference classifier has."""
    if protocol.reference == "none" or protocol.reference == "auto" and best_device() != "cuda":
        return 0
    return len(REFERENCED) - (2 not in _multiples(evidence, protocol))


def real_only_classifiers(evidence: Evidence, protocol: Protocol, folder: str | Path | None = None) -> list[SmallCNN]:
    """The arm real_only alone."""
    train = evidence.train
    return list(train_each(_every_seed(_whole(train), train.num_users, protocol, folder)))


def _chosen_share(evidence: Evidence, protocol: Protocol, progress) -> float:
    """The share of generated windows whose classifier does best on validation windows; the test plays no part."""
    val, real, made = evidence.val, evidence.train, evidence.generated
    jobs = [_job(_mixed(real, made, share), val.num_users, protocol.seeds, protocol) for share in protocol.fractions]
    accuracy = [correctness([judge], val.images, val.labels).mean() for judge in _train(jobs, progress)]
    return protocol.fractions[int(np.argmax(accuracy))]


def _whole(windows: WindowSet) -> tuple[torch.Tensor, torch.Tensor]:
    return windows.images, windows.labels


def _mixed(real: WindowSet, made: WindowSet, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of both sets, repeated as needed, so that `share` of a batch is generated and all windows of a
    set count alike."""
    total = max(len(real) / (1 - share), len(made) / share)
    rows = [_repeated(some, round(total * part)) for part, some in ((1 - share, real), (share, made))]
    images = torch.cat([real.images[rows[0]], made.images[rows[1]]])
    return images, torch.cat([real.labels[rows[0]], made.labels[rows[1]]])


def _repeated(windows: WindowSet, count: int) -> torch.Tensor:
    """`count` rows (count,): all as often as they go, then chance ones from the users in turn, so that all users are
    seen as often as in the windows themselves."""
    whole, rest = divmod(count, len(windows))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    shuffled = windows.labels[order]
    place = torch.empty(len(windows), dtype=torch.long)
    for user in shuffled.unique():
        place[shuffled == user] = torch.arange(int((shuffled == user).sum()))
    in_turn = order[place.argsort(stable=True)]
    return torch.cat([torch.arange(len(windows)).repeat(whole), in_turn[:rest]])


def correctness(judges: list[Classifier], images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Whether each judge names the right user: bool (judges, N)."""
    return torch.stack([judge.probabilities(images).argmax(1) == labels for judge in judges]).numpy()


def _train(jobs: list[tuple], progress) -> Iterator[Classifier]:
    for judge in train_each(jobs):
        progress.update()
        yield judge


def _every_seed(windows: tuple, num_users: int, protocol: Protocol, folder=None, augment: bool = True) -> list[tuple]:
    return [_job(windows, num_users, seed, protocol, folder, augment) for seed in range(protocol.seeds)]


def _job(windows: tuple, num_users: int, seed: int, protocol: Protocol, folder=None, augment: bool = True) -> tuple:
    """For `train_each`: a judge of (images, labels), or that of `folder` which was trained on the same windows in the
    same way."""
    return train_classifier, SmallCNN, folder, *windows, num_users, protocol.evaluation_steps, seed, augment


def _resnet_job(windows: tuple, num_users: int, seed: int, protocol: Protocol, folder) -> tuple:
    return train_resnet, ResNet18, folder, *windows, num_users, protocol.evaluation_steps, seed


def outcomes(evidence: Evidence, arms: Arms) -> Outcomes:
    """The arms' correctness with the test windows it is about."""
    test = evidence.test
    users = np.array([file.user for file in test.files])
    return Outcomes(arms.correct, chance_blocks(test, evidence.gap), test.paths, users)


def augmentation(evidence: Evidence, protocol: Protocol, arms: Arms) -> dict:
    """Real + generated against real alone, and against more real windows, on test windows."""
    found, users = outcomes(evidence, arms), evidence.train.num_users
    by_windows = gain_by_windows(evidence, arms, found.blocks)
    no_more = (
        "a user has fewer spare real windows than training windows"
        if evidence.spare is not None
        else "no spare real windows: the split keeps them where windows_per_user leaves some out"
    )
    return {
        **compared(found, len(evidence.train) / users, no_more),
        **_gain_by_times(by_windows, len(evidence.train) / users),
        "gain_by_windows": by_windows,
        "gain_by_selection": gain_by_selection(evidence, arms, found.blocks),
        "generated_fraction": arms.share,
        "generated_windows_per_user": len(evidence.generated) / users,
        "steps": protocol.evaluation_steps,
    }


def gain_by_windows(evidence: Evidence, arms: Arms, blocks: np.ndarray) -> list[dict]:
    """The gain with ever more generated windows a user, all of them at the end; their share of a batch is one and the
    same."""
    every = len(evidence.generated) / evidence.train.num_users
    found = {**arms.by_count, every: arms.correct["real_plus_generated"]}
    rows = []
    for count, correct in sorted(found.items()):
        gain = metrics.paired_gain(arms.correct["real_only"], correct, blocks)
        rows.append({"windows_per_user": count, **figure(gain["gain"], len(evidence.test), gain["ci95"])})
    return rows


def _gain_by_times(by_windows: list[dict], per_user: float) -> dict:
    """The gain by TIMES as many generated windows as real ones."""
    measured = {row["windows_per_user"]: row for row in by_windows}
    found = {}
    for times in TIMES:
        wanted = round(per_user * times)
        row = measured.get(wanted)
        lacking = f"{wanted} generated windows a user are not among the numbers measured"
        found[f"gain_{times}_to_1"] = figure(row["value"], row["n"], row["ci95"]) if row else absent(lacking)
    return found


def gain_by_selection(evidence: Evidence, arms: Arms, blocks: np.ndarray) -> list[dict]:
    """The gain with the generated windows that a filter keeps: what is bought with how much of the yield. Each filter's
    curve begins with all of them."""
    whole, rows = metrics.paired_gain(arms.correct["real_only"], arms.correct["real_plus_generated"], blocks), []
    for name in dict.fromkeys(name for name, _ in arms.by_selection):
        rows.append({"by": name, "kept": 1.0, **figure(whole["gain"], len(evidence.test), whole["ci95"])})
    for (name, kept), correct in arms.by_selection.items():
        gain = metrics.paired_gain(arms.correct["real_only"], correct, blocks)
        rows.append({"by": name, "kept": kept, **figure(gain["gain"], len(evidence.test), gain["ci95"])})
    return rows
