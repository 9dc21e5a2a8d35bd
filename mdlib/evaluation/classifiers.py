"""Classifiers and embedders that the evaluation trains from scratch. They neither teach nor guide a generator; networks
that do are trained on the generator's own windows."""

import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import joblib
import torch

from mdlib.data.augment import as_they_are, classical_augmentation
from mdlib.models.classifier import Embedder, ResNet18, SmallCNN
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.utils import best_device


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int = 0, augment: bool = True
) -> SmallCNN:
    """A small CNN trained on uint8 images (N, C, S, S) and labels (N,) for `steps` optimizer steps, with the classical
    augmentation of `mdlib.data.augment` unless `augment` is False."""
    return trained(lambda: SmallCNN(num_users, images.shape[1]), images, labels, steps, seed, augment)


def train_embedder(images: torch.Tensor, labels: torch.Tensor, steps: int, seed: int = 0) -> Embedder:
    """An embedder trained in the same way."""
    return trained(lambda: Embedder(channels=images.shape[1]), images, labels, steps, seed)


def train_resnet(images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int = 0) -> ResNet18:
    """A ResNet-18 trained in the same way."""
    return trained(lambda: ResNet18(num_users, images.shape[1]), images, labels, steps, seed)


def trained(make, images: torch.Tensor, labels: torch.Tensor, steps: int, seed: int, augment: bool = True):
    """The network that make() returns, trained; the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make().to(memory_format=torch.channels_last)
    config = TrainConfig(
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=steps // 10,
        weight_decay=1e-2,
        seed=seed,
        evaluate_every=steps,
        tracker="none",
    )
    transform = classical_augmentation if augment else as_they_are
    fit(network, Batches((images, labels), transform), config, progress=False)
    return network


def trained_once(train, kind: type, folder: str | Path | None, images: torch.Tensor, labels: torch.Tensor, *arguments):
    """train(images, labels, *arguments), or the network of class `kind` in `folder` that was trained on the same."""
    if not folder:
        return train(images, labels, *arguments)
    key = (kind.__name__, arguments, source_code(kind), images.numpy(), labels.numpy())
    path = Path(folder) / joblib.hash(key)
    if not path.exists():
        unfinished = path.with_suffix(".part")
        train(images, labels, *arguments).save_pretrained(unfinished)
        unfinished.rename(path)
    return kind.from_pretrained(path).to(best_device())


@cache
def source_code(kind: type) -> list[str]:
    """The code that decides how a network is trained: networks of another version are trained again."""
    return [inspect.getsource(inspect.getmodule(part)) for part in (kind, SmallCNN, classical_augmentation, fit)]


def train_each(jobs: Iterable[tuple]) -> Iterator[SmallCNN | ResNet18 | Embedder]:
    """`trained_once` of each job's arguments, in order. On a CPU each takes one core and as many train at a time as
    torch has threads: small networks gain little from a second thread."""
    once = joblib.delayed(trained_once)
    yield from joblib.Parallel(training_at_once(), return_as="generator")(once(*job) for job in jobs)


def training_at_once() -> int:
    """How many classifiers train at a time: 1 on a GPU, on a CPU as many as torch has threads, at most 4 for memory."""
    return 1 if best_device() == "cuda" else min(torch.get_num_threads(), 4)
