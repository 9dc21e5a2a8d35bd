"""The page of one user: the report's metrics of this user, and the user's windows."""

from pathlib import Path

from mdlib.evaluation.evidence import Evidence
from mdlib.evaluation.metrics import nearest_train
from mdlib.reports import charts, plots
from mdlib.reports.charts import describe
from mdlib.reports.pages import write_page

GAIT = ("torso_speed", "cadence", "step_length", "foot_speed")  # whose spread within a user is shown
ARMS = ("real_only", "real_plus_generated")
SHOWN = 8  # windows in a row


def write_user(report: dict, evidence: Evidence, user: int, out: str | Path) -> None:
    """Write report-user-K.html and .json into `out`. report: of `evidence`, whose windows the page shows."""
    found, physics = of_user(report, user), report["physics"]
    shown = {f"windows {k}": figure for k, figure in enumerate(_windows(evidence, user))}
    row = report["users"].index(user)
    names = tuple(name for name in GAIT if name in found["physics"])
    keys = ("unseen_spread", "generated_spread")
    spreads = {name: {**physics[name], **{key: [physics[name][key][row]] for key in keys}} for name in names}
    if names:
        shown["spreads"] = charts.user_spreads(spreads, [user], names)
    write_page(found, out, f"report-user-{user}", shown, template="user")


def of_user(report: dict, user: int) -> dict:
    """What a report says of a user: metrics of its sections, None or left out where they were not measured."""
    row, confusion = report["users"].index(user), report["identity"]["confusion"]
    mine = lambda section: next((one for one in report[section]["per_user"] if one["user"] == user), None)
    others = [(other, k) for k, other in enumerate(report["users"])]
    named = {f"ID_{other}": confusion[row][k] for other, k in others if confusion[row][k]}
    taken = {f"ID_{other}": confusion[k][row] for other, k in others if other != user and confusion[k][row]}
    gait = {}
    for name, one in report["physics"].items():
        if "generated_means" in one and one["per_user"][row] is not None:
            means = dict(real=one["unseen_means"][row], generated=one["generated_means"][row])
            label, unit = describe("physics", name)["label"], one["unit"]
            gait[name] = dict(label=label, unit=unit, **means, distance=one["per_user"][row], all=one["value"])
    of = lambda section, name: report[section][name]["value"]
    return {
        **{key: report[key] for key in ("mdlib", "created")},
        "user": user,
        "identity": {"own": mine("identity"), "named": named, "taken": taken, "all": of("identity", "accuracy")},
        "augmentation": {"own": mine("augmentation"), **{n: of("augmentation", n) for n in ARMS}},
        "memorisation": {"own": mine("memorisation"), "all": of("memorisation", "copies")},
        "physics": gait,
    }


def _windows(evidence: Evidence, user: int) -> list[plots.Figure]:
    """For each condition some real and generated windows, and the training windows nearest to these."""
    found, usual = [], nearest_train(evidence.test, evidence.train)[0].median().clamp_min(1e-9)
    for k, condition in enumerate(evidence.generated.of_user(user).conditions, 1):
        real, generated = (part.few(user, condition, SHOWN) for part in (evidence.unseen, evidence.generated))
        found.append(plots.user_view(real, generated, evidence.train, usual, f"condition {k}"))
    return found
