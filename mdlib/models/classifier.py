"""User classifiers and an embedder: the small CNN, ResNet-18, and a network whose output is an embedding.

The small CNN is the codec's teacher, guides diffusion, and is what the evaluation trains.
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from mdlib.data.windows import to_float


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


class SmallCNN(Classifier):
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
def features(judge: SmallCNN, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """A judge's features (N, D) of uint8 images (N, C, S, S)."""
    judge.eval()
    return torch.cat([judge.features(to_float(part.to(judge.device))).cpu() for part in images.split(batch_size)])


class Embedder(ModelMixin, ConfigMixin):
    """The judge's network with an embedding (B, size) of length 1 instead of logits: near for one user's windows, far
    for others', users it was never trained on included."""

    @register_to_config
    def __init__(self, size: int = 64, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        self.network = SmallCNN(size, channels, widths)

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


class ResNet18(Classifier):
    """torchvision's ResNet-18 (He et al. 2016) from scratch, its first convolution for `channels` channels: windows
    (B, C, S, S) in [−1, 1] → logits (B, num_users). Unlike the small judge it sees the speckle."""

    @register_to_config
    def __init__(self, num_users: int, channels: int = 1):
        super().__init__()
        from torchvision.models import resnet18

        self.network = resnet18(weights=None, num_classes=num_users)
        self.network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)
