"""The command line. Heavy packages are imported only when a command needs them, so help and errors appear at once."""

import ast
import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

import mdlib
from mdlib.experiments.settings import check_names, check_request, check_type, options_page, order_of, read_record
from mdlib.utils import count, failed_import, read_json, use_gpus


class Commands(TyperGroup):
    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:  # typer would end without a word
            print(f"mdlib: {str(error) or 'interrupted; to resume, run the same command'}", file=sys.stderr)
            sys.exit(130)


app = typer.Typer(
    cls=Commands,
    help="Generative models for micro-Doppler spectrograms, conditioned on the user.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[Path, typer.Option(help="folder of ID_k/ folders")]
Real = Annotated[Path, typer.Option(help="folder of real windows")]
Generated = Annotated[Path, typer.Option(help="folder of generated windows")]
Split = Annotated[Path, typer.Option(help="the split the generator was trained with")]
Size = Annotated[int, typer.Option(help="side in pixels to which windows are resized for comparison")]
Colormap = Annotated[str, typer.Option(help="colour map of the real images: auto, or a name such as jet or viridis")]
Crop = Annotated[str, typer.Option(help="crop of the real images: none, auto, or left,top,right,bottom in pixels")]
Order = Annotated[str, typer.Option(help="order of windows: number (in the names), name or time")]
PresetName = Annotated[str, typer.Option(help="auto (by the GPU), a size, a machine or size@machine")]
Devices = Annotated[int, typer.Option(min=0, help="number of GPUs to train on, the first of those visible; 0: all")]
Precision = Annotated[str, typer.Option(help="for codec and prior: fp16, bf16, no or auto; default: the preset's")]
Parameters = Annotated[list[str], typer.Option("--parameter", "-p", help="NAME=VALUE, see docs/options.md")]


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="folder to write")],
    users: Annotated[int, typer.Option(min=2)] = 31,
    windows: Annotated[int, typer.Option(min=1, help="windows of each user in each condition")] = 150,
    size: Annotated[int, typer.Option(min=16, help="pixels a side")] = 256,
    seed: int = 0,
    condition: Annotated[str, typer.Option(help="normal, backpack, bag, bag_phone or all")] = "normal",
    recordings: Annotated[int, typer.Option(min=1, help="recordings (days) of each user")] = 1,
):
    """Simulate walking people as a 77 GHz radar records them, with every gait parameter in parameters.csv."""
    sizes = dict(users=users, windows=windows, size=size, seed=seed, condition=condition, recordings=recordings)
    mdlib.simulate_dataset(out, **sizes)
    print(f"{out}: {users} users with {count(windows, 'window')} each, condition {condition}")


@app.command()
def inspect(
    data: Data,
    out: Annotated[Path, typer.Option(help="contact sheet to write")] = Path("inspect.png"),
    colormap: Colormap = "auto",
    crop: Crop = "none",
    order: Order = "number",
):
    """Check a folder of windows: users, recordings, colours, copies, overlap, and a contact sheet."""
    if mdlib.inspect_folder(data, out, colormap=colormap, crop=crop, order=order):
        raise typer.Exit(1)


@app.command()
def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="file to write")],
    val: float = 0.15,
    test: float = 0.25,
    gap: Annotated[int, typer.Option(help="windows between the parts")] = 4,
    windows_per_user: Annotated[int, typer.Option(help="training windows of each user; 0 takes all")] = 0,
    folders: Annotated[str, typer.Option(help="new folder for copies of the windows, in train/ val/ test/")] = "",
    colormap: Colormap = "auto",
    crop: Crop = "none",
    order: Order = "number",
):
    """Split by recording and time, so that no windows of different parts overlap."""
    options = dict(val=val, test=test, gap=gap, windows_per_user=windows_per_user or None, folders=folders)
    parts = mdlib.split_folder(data, out, dict(colormap=colormap, crop=crop, order=order), **options)
    print(f"{out}: {count(len(parts['users']), 'user')}, {mdlib.split_summary(parts)}")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="run folder")],
    data: Annotated[Path | None, typer.Option(help="folder of ID_k/ folders; an existing run has its own")] = None,
    system: Annotated[
        str, typer.Option(help="; ".join(mdlib.SYSTEMS) + "; default: the run's, or else the first")
    ] = "",
    preset: PresetName = "",
    parameter: Parameters = [],  # noqa: B006
    first: Annotated[str, typer.Option("--from", help="number of the notebook (05) from which to run again")] = "",
    last: Annotated[str, typer.Option("--to", help="number of the last notebook (06) to run")] = "",
    extend: Annotated[bool, typer.Option("--extend", help="train longer: more codec_steps or prior_steps")] = False,
    devices: Devices = 0,
    precision: Precision = "",
):
    """Run a system's notebooks on a data folder, up to report.html; run it again to resume."""
    given = dict(data=str(data or ""), system=system, preset=preset)
    parameters = _parameters(parameter, precision, read_record(out)["settings"])
    check_request(out, parameters, first, last, **given)
    use_gpus(devices)
    mdlib.execute(out, parameters, first, last, extend, **given)
    report = out / "report.json"
    if report.exists():
        found = read_json(report, "write it again with --from 06")
        print(f"{out / 'report.html'}\n{found['verdict']['sentence']}")


@app.command()
def pretrain(
    system: Annotated[str, typer.Option(help="; ".join((*mdlib.SYSTEMS, "identifier")))],
    out: Annotated[Path, typer.Option(help="folder to write: people/, the training, and weights/")],
    preset: PresetName = "demo",
    people: Annotated[int, typer.Option(min=2, help="simulated people")] = 300,
    minutes: Annotated[float, typer.Option(help="training time, a quarter for the codec")] = 45.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of the people; use others in your own simulations")] = 22000,
    devices: Devices = 0,
):
    """Pretrain the initial weights of runs (init) on simulated people; run it again to resume."""
    use_gpus(devices)
    weights = mdlib.pretrain(system, out, preset, people, minutes, seed)
    print(f"{weights}: give it as init, attach it on Kaggle, or copy it to mdlib/weights/{system}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="vavae, lightningdit, dinov2, inception, lpips; others: docs/kaggle.md")],
):
    """Download published weights to where mdlib reads them, and verify them."""
    mdlib.fetch_weights(name)


@app.command()
def compare(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder of the comparison, with a run for each system")],
    systems: Annotated[str, typer.Option(help="names separated by commas, or all")] = "all",
    preset: PresetName = "auto",
    budget_minutes: Annotated[float, typer.Option(help="training time of each system; 0: the preset's steps")] = 0.0,
    images_per_user: Annotated[int, typer.Option(help="generated windows per user; 0: the maximum of the presets")] = 0,
    parameter: Parameters = [],  # noqa: B006
    devices: Devices = 0,
    precision: Precision = "",
):
    """Train and evaluate systems on one split with one budget, up to comparison.html; run it again to resume."""
    chosen = _parameters(parameter, precision)
    _check(data, systems if systems != "all" else ",".join(mdlib.SYSTEMS), preset, chosen)
    use_gpus(devices)
    result = mdlib.compare(data, out, systems, preset, budget_minutes, images_per_user, chosen)
    sentences = [answer["sentence"] for answer in result["conclusions"].values() if isinstance(answer, dict)]
    print("\n".join([str(out / "comparison.html"), *sentences]))
    failed = [name for name, metrics in result["systems"].items() if "error" in metrics]
    if failed:
        raise ValueError(f"not compared: {', '.join(failed)}; the reasons are in {out / 'comparison.html'}")


@app.command()
def study(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder of the study, with a run for each number")],
    system: Annotated[str, typer.Option(help="; ".join(mdlib.SYSTEMS))] = "vae-diffusion",
    preset: PresetName = "auto",
    windows: Annotated[str, typer.Option(help="training windows of each user, separated by commas")] = "5,10,20,50",
    folds: Annotated[int, typer.Option(help="number of cross-validation folds, 1 to 4")] = 1,
    parameter: Parameters = [],  # noqa: B006
    devices: Devices = 0,
    precision: Precision = "",
):
    """Train and evaluate a system at several numbers of windows per user, up to study.html; run it again to resume."""
    numbers, given = _numbers("windows", windows), _parameters(parameter, precision)
    _check(data, system, preset, given)
    use_gpus(devices)
    result = mdlib.study(data, out, system, preset, numbers, folds, given)
    print("\n".join([str(out / "study.html"), *(row["verdict"]["sentence"] for row in result["rows"])]))


@app.command()
def generate(
    pipeline: Annotated[Path, typer.Option(help="RUN/pipeline")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    users: Annotated[str, typer.Option(help="such as 1,2,5-8; default: all")] = "",
    per_user: Annotated[int, typer.Option(min=1)] = 10,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    conditions: Annotated[str, typer.Option(help="separated by commas; default: all conditions in training")] = "",
    option: Annotated[
        list[str], typer.Option("--option", "-o", help="sampling option of the prior as NAME=VALUE, or speckle=false")
    ] = [],  # noqa: B006
    weights: Annotated[str, typer.Option(help="prior weights: best or last; default: the run's")] = "",
    grid: Annotated[bool, typer.Option("--grid", help="also draw grid.png, ten windows in a row")] = False,
):
    """Generate windows of given users into ID_k/ folders with a manifest."""
    options = dict(map(pair, option))
    if not (pipeline / "model_index.json").exists():
        raise ValueError(f"{pipeline} holds no pipeline (no model_index.json): give the pipeline/ folder of a run")
    chosen = mdlib.parse_users(users) if users else None
    carried = [name.strip() for name in conditions.split(",")] if conditions else None
    found = mdlib.load_pipeline(pipeline, weights)
    found.check_options(options)
    rows = found.generate_folder(out, chosen, per_user, seed, batch_size, carried, **options)
    if grid:
        mdlib.contact_sheet(out, rows).savefig(out / "grid.png")
    print(f"{out}: {count(len(rows), 'window')} of {count(len({row['user'] for row in rows}), 'user')}")


@app.command()
def select(
    real: Real,
    generated: Generated,
    split: Split,
    out: Annotated[Path, typer.Option(help="folder for the selected windows")],
    by: Annotated[str, typer.Option(help="kinematics, confidence, margin, specificity or diversity")] = "kinematics",
    keep: Annotated[float, typer.Option(help="fraction to select, best first; not used by kinematics")] = 0.5,
    size: Size = 64,
):
    """Select generated windows with a filter that uses only the generator's training windows."""
    _exist(real, generated, split)
    selected, every = mdlib.select_folder(real, generated, split, out, by, keep, size)
    print(f"{out}: {selected} of {count(every, 'window')}")


@app.command()
def validate(
    real: Real,
    generated: Generated,
    split: Split,
    out: Annotated[Path, typer.Option(help="folder for report.json and report.html")],
    size: Size = 64,
    pipeline: Annotated[Path | None, typer.Option(help="RUN/pipeline, for codec and codebook")] = None,
    channels: Annotated[int, typer.Option(help="1: intensity, 3: RGB as it is; 0: as when the split was made")] = 0,
    colormap: Colormap = "",
    crop: Crop = "",
    evaluation_steps: Annotated[int, typer.Option(help="optimizer steps of each classifier")] = 400,
    seeds: Annotated[int, typer.Option(min=2, help="classifiers for each set of training windows")] = 3,
    reference: Annotated[str, typer.Option(help="second classifier: resnet18, none, or auto (on a GPU)")] = "auto",
    backbone: Annotated[
        str, typer.Option(help="initial weights of pretrained classifiers: auto (attached, shipped), none, or a folder")
    ] = "auto",
    counts: Annotated[str, typer.Option(help="also measure the gain with 5,10,25 generated windows per user")] = "",
    user: Annotated[int | None, typer.Option(help="also write the page of this user, report-user-3.html for 3")] = None,
):
    """Evaluate generated windows against real ones the generator was not trained on."""
    _exist(real, generated, split, *([pipeline] if pipeline else []))
    protocol = dict(evaluation_steps=evaluation_steps, seeds=seeds, reference=reference, backbone=backbone)
    protocol |= dict(counts=_numbers("counts", counts) or None)
    how = dict(size=size, pipeline=pipeline, channels=channels, colormap=colormap, crop=crop, user=user)
    report = mdlib.validate_folders(real, generated, split, out, **how, **protocol)
    pages = [out / "report.html", *([] if user is None else [out / f"report-user-{user}.html"])]
    print("\n".join([*map(str, pages), report["verdict"]["sentence"]]))


@app.command()
def check_codec(
    codec: Annotated[Path, typer.Option(help="RUN/codec, or RUN/pipeline/codec after joint training")],
    data: Data,
    split: Annotated[Path | None, typer.Option(help="RUN/split.json: check its validation windows, not all")] = None,
    out: Annotated[Path | None, typer.Option(help="image to write: reconstructions and difference maps")] = None,
    colormap: Colormap = "",
    crop: Crop = "",
):
    """Check a codec on real windows: PSNR, SSIM, LPIPS, the statistics of its latents, and a verdict."""
    _exist(codec, *([split] if split else []))
    found = mdlib.check_codec_folder(codec, data, out, split, colormap=colormap, crop=crop)
    latents, verdict = found.pop("latents"), found.pop("verdict")
    values = [
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in found.items()
    ]
    print("\n".join(values + [f"latents, {name}: {value}" for name, value in latents.items()] + [verdict]))


@app.command()
def identify(
    identifier: Annotated[Path, typer.Option(help="RUN/identifier")],
    data: Annotated[Path, typer.Option(help="folder of ID_k/ folders, of folders of recordings, or of windows")],
    out: Annotated[Path, typer.Option(help="table of windows; recordings: NAME-recordings.csv")] = Path(
        "predictions.csv"
    ),
    colormap: Colormap = "",
    crop: Crop = "",
    order: Order = "",
    threshold: Annotated[
        float | None, typer.Option(help="P(user) below which a window is unknown; 0 names all")
    ] = None,
):
    """Identify the user of each window and recording, or answer unknown; option defaults are the identifier's own."""
    print(mdlib.identify_folder(identifier, data, out, threshold, colormap=colormap, crop=crop, order=order))


@app.command(hidden=True)
def options():
    """Print docs/options.md."""
    print(options_page(), end="")


def pair(text: str) -> tuple[str, object]:
    """NAME=VALUE with the value as JSON (3, 0.5, true), or as Python where that is a bool, a list or a dictionary, else
    as text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is not NAME=VALUE")
    with suppress(json.JSONDecodeError):
        return key, json.loads(value)
    with suppress(ValueError, SyntaxError):
        if isinstance(found := ast.literal_eval(value), bool | list | dict):
            return key, found
    return key, value


def _parameters(texts: list[str], precision: str, stored: dict | None = None) -> dict:
    """Parse `texts` and add `precision` to the codec and prior options, those given or else the `stored` ones."""
    given = dict(map(pair, texts))
    if precision not in ("", "fp16", "bf16", "no", "auto"):
        raise ValueError(f"precision is fp16, bf16, no (float32) or auto, got {precision!r}")
    for name in ("codec_options", "prior_options") if precision else ():
        check_type(name, given.get(name, {}), dict)
        if given.get(name, {}).get("mixed_precision", precision) != precision:
            raise ValueError(f"precision {precision} contradicts mixed_precision in {name}: give one of the two")
        given[name] = {**(given.get(name) or (stored or {}).get(name, {})), "mixed_precision": precision}
    return given


def _check(data: Path, systems: str, preset: str, parameters: dict) -> None:
    """Check names and folder of a comparison or study without torch."""
    for name in filter(None, map(str.strip, systems.split(","))):
        check_names(name, preset, parameters)
    mdlib.find_windows(data, order=order_of(parameters.get("reading", {})))


def _exist(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError as error:
        raise ValueError(f"{name}: whole numbers separated by commas, got {text!r}") from error


def main() -> None:
    """Run the command line; bad input, or a package that does not import, ends with one line and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app()
    except Exception as error:
        broken = failed_import(error)
        if not broken and not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        print(f"mdlib: {broken or error}", file=sys.stderr)
        sys.exit(1)
