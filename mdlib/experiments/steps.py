"""The two stages of a run: its codec, and its prior over the codec's latents or tokens.

Notebooks build them here, and so does each of the processes that train together on several GPUs
(`python -m mdlib.experiments.steps RUN codec MINUTES`, started by `train_stage`). The notebook computes the codec's
teacher and the prior's inputs once and saves them in the run folder.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from mdlib.data.augment import enlarge, no_augmentation
from mdlib.data.speckle import fit_speckle
from mdlib.data.windows import WindowSet, to_uint8
from mdlib.evaluation.evidence import through_codec, trained_once
from mdlib.evaluation.fidelity import describe
from mdlib.evaluation.metrics import code_counts, codebook_metrics
from mdlib.experiments.run import Run, open_run, published_networks
from mdlib.models.classifier import SmallCNN
from mdlib.models.codec import FeatureDistance
from mdlib.models.layers import world
from mdlib.models.pretrained import ClassifierFeatures
from mdlib.pipeline import LAST, MicroDopplerPipeline
from mdlib.reports import plots
from mdlib.systems import attach_losses, load_codec, make_codec, make_prior, seeded
from mdlib.training.distributed import ERROR, check_batch, launch, processes
from mdlib.training.fit import Batches, TrainConfig, fit_stages
from mdlib.training.latents import encode_all
from mdlib.training.state import State
from mdlib.utils import atomic_file, best_device, readable, to_float

SHOWN = 8  # windows in a preview: few, because a prior samples them while training waits
SPECKLED = 500  # training windows, at most, on which speckle is fitted
TRAIN_AGAIN = "restore it, or train the codec again with --from 02"


@dataclass(frozen=True)
class Stage:
    """A model of a run with its data and its training."""

    run: Run
    name: str  # codec | prior; its folder in the run too
    model: torch.nn.Module
    codec: torch.nn.Module  # the run's; in the first stage the model itself
    images: torch.Tensor  # uint8 (N, C, S, S): training windows and their stride recombinations
    data: Batches  # images, latents or tokens, and the labels (N,) that the model is conditioned on
    held_out: Batches
    config: TrainConfig
    draw: Callable[[], np.ndarray]  # a preview, uint8 (H, W, 3): reconstructions by the codec, samples of the prior
    options: dict = field(default_factory=dict)  # further arguments of `fit_stages`


def codec_stage(run: Run, max_minutes: float = 0.0) -> Stage:
    """The run's codec with its initial weights and the losses it is trained with; or the finished codec of another run,
    which is not trained."""
    config = _config(run.preset.codec_training, max_minutes)
    train, val = run.parts["train"], run.parts["val"]
    if run.finished_codec:
        images, labels = train.images, train.labels
        codec = load_codec(run.finished_codec).float().to(best_device())  # pretrained weights are stored as halves
    else:
        images, (labels, *_) = _enlarged(run, run.settings["seed"])
        networks = _frozen_networks(run, images, labels)

        def make():
            codec = make_codec(run.preset, train.images.shape[1], train.num_users)
            attach_losses(codec, run.preset, **networks)
            return codec

        codec = seeded(run.settings["seed"], make)
        run.start("codec", codec)
    some = val.select(torch.linspace(0, len(val) - 1, min(SHOWN, len(val))).long())
    draw = lambda: _tiles([some.images, through_codec(codec, some.images, some.labels)], val.colormap)
    batches = Batches((images, labels), no_augmentation), Batches((val.images, val.labels), no_augmentation)
    options = {"stages": run.preset.stages, "evaluate": partial(_held_out_codes, val)}
    return Stage(run, "codec", codec, codec, images, *batches, config, draw, options)


def prior_stage(run: Run, max_minutes: float = 0.0) -> Stage:
    """The run's prior with its initial weights; its inputs, encoded by the trained codec, are cached in codec/."""
    config = _config(run.preset.prior_training, max_minutes)
    train, val = run.parts["train"], run.parts["val"]
    with readable(run.path / "codec", TRAIN_AGAIN):
        codec = load_codec(run.path / "codec").to(best_device())
    sizes = (train.num_users, len(run.conditions))
    prior = seeded(run.settings["seed"], make_prior, run.settings["system"], run.preset, codec, *sizes)
    run.start("prior", prior)
    images, labels = _enlarged(run, run.settings["seed"] + 1)  # other recombinations than the codec's
    inputs = encode_all(codec, images, prior.consumes, run.path / "codec", labels=labels[0])
    held_out = encode_all(codec, val.images, prior.consumes, run.path / "codec", labels=val.labels)
    batches = Batches((inputs, *labels)), Batches((held_out, *run.labels(val)))

    def draw() -> np.ndarray:
        users = list(train.users[: SHOWN // 2])
        pipeline = MicroDopplerPipeline(codec, prior, **_generator(run))
        made = pipeline(users, 2, run.settings["seed"], output_type="pt", conditions=run.conditions[:1]).images
        return _tiles([[train.of_user(user).images[0] for user in users], made[::2], made[1::2]], train.colormap)

    return Stage(run, "prior", prior, codec, images, *batches, config, draw)


def train_stage(stage: Stage, show: Callable[[Path], None] | None = None) -> list[dict]:
    """Train a stage's model on all GPUs, or continue; returns the history, see `mdlib.training.fit.fit_stages`. It is
    empty for the finished codec of another run.

    With several GPUs a process for each trains on its part of every batch; the caller waits and then has the trained
    weights in its model. RuntimeError: one of the processes failed; SystemExit: the session's time is up.

    show: called with the newest preview, a PNG file in samples/ of the run folder.
    """
    run, number = stage.run, processes()
    if stage.name == "codec" and run.finished_codec:
        return []
    words = (run.path.resolve(), stage.name, stage.config.max_minutes)
    samples = run.path / "samples"

    def preview(_, step: int) -> np.ndarray:
        image = stage.draw()
        with atomic_file(file := samples / f"{stage.name}-{step:06}.png") as path:
            Image.fromarray(image).save(path, format="PNG")
        if show:
            show(file)
        return image

    def show_newest() -> None:
        if show and (files := sorted(samples.glob(f"{stage.name}-*.png"))):
            show(files[-1])

    return fit_stages(
        stage.model,
        stage.data,
        stage.config,
        run.path / stage.name,
        held_out=stage.held_out,
        name=stage.name,
        launch=(lambda: launch(number, "mdlib.experiments.steps", *words, on_line=show_newest)) if number > 1 else None,
        preview=preview,
        **stage.options,
    )


def _tiles(rows: list, colormap: str) -> np.ndarray:
    """Rows of windows (C, H, W) as one image, uint8 (H, W, 3)."""
    show = lambda window: plots.as_rgb(window if window.dtype == torch.uint8 else window.float(), colormap)
    return np.vstack([np.hstack([show(window) for window in row]) for row in rows])


def _generator(run: Run) -> dict:
    """Pipeline arguments of a run."""
    return dict(users=run.parts["train"].users, conditions=run.conditions, sampling=run.preset.sampling)


def _enlarged(run: Run, seed: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Training windows and stride recombinations, uint8 (N, C, S, S), and what a prior is conditioned on, see
    `Run.labels`."""
    windows = run.parts["train"]
    groups = windows.labels + windows.num_users * windows.condition_labels(run.conditions)
    images, rows = enlarge(windows.images, groups, run.preset.variants, seed)
    return images, tuple(labels[rows] for labels in run.labels(windows))


def _frozen_networks(run: Run, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.nn.Module]:
    """The networks of the codec's losses, as arguments of `attach_losses`: the teacher, trained once on images
    (N, C, S, S) and labels (N,) and stored next to the codec, LPIPS, and the foundation."""
    networks = published_networks(run.preset)
    if steps := run.preset.teacher_steps:
        users, seed = run.parts["train"].num_users, run.settings["seed"] + 1000  # not the seed of a classifier's
        teacher = trained_once(SmallCNN, run.path / "codec" / "teacher", images, labels, users, steps, seed)
        networks["teacher"] = FeatureDistance(teacher.to(memory_format=torch.channels_last))
    if run.preset.foundation == "classifier":
        networks["foundation"] = ClassifierFeatures(networks["teacher"].classifier, images)
    return networks


def save_codec(stage: Stage) -> None:
    """Calibrate the trained codec on the training windows and write it to the run folder, next to the weights of its
    losses. The finished codec of another run is written as it is."""
    run, codec, train = stage.run, stage.codec, stage.run.parts["train"]
    if not run.finished_codec:
        codec.calibrate(to_float(train.images), train.labels)
    codec.save_pretrained(run.path / "codec")
    with atomic_file(run.path / "codec" / "losses.safetensors") as path:
        save_file({key: value.contiguous() for key, value in codec.losses.state_dict().items()}, path)


def save_pipeline(stage: Stage, classifier: torch.nn.Module | None = None) -> MicroDopplerPipeline:
    """Write the run's generator, of a trained prior stage, to pipeline/, and return it. Where the prior ends with its
    best weights, the last ones are written as well, as the variant `LAST` of diffusers."""
    run, prior, train = stage.run, stage.model, stage.run.parts["train"]
    pipeline = MicroDopplerPipeline(
        stage.codec.to(prior.device),
        prior,
        classifier,
        **_generator(run),
        colormap=train.colormap,
        output_size=run.output_size,
        trained_on=run.trained_on,
        speckle=fitted_speckle(stage.codec, train),
        weights="best" if run.ends_with_best else LAST,
    )
    pipeline.save_pretrained(run.path / "pipeline")
    if run.ends_with_best:
        state = State(prior, stage.config, run.path / "prior")  # as the last step left it
        state.swap_average()
        prior.save_pretrained(run.path / "pipeline" / "prior", variant=LAST)
        state.load_final_weights()
    return pipeline


def attach_trained_losses(run: Run, codec) -> None:
    """Attach the losses to the run's trained codec, with the weights of `save_codec`: its training can continue."""
    images, (labels, *_) = _enlarged(run, run.settings["seed"])
    attach_losses(codec, run.preset, **_frozen_networks(run, images, labels))
    with readable(file := run.path / "codec" / "losses.safetensors", TRAIN_AGAIN):
        codec.losses.load_state_dict(load_file(file))
    for _, options in run.preset.stages[-1:]:
        codec.configure(**options)


def fitted_speckle(codec: torch.nn.Module, windows: WindowSet) -> dict:
    """The speckle that the codec removes from its training windows, as `MicroDopplerPipeline` takes it.

    {}, so that none is added, for RGB windows, and where it does not bring reconstructions closer to the windows in the
    means of `mdlib.evaluation.fidelity.FEATURES`, in units of the windows' deviations.
    """
    some = windows.select(torch.linspace(0, len(windows) - 1, min(len(windows), SPECKLED)).long())
    if some.images.shape[1] != 1:
        return {}
    smooth = to_uint8(through_codec(codec, some.images, some.labels))
    speckle = fit_speckle(some.images, smooth)
    speckled = speckle.add(smooth, range(len(smooth)))
    real = describe(some.images)
    away = lambda images: (np.abs(describe(images).mean(0) - real.mean(0)) / (real.std(0) + 1e-9)).mean()
    return asdict(speckle) if away(speckled) < away(smooth) else {}


def _config(config: TrainConfig, max_minutes: float) -> TrainConfig:
    """The configuration of this process: the batch of a preset is that of all GPUs together, which have to share it."""
    check_batch(config.batch_size)
    return replace(config, batch_size=config.batch_size // world(), max_minutes=max_minutes)


def _held_out_codes(windows: WindowSet, codec: torch.nn.Module) -> dict[str, float]:
    """Codebook use on windows, for a codec with a codebook."""
    if not hasattr(codec, "encode_tokens"):
        return {}
    tokens = encode_all(codec, windows.images, "tokens")
    used = code_counts(tokens, windows.labels, codec.num_codes, windows.num_users)
    found = codebook_metrics(used, windows.labels.bincount(minlength=windows.num_users))
    return {f"held_out_{key}": value for key, value in found.items()}


def main() -> None:
    """Train a stage of a run as one of the processes that `train_stage` starts."""
    out, name, minutes = sys.argv[1:]
    PartialState(cpu=not torch.cuda.is_available())  # joins the processes
    make = {"codec": codec_stage, "prior": prior_stage}[name]
    try:
        with suppress(SystemExit):  # the session's time is up: no failure
            train_stage(make(open_run(out), float(minutes)))
    except Exception as error:
        print(f"{ERROR}{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
