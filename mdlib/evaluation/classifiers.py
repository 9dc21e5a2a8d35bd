"""The judges: a user classifier and an embedder, trained from scratch, that measure windows. One that measures never
teaches or guides a generator; those that do (the codec's teacher, classifier guidance) are trained on the generator's
own windows."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from joblib import Parallel, delayed

from mdlib.data.augment import as_they_are, classical_augmentation
from mdlib.models.classifier import Embedder, ResNet18, SmallCNN
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.utils import best_device


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int = 0, augment: bool = True
) -> SmallCNN:
    """A judge trained from scratch on uint8 images (N, C, S, S) and labels (N,) for `steps` optimizer steps, with the
    classical augmentation of `mdlib.data.augment` or on the windows as they are."""
    return trained(lambda: SmallCNN(num_users, images.shape[1]), images, labels, steps, seed, augment)


def train_embedder(images: torch.Tensor, labels: torch.Tensor, steps: int, seed: int = 0) -> Embedder:
    """An embedder trained from scratch likewise, always with the classical augmentation."""
    return trained(lambda: Embedder(channels=images.shape[1]), images, labels, steps, seed)


def trained(make, images: torch.Tensor, labels: torch.Tensor, steps: int, seed: int, augment: bool = True):
    """The network that make() begins, trained on uint8 images (N, C, S, S) and labels (N,); a seed makes it the same
    anew."""
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
    """train(images, labels, *arguments), or the network of class `kind` in `folder` which was trained on the same."""
    if not folder:
        return train(images, labels, *arguments)
    digest = hashlib.sha256(repr((kind.__name__, *arguments, _how(kind))).encode())
    for tensor in (images, labels):
        digest.update(tensor.contiguous().numpy())
    path = Path(folder) / digest.hexdigest()[:16]
    if not path.exists():
        half = path.with_suffix(".part")  # whole or not at all
        train(images, labels, *arguments).save_pretrained(half)
        half.rename(path)
    return kind.from_pretrained(path).to(best_device())


@cache
def _how(kind: type) -> list[str]:
    """What decides how a network turns out, beside what it is told: networks of another version are not the same."""
    return [inspect.getsource(inspect.getmodule(part)) for part in (kind, SmallCNN, classical_augmentation, fit)]


def train_each(jobs: Iterable[tuple]) -> Iterator[SmallCNN | Embedder]:
    """`trained_once` of each job's arguments, in order. On a CPU each takes one core and as many train at a time as
    torch has threads: networks so small gain little from a second thread."""
    at_once = training_at_once()
    if at_once == 1:
        yield from (trained_once(*job) for job in jobs)
    else:
        yield from Parallel(at_once, return_as="generator")(delayed(trained_once)(*job) for job in jobs)


def training_at_once() -> int:
    """How many judges train side by side: one on a GPU, on a CPU as torch has threads, four at most for memory."""
    return 1 if best_device() == "cuda" else min(torch.get_num_threads(), 4)


def train_resnet(images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int = 0) -> ResNet18:
    """A ResNet-18 trained like a judge (`judge.train_classifier`), with the classical augmentation."""
    return trained(lambda: ResNet18(num_users, images.shape[1]), images, labels, steps, seed)
