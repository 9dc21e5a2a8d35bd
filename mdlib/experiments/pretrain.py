"""Weights pretrained on simulated people, from which runs with few windows start: simulate, train, export.

Training calls the stages of a run directly, without its notebooks: a wheel of mdlib has none.
"""

import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mdlib import __version__, simulate_dataset
from mdlib.data.augment import radar_augmentation
from mdlib.data.checks import SIMULATED
from mdlib.data.windows import WindowSet, load_windows
from mdlib.experiments.run import Run, open_run
from mdlib.experiments.settings import read_record
from mdlib.experiments.steps import codec_stage, prior_stage, save_codec, train_stage
from mdlib.models.classifier import SmallCNN
from mdlib.pipeline import MicroDopplerPipeline
from mdlib.systems import SYSTEMS, get_preset, get_system, make_codec, make_prior, seeded, start
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.utils import DataError, atomic_file, read_history, read_json

WINDOWS = 60  # of each person
CODEC_FRACTION = 0.25  # of the minutes
STEPS = 100_000  # more than the minutes allow
RARELY = dict(evaluate_every=1000, save_every=1000)
IDENTIFIER = dict(steps=8000, batch_size=64, learning_rate=2e-3, warmup_steps=150, weight_decay=1e-2)
WIDTHS = (32, 64, 128)  # twice a SmallCNN's: with simulated people there is enough to learn from
SCALE, MARGIN = 24.0, 0.15  # of cosines


def pretrain(
    system: str, out: str | Path, preset: str = "demo", people: int = 300, minutes: float = 45.0, seed: int = 22000
) -> Path:
    """Simulate people, train on all of their windows, and export the weights to `out/weights`, which is returned.

    A second call continues. A run in `out/run` that the notebooks trained with the same settings is exported as well.

    Args:
        system: one of SYSTEMS, whose codec and prior are trained in `out/run`; or "identifier", a `SmallCNN`.
        preset: whose models, or size of windows, are trained.
        minutes: of training, a quarter for the codec; the most that an identifier takes.
        seed: of the simulated people; runs on people of the same seed do not start from these weights.
    """
    out, identifies = Path(out), system == "identifier"
    chosen = get_preset(next(iter(SYSTEMS)) if identifies else get_system(system).name, preset)
    if minutes <= 0:
        raise DataError(f"minutes must be more than 0, got {minutes}")
    command = f"python -m mdlib pretrain --system {system} --preset {preset} --people {people}"
    command += f" --minutes {minutes:g} --seed {seed}"
    trained_on, weights = [f"{SIMULATED}{seed}"], out / "weights"
    known = weights / "weights.json"
    if known.exists() and (before := read_json(known, f"delete {weights}").get("command")) != command:
        raise DataError(f"{weights} was exported by `{before}`: choose another --out")
    data = simulate_dataset(out / "people", users=people, windows=WINDOWS, seed=seed)
    if identifies:
        windows = load_windows(data, size=chosen.image_size)
        _in_float16(train_identifier(windows, minutes, out / "identifier")).save_pretrained(weights)
        parts = [out / "identifier"]
    else:
        batch = max(16, chosen.codec_training.batch_size)
        settings = dict(data=str(data), system=system, preset=preset, init="none", windows_per_user=-1, variants=0)
        settings |= dict(codec_steps=STEPS, codec_options={"batch_size": batch, **RARELY}, prior_steps=STEPS)
        ema = max(0.998, chosen.prior_training.ema_decay)
        run = open_run(out / "run", prior_options={"ema_decay": ema, **RARELY}, **settings)
        _train(run, minutes)
        _export(run, trained_on).save_pretrained(weights)
        parts = [run.path / "codec", run.path / "prior"]
    last = {part.name: read_history(part)[-1] for part in parts}
    card = dict(name=system, mdlib=__version__, command=command, preset=preset, people=people)
    card |= dict(windows=WINDOWS, seed=seed, trained_on=trained_on)
    card |= {name: dict(steps=int(row["step"]), minutes=round(row["seconds"] / 60, 1)) for name, row in last.items()}
    with atomic_file(weights / "weights.json") as path:  # last: with it the folder counts
        path.write_text(json.dumps(card, indent=1) + "\n")
    return weights


class MarginSoftmax(nn.Module):
    """A network trained to tell `users` people apart by a softmax over scaled cosines with a margin (CosFace, Wang et
    al. 2018), as in face and speaker recognition: its features serve people it has not seen better than those of a
    plain softmax."""

    def __init__(self, network: SmallCNN, users: int):
        from pytorch_metric_learning.losses import CosFaceLoss

        super().__init__()
        self.network = network
        self.criterion = CosFaceLoss(users, network.head.in_features, margin=MARGIN, scale=SCALE)

    def loss(self, images: Tensor, users: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.criterion(self.network.drop(self.network.features(images)), users), {}


def train_identifier(windows: WindowSet, minutes: float, run_dir: Path) -> SmallCNN:
    """Train a `SmallCNN` to identify the users of the windows. Its last layer, of one user, stays untrained."""
    how = dict(channels=windows.images.shape[1], widths=WIDTHS, image_size=windows.images.shape[-1])
    network = seeded(0, lambda: MarginSoftmax(SmallCNN(1, **how), windows.num_users))
    network.to(memory_format=torch.channels_last)
    config = TrainConfig(**IDENTIFIER, **RARELY, max_minutes=minutes)
    fit(network, Batches((windows.images, windows.labels), radar_augmentation), config, run_dir, name="identifier")
    return network.network.cpu()


def _train(run: Run, minutes: float) -> None:
    """Train codec and prior of a run, as its notebooks do, and write them to its pipeline/."""
    (_, first, second, *_), done = run.system.notebooks, read_record(run.path)["steps"]
    if first not in done:
        started, stage = time.monotonic(), codec_stage(run, CODEC_FRACTION * minutes)
        train_stage(stage)
        save_codec(stage)
        run.done(first, started)
    if second not in done:
        started, stage = time.monotonic(), prior_stage(run, (1 - CODEC_FRACTION) * minutes)
        train_stage(stage)
        for part, model in (("codec", stage.codec), ("prior", stage.model)):
            model.save_pretrained(run.path / "pipeline" / part)
        run.done(second, started)


def _export(run: Run, trained_on: list[str]) -> MicroDopplerPipeline:
    """The run's pipeline for one user, the mean of its users."""
    codec = make_codec(run.preset, run.settings["channels"])
    prior = make_prior(run.settings["system"], run.preset, codec, 1)
    for part, model in (("codec", codec), ("prior", prior)):
        start(model, run.path / "pipeline" / part, other_users=True)
        _in_float16(model)
    options = dict(colormap=run.windows.colormap, output_size=run.output_size, sampling=run.preset.sampling)
    return MicroDopplerPipeline(codec, prior, users=[1], trained_on=trained_on, **options)


def _in_float16(model):
    """Convert the parameters to float16. Buffers (running averages) keep their type."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model
