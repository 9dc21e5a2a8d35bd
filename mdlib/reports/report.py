"""report.json and report.html: one page that opens offline, the verdict on top."""

import base64
import html
import json
from pathlib import Path

from mdlib.data.splits import apply_split, describe_training, read_split, seen_beyond, seen_of_test, spare_windows
from mdlib.data.windows import DataError, WindowSet, load_windows
from mdlib.evaluation.evidence import Evidence, Protocol, concatenate, missing
from mdlib.evaluation.protocol import evaluate, through_codec
from mdlib.reports import plots
from mdlib.systems.registry import load_codec
from mdlib.training.fit import read_history
from mdlib.utils import whole_file

GAIT = ("torso_speed", "cadence", "step_length", "foot_speed")  # whose spread within a user is pictured
USER_COLUMNS = ["user", "test windows", "real only, %", "real + generated, %", "generated windows", "taken for them, %"]
CURVES = 4  # panels of a training log
OVERLAP = 4  # windows of four steps, one step apart: n and n + 4 share nothing

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dbe1; }
.verdict { font-size: 1.15rem; padding: .8rem 1rem; background: #eef3f8; border-left: 5px solid #2463a4; }
table { border-collapse: collapse; font-size: .92rem; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  vertical-align: top; } td.n { font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .note { color: #5a6672; font-size: .88rem; }
"""

_SECTIONS = {
    "augmentation": (
        "Does real + generated train a better identifier?",
        "Classifiers from scratch on the generator's own training windows; equal optimizer steps and the same "
        "classical augmentation (whole-stride shifts, small gain and noise) in every arm; test windows untouched. "
        "The share of generated windows in a batch is chosen on validation windows. real_unaugmented: real alone "
        "without the classical augmentation. real_x2, real_x4: twice, four times as many real windows; gain_over_x2: "
        "real + generated over twice as many. resnet18_…: the same by ResNet-18. Intervals redraw test windows and the "
        "classifiers' seeds, not the generator. gain_other_users: the mean of the users' gains, its interval redraws "
        "users, as if other people had walked. gain_5_to_1: with five generated windows a real one. "
        "equivalent_real_windows: the number of real windows a user with which real alone does as well, "
        "read off between the measured numbers, which are its limits. Filters: confidence keeps the generated windows "
        "a classifier of the training windows is surest of, margin those where its first and second choice lie "
        "farthest apart, specificity those where their user and the likeliest other do, diversity those least like "
        "another of their user, kinematics those within their user's range of gait.",
    ),
    "conditions": (
        "Does what people carry confuse the identifier?",
        "Accuracy of real + generated on the test windows of each condition; real: of real alone. unrecorded: users "
        "whom no training window shows in that condition: only generated windows can teach what they look like then.",
    ),
    "identity": (
        "Do generated windows look like their user?",
        "Judges trained on real windows the generator was not trained on. classifier_accuracy is their own on windows "
        "they did not see. control_ratio: probability of the conditioned user over that of any other. "
        "verification_eer: equal error rate of claims checked by an embedder that was trained on other users' real "
        "windows; each user is held out once and enrolled by the mean of unseen real windows. real: of the training "
        "windows, which generated ones imitate.",
    ),
    "reconstruction": (
        "What does the codec keep?",
        "On test windows, intensity in [0, 1]. identity_accuracy: the real-only classifiers after "
        "the codec's round trip, beside before. "
        "rival_psnr_db: of a codec given beside this one; codec_choice: VQ or KL, where it is of the other kind. "
        "other_label: of a codec that is told users when it is told a wrong one; taken: how often its output then "
        "passes for that other user.",
    ),
    "codebook": (
        "Is the codebook used?",
        "Counted on validation and test windows. A code is distinctive for a user who uses it at least 1.5 times as "
        "often as the others together, and at least once in four windows.",
    ),
    "memorisation": (
        "Are training windows copied?",
        "Distance to the nearest training window of the same user, over all circular shifts in time, relative to that "
        "of real test windows. Well below 1, or many copies, means copying. Pictured: the generated windows that "
        "come nearest, each above the training window it is nearest to.",
    ),
    "fidelity": (
        "Are generated windows spread like real ones?",
        "Fréchet distance (fd) between generated windows and unseen real ones, in the features of classifiers that "
        "saw neither; lower is better. fd_real_vs_real: between two halves of the unseen real windows that do not "
        "overlap, as low as fd can be hoped to get. fd_train: the generator's training windows against the unseen, "
        "what a perfect copier would get. fd_ratio: fd over fd_real_vs_real, 1 for real windows. Every comparison "
        "takes the same number n of windows a side, user by user: fd grows when n shrinks, so compare fd at equal n "
        "only. Copies score well here too: read it beside memorisation. kid: kernel distance, around 0 for windows "
        "of one distribution. precision, density: how much of the generated lies among real windows; recall, "
        "coverage: how much of the real lies among generated ones. Of all these, real and train stand for the same "
        "two comparisons. diversity: distance between two windows of one user that share no step, real: of unseen "
        "windows; well below a ratio of 1 is collapse. inception_score: of the classifiers' probabilities, at most "
        "the number of users. Pictured: some windows by t-SNE of one classifier's features, where distances mean "
        "nothing.",
    ),
    "statistics": (
        "Are they alike as plain images?",
        "Mean, deviation, skewness, kurtosis, texture (contrast, dissimilarity, homogeneity and energy of neighbouring "
        "grey levels) and spectrum (share of the power in four bands), user by user. ks: Kolmogorov-Smirnov statistic "
        "between generated and unseen windows, mean over them and over users, 0 for one distribution; by the same "
        "number of windows a side. mahalanobis: distance to the middle of the user's unseen windows. typical: share of "
        "generated windows no nearer and no farther than nine in ten real ones. silhouette: how far users lie apart.",
    ),
    "physics": (
        "Do generated walkers move like the real ones?",
        "Read off each window alone: trunk speed, step rate, peak foot speed, envelopes (the velocities below which 97 "
        "% and 3 % of a column lie, and the mean of both), bandwidth, difference of left and right steps, which four "
        "steps hardly show. Value: Wasserstein-1 distance between a user's generated and unseen real windows, the mean "
        "over users, its interval redraws users; lower is better. real: between two halves of the unseen windows that "
        "do not overlap; ratio: value over real; train: training windows against the unseen, what a perfect copier "
        "would get. Every comparison takes the same number n of windows a side. Windows of a half are neighbours that "
        "share steps, so train can lie below real. r, real r: correlation over users of generated and real means, and "
        "of the means of the two halves. plausible: share of windows that a walking adult could have made, by foot over"
        " trunk speed, regularity of the steps and energy out of range; low for real ones too where 32 pixels are few. "
        "Images carry no axes: m/s are right if their height spans -0.9 to 3.9 m/s, as the simulator's does by default,"
        " else they are units of that axis; a window is taken for four steps of 0.58 s, so cadence and step length are "
        "relative, and where windows are cut to four steps, cadence shows only how well they were cut. Boxes: "
        "the middle half of a user's windows, the median, and from the 5th to the 95th percentile.",
    ),
    "training": (
        "How did training go?",
        "The codec's curves, and below them the prior's: training windows and held-out (validation) ones, against "
        "optimizer steps.",
    ),
    "split": (
        "Is the test apart from training?",
        "Windows of one recording share steps with their neighbours. min_distance: the smallest difference of window "
        "numbers between training, validation and test windows of a recording; test_share_overlapping: share of test "
        "windows that share a step with a training window. nearest_train_ratio: how near test windows come to training "
        "windows, over how near they come to those that they share nothing with; below 1 is a leak.",
    ),
}

_BESIDE = {
    "real": "real",
    "real_ci95": "real between",
    "real_vs_real": "real",
    "train": "train",
    "ratio": "ratio",
    "user_correlation": "r",
    "user_correlation_real": "real r",
}


def write_report(report: dict, evidence: Evidence, out: str | Path) -> dict[str, str]:
    """Write report.json and report.html into `out`; returns the page's sections by name, as HTML
    without their headings."""
    out = Path(out)
    with whole_file(out / "report.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    pictures = _pictures(report, evidence) | {"training": training_curves(out)}
    logs = {} if pictures["training"] else missing("curves", reason="no training logs lie beside this page")
    unasked = {} if report["augmentation"]["gain_by_selection"] else missing("filters", reason="keep asked for none")
    figures = report | {"training": logs, "augmentation": report["augmentation"] | unasked}
    sections = {name: _section(name, figures[name], pictures.get(name, [])) for name in _SECTIONS}
    sections["identity"] += table(_each_user(report), USER_COLUMNS)
    with whole_file(out / "report.html") as path:
        path.write_text(_page(report, sections), encoding="utf-8")
    return sections


def validate_folders(
    real: str | Path,
    generated: str | Path,
    split: str | Path,
    out: str | Path,
    size: int = 64,
    pipeline: str | Path | None = None,
    channels: int = 1,
    colormap: str = "auto",
    rival: str | Path | None = None,
    **protocol,
) -> dict:
    """The protocol over folders of images: load, evaluate, write the report into `out`; returns the report.

    Args:
        pipeline: where given, its codec adds the reconstruction and codebook figures, at its own size and channels.
        rival: codec/ folder of a run with the other kind of codec (VQ, KL); adds which of the two to take.
        channels, colormap: how the real images are read, see `mdlib.data.windows.load_windows`.
        protocol: fields of `evidence.Protocol`.

    Raises:
        DataError: users of the two folders differ, the split does not fit, the generator has seen its test windows, or
            the rival's size does not fit.
    """
    codec = None
    if rival and not pipeline:
        raise DataError("a rival codec stands beside the pipeline's own: give --pipeline too")
    if pipeline:
        from mdlib.pipeline import load_pipeline

        codec = load_pipeline(pipeline).codec
        size, channels = codec.config.image_size, codec.config.in_channels
    terms = read_split(split)
    about = {
        "real": str(real),
        "generated": str(generated),
        "split": str(split),
        "training windows are": describe_training(terms),
    }
    for weights in filter(None, (generated, pipeline)):
        if seen := seen_of_test(weights, terms, real):
            raise DataError(f"{weights} comes from training on {seen} of the test windows: judge it by its own split")
        if others := seen_beyond(weights, terms, real):
            about["not by the split's training windows alone"] = f"{weights} comes from {others} others too"
    windows = load_windows(real, size=size, channels=channels, colormap=colormap)
    evidence = gather(windows, terms, load_generated(generated, windows), codec, rival)
    report = evaluate(evidence, Protocol(**protocol), about)
    write_report(report, evidence, out)
    return report


def gather(
    windows: WindowSet, split: dict, generated: WindowSet, codec=None, rival: str | Path | None = None
) -> Evidence:
    """What the protocol needs, from a set, its split and the generated windows.

    rival: codec/ folder of a run with the other kind of codec than `codec`, see `Evidence`.
    """
    gap = max(OVERLAP, split.get("gap", OVERLAP))  # a split may ignore the overlap; an interval may not
    other = load_rival(rival, split).to(codec.device) if rival else None
    parts, spare = apply_split(windows, split), spare_windows(windows, split)
    return Evidence(**parts, generated=generated, gap=gap, codec=codec, rival=other, spare=spare)


def load_rival(path: str | Path, split: dict):
    """The codec of folder `path`, which lies in the folder of the run that trained it.

    Raises:
        DataError: no codec there, or its run trained it on windows that `split` keeps for the test.
    """
    codec = load_codec(path)
    if seen := seen_of_test(path, split):
        raise DataError(f"{path} was trained on {seen} of the test windows: train it on the same split")
    return codec


def load_generated(folder: str | Path, real: WindowSet) -> WindowSet:
    """Generated windows at the real set's size, with the real set's label map.

    Raises:
        DataError: a generated user without real windows.
    """
    return load_windows(
        folder,
        size=real.images.shape[-1],
        channels=real.images.shape[1],
        colormap=real.colormap,
        users=real.users,
    )


def _pictures(report: dict, evidence: Evidence) -> dict[str, list[bytes]]:
    real = concatenate(evidence.val, evidence.test)
    shown = [user for user in real.users if user in {file.user for file in evidence.generated.files}][:6]
    pictures = {
        "augmentation": [plots.arms(report["augmentation"]), *_curves(report["augmentation"])],
        "identity": [
            plots.real_beside_generated(real, evidence.generated, shown),
            plots.confusion(report["identity"]["confusion"], report["users"]),
        ],
        "memorisation": [nearest_pairs(report["memorisation"], evidence)],
    }
    if report["fidelity"]["map"]:
        pictures["fidelity"] = [plots.neighbourhoods(report["fidelity"]["map"])]
    if "roc" in report["identity"]:
        pictures["identity"].append(plots.roc(report["identity"]["roc"]))
    if evidence.codec is not None:
        every = slice(None, None, max(1, len(evidence.test) // 6))
        some, labels = evidence.test.images[every][:6], evidence.test.labels[every][:6]
        decoded = through_codec(evidence.codec, some, labels)
        pictures["reconstruction"] = [plots.reconstructions(some.float() / 127.5 - 1, decoded, real.colormap)]
    if "counts" in report["codebook"]:
        pictures["codebook"] = [plots.code_usage(report["codebook"]["counts"])]
    if report["physics"]["torso_speed"]["value"] is not None:
        shown = [name for name in GAIT if report["physics"][name]["value"] is not None]
        pictures["physics"] = [
            plots.user_means(report["physics"]),
            plots.user_spreads(report["physics"], report["users"], shown),
        ]
    return {name: [plots.to_png(figure) for figure in figures] for name, figures in pictures.items()}


def training_curves(run: Path) -> list[bytes]:
    """The training curves of a run folder's codec and prior, as far as their logs are there."""
    pages = []
    for part in ("codec", "prior"):
        if (run / part / "history.csv").exists():
            history = read_history(run / part)
            pairs = [(name, f"held_out_{name}") for name in history[-1] if f"held_out_{name}" in history[-1]]
            pages.append(plots.to_png(plots.history(history, pairs[:CURVES])))
    return pages


def _curves(augmentation: dict) -> list:
    """The gain against numbers of generated windows and against what filters keep, where there is more than one."""
    more = len(augmentation["gain_by_windows"]) > 1 or augmentation["gain_by_selection"]
    return [plots.gain_curves(augmentation)] if more else []


def nearest_pairs(memorisation: dict, evidence: Evidence):
    """The generated windows nearest to a training window, each above that; titles: its distance over a real one's."""
    pairs, images = memorisation["nearest"], []
    for name, part in (("generated", evidence.generated), ("train", evidence.train)):
        row = {path: row for row, path in enumerate(part.paths)}
        images += [part.images[row[pair[name]]] for pair in pairs]
    titles = [f"{pair['ratio']:.2f}" for pair in pairs] + ["training"] * len(pairs)
    return plots.windows(images, titles, evidence.train.colormap, columns=len(pairs))


def _each_user(report: dict) -> list[list[str]]:
    """The rows of the table that tells users apart, see USER_COLUMNS."""
    arms = {row["user"]: row for row in report["augmentation"]["per_user"]}
    taken = {row["user"]: row for row in report["identity"]["per_user"]}
    rows = []
    for user in report["users"]:
        own, made = arms.get(user, {"n": 0}), taken.get(user, {"n": 0})
        shares = [own.get("real_only"), own.get("real_plus_generated"), made.get("accuracy")]
        percent = ["–" if share is None else f"{100 * share:.1f}" for share in shares]
        rows.append([f"ID_{user}", str(own["n"]), *percent[:2], str(made["n"]), percent[2]])
    return rows


def _page(report: dict, sections: dict[str, str]) -> str:
    about = {**report["about"], **{f"{name} windows": n for name, n in report["windows"].items()}}
    parts = [
        f"<h1>mdlib report</h1><p class=verdict>{html.escape(report['verdict']['sentence'])}</p>",
        table([[name.replace("_", " "), str(value)] for name, value in about.items()]),
        *(f"<h2>{html.escape(_SECTIONS[name][0])}</h2>{section}" for name, section in sections.items()),
        f"<p class=note>mdlib {report['mdlib']}, {report['created']}. The figures of this page are in report.json.</p>",
    ]
    return page("mdlib report", parts)


def page(title: str, parts: list[str]) -> str:
    """A page of HTML parts that opens offline."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html><html lang=en>{head}{body}</html>"


def embedded(name: str, png: bytes) -> str:
    """A picture within the page."""
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def table(body: list[list[str]], head: list[str] = ()) -> str:
    """A table whose first column names its rows."""
    head, *body = ([html.escape(cell) for cell in cells] for cells in (head, *body))
    lines = ["".join(f"<th>{cell}</th>" for cell in head)] if head else []
    lines += [f"<th>{first}</th>" + "".join(f"<td class=n>{cell}</td>" for cell in cells) for first, *cells in body]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _section(name: str, figures: dict, pictures: list[bytes]) -> str:
    note = _SECTIONS[name][1]
    rows = [[key.replace("_", " "), _cell(value)] for key, value in figures.items() if not isinstance(value, list)]
    images = "".join(embedded(name, png) for png in pictures)
    return f"<p class=note>{html.escape(note)}</p>{table(rows)}{images}"


def _told(value: float | list[float]) -> str:
    return " and ".join(f"{edge:.3g}" for edge in value) if isinstance(value, list) else f"{value:.3g}"


def _cell(figure: dict | float) -> str:
    if figure is None:
        return "none"
    if not isinstance(figure, dict):
        return f"{figure:.4g}"
    if "sentence" in figure:
        return figure["sentence"]
    if figure["value"] is None:
        return figure["reason"]
    interval = figure.get("ci95")
    spread = f"  [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""
    unit = f" {figure['unit']}" if figure.get("unit") else ""
    beside = [f"{word} {_told(figure[key])}, " for key, word in _BESIDE.items() if figure.get(key) is not None]
    if figure.get("between"):
        beside.insert(0, f"measured between {figure['between'][0]:.3g} and {figure['between'][1]:.3g}, ")
    return f"{figure['value']:.4g}{unit}{spread}  ({''.join(beside)}n = {figure['n']})"
