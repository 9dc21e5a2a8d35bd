"""Correctness of every arm's classifiers on test windows, the figures that follow, and several folds as one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mdlib.data.windows import DataError
from mdlib.evaluation import intervals
from mdlib.evaluation.intervals import absent, figure, missing, paired_gain, scored


@dataclass(frozen=True)
class Outcomes:
    """Correctness of every arm's classifiers on N test windows."""

    correct: dict[str, np.ndarray]  # by arm, real_only and real_plus_generated among them: (seeds, N) bool
    blocks: np.ndarray  # (N,), for intervals
    paths: tuple[str, ...]
    users: np.ndarray  # ids (N,)

    def to_json(self) -> dict:
        """As in report.json: by arm a string a seed, "1" where the right user was named."""
        arms = {name: ["".join(map(str, row.astype(int))) for row in rows] for name, rows in self.correct.items()}
        windows = {"paths": list(self.paths), "users": self.users.tolist(), "blocks": self.blocks.tolist()}
        return {**windows, "correct": arms}

    @classmethod
    def from_json(cls, found: dict) -> "Outcomes":
        arms = {name: np.array([list(row) for row in rows]) == "1" for name, rows in found["correct"].items()}
        return cls(arms, np.array(found["blocks"]), tuple(found["paths"]), np.array(found["users"]))


def joined(folds: Sequence[Outcomes]) -> Outcomes:
    """The test windows of several folds as one set, in the arms that all folds have; a window of two folds counts once.

    Raises:
        DataError: folds of different numbers of seeds.
    """
    if len(seeds := {len(rows) for fold in folds for rows in fold.correct.values()}) > 1:
        raise DataError(f"folds of {' and '.join(map(str, sorted(seeds)))} seeds: evaluate all with the same number")
    paths = np.array([path for fold in folds for path in fold.paths])
    once = np.sort(np.unique(paths, return_index=True)[1])
    names = [name for name in folds[0].correct if all(name in fold.correct for fold in folds)]
    correct = {name: np.concatenate([fold.correct[name] for fold in folds], axis=1)[:, once] for name in names}
    first = np.cumsum([0, *(fold.blocks.max() + 1 for fold in folds[:-1])])
    blocks = np.concatenate([fold.blocks + start for fold, start in zip(folds, first, strict=True)])
    users = np.concatenate([fold.users for fold in folds])
    return Outcomes(correct, blocks[once], tuple(paths[once].tolist()), users[once])


def compared(outcomes: Outcomes, per_user: float, no_more: str) -> dict:
    """Every arm's accuracy, and real + generated compared to real alone and to more real windows.

    Args:
        per_user: real windows a user in real_only.
        no_more: why there is no arm with more real windows, where there is none.
    """
    correct, blocks = outcomes.correct, outcomes.blocks
    real, both = correct["real_only"], correct["real_plus_generated"]
    reference = absent("ResNet-18 is trained on a GPU or with reference=resnet18")
    if "resnet18_real_only" in correct and "resnet18_real_plus_generated" in correct:
        reference = paired_gain(correct["resnet18_real_only"], correct["resnet18_real_plus_generated"], blocks)
    gain, each = paired_gain(real, both, blocks), []
    for user in np.unique(outcomes.users).tolist():
        own = outcomes.users == user
        accuracy = {"real_only": float(real[:, own].mean()), "real_plus_generated": float(both[:, own].mean())}
        each.append({"user": user, "n": int(own.sum()), **accuracy})
    of_users = np.array([row["real_plus_generated"] - row["real_only"] for row in each])
    return {
        **{name: {**scored(rows, blocks), "per_seed": rows.mean(1).tolist()} for name, rows in correct.items()},
        "gain": gain,
        "gain_ci95": gain["ci95"],
        "p_value": intervals.p_value(real, both, blocks),
        "resnet18_gain": reference,
        "gain_other_users": intervals.over_users(of_users),
        **_against_more_real(outcomes, per_user, no_more),
        "real_windows_per_user": per_user,
        "seeds": len(real),
        "per_user": each,
    }


def _against_more_real(outcomes: Outcomes, per_user: float, no_more: str) -> dict:
    """gain_over_x2, and equivalent_real_windows: see `intervals.equivalent_count`."""
    correct, blocks = outcomes.correct, outcomes.blocks
    factors = sorted(int(name.removeprefix("real_x")) for name in correct if name.startswith("real_x"))
    if not factors:
        return missing("real_x2", "gain_over_x2", "equivalent_real_windows", reason=no_more)
    both = correct["real_plus_generated"]
    if 2 in factors:
        found = {"gain_over_x2": paired_gain(correct["real_x2"], both, blocks)}
    else:
        found = missing("real_x2", "gain_over_x2", reason="not requested: add 2 to multiples")
    counts = per_user * np.array([1, *factors])
    arms = np.stack([both, correct["real_only"], *(correct[f"real_x{factor}"] for factor in factors)])
    measured = intervals.equivalent_count(counts, arms.mean((1, 2))[None])[0]
    likely = intervals.interval(intervals.equivalent_count(counts, intervals.paired_bootstrap(arms, blocks)))
    between = {"between": [float(counts[0]), float(counts[-1])]}
    return {**found, "equivalent_real_windows": {**figure(float(measured), len(blocks), likely), **between}}
