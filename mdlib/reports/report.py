"""Report, comparison and study as JSON and HTML, and the folders of images that a report is made from."""

from pathlib import Path

from mdlib.data.checks import check_split, seen_beyond, seen_of_test
from mdlib.data.overlap import SIDE
from mdlib.data.splits import apply_split, describe_training, read_split, spare_windows
from mdlib.data.windows import WindowSet, load_windows
from mdlib.evaluation.evidence import Evidence, Protocol, through_codec, train_classifier
from mdlib.evaluation.filters import FILTERS, keep_best, keep_plausible, scores
from mdlib.evaluation.metrics import unmeasured
from mdlib.evaluation.protocol import evaluate
from mdlib.pipeline import copy_windows, load_pipeline
from mdlib.reports import charts, plots
from mdlib.reports.charts import describe
from mdlib.reports.pages import format_metric, not_measured, write_page
from mdlib.reports.user_page import GAIT, write_user
from mdlib.utils import DataError, read_history, to_float

OVERLAP = 4  # windows of four steps, one step apart: n and n + 4 share nothing
VQ_RATIO, VQ_USAGE = 1.1, 0.8  # see `choose_codec`
BEST = {  # the metrics by which systems are compared: section, name, which value is best, how the answer begins
    "gain": ("augmentation", "gain", max, "Largest gain"),
    "fidelity": ("fidelity", "fd_ratio", min, "Nearest to real windows by Fréchet distance"),
    "identity": ("identity", "accuracy", max, "Most often recognised as their user"),
}


def write_report(report: dict, evidence: Evidence, out: str | Path) -> dict[str, plots.Figure]:
    """Write report.json and report.html into `out`; returns the charts of the page for which there are data, by
    name (see templates/metrics.toml). Training curves need the run's codec/ and prior/ in `out`."""
    shown = _charts(report, evidence)
    for part in ("codec", "prior"):
        if (Path(out) / part / "history.csv").exists():
            shown[part] = plots.history(read_history(Path(out) / part))
    measured = {**report, "training": {}}
    if not {"codec", "prior"} & shown.keys():
        measured["training"]["curves"] = unmeasured("no training logs in this folder")
    write_page(report, out, "report", shown, measured=measured, missing=not_measured(measured))
    return shown


def validate_folders(
    real: str | Path,
    generated: str | Path,
    split: str | Path,
    out: str | Path,
    size: int = 64,
    pipeline: str | Path | None = None,
    channels: int = 0,
    colormap: str = "",
    crop: str = "",
    user: int | None = None,
    **protocol,
) -> dict:
    """The protocol over folders of images: load, evaluate, write the report into `out`; returns the report.

    Args:
        pipeline: where given, its codec adds the reconstruction and codebook metrics, at its own size and channels.
        channels, colormap, crop: how the real images are read, see `mdlib.data.windows.load_windows`; 0 and "": as
            when the split was made.
        user: k of the ID_k whose own page, report-user-k.html, is written as well; None: of no user.
        protocol: fields of `evidence.Protocol`.

    Raises:
        DataError: users of the two folders differ, the split does not fit, or the generator has seen its test windows.
    """
    loaded = load_pipeline(pipeline) if pipeline else None
    if loaded:
        size, channels = loaded.codec.config.image_size, loaded.codec.config.in_channels
    parts = read_split(split)
    about = {"real": str(real), "generated": str(generated), "split": str(split)}
    about["training windows"] = describe_training(parts)
    for weights in filter(None, (generated, pipeline)):
        if seen := seen_of_test(weights, parts, real):
            raise DataError(f"{weights} was trained on {seen} of the test windows: evaluate it with its own split")
        if others := seen_beyond(weights, parts, real):
            about["weights trained on other windows"] = f"{weights}: {others} windows outside this split"
    given = {"channels": channels, "colormap": colormap, "crop": crop}
    reading = {**parts.get("reading", {}), **{key: value for key, value in given.items() if value}}
    parts = check_split(load_windows(real, size=max(SIDE, size), **reading), {**parts, "reading": reading})
    windows = load_windows(real, size=size, **reading)
    evidence = gather(windows, parts, load_generated(generated, windows), loaded)
    if user is not None and windows.of_user(user) and not evidence.generated.of_user(user):
        raise DataError(f"{generated} holds no window of ID_{user}: generate some, or choose another user")
    report = evaluate(evidence, Protocol(**protocol), about, identifier_folder=Path(out) / "identifier")
    write_report(report, evidence, out)
    if user is not None:
        write_user(report, evidence, user, out)
    return report


def select_folder(
    real: str | Path,
    generated: str | Path,
    split: str | Path,
    out: str | Path,
    by: str = "kinematics",
    fraction: float = 0.5,
    size: int = 64,
) -> tuple[int, int]:
    """Copy the generated windows that a filter keeps into `out`, with their manifest; returns how many of how many.

    Args:
        real, split: their training windows are what the filter knows.
        generated: folder that `generate` or notebook 05 wrote.
        by: one of FILTERS, or kinematics for `keep_plausible`, which decides by itself how many to keep.
        fraction: of each user's windows to keep, best first.
        size: pixels a side at which windows are compared.
    """
    if by not in (*FILTERS, "kinematics"):
        raise DataError(f"by must be one of {', '.join(FILTERS)} or kinematics, got {by!r}")
    if not 0 < fraction <= 1:
        raise DataError(f"keep must be a fraction between 0 and 1, got {fraction}")
    parts = read_split(split)
    every = load_windows(real, size=size, **parts.get("reading", {}))
    train = apply_split(every, parts)["train"]
    windows = load_generated(generated, every)
    if by == "kinematics":
        kept = keep_plausible(windows, train)
    else:
        classifier = train_classifier(train.images, train.labels, train.num_users, Protocol().evaluation_steps)
        kept = keep_best(windows, scores(windows, classifier)[by], fraction)
    if not kept.any():
        raise DataError(f"{by} keeps none of the {len(windows)} windows of {generated}: choose another filter")
    copy_windows(generated, [windows.paths[row] for row in kept.nonzero()[0]], out)
    return int(kept.sum()), len(windows)


def gather(windows: WindowSet, split: dict, generated: WindowSet, pipeline=None) -> Evidence:
    """Collect the evaluation's inputs from a set, its split, generated windows and their pipeline."""
    gap = max(OVERLAP, split.get("gap", OVERLAP))  # intervals need the full overlap, even if a split ignores it
    parts, spare = apply_split(windows, split), spare_windows(windows, split)
    made_by = dict(codec=pipeline.codec, speckle=pipeline.config.speckle) if pipeline else {}
    return Evidence(**parts, generated=generated, gap=gap, spare=spare, split=split, **made_by)


def load_generated(folder: str | Path, real: WindowSet) -> WindowSet:
    """Generated windows at the real set's size, with its label map; DataError on a user without real windows."""
    channels, size = real.images.shape[1:3]
    ours = (Path(folder) / "generation.json").exists()  # other tools have other colour maps
    colormap = real.colormap if ours else "auto"
    # Ordered by name, because numbers repeat where there are several seeds.
    return load_windows(folder, size=size, channels=channels, users=real.users, colormap=colormap, order="name")


def _charts(report: dict, evidence: Evidence) -> dict[str, plots.Figure]:
    augmentation, physics = report["augmentation"], report["physics"]
    real, generated = evidence.unseen, evidence.generated
    users = [user for user in real.users if len(generated.of_user(user))][:6]
    shown = {
        "headline": charts.accuracies(augmentation, charts.HEADLINE),
        "accuracies": charts.accuracies(augmentation),
        "contact": plots.real_and_generated(real, generated, users),
        "confusion": charts.confusion(report["identity"]["confusion"], report["users"]),
        "nearest": _nearest_pairs(report["memorisation"]["nearest"], evidence),
    }
    if len(augmentation["gain_by_windows"]) > 1:
        shown["gain_curves"] = charts.gain_curves(augmentation)
    if "roc" in report["identity"]:
        shown["verification"] = charts.roc(report["identity"]["roc"])
    if report["fidelity"]["map"]:
        shown["map"] = plots.neighbourhoods(report["fidelity"]["map"])
    if physics["torso_speed"]["value"] is not None:
        names = tuple(name for name in GAIT if physics[name]["value"] is not None)
        shown["user_means"] = charts.user_means(physics)
        shown["user_spreads"] = charts.user_spreads(physics, report["users"], names)
    if evidence.codec is not None:
        some = evidence.test.select(range(0, len(evidence.test), max(1, len(evidence.test) // 6))[:6])
        decoded = through_codec(evidence.codec, some.images, some.labels)
        shown["reconstructions"] = plots.reconstructions(to_float(some.images), decoded, real.colormap)
    if "counts" in report["codebook"]:
        shown["code_usage"] = plots.code_usage(report["codebook"]["counts"])
    return shown


def _nearest_pairs(pairs: list[dict], evidence: Evidence) -> plots.Figure:
    """The generated windows nearest to a training window, each above that; titles: its distance over a real one's."""
    images = []
    for name, part in (("generated", evidence.generated), ("train", evidence.train)):
        row = {path: row for row, path in enumerate(part.paths)}
        images += [part.images[row[pair[name]]] for pair in pairs]
    titles = [f"{pair['ratio']:.2f}" for pair in pairs] + ["training"] * len(pairs)
    return plots.windows(images, titles, evidence.train.colormap, columns=len(pairs))


# ---- several reports on one page


def write_study(result: dict, out: str | Path) -> None:
    """Write study.json and study.html into `out`. result: settings, and rows (windows_per_user, folds and sections of a
    report, verdict among them), with mdlib and created."""
    counts = {row["windows_per_user"]: row for row in result["rows"]}
    write_page(result, out, "study", {"study": charts.study(result["rows"])}, counts=counts)


def write_comparison(result: dict, windows: dict[str, WindowSet], out: str | Path) -> None:
    """Write comparison.json and comparison.html into `out`. result: settings, conclusions and systems (metrics, or an
    error, by name), with mdlib and created; windows: "real" and those of each measured system, may be empty."""
    measured = {name: metrics for name, metrics in result["systems"].items() if "error" not in metrics}
    shown = {"gains": charts.gains(measured)} if measured else {}
    if windows:
        shown["windows"] = plots.side_by_side(windows)
    write_page(result, out, "comparison", shown, systems=measured)


def conclusions(systems: dict[str, dict]) -> dict:
    """Answers, each a dictionary with value and sentence: which system by gain, by Fréchet distance and by identity,
    and which kind of codec by the rule of `choose_codec`."""
    measured, found = {name: metrics for name, metrics in systems.items() if "error" not in metrics}, {}
    for key, (section, name, pick, title) in BEST.items():
        every = {system: metrics[section][name] for system, metrics in measured.items()}
        values = {system: metric["value"] for system, metric in every.items() if metric["value"] is not None}
        if values:
            best = pick(values, key=values.get)
            text = format_metric(every[best], describe(section, name)["unit"])
            found[key] = {"value": best, "sentence": f"{title}: {best}, {text}."}
    if "gain" in found:
        ends = {system: metrics["augmentation"]["gain"]["ci95"] for system, metrics in measured.items()}
        doubt = "" if any(low > 0 for low, _ in ends.values()) else "No system's generated windows clearly help. "
        low, _ = ends.pop(found["gain"]["value"])
        apart = [system for system, (_, high) in ends.items() if high < low]
        how = f" Its interval lies above that of {', '.join(apart)}." * bool(apart)
        if near := ", ".join(system for system in ends if system not in apart):
            how += f" It overlaps that of {near}."
        found["gain"]["sentence"] = f"{doubt}{found['gain']['sentence']}{how}"
    return found | {"codec": choose_codec(measured)}


def choose_codec(systems: dict[str, dict]) -> dict:
    """Choose VQ or KL by the codecs of best PSNR with and without a codebook: VQ if its PSNR is at least VQ_RATIO times
    that of KL and more than VQ_USAGE of its codes are used, else KL; all on unseen windows."""
    kinds: dict[str, dict] = {"vq": {}, "kl": {}}
    for name, metrics in systems.items():
        psnr, usage = metrics["reconstruction"]["psnr_db"]["value"], metrics["codebook"]["usage"]["value"]
        if psnr is not None:
            kinds["kl" if usage is None else "vq"][name] = psnr, usage
    if not all(kinds.values()):
        reason = "it takes a codec with a codebook and one without"
        return {"value": None, "reason": reason, "sentence": f"VQ or KL codec: not measured ({reason})."}
    (vq, (high, usage)), (kl, (low, _)) = (max(kind.items(), key=lambda one: one[1][0]) for kind in kinds.values())
    ratio = high / max(low, 1e-9)
    choice = "vq" if ratio >= VQ_RATIO and usage > VQ_USAGE else "kl"
    sentence = (
        f"Take the {choice.upper()} codec: the PSNR of {vq}'s VQ codec, {high:.1f} dB, is {ratio:.2f} times the "
        f"{low:.1f} dB of {kl}'s KL codec (VQ needs {VQ_RATIO}), and {100 * usage:.0f} % of its codes are used (VQ "
        f"needs more than {100 * VQ_USAGE:.0f} %)."
    )
    measured = {"vq_psnr_db": high, "kl_psnr_db": low, "ratio": ratio, "usage": usage}
    return {"value": choice, **measured, "systems": {"vq": vq, "kl": kl}, "sentence": sentence}
