"""study.json and study.html: how few real windows are enough?"""

from pathlib import Path

from mdlib.reports import pages, plots

ROWS = {
    "augmentation": (
        *("folds", "real_only", "real_plus_generated", "real_x2", "generated_only", "real_unaugmented"),
        *("gain", "gain_per_fold", "gain_other_users", "gain_over_x2", "resnet18_gain", "equivalent_real_windows"),
    ),
    "identity": ("accuracy", "classifier_accuracy"),
    "memorisation": ("copies",),
    "fidelity": ("fd_ratio",),
}
CHART = (
    "Accuracy on unseen windows against the number of real windows per user, with 95 % intervals. Generated windows "
    "help where the blue line lies above the dark one; hollow dots are twice as many real windows."
)
NOTE = (
    "For each number of windows the generator is trained from scratch on exactly those windows; validation and test "
    "windows are the same for all numbers of a fold. Accuracies and gains are those of all folds' test windows "
    "together, other figures the mean over folds. Intervals resample test windows and classifier seeds, not "
    "generators: compare the folds to see how much another generator changes."
)


def write_study(result: dict, out: str | Path) -> None:
    """Write study.json and study.html into `out`. result: settings, and rows (windows_per_user, folds and sections of a
    report, verdict among them), with mdlib and created."""
    columns = {f"{row['windows_per_user']} real windows": row for row in result["rows"]}
    pages.write(
        result,
        Path(out),
        "study",
        "across.html",
        {"study": plots.study(result["rows"])},
        title="mdlib study: how few real windows are enough?",
        sentences=[row["verdict"]["sentence"] for row in result["rows"]],
        shown=[("study", CHART)],
        note=NOTE,
        failed={},
        parts=pages.across(ROWS, columns),
        heading="Real windows per user",
        columns=[str(row["windows_per_user"]) for row in result["rows"]],
    )
