"""The command line: simulate, split, run, compare, study, generate, select, validate."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Generative models for micro-Doppler spectrograms, user by user.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[Path, typer.Option(help="folder of ID_k/ folders")]


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="folder to write")],
    users: Annotated[int, typer.Option(min=2)] = 31,
    windows: Annotated[int, typer.Option(min=1, help="windows a user and condition")] = 150,
    size: Annotated[int, typer.Option(min=16, help="pixels a side")] = 256,
    seed: int = 0,
    condition: Annotated[str, typer.Option(help="normal, backpack, bag, bag_phone or all")] = "normal",
    recordings: Annotated[int, typer.Option(min=1, help="recordings (days) a user")] = 1,
):
    """Simulate walking people: windows as a 77 GHz radar records them, and every gait parameter in parameters.csv."""
    from mdlib.simulation.dataset import simulate_dataset

    simulate_dataset(
        out, users=users, windows=windows, size=size, seed=seed, condition=condition, recordings=recordings
    )
    print(f"{out}: {users} users, {windows} windows each, condition {condition}")


@app.command()
def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="file to write")],
    val: float = 0.15,
    test: float = 0.25,
    gap: Annotated[int, typer.Option(help="windows between the parts")] = 4,
    windows_per_user: Annotated[int, typer.Option(help="training windows kept a user; 0 keeps all")] = 0,
):
    """Split by recording and time, without leaking overlapping windows from one part into another."""
    from mdlib.data.splits import make_split, write_split
    from mdlib.data.windows import find_windows

    files = find_windows(data)
    few = dict(windows_per_user=windows_per_user or None)
    parts = make_split(files, val=val, test=test, gap=gap, **few)
    write_split(parts, out)
    sizes = ", ".join(f"{len(parts[name])} {name}" for name in ("train", "val", "test"))
    print(f"{out}: {len(parts['users'])} users, {sizes}, {len(parts['dropped'])} dropped in the gaps")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="run folder")],
    data: Annotated[Path | None, typer.Option(help="folder of ID_k/ folders; a run knows its own")] = None,
    system: Annotated[str, typer.Option(help="vqvae-transformer unless the run says otherwise")] = "",
    preset: Annotated[str, typer.Option(help="demo unless the run says otherwise")] = "",
    parameter: Annotated[list[str], typer.Option("--parameter", "-p", help="key=value of any notebook")] = [],  # noqa: B006
    first: Annotated[str, typer.Option("--from", help="first notebook (03); runs anew from there")] = "",
    last: Annotated[str, typer.Option("--to", help="last notebook (06)")] = "",
):
    """Run the notebooks of a system on a data folder, down to report.html; a second call goes on where it stopped."""
    from mdlib.experiments.run import execute

    parameters = dict(pair(text) for text in parameter)
    execute(str(out), parameters, first, last, data=str(data or ""), system=system, preset=preset)
    report = out / "report.json"
    if report.exists():
        print(f"{out / 'report.html'}\n{json.loads(report.read_text())['verdict']['sentence']}")


@app.command()
def compare(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder of the comparison, a run a system in it")],
    systems: Annotated[str, typer.Option(help="names with commas between, or all")] = "all",
    preset: Annotated[str, typer.Option(help="of every system")] = "demo",
    budget_minutes: Annotated[float, typer.Option(help="training time of each system; 0: the preset's steps")] = 0.0,
    images_per_user: Annotated[int, typer.Option(help="windows each draws; 0: the most any preset draws")] = 0,
    parameter: Annotated[list[str], typer.Option("--parameter", "-p", help="key=value of any notebook")] = [],  # noqa: B006
):
    """Train and judge systems on one split with one budget, down to comparison.html; a second call goes on."""
    from mdlib.experiments.compare import compare as run_comparison

    chosen = dict(pair(text) for text in parameter)
    result = run_comparison(data, out, systems, preset, budget_minutes, images_per_user, chosen)
    told = [answer["sentence"] for answer in result["conclusions"].values() if isinstance(answer, dict)]
    print("\n".join([str(out / "comparison.html"), *told]))
    failed = [name for name, figures in result["systems"].items() if "error" in figures]
    if failed:
        raise ValueError(f"not compared: {', '.join(failed)}; the reasons are in {out / 'comparison.html'}")


@app.command()
def study(
    data: Data,
    out: Annotated[Path, typer.Option(help="folder of the study, a run for each number in it")],
    system: Annotated[str, typer.Option(help="which system")] = "vae-diffusion",
    preset: Annotated[str, typer.Option(help="its sizes")] = "demo",
    windows: Annotated[str, typer.Option(help="training windows a user, with commas between")] = "5,10,20,50",
    folds: Annotated[int, typer.Option(help="how many of the 4 folds of cross-validation")] = 1,
    parameter: Annotated[list[str], typer.Option("--parameter", "-p", help="key=value of any notebook")] = [],  # noqa: B006
):
    """Train and judge a system on few and on more windows a user, down to study.html; a second call goes on."""
    from mdlib.experiments.study import study as run_study

    given = dict(pair(text) for text in parameter)
    result = run_study(data, out, system, preset, _numbers("windows", windows, int), folds, given)
    print("\n".join([str(out / "study.html"), *(row["verdict"]["sentence"] for row in result["rows"])]))


@app.command()
def generate(
    pipeline: Annotated[Path, typer.Option(help="RUN/pipeline")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    users: Annotated[str, typer.Option(help="1,2,5-8; all users when left out")] = "",
    per_user: Annotated[int, typer.Option(min=1)] = 10,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    conditions: Annotated[str, typer.Option(help="with commas between; all it knows when left out")] = "",
    option: Annotated[list[str], typer.Option("--option", "-o", help="key=value of the prior's sampling")] = [],  # noqa: B006
    grid: Annotated[bool, typer.Option("--grid", help="also draw grid.png, a row a user")] = False,
):
    """Generate windows of given users into ID_k/ folders with a manifest."""
    from mdlib.data.windows import parse_users
    from mdlib.pipeline import load_pipeline

    pipe = load_pipeline(pipeline)
    chosen = parse_users(users) if users else None
    carried, options = conditions.split(",") if conditions else None, dict(pair(text) for text in option)
    rows = pipe.generate_folder(out, chosen, per_user, seed, batch_size, carried, **options)
    if grid:
        from mdlib.reports import plots

        plots.save(plots.sheet(out, rows), out / "grid.png")
    print(f"{out}: {len(rows)} windows of {len({row['user'] for row in rows})} users")


@app.command()
def select(
    real: Annotated[Path, typer.Option(help="folder of real windows")],
    generated: Annotated[Path, typer.Option(help="folder of generated windows")],
    split: Annotated[Path, typer.Option(help="the split the generator was trained with")],
    out: Annotated[Path, typer.Option(help="folder for the windows that are kept")],
    by: Annotated[str, typer.Option(help="kinematics, confidence, margin, specificity or diversity")] = "kinematics",
    keep: Annotated[float, typer.Option(help="share to keep, the best first; kinematics decides by itself")] = 0.5,
    size: Annotated[int, typer.Option(help="pixels a side at which windows are compared")] = 64,
):
    """Keep the generated windows that a filter finds worth it; it knows the generator's training windows alone."""
    from mdlib.evaluation.filters import select_folder

    kept, every = select_folder(real, generated, split, out, by, keep, size)
    print(f"{out}: {kept} of {every} windows")


@app.command()
def validate(
    real: Annotated[Path, typer.Option(help="folder of real windows")],
    generated: Annotated[Path, typer.Option(help="folder of generated windows")],
    split: Annotated[Path, typer.Option(help="the split the generator was trained with")],
    out: Annotated[Path, typer.Option(help="folder for report.json and report.html")],
    size: Annotated[int, typer.Option(help="pixels a side at which windows are compared")] = 64,
    pipeline: Annotated[Path | None, typer.Option(help="RUN/pipeline, for codec and codebook")] = None,
    rival: Annotated[Path | None, typer.Option(help="RUN/codec of the other kind, VQ or KL")] = None,
    channels: Annotated[int, typer.Option(help="1: intensity, 3: RGB as it is")] = 1,
    colormap: Annotated[str, typer.Option(help="of the real images")] = "auto",
    evaluation_steps: Annotated[int, typer.Option(help="optimizer steps of each judge")] = 400,
    seeds: Annotated[int, typer.Option(min=2, help="classifiers an arm")] = 3,
    reference: Annotated[str, typer.Option(help="resnet18 | none; auto: ResNet-18 where there is a GPU")] = "auto",
    counts: Annotated[str, typer.Option(help="generated windows a user: the gain with 5,10,25 too")] = "",
    keep: Annotated[str, typer.Option(help="shares of generated windows: the gain with 0.5,0.25 by each filter")] = "",
):
    """SmallCNN generated windows against real ones the generator was not trained on."""
    from mdlib.reports.report import validate_folders

    protocol = dict(
        evaluation_steps=evaluation_steps, seeds=seeds, reference=reference, keep=_numbers("keep", keep, float)
    )
    protocol["counts"] = _numbers("counts", counts, int) or None
    report = validate_folders(real, generated, split, out, size, pipeline, channels, colormap, rival, **protocol)
    print(f"{out / 'report.html'}\n{report['verdict']['sentence']}")


def _numbers(name: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(number) for number in text.split(",") if number)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name}: {what} with commas between, got {text!r}") from error


def pair(text: str) -> tuple[str, object]:
    """key=value with the value as JSON where it is JSON (3, 0.5, true), else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is not key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main() -> None:
    """Run the command line; bad input ends with one line and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"mdlib: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
