"""User classifiers (a small CNN, ResNet-18) and an embedder. The small CNN trains the codec as its teacher, guides
diffusion, and evaluates generated windows; each use trains its own.

Legend: B batch, N windows, C image channels, S height and width.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from mdlib.utils import to_float


class Classifier(ModelMixin, ConfigMixin):
    """Base class: forward maps windows (B, C, S, S) in [−1, 1] to logits (B, num_users)."""

    def loss(self, images: Tensor, users: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy; users: labels (B,), or probabilities (B, num_users)."""
        logits = self(images)
        accuracy = (logits.argmax(1) == (users if users.ndim == 1 else users.argmax(1))).float().mean()
        return F.cross_entropy(logits, users), {"accuracy": accuracy}

    def probabilities(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """P(user) (N, num_users) of uint8 images (N, C, S, S)."""
        return _in_batches(self, lambda windows: self(windows).softmax(1), images, batch_size)


class SmallCNN(Classifier):
    """A small CNN: windows (B, C, S, S) in [−1, 1] → logits (B, num_users).

    A 5×5 binomial filter removes speckle first: speckle is random, and a classifier that relies on it fails on
    another day or after a codec. Pooling is coarser in time than in Doppler, down to 8 × 2 cells: users
    differ in where the energy lies in velocity, not in when a step falls into the window.

    Args:
        image_size: side in pixels to which larger windows are first reduced by averaging; 0: no reduction.
    """

    @register_to_config
    def __init__(
        self,
        num_users: int,
        channels: int = 1,
        widths: tuple[int, ...] = (16, 32, 64),
        dropout: float = 0.3,
        image_size: int = 0,
    ):
        super().__init__()
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("binomial", (row[:, None] * row).expand(channels, 1, 5, 5).clone())
        self.blocks = nn.Sequential()
        for before, width in pairwise((channels, *widths)):
            first = not self.blocks
            convolution = nn.Conv2d(before, width, 3, 2 if first else 1, padding=1, bias=False)
            # Pooling precedes normalisation: on a CPU a step takes a fifth less time than in the other order.
            pool = nn.MaxPool2d((1, 2) if first else 2)
            self.blocks.append(nn.Sequential(convolution, pool, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
        self.pool = nn.AdaptiveAvgPool2d((8, 2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1] * 16, num_users)

    @classmethod
    def from_backbone(cls, folder: str, num_users: int) -> "SmallCNN":
        """The network in `folder`, trained on other people, with a new last layer for num_users."""
        network = cls.from_pretrained(folder).float()
        network.head = nn.Linear(network.head.in_features, num_users)
        network.register_to_config(num_users=num_users)
        return network

    def stages(self, images: Tensor) -> list[Tensor]:
        """Output of each convolutional stage, a list of (B, width, rows, columns)."""
        if 0 < self.config.image_size < images.shape[-1]:
            images = F.interpolate(images, (self.config.image_size, self.config.image_size), mode="area")
        smooth = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), self.binomial, groups=images.shape[1])
        found = [smooth.contiguous(memory_format=torch.channels_last)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found[1:]

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 16·width) before the last layer."""
        return self.pool(self.stages(images)[-1]).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.features(images)))


class ResNet18(Classifier):
    """torchvision's ResNet-18 (He et al. 2016) from scratch, for C channels: windows (B, C, S, S) in [−1, 1] → logits
    (B, num_users). Unlike the small CNN it sees the speckle."""

    @register_to_config
    def __init__(self, num_users: int, channels: int = 1):
        super().__init__()
        from torchvision.models import resnet18

        self.network = resnet18(weights=None, num_classes=num_users)
        self.network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class Embedder(ModelMixin, ConfigMixin):
    """The small CNN with an embedding (B, size) of length 1 instead of logits: windows of one user are close, those of
    different users far apart, users outside the training set included."""

    @register_to_config
    def __init__(self, size: int = 64, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        self.network = SmallCNN(size, channels, widths)

    def features(self, images: Tensor) -> Tensor:
        """Embeddings (B, size) of windows (B, C, S, S) in [−1, 1]."""
        return F.normalize(self.network(images), dim=1)

    def loss(self, images: Tensor, users: Tensor) -> tuple[Tensor, dict]:
        """Supervised contrastive loss (Khosla et al. 2020): all windows of a user in the batch attract one another."""
        from pytorch_metric_learning.losses import SupConLoss

        return SupConLoss(temperature=0.1)(self.features(images), users), {}


def features(network: SmallCNN | Embedder, images: Tensor, batch_size: int = 256) -> Tensor:
    """A classifier's features (N, D), or embeddings, of uint8 images (N, C, S, S)."""
    return _in_batches(network, network.features, images, batch_size)


@torch.no_grad()
def _in_batches(model: nn.Module, function: Callable, images: Tensor, batch_size: int) -> Tensor:
    """function of uint8 images (N, C, S, S) as floats in [−1, 1], batch by batch, with `model` in eval mode."""
    model.eval()
    return torch.cat([function(to_float(part.to(model.device))).cpu() for part in images.split(batch_size)])
