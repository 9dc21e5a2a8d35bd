"""Which test windows every arm's classifiers got right, what follows from it, and several folds as one measurement."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mdlib.data.windows import DataError
from mdlib.evaluation import metrics
from mdlib.evaluation.evidence import absent, figure, missing, over_users, scored


@dataclass(frozen=True)
class Outcomes:
    """correct: arm → (seeds, N) bool, "real_only" and "real_plus_generated" among them; blocks (N,): test windows of
    one block are drawn together; paths and users (ids): of the N windows."""

    correct: dict[str, np.ndarray]
    blocks: np.ndarray
    paths: tuple[str, ...]
    users: np.ndarray

    def to_json(self) -> dict:
        """As report.json holds it: by arm a string a seed, "1" where the right user was named."""
        arms = {name: ["".join(map(str, row.astype(int))) for row in rows] for name, rows in self.correct.items()}
        windows = {"paths": list(self.paths), "users": self.users.tolist(), "blocks": self.blocks.tolist()}
        return {**windows, "correct": arms}

    @classmethod
    def from_json(cls, found: dict) -> "Outcomes":
        arms = {name: np.array([list(row) for row in rows]) == "1" for name, rows in found["correct"].items()}
        return cls(arms, np.array(found["blocks"]), tuple(found["paths"]), np.array(found["users"]))


def joined(folds: Sequence[Outcomes]) -> Outcomes:
    """The folds' test windows side by side, in the arms that all of them have; a window keeps to its fold's block, and
    one that stands in two folds' tests counts in the first.

    Raises:
        DataError: folds of different numbers of seeds.
    """
    seeds = {len(rows) for fold in folds for rows in fold.correct.values()}
    if len(seeds) > 1:
        told = " and ".join(map(str, sorted(seeds)))
        raise DataError(f"folds of {told} seeds cannot be read together: judge them alike")
    names = [name for name in folds[0].correct if all(name in fold.correct for fold in folds)]
    correct = {name: np.concatenate([fold.correct[name] for fold in folds], axis=1) for name in names}
    first = np.cumsum([0, *(fold.blocks.max() + 1 for fold in folds[:-1])])
    blocks = np.concatenate([fold.blocks + start for fold, start in zip(folds, first, strict=True)])
    paths = np.array([path for fold in folds for path in fold.paths])
    users = np.concatenate([fold.users for fold in folds])
    once = np.sort(np.unique(paths, return_index=True)[1])
    correct = {name: rows[:, once] for name, rows in correct.items()}
    return Outcomes(correct, blocks[once], tuple(paths[once].tolist()), users[once])


def compared(outcomes: Outcomes, per_user: float, no_more: str) -> dict:
    """Every arm's accuracy, and real + generated against real alone and against more real windows.

    Args:
        per_user: real windows a user in real_only.
        no_more: why there is no arm with more real windows, where there is none.
    """
    correct, blocks = outcomes.correct, outcomes.blocks
    gain = metrics.paired_gain(correct["real_only"], correct["real_plus_generated"], blocks)
    each = each_user(outcomes)
    figures = {name: scored(rows, blocks) for name, rows in correct.items()}
    for name, rows in correct.items():
        figures[name]["per_seed"] = rows.mean(1).tolist()
    return {
        **figures,
        "gain": figure(gain["gain"], len(blocks), gain["ci95"]),
        "gain_ci95": gain["ci95"],
        "p_value": gain["p_value"],
        "resnet18_gain": _by_reference(outcomes),
        "gain_other_users": over_users(np.array([row["real_plus_generated"] - row["real_only"] for row in each])),
        **_against_more_real(outcomes, per_user, no_more),
        "real_windows_per_user": per_user,
        "seeds": len(correct["real_only"]),
        "per_user": each,
    }


def _by_reference(outcomes: Outcomes) -> dict:
    """The gain by the reference classifier."""
    arms = [outcomes.correct.get(f"resnet18_{name}") for name in ("real_only", "real_plus_generated")]
    if any(arm is None for arm in arms):
        return absent("ResNet-18 is trained where there is a GPU, or by reference=resnet18")
    gain = metrics.paired_gain(*arms, outcomes.blocks)
    return figure(gain["gain"], len(outcomes.blocks), gain["ci95"])


def each_user(outcomes: Outcomes) -> list[dict]:
    """Accuracy of real alone and of real + generated on each user's test windows; n: of them."""
    rows = []
    for user in np.unique(outcomes.users).tolist():
        own = outcomes.users == user
        arms = {name: float(outcomes.correct[name][:, own].mean()) for name in ("real_only", "real_plus_generated")}
        rows.append({"user": user, "n": int(own.sum()), **arms})
    return rows


def _against_more_real(outcomes: Outcomes, per_user: float, no_more: str) -> dict:
    """real + generated beside more real windows: gain_over_x2, and equivalent_real_windows, the number of real windows
    a user with which real alone does as well, read off the line through the measured numbers over their logarithm."""
    correct, blocks = outcomes.correct, outcomes.blocks
    factors = sorted(int(name.removeprefix("real_x")) for name in correct if name.startswith("real_x"))
    if not factors:
        return missing("real_x2", "gain_over_x2", "equivalent_real_windows", reason=no_more)
    both, n = correct["real_plus_generated"], len(blocks)
    found = {} if 2 in factors else missing("real_x2", "gain_over_x2", reason="2 is not among the multiples")
    if 2 in factors:
        gain = metrics.paired_gain(correct["real_x2"], both, blocks)
        found["gain_over_x2"] = figure(gain["gain"], n, gain["ci95"])
    counts = per_user * np.array([1, *factors])
    real = [correct["real_only"], *(correct[f"real_x{factor}"] for factor in factors)]
    draws = metrics.paired_bootstrap(np.stack([both, *real]), blocks)
    measured = metrics.equivalent_count(counts, np.array([[rows.mean() for rows in (both, *real)]]))[0]
    found["equivalent_real_windows"] = {
        **figure(float(measured), n, metrics.interval(metrics.equivalent_count(counts, draws))),
        "between": [float(counts[0]), float(counts[-1])],
    }
    return found
