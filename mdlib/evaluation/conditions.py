"""Does what people carry confuse identification, and do generated windows of unrecorded conditions help?"""

import numpy as np

from mdlib.evaluation import metrics
from mdlib.evaluation.augmentation_study import Arms
from mdlib.evaluation.evidence import Evidence, chance_blocks, figure, missing, scored


def conditions(evidence: Evidence, arms: Arms) -> dict:
    """Accuracy on the test windows of each condition, of real + generated (`real`: of real alone), with the gain; apart
    (`CONDITION_unrecorded`) for users whom no training window shows in it: the cross-condition table."""
    test = evidence.test
    if len(test.conditions) < 2:
        return missing("cross_condition", reason="the test windows are of one condition")
    recorded = {(file.user, file.condition) for file in evidence.train.files}
    where = np.array([file.condition for file in test.files])
    known = np.array([(file.user, file.condition) in recorded for file in test.files])
    blocks, found = chance_blocks(test, evidence.gap), {}
    for condition in test.conditions:
        for suffix, told in (("", known), ("_unrecorded", ~known)):
            rows = (where == condition) & told
            if rows.any():
                found |= _figures(f"{condition}{suffix}", arms, rows, blocks)
    return found


def _figures(name: str, arms: Arms, rows: np.ndarray, blocks: np.ndarray) -> dict:
    real, both = (arms.correct[arm][:, rows] for arm in ("real_only", "real_plus_generated"))
    gain = metrics.paired_gain(real, both, blocks[rows])
    accuracy = scored(both, blocks[rows]) | {"real": float(real.mean())}
    return {name: accuracy, f"{name}_gain": figure(gain["gain"], int(rows.sum()), gain["ci95"])}
