"""Networks that the evaluation trains from scratch. They neither teach nor guide a generator; networks that do are
trained on the generator's own windows."""

import inspect
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import joblib
import torch
from torch import Tensor

from mdlib.data.augment import as_they_are, classical_augmentation
from mdlib.models.classifier import Embedder, ResNet18, SmallCNN
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.utils import best_device

Network = SmallCNN | ResNet18 | Embedder


def train_classifier(
    images: Tensor, labels: Tensor, outputs: int, steps: int, seed=0, augment=True, kind: type[Network] = SmallCNN
) -> Network:
    """kind(outputs, channels) trained on uint8 images (N, C, S, S) and labels (N,); the same for the same seed.

    Args:
        outputs: number of users, or size of an `Embedder`.
        augment: with the classical augmentation of `mdlib.data.augment`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = kind(outputs, images.shape[1]).to(memory_format=torch.channels_last)
    how = dict(batch_size=32, learning_rate=2e-3, warmup_steps=steps // 10, weight_decay=1e-2)
    config = TrainConfig(steps=steps, seed=seed, evaluate_every=steps, **how)
    transform = classical_augmentation if augment else as_they_are
    fit(network, Batches((images, labels), transform), config, progress=False)
    return network


def trained_once(kind: type[Network], folder: str | Path | None, images: Tensor, labels: Tensor, *arguments) -> Network:
    """`train_classifier`, or the network in `folder` that was trained with the same arguments."""
    if not folder:
        return train_classifier(images, labels, *arguments, kind=kind)
    key = (kind.__name__, arguments, source_code(kind), images.numpy(), labels.numpy())
    path = Path(folder) / joblib.hash(key)
    if path.exists():
        with suppress(Exception):  # damaged: trained again
            return kind.from_pretrained(path).to(best_device())
        shutil.rmtree(path)
    unfinished = path.with_suffix(".part")
    train_classifier(images, labels, *arguments, kind=kind).save_pretrained(unfinished)
    unfinished.rename(path)
    return kind.from_pretrained(path).to(best_device())


@cache
def source_code(kind: type) -> list[str]:
    """The code that decides how a network is trained: networks of another version are trained again."""
    return [inspect.getsource(inspect.getmodule(part)) for part in (kind, SmallCNN, classical_augmentation, fit)]


def train_each(jobs: Iterable[tuple]) -> Iterator[Network]:
    """`trained_once` of each job's arguments, in order. On a CPU each takes one core and as many train at a time as
    torch has threads: small networks gain little from a second thread."""
    once = joblib.delayed(trained_once)
    yield from joblib.Parallel(training_at_once(), return_as="generator")(once(*job) for job in jobs)


def training_at_once() -> int:
    """How many classifiers train at a time: 1 on a GPU, on a CPU as many as torch has threads, at most 4 for memory."""
    return 1 if best_device() == "cuda" else min(torch.get_num_threads(), 4)
