"""Report, comparison and study as JSON and HTML, and the folders of images that a report is made from."""

from pathlib import Path

from mdlib.data.checks import check_split, seen_beyond, seen_of_test
from mdlib.data.nearness import SIDE
from mdlib.data.splits import apply_split, describe_training, read_split, spare_windows
from mdlib.data.windows import WindowSet, load_windows, to_float
from mdlib.evaluation.codec_quality import choose_codec
from mdlib.evaluation.evidence import Evidence, Protocol
from mdlib.evaluation.metrics import absent
from mdlib.evaluation.protocol import evaluate, through_codec
from mdlib.reports import charts, pages, plots
from mdlib.training.fit import read_history
from mdlib.utils import DataError

GAIT = ("torso_speed", "cadence", "step_length", "foot_speed")  # whose spread within a user is pictured
OVERLAP = 4  # windows of four steps, one step apart: n and n + 4 share nothing


def write_report(report: dict, evidence: Evidence, out: str | Path) -> dict[str, plots.Figure]:
    """Write report.json and report.html into `out`; returns the page's charts by name (see templates/figures.toml),
    those that there was something to draw for. Training curves need the run's codec/ and prior/ in `out`."""
    shown = _charts(report, evidence)
    for part in ("codec", "prior"):
        if (Path(out) / part / "history.csv").exists():
            history = read_history(Path(out) / part)
            pairs = [(name, f"held_out_{name}") for name in history[-1] if f"held_out_{name}" in history[-1]]
            shown[part] = plots.history(history, pairs[:4])
    measured = {**report, "training": {}, "augmentation": dict(report["augmentation"])}
    if "codec" not in shown:
        measured["training"]["curves"] = absent("no training logs in this folder")
    if not report["augmentation"]["gain_by_selection"]:
        measured["augmentation"]["filters"] = absent("none asked for: set keep, the fractions to retain")
    pages.write(report, Path(out), "report", shown, measured=measured, missing=pages.not_measured(measured))
    return shown


def validate_folders(
    real: str | Path,
    generated: str | Path,
    split: str | Path,
    out: str | Path,
    size: int = 64,
    pipeline: str | Path | None = None,
    channels: int = 1,
    colormap: str = "auto",
    **protocol,
) -> dict:
    """The protocol over folders of images: load, evaluate, write the report into `out`; returns the report.

    Args:
        pipeline: where given, its codec adds the reconstruction and codebook figures, at its own size and channels.
        channels, colormap: how the real images are read, see `mdlib.data.windows.load_windows`.
        protocol: fields of `evidence.Protocol`.

    Raises:
        DataError: users of the two folders differ, the split does not fit, or the generator has seen its test windows.
    """
    codec = None
    if pipeline:
        from mdlib.pipeline import load_pipeline

        codec = load_pipeline(pipeline).codec
        size, channels = codec.config.image_size, codec.config.in_channels
    parts = read_split(split)
    about = {"real": str(real), "generated": str(generated), "split": str(split)}
    about["training windows are"] = describe_training(parts)
    for weights in filter(None, (generated, pipeline)):
        if seen := seen_of_test(weights, parts, real):
            raise DataError(f"{weights} was trained on {seen} of the test windows: evaluate it with its own split")
        if others := seen_beyond(weights, parts, real):
            about["weights trained on other windows too"] = f"{weights} was trained on {others} others too"
    reading = dict(channels=channels, colormap=colormap)
    check_split(load_windows(real, size=max(SIDE, size), **reading), parts)
    windows = load_windows(real, size=size, **reading)
    evidence = gather(windows, parts, load_generated(generated, windows), codec)
    report = evaluate(evidence, Protocol(**protocol), about)
    write_report(report, evidence, out)
    return report


def gather(windows: WindowSet, split: dict, generated: WindowSet, codec=None) -> Evidence:
    """What the protocol needs, from a set, its split and the generated windows."""
    gap = max(OVERLAP, split.get("gap", OVERLAP))  # a split may ignore the overlap; an interval may not
    parts, spare = apply_split(windows, split), spare_windows(windows, split)
    return Evidence(**parts, generated=generated, gap=gap, codec=codec, spare=spare)


def load_generated(folder: str | Path, real: WindowSet) -> WindowSet:
    """Generated windows at the real set's size, with its label map; DataError on a user without real windows."""
    channels, size = real.images.shape[1:3]
    return load_windows(folder, size=size, channels=channels, colormap=real.colormap, users=real.users)


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
    if len(augmentation["gain_by_windows"]) > 1 or augmentation["gain_by_selection"]:
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
    pages.write(result, Path(out), "study", {"study": charts.study(result["rows"])}, counts=counts)


def write_comparison(result: dict, windows: dict[str, WindowSet], out: str | Path) -> None:
    """Write comparison.json and comparison.html into `out`. result: settings, conclusions and systems (figures, or an
    error, by name), with mdlib and created; windows: "real" and those of each measured system, may be empty."""
    measured = {name: figures for name, figures in result["systems"].items() if "error" not in figures}
    shown = {"gains": charts.gains(measured), "learning": charts.learning(measured)} if measured else {}
    if windows:
        shown["windows"] = plots.side_by_side(windows)
    pages.write(result, Path(out), "comparison", shown, systems=measured)


def conclusions(systems: dict[str, dict]) -> dict:
    """Answers, each a dictionary with value and sentence: which system by gain, by Fréchet distance and by identity,
    and which kind of codec by the rule of `codec_quality.choose_codec`."""
    measured = {name: figures for name, figures in systems.items() if "error" not in figures}
    return {**_best_systems(measured), "codec": _best_codec(measured)}


def _best_systems(systems: dict[str, dict]) -> dict:
    if not systems:
        return {}
    gains = {name: figures["augmentation"]["gain"] for name, figures in systems.items()}
    best = max(gains, key=lambda name: gains[name]["value"])
    apart = [name for name in gains if gains[name]["ci95"][1] < gains[best]["ci95"][0]]
    how = f"its interval lies above that of {', '.join(apart)}" if apart else "but the intervals of all systems overlap"
    sentence = f"Largest gain: {best}, {pages.written(gains[best], 'points')}; {how}."
    if gains[best]["ci95"][0] <= 0:
        sentence = f"No system's generated windows help for certain. {sentence}"
    found = {"gain": {"value": best, "sentence": sentence}}
    for key, title, pick, name in (
        ("fidelity", "Nearest to real windows by Fréchet distance", min, "fd_ratio"),
        ("identity", "Most often recognised as their user", max, "accuracy"),
    ):
        values = {system: figures[key][name]["value"] for system, figures in systems.items()}
        values = {system: value for system, value in values.items() if value is not None}
        if values:
            best = pick(values, key=values.get)
            figure = pages.written(values[best], pages.describe(key, name)["unit"])
            found[key] = {"value": best, "sentence": f"{title}: {best} ({figure})."}
    return found


def _best_codec(systems: dict[str, dict]) -> dict:
    """VQ or KL: the codecs of best PSNR with and without a codebook."""
    best = {}
    for name, figures in systems.items():
        psnr, usage = figures["reconstruction"]["psnr_db"]["value"], figures["codebook"]["usage"]["value"]
        kind = "kl" if usage is None else "vq"
        if psnr is not None and psnr > best.get(kind, {"psnr_db": 0.0})["psnr_db"]:
            best[kind] = {"psnr_db": psnr, "usage": usage, "system": name}
    if len(best) < 2:
        reason = "it takes a codec with a codebook and one without"
        return {"value": None, "reason": reason, "sentence": f"VQ or KL codec: not measured ({reason})."}
    choice, names = choose_codec(best["vq"], best["kl"]), {kind: one["system"] for kind, one in best.items()}
    sentence = f"{choice['sentence']} (VQ: {names['vq']}, KL: {names['kl']}.)"
    return {"value": choice["choice"], **choice, "systems": names, "sentence": sentence}
