"""The augmentation study: do generated windows train a better classifier?

An arm is a set of training windows. The classifiers of all arms are trained with the same classical augmentation and
compared on the same test windows, after equal optimizer steps. They start from scratch; those of pretrained_… arms
start from a backbone trained to tell simulated people apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mdlib.data.speckle import Speckle
from mdlib.data.windows import WindowSet, to_uint8
from mdlib.evaluation import metrics
from mdlib.evaluation.evidence import (
    Evidence,
    Protocol,
    concatenate,
    find_backbone,
    first_of_each,
    through_codec,
    train_each,
)
from mdlib.evaluation.metrics import metric, missing, paired_gain, scored, unmeasured
from mdlib.models.classifier import Classifier, ResNet18, SmallCNN
from mdlib.utils import DataError, best_device

REFERENCED = ("real_only", "real_plus_generated", "generated_only", "codec_copies", "real_x2")  # arms of ResNet-18, too
PRETRAINED = ("real_only", "real_plus_generated", "codec_copies", "common_conditions", "real_x2")  # by a backbone, too
DEPLOYED = ("real_only", "real_plus_generated")  # arms whose classifiers may become the run's identifier
TIMES = (1, 2, 5, 10)  # generated windows per real one for which the gain is measured by default


@dataclass(frozen=True)
class Arms:
    """Correctness of every arm's classifiers: bool (seeds, N) for N test windows. by_count: the same for
    real_plus_generated with that many generated windows per user."""

    networks: dict[str, list[SmallCNN]]  # of the arms DEPLOYED and pretrained_DEPLOYED
    correct: dict[str, np.ndarray]
    fraction: float  # of generated windows in a batch of real_plus_generated
    by_count: dict[int, np.ndarray] = field(default_factory=dict)
    backbone: str = ""  # folder that the pretrained arms started from; "": there are none


def unseen_classifiers(evidence: Evidence, protocol: Protocol, folder=None) -> list[SmallCNN]:
    """Classifiers trained on validation and test windows; the generator's training windows are unseen to them. `folder`
    caches the classifiers for other runs on the same split."""
    return list(train_each(_jobs(evidence.unseen, protocol, folder), "classifiers of unseen windows"))


def train_arms(evidence: Evidence, protocol: Protocol, folder=None) -> Arms:
    """Train classifiers in every arm, see docs/evaluation.md. `folder` saves the classifiers of real windows."""
    backbone = find_backbone(protocol.backbone, evidence.train)
    with_resnet = protocol.reference == "resnet18" or protocol.reference == "auto" and best_device() == "cuda"
    fraction, names, jobs = _best_fraction(evidence, protocol), [], []
    for name, windows in _sets(evidence, protocol, fraction).items():
        saved = folder if name != "real_plus_generated" and str(name).startswith("real_") else None
        names.append(name)
        jobs += _jobs(windows, protocol, saved)
        if with_resnet and name in REFERENCED:
            names.append(f"resnet18_{name}")
            jobs += _jobs(windows, protocol, saved, kind=ResNet18)
        if backbone and name in PRETRAINED:
            names.append(f"pretrained_{name}")
            jobs += _jobs(windows, protocol, saved, backbone=backbone)
    classifiers, correct, networks = train_each(jobs, "classifiers of each training set"), {}, {}
    for name in names:
        own = [next(classifiers) for _ in range(protocol.seeds)]
        correct[name] = correctness(own, evidence.test.images, evidence.test.labels)
        if str(name).removeprefix("pretrained_") in DEPLOYED:
            networks[name] = own
    correct["chosen"] = correct[chosen_arm(networks, evidence)]
    by_count = {name: correct.pop(name) for name in list(correct) if isinstance(name, int)}
    return Arms(networks, correct, fraction, by_count, backbone)


def chosen_arm(networks: dict[str, list[SmallCNN]], evidence: Evidence) -> str:
    """The arm whose classifiers are most accurate on validation windows (mean over seeds); the first of equals. If
    generated windows show unrecorded conditions, which validation windows cannot, only arms with them count."""
    arms, val = [arm for arm in networks if arm.endswith("generated") or not evidence.has_unrecorded], evidence.val
    accuracy = {arm: correctness(networks[arm], val.images, val.labels).mean() for arm in arms}
    return max(accuracy, key=accuracy.get)


def not_gait(evidence: Evidence) -> np.ndarray:
    """Whether a logistic regression on the brightness of windows alone names the right user: bool (N,) of the test
    windows. It sees quantiles, mean and deviation of the intensities, and so distance, noise and gain, but no gait."""
    quantiles = torch.linspace(0, 1, 11)

    def brightness(windows: WindowSet) -> np.ndarray:
        values = windows.float().flatten(1)
        return torch.cat([values.quantile(quantiles, 1).T, values.mean(1)[:, None], values.std(1)[:, None]], 1).numpy()

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(brightness(evidence.train), evidence.train.labels.numpy())
    return classifier.predict(brightness(evidence.test)) == evidence.test.labels.numpy()


def correctness(classifiers: list[Classifier], images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Whether each classifier names the right user: bool (classifiers, N)."""
    return torch.stack([one.probabilities(images).argmax(1) == labels for one in classifiers]).numpy()


def _jobs(
    windows: WindowSet, protocol: Protocol, folder=None, backbone: str = "", kind: type = SmallCNN, seeds=None
) -> list[tuple]:
    """For `train_each`: classifiers of some windows, by default one for each of the protocol's seeds."""
    what = (kind, folder, windows.images, windows.labels, windows.num_users, protocol.evaluation_steps)
    return [(*what, seed, backbone, protocol.evaluation_compile) for seed in seeds or range(protocol.seeds)]


def _sets(evidence: Evidence, protocol: Protocol, fraction: float) -> dict:
    """Windows of the arms by name. A number stands for real_plus_generated with that many generated windows per
    user."""
    train, generated, counts = evidence.train, evidence.added, protocol.counts
    if counts is None:
        counts = [round(len(train) / train.num_users * factor) for factor in TIMES]
    fewest = _fewest(evidence)
    some = {count: first_of_each(generated, count) for count in counts if 0 < count < fewest}
    more = {f"real_x{factor}": times(evidence, factor) for factor in sorted(set(protocol.multiples))}
    if evidence.codec is not None:
        copies = to_uint8(through_codec(evidence.codec, train.images, train.labels))
        if evidence.speckle:
            copies = Speckle(**evidence.speckle).add(copies, range(len(train)))
        more["codec_copies"] = mixed(train, replace(train, images=copies), fraction)
    if evidence.has_unrecorded:
        more["common_conditions"] = of_common_conditions(train)
    return {
        "real_only": train,
        "real_plus_generated": mixed(train, generated, fraction),
        "generated_only": evidence.generated,
        **{name: windows for name, windows in more.items() if windows is not None},
        **{name: mixed(train, windows, fraction) for name, windows in some.items()},
    }


def _fewest(evidence: Evidence) -> int:
    """The generated windows that every user has of those that are added."""
    return int(evidence.added.labels.unique(return_counts=True)[1].min())


def check_request(evidence: Evidence, protocol: Protocol) -> None:
    """Raise DataError if the protocol asks for more than these windows, or its backbone, can provide."""
    find_backbone(protocol.backbone, evidence.train)
    if (most := max(protocol.counts or [0])) > (fewest := _fewest(evidence)):
        raise DataError(f"counts: {most} generated windows of each user, but one has {fewest}: generate more")


def _best_fraction(evidence: Evidence, protocol: Protocol) -> float:
    """The fraction of generated windows whose classifier does best on validation windows."""
    val, jobs = evidence.val, []
    if len(protocol.fractions) == 1:
        return protocol.fractions[0]
    for fraction in protocol.fractions:
        jobs += _jobs(mixed(evidence.train, evidence.added, fraction), protocol, seeds=[protocol.seeds])
    classifiers = train_each(jobs, "classifiers that choose the fraction of generated windows")
    accuracy = [correctness([one], val.images, val.labels).mean() for one in classifiers]
    return protocol.fractions[int(np.argmax(accuracy))]


def of_common_conditions(windows: WindowSet) -> WindowSet | None:
    """The windows of the conditions in which every user has some; None where there is no such condition."""
    pairs = pd.DataFrame(list(windows.files))
    common = pairs.groupby("condition")["user"].transform("nunique") == windows.num_users
    return windows.select(torch.tensor(common)) if common.any() else None


def times(evidence: Evidence, factor: int) -> WindowSet | None:
    """The training windows and (factor − 1) times as many spare ones of each user, evenly spaced in time; None where a
    user has too few."""
    train, spare, chosen = evidence.train, evidence.spare, []
    if spare is None:
        return None
    for label, count in enumerate(torch.bincount(train.labels, minlength=train.num_users).tolist()):
        rows, wanted = torch.nonzero(spare.labels == label).flatten().tolist(), (factor - 1) * count
        if len(rows) < wanted:
            return None
        chosen += [rows[place] for place in np.linspace(0, len(rows) - 1, wanted).round().astype(int)]
    return concatenate(train, spare.select(chosen))


def mixed(real: WindowSet, generated: WindowSet, fraction: float) -> WindowSet:
    """Both sets, repeated so that `fraction` of a batch is generated and all windows of a set count alike."""
    total = max(len(real) / (1 - fraction), len(generated) / fraction)
    parts = [(real, 1 - fraction), (generated, fraction)]
    return concatenate(*(windows.select(_repeated(windows, round(total * part))) for windows, part in parts))


def _repeated(windows: WindowSet, count: int) -> torch.Tensor:
    """`count` rows: each as often as possible, the rest at random from the users in turn, so that users occur as often
    as in the windows themselves."""
    whole, rest = divmod(count, len(windows))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    place = pd.Series(order).groupby(windows.labels[order].numpy()).cumcount()  # among the user's own windows
    in_turn = order[np.argsort(place, kind="stable").to_numpy()]
    return torch.cat([torch.arange(len(windows)).repeat(whole), in_turn[:rest]])


@dataclass(frozen=True)
class Outcomes:
    """Correctness of every arm's classifiers on the N test windows of one or more folds: the basis of all metrics."""

    correct: dict[str, np.ndarray]  # by arm, real_only and real_plus_generated among them: (seeds, N) bool
    blocks: np.ndarray  # (N,), for intervals
    paths: tuple[str, ...]
    users: np.ndarray  # ids (N,)

    def to_json(self) -> dict:
        """As in report.json: for each arm one string per seed, with "1" where the classifier was correct."""
        arms = {name: ["".join(map(str, row.astype(int))) for row in rows] for name, rows in self.correct.items()}
        windows = {"paths": list(self.paths), "users": self.users.tolist(), "blocks": self.blocks.tolist()}
        return {**windows, "correct": arms}

    @classmethod
    def from_json(cls, found: dict) -> "Outcomes":
        arms = {name: np.array([list(row) for row in rows]) == "1" for name, rows in found["correct"].items()}
        return cls(arms, np.array(found["blocks"]), tuple(found["paths"]), np.array(found["users"]))


def outcomes(evidence: Evidence, arms: Arms) -> Outcomes:
    test, users = evidence.test, np.array([file.user for file in evidence.test.files])
    return Outcomes(arms.correct, evidence.blocks, test.paths, users)


def joined(folds: Sequence[Outcomes]) -> Outcomes:
    """The test windows of several folds as one set, in the arms that all folds have; a window of two folds counts once.
    DataError for folds of different numbers of seeds."""
    if len(seeds := {len(rows) for fold in folds for rows in fold.correct.values()}) > 1:
        numbers = " and ".join(map(str, sorted(seeds)))
        raise DataError(f"the folds used different numbers of seeds ({numbers}): evaluate all with the same number")
    paths = np.array([path for fold in folds for path in fold.paths])
    once = np.sort(np.unique(paths, return_index=True)[1])
    names = [name for name in folds[0].correct if all(name in fold.correct for fold in folds)]
    correct = {name: np.concatenate([fold.correct[name] for fold in folds], axis=1)[:, once] for name in names}
    first = np.cumsum([0, *(fold.blocks.max() + 1 for fold in folds[:-1])])
    blocks = np.concatenate([fold.blocks + start for fold, start in zip(folds, first, strict=True)])
    users = np.concatenate([fold.users for fold in folds])
    return Outcomes(correct, blocks[once], tuple(paths[once].tolist()), users[once])


def compared(outcomes: Outcomes, per_user: float, no_more: str, num_users: int) -> dict:
    """Every arm's accuracy, and gains of one arm over another. per_user: windows in real_only; no_more: reason
    if no arm has more real windows; num_users: of the classifiers."""
    correct, blocks = outcomes.correct, outcomes.blocks
    more = any(name.startswith("real_x") for name in correct)
    no_x2 = "not requested: add 2 to multiples" if more else no_more
    no_backbone = "no pretrained arms: backbone is none, or no attached or shipped weights fit these windows"
    chosen = "chosen" if "pretrained_real_only" in correct else ""

    def gain(arm: str, other: str, reason: str) -> dict:
        known = arm in correct and other in correct
        return paired_gain(correct[other], correct[arm], blocks) if known else unmeasured(reason)

    def worth(arm: str, reason: str) -> dict:
        return _equivalent(correct[arm], correct, blocks, per_user) if more and arm else unmeasured(reason)

    real, both = correct["real_only"], correct["real_plus_generated"]
    by_user = pd.DataFrame({name: correct[name].mean(0) for name in DEPLOYED}).groupby(outcomes.users)
    each = by_user.mean().assign(n=by_user.size()).rename_axis("user").reset_index()
    no_resnet = "ResNet-18 is trained on a GPU or with reference=resnet18"
    return {
        "real_x2": unmeasured(no_x2),
        **{name: {**scored(rows, blocks), "per_seed": rows.mean(1).tolist()} for name, rows in correct.items()},
        "gain": paired_gain(real, both, blocks),
        "p_value": metrics.p_value(real, both, blocks),
        "resnet18_gain": gain("resnet18_real_plus_generated", "resnet18_real_only", no_resnet),
        "gain_over_copies": gain("real_plus_generated", "codec_copies", "no codec was given"),
        "gain_other_users": metrics.over_users((each["real_plus_generated"] - each["real_only"]).to_numpy()),
        "gain_over_x2": gain("real_plus_generated", "real_x2", no_x2),
        "equivalent_real_windows": worth("real_plus_generated", no_more),
        "pretraining_gain": gain("pretrained_real_only", "real_only", no_backbone),
        "pretrained_gain": gain("pretrained_real_plus_generated", "pretrained_real_only", no_backbone),
        "total_gain": gain(chosen, "real_only", no_backbone),
        "total_real_windows": worth(chosen, no_more if chosen else no_backbone),
        "num_users": num_users,
        "real_windows_per_user": per_user,
        "blocks": len(np.unique(blocks)),
        "seeds": len(real),
        "per_user": each.to_dict("records"),
    }


def _equivalent(arm: np.ndarray, correct: dict, blocks: np.ndarray, per_user: float) -> dict:
    """Real windows per user with which classifiers from scratch are as accurate as an arm's."""
    factors = sorted(int(name.removeprefix("real_x")) for name in correct if name.startswith("real_x"))
    counts = per_user * np.array([1, *factors])
    arms = np.stack([arm, correct["real_only"], *(correct[f"real_x{factor}"] for factor in factors)])
    measured = metrics.equivalent_count(counts, arms.mean((1, 2))[None])[0]
    likely = metrics.interval(metrics.equivalent_count(counts, metrics.paired_bootstrap(arms, blocks)))
    return {**metric(float(measured), len(blocks), likely), "between": [float(counts[0]), float(counts[-1])]}


def augmentation(evidence: Evidence, protocol: Protocol, arms: Arms) -> dict:
    """The section `augmentation` of the report."""
    users, found = evidence.train.num_users, outcomes(evidence, arms)
    per_user, of_all = len(evidence.train) / users, len(evidence.added) / len(evidence.added.labels.unique())
    too_few = "a user has fewer spare real windows than training windows"
    no_spare = "no spare real windows: set windows_per_user below the number of training windows"
    no_more = no_spare if evidence.spare is None else too_few
    section = compared(found, per_user, no_more, users)
    real, both = arms.correct["real_only"], arms.correct["real_plus_generated"]
    gains = {n: paired_gain(real, one, found.blocks) for n, one in sorted({**arms.by_count, of_all: both}.items())}
    return section | {
        "not_gait": scored(not_gait(evidence)[None], found.blocks),
        "gain_by_windows": [{"windows_per_user": n, **gain} for n, gain in gains.items()],
        "generated_fraction": arms.fraction,
        "generated_windows_per_user": of_all,
        "generated_users": len(evidence.added.labels.unique()),
        "steps": protocol.evaluation_steps,
    }


def conditions(evidence: Evidence, arms: Arms) -> dict:
    """The section `conditions` of the report; …_unrecorded: of users without training windows in that condition;
    pretrained_…: of the classifiers that start from a backbone. common: of those of common conditions."""
    test, found = evidence.test, {}
    if len(test.conditions) < 2:
        return missing("cross_condition", reason="the test windows have one condition")
    recorded = {(file.user, file.condition) for file in evidence.train.files}
    where = np.array([file.condition for file in test.files])
    known = np.array([(file.user, file.condition) in recorded for file in test.files])
    blocks = evidence.blocks
    for condition in test.conditions:
        title = condition or "none"  # of windows in no folder of a condition
        for name, some in ((title, known), (f"{title}_unrecorded", ~known)):
            rows = (where == condition) & some
            for start in ("", "pretrained_") if rows.any() else ():
                if f"{start}real_only" in arms.correct:
                    real, both = (arms.correct[f"{start}{arm}"][:, rows] for arm in DEPLOYED)
                    found[start + name] = {**scored(both, blocks[rows]), "real": float(real.mean())}
                    found[f"{start}{name}_gain"] = paired_gain(real, both, blocks[rows])
                if (common := arms.correct.get(f"{start}common_conditions")) is not None:
                    found[start + name]["common"] = float(common[:, rows].mean())
    return found
