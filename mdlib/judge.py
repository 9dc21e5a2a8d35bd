"""The judges: a user classifier and an embedder, trained from scratch, that measure windows. One that measures never
teaches or guides a generator; those that do (the codec's teacher, classifier guidance) are trained on the generator's
own windows."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from joblib import Parallel, delayed
from torch import nn

from mdlib.augment import as_they_are, classical_augmentation
from mdlib.data import to_float
from mdlib.nn import best_device
from mdlib.train import Batches, TrainConfig, fit


class Classifier(ModelMixin, ConfigMixin):
    """What every user classifier can do: forward(images (B, C, S, S) in [−1, 1]) → logits (B, num_users)."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """P(user) (N, num_users) of uint8 images (N, C, S, S)."""
        self.eval()
        return torch.cat([self(to_float(part.to(self.device))).softmax(1).cpu() for part in images.split(batch_size)])


class Judge(Classifier):
    """A small CNN on windows (B, C, S, S) in [−1, 1] → logits (B, num_users).

    A 5×5 binomial filter comes first: speckle is chance, and a judge that leans on it would know neither the same user
    on another day nor a codec's output. Time is averaged over each half at the end, Doppler over eighths: where the
    energy lies in velocity tells users apart, when exactly a step falls into the window does not. For the same reason
    time is pooled from the first layer on, Doppler from the second.
    """

    @register_to_config
    def __init__(self, num_users: int, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64), dropout: float = 0.3):
        super().__init__()
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("binomial", (row[:, None] * row).expand(channels, 1, 5, 5).clone())
        first, *others = widths
        layers = [_stage(channels, first, stride=2, pool=(1, 2))]
        layers += [_stage(before, width) for before, width in zip(widths, others, strict=False)]
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d((8, 2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1] * 16, num_users)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each convolution makes of images: a list of (B, width, rows, columns)."""
        found = [self._without_speckle(images)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found[1:]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 16·width) before the last layer."""
        return self.pool(self.blocks(self._without_speckle(images))).flatten(1)

    def _without_speckle(self, images: torch.Tensor) -> torch.Tensor:
        smooth = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), self.binomial, groups=images.shape[1])
        return smooth.contiguous(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.features(images)))


def _stage(before: int, width: int, stride: int = 1, pool: int | tuple[int, int] = 2) -> nn.Sequential:
    """Pooled before it is normalised: on a CPU a step takes a fifth less time than in the other order."""
    convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.MaxPool2d(pool), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


@torch.no_grad()
def features(judge: Judge, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """A judge's features (N, D) of uint8 images (N, C, S, S)."""
    judge.eval()
    return torch.cat([judge.features(to_float(part.to(judge.device))).cpu() for part in images.split(batch_size)])


class Embedder(ModelMixin, ConfigMixin):
    """The judge's network with an embedding (B, size) of length 1 instead of logits: near for one user's windows, far
    for others', users it was never trained on included."""

    @register_to_config
    def __init__(self, size: int = 64, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        self.network = Judge(size, channels, widths)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.network(images), dim=1)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """Supervised contrastive loss (Khosla et al. 2020): every other window of the user in the batch attracts."""
        from pytorch_metric_learning.losses import SupConLoss

        return SupConLoss(temperature=0.1)(self(images), labels), {}

    @torch.no_grad()
    def embeddings(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """(N, size) of uint8 images (N, C, S, S)."""
        self.eval()
        return torch.cat([self(to_float(part.to(self.device))).cpu() for part in images.split(batch_size)])


def train_judge(
    images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int = 0, augment: bool = True
) -> Judge:
    """A judge trained from scratch on uint8 images (N, C, S, S) and labels (N,) for `steps` optimizer steps, with the
    classical augmentation of `mdlib.augment` or on the windows as they are."""
    return trained(lambda: Judge(num_users, images.shape[1]), images, labels, steps, seed, augment)


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
    return [inspect.getsource(inspect.getmodule(part)) for part in (kind, Judge, classical_augmentation, fit)]


def train_each(jobs: Iterable[tuple]) -> Iterator[Judge | Embedder]:
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
