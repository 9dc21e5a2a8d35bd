"""The two stages of a run: its codec, and its prior over what the codec makes of windows.

The notebooks build them here, and so does each of the processes that train one together on several GPUs
(`python -m mdlib.experiments.steps RUN codec`, started by `train_stage`): they are the same objects. What takes long,
a codec's teacher and a prior's inputs, is made once, by the notebook, and kept in the run folder.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from mdlib.data.augment import as_they_are, enlarge
from mdlib.data.windows import WindowSet
from mdlib.evaluation.classifiers import train_classifier
from mdlib.evaluation.metrics import code_counts, codebook_figures
from mdlib.experiments.run import Run, open_run
from mdlib.models.classifier import SmallCNN
from mdlib.models.foundation import make_foundation
from mdlib.models.layers import world
from mdlib.models.teacher import FeatureDistance
from mdlib.systems.registry import load_codec, make_codec, make_prior, seeded
from mdlib.training.distributed import ERROR, check_batch, launch, processes
from mdlib.training.fit import Batches, TrainConfig, fit_stages
from mdlib.training.latents import encode_all
from mdlib.utils import best_device, whole_file


@dataclass(frozen=True)
class Stage:
    """A model of a run, and what it is trained on and how."""

    run: Run
    name: str  # codec | prior; its folder in the run too
    model: torch.nn.Module
    codec: torch.nn.Module  # the run's; of the first stage the model itself
    images: torch.Tensor  # uint8 (N, C, S, S): training windows and their stride recombinations
    data: Batches  # what is made of them, and the labels (N,) that the model is told
    held_out: Batches
    config: TrainConfig
    options: dict = field(default_factory=dict)  # further arguments of `fit_stages`


def codec_stage(run: Run, max_minutes: float = 0.0) -> Stage:
    """The run's codec with the weights it starts from, its teacher and what it is aligned with.

    Raises:
        ValueError: the GPUs here cannot share the batch.
    """
    config = _config(run.preset.codec_training, max_minutes)
    train, val = run.parts["train"], run.parts["val"]
    images, labels = codec_windows(run)
    teacher, foundation = guides(run, images, labels)
    width = foundation.width if foundation else 0
    codec = seeded(run.settings["seed"], make_codec, run.preset, train.images.shape[1], train.num_users, width)
    run.start_codec(codec)
    guide(run, codec, teacher, foundation)
    return Stage(
        run,
        "codec",
        codec,
        codec,
        images,
        Batches((images, labels), as_they_are),
        Batches((val.images, val.labels), as_they_are),
        config,
        {"stages": run.preset.stages, "evaluate": _held_out_codes(val)},
    )


def prior_stage(run: Run, max_minutes: float = 0.0) -> Stage:
    """The run's prior with the weights it starts from; its inputs are what the trained codec makes of windows, kept
    beside the codec.

    Raises:
        DataError: the run has no trained codec yet.
        ValueError: the GPUs here cannot share the batch.
    """
    config = _config(run.preset.prior_training, max_minutes)
    train, val = run.parts["train"], run.parts["val"]
    codec = load_codec(run.path / "codec").to(best_device())
    sizes = (train.num_users, len(run.conditions))
    prior = seeded(run.settings["seed"], make_prior, run.settings["system"], run.preset, codec, *sizes)
    run.start_prior(prior)
    images, labels = prior_windows(run)
    inputs = encode_all(codec, images, prior.consumes, run.path / "codec", labels=labels[0])
    held_out = encode_all(codec, val.images, prior.consumes, run.path / "codec", labels=val.labels)
    batches = Batches((inputs, *labels)), Batches((held_out, *run.labels(val)))
    return Stage(run, "prior", prior, codec, images, *batches, config)


def train_stage(stage: Stage) -> list[dict]:
    """Train a stage's model on all GPUs, or go on with it; returns the history, see `mdlib.training.fit.fit_stages`.

    With several GPUs a process for each trains it, on its part of every batch. The one that called waits, and then has
    the trained weights in its model as if it had trained by itself.

    Raises:
        RuntimeError: one of the processes failed.
        SystemExit: the session's time is up (`mdlib.utils`).
    """
    number, words = processes(), (stage.run.path.resolve(), stage.name, "--max-minutes", stage.config.max_minutes)
    return fit_stages(
        stage.model,
        stage.data,
        stage.config,
        stage.run.path / stage.name,
        held_out=stage.held_out,
        name=stage.name,
        launch=(lambda: launch(number, "mdlib.experiments.steps", *words)) if number > 1 else None,
        **stage.options,
    )


# ---- what they are made of


def train_teacher(
    images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int, kept: Path | None = None
) -> FeatureDistance:
    """The distance of a classifier trained on uint8 images (N, C, S, S) and labels (N,) for `steps` optimizer steps.

    kept: file of the classifier's weights; where it is there, they are read from it and nothing is trained.
    """
    if kept and kept.exists():
        with torch.random.fork_rng():  # weights are drawn before they are loaded
            classifier = SmallCNN(num_users, images.shape[1]).to(memory_format=torch.channels_last)
        classifier.load_state_dict(load_file(kept))
        return FeatureDistance(classifier)
    classifier = train_classifier(images, labels, num_users, steps, seed)
    if kept:
        with whole_file(kept) as path:
            save_file({key: value.contiguous() for key, value in classifier.state_dict().items()}, path)
    return FeatureDistance(classifier)


def codec_windows(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Training windows and their stride recombinations as a codec sees them: uint8 (N, C, S, S), users (N,)."""
    images, labels = _enlarged(run, run.settings["seed"])
    return images, labels[0]


def prior_windows(run: Run) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Training windows and other stride recombinations, uint8 (N, C, S, S), and what a prior is conditioned on, see
    `Run.labels`."""
    return _enlarged(run, run.settings["seed"] + 1)


def _enlarged(run: Run, seed: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    windows = run.parts["train"]
    groups = windows.labels + windows.num_users * windows.condition_labels(run.conditions)
    images, rows = enlarge(windows.images, groups, run.preset.variants, seed)
    return images, tuple(labels[rows] for labels in run.labels(windows))


def guides(run: Run, images: torch.Tensor, labels: torch.Tensor) -> tuple[FeatureDistance | None, object | None]:
    """The codec's teacher and what it is aligned with (`mdlib.models.foundation`), None where the run does without; the
    teacher, trained on images (N, C, S, S) and labels (N,), is kept beside the codec."""
    teacher = None
    if steps := run.preset.teacher_steps:
        kept = run.path / "codec" / "teacher.safetensors"
        users, seed = run.parts["train"].num_users, run.settings["seed"] + 1000  # begun like no classifier that judges
        teacher = train_teacher(images, labels, users, steps, seed, kept)
    return teacher, make_foundation(run.preset.foundation, teacher and teacher.classifier, images)


def guide(run: Run, codec, teacher: FeatureDistance | None, foundation: torch.nn.Module | None) -> None:
    """Give a codec its `guides`."""
    if teacher:
        codec.add_teacher("teacher", teacher, run.preset.teacher_weight)
    if foundation:
        codec.align_to(foundation)


def _config(config: TrainConfig, max_minutes: float) -> TrainConfig:
    """This process's part: a preset's batch is that of all GPUs together, so their number changes no training."""
    check_batch(config.batch_size)
    return replace(config, batch_size=config.batch_size // world(), max_minutes=max_minutes)


def _held_out_codes(windows: WindowSet) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Measures how a codec's codes are used in windows; nothing where it has none."""
    counts = windows.labels.bincount(minlength=windows.num_users)

    def measure(codec) -> dict[str, float]:
        if not hasattr(codec, "encode_tokens"):
            return {}
        tokens = encode_all(codec, windows.images, "tokens")
        used = code_counts(tokens, windows.labels, codec.num_codes, windows.num_users)
        return {f"held_out_{key}": value for key, value in codebook_figures(used, counts).items()}

    return measure


# ---- one of several processes


def main() -> None:
    """Train a stage of a run as one of the processes that `train_stage` starts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", help="run folder, where split, teacher and inputs are made already")
    parser.add_argument("stage", choices=("codec", "prior"))
    parser.add_argument("--max-minutes", type=float, default=0.0)
    told = parser.parse_args()
    PartialState(cpu=not torch.cuda.is_available())  # from now on the processes know each other and their GPUs
    make = {"codec": codec_stage, "prior": prior_stage}[told.stage]
    try:
        with suppress(SystemExit):  # the session's time is up, and that is no failure
            train_stage(make(open_run(told.run), told.max_minutes))
    except Exception as error:
        print(f"{ERROR}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
