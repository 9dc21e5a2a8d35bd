"""report.json and report.html of one generator, and the folders of images that they are made from."""

from pathlib import Path

from mdlib.data.splits import apply_split, describe_training, read_split, seen_beyond, seen_of_test, spare_windows
from mdlib.data.windows import DataError, WindowSet, load_windows, to_float
from mdlib.evaluation.evidence import Evidence, Protocol
from mdlib.evaluation.intervals import absent
from mdlib.evaluation.protocol import evaluate, through_codec
from mdlib.reports import pages, plots
from mdlib.training.fit import read_history

GAIT = ("torso_speed", "cadence", "step_length", "foot_speed")  # whose spread within a user is pictured
CARDS = (("augmentation", "gain"), ("identity", "accuracy"), ("memorisation", "copies"))  # the numbers on top
HEADINGS = {"augmentation": "Value", "conditions": "Real + generated", "reconstruction": "Value", "codebook": "Value"}
OVERLAP = 4  # windows of four steps, one step apart: n and n + 4 share nothing


def write_report(report: dict, evidence: Evidence, out: str | Path) -> dict[str, plots.Figure]:
    """Write report.json and report.html into `out`; returns the page's charts by name (see templates/figures.toml),
    those that there was something to draw for. Training curves need the run's codec/ and prior/ in `out`."""
    out = Path(out)
    charts = _charts(report, evidence) | _training_curves(out)
    measured = {
        **report,
        "training": {} if "codec" in charts else {"curves": absent("no training logs in this folder")},
    }
    filtered = report["augmentation"]["gain_by_selection"]
    filters = {} if filtered else {"filters": absent("none asked for: set keep, the fractions to retain")}
    measured["augmentation"] = report["augmentation"] | filters
    sections = []
    for key in pages.SECTIONS.keys() & measured.keys():
        section, rows = pages.SECTIONS[key], pages.table(key, measured[key])
        shown = [(name, sentence) for name, sentence in section.get("charts", {}).items() if name in charts]
        if rows or shown:
            heading = HEADINGS.get(key, "Generated windows")
            sections.append({**section, "key": key, "rows": rows, "charts": shown, "heading": heading})
    about = {**report["about"], **{f"{name} windows": n for name, n in report["windows"].items()}}
    pages.write(
        report,
        out,
        "report",
        "report.html",
        charts,
        cards=[_card(report, *names) for names in CARDS],
        about=about.items(),
        sections=sorted(sections, key=lambda section: list(pages.SECTIONS).index(section["key"])),
        columns=pages.COLUMNS,
        users=_each_user(report),
        missing=pages.not_measured(measured),
    )
    return charts


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
            about["not by the split's training windows alone"] = f"{weights} was trained on {others} others too"
    windows = load_windows(real, size=size, channels=channels, colormap=colormap)
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
    """Generated windows at the real set's size, with the real set's label map.

    Raises:
        DataError: a generated user without real windows.
    """
    channels, size = real.images.shape[1:3]
    return load_windows(folder, size=size, channels=channels, colormap=real.colormap, users=real.users)


def _charts(report: dict, evidence: Evidence) -> dict[str, plots.Figure]:
    augmentation, physics = report["augmentation"], report["physics"]
    real, generated = evidence.unseen, evidence.generated
    shown = [user for user in real.users if len(generated.of_user(user))][:6]
    charts = {
        "headline": plots.accuracies(augmentation, plots.HEADLINE),
        "accuracies": plots.accuracies(augmentation),
        "contact": plots.real_and_generated(real, generated, shown),
        "confusion": plots.confusion(report["identity"]["confusion"], report["users"]),
        "nearest": nearest_pairs(report["memorisation"], evidence),
    }
    if len(augmentation["gain_by_windows"]) > 1 or augmentation["gain_by_selection"]:
        charts["gain_curves"] = plots.gain_curves(augmentation)
    if "roc" in report["identity"]:
        charts["verification"] = plots.roc(report["identity"]["roc"])
    if report["fidelity"]["map"]:
        charts["map"] = plots.neighbourhoods(report["fidelity"]["map"])
    if physics["torso_speed"]["value"] is not None:
        names = tuple(name for name in GAIT if physics[name]["value"] is not None)
        charts["user_means"] = plots.user_means(physics)
        charts["user_spreads"] = plots.user_spreads(physics, report["users"], names)
    if evidence.codec is not None:
        some = evidence.test.select(range(0, len(evidence.test), max(1, len(evidence.test) // 6))[:6])
        decoded = through_codec(evidence.codec, some.images, some.labels)
        charts["reconstructions"] = plots.reconstructions(to_float(some.images), decoded, real.colormap)
    if "counts" in report["codebook"]:
        charts["code_usage"] = plots.code_usage(report["codebook"]["counts"])
    return charts


def _training_curves(run: Path) -> dict[str, plots.Figure]:
    """The first four training curves of a run folder's codec and prior, as far as their logs are there."""
    charts = {}
    for part in ("codec", "prior"):
        if (run / part / "history.csv").exists():
            history = read_history(run / part)
            pairs = [(name, f"held_out_{name}") for name in history[-1] if f"held_out_{name}" in history[-1]]
            charts[part] = plots.history(history, pairs[:4])
    return charts


def nearest_pairs(memorisation: dict, evidence: Evidence) -> plots.Figure:
    """The generated windows nearest to a training window, each above that; titles: its distance over a real one's."""
    pairs, images = memorisation["nearest"], []
    for name, part in (("generated", evidence.generated), ("train", evidence.train)):
        row = {path: row for row, path in enumerate(part.paths)}
        images += [part.images[row[pair[name]]] for pair in pairs]
    titles = [f"{pair['ratio']:.2f}" for pair in pairs] + ["training"] * len(pairs)
    return plots.windows(images, titles, evidence.train.colormap, columns=len(pairs))


def _card(report: dict, section: str, name: str) -> dict:
    """One of the numbers on top of the page."""
    about = pages.describe(section, name)
    known = {"identity": ("real windows", "classifier_accuracy"), "memorisation": ("expected", "copies_expected")}
    word, key = known.get(section, ("", ""))
    reference = f"; {word}: {pages.written(report[section][key], about['unit'])}" if key else ""
    value = pages.written(report[section][name], about["unit"])
    return {"value": value, "label": about["label"], "cue": about["cue"] + reference}


def _each_user(report: dict) -> list[list[str]]:
    """User, test windows, accuracy of real only and real + generated, generated windows, how many are recognised."""
    accuracy = {row["user"]: row for row in report["augmentation"]["per_user"]}
    recognised = {row["user"]: row for row in report["identity"]["per_user"]}
    rows = []
    for user in report["users"]:
        real, generated = accuracy.get(user, {"n": 0}), recognised.get(user, {"n": 0})
        arms = [pages.written(real.get(name), "percent") for name in ("real_only", "real_plus_generated")]
        named = pages.written(generated.get("accuracy"), "percent")
        rows.append([f"ID_{user}", str(real["n"]), *arms, str(generated["n"]), named])
    return rows
