"""The reference classifier: ResNet-18, so that a verdict does not hang on one small network."""

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torchvision.models import resnet18

from mdlib.judge import Classifier, trained


class ResNet18(Classifier):
    """torchvision's ResNet-18 (He et al. 2016) from scratch, its first convolution for `channels` channels: windows
    (B, C, S, S) in [−1, 1] → logits (B, num_users). Unlike the small judge it sees the speckle."""

    @register_to_config
    def __init__(self, num_users: int, channels: int = 1):
        super().__init__()
        self.network = resnet18(weights=None, num_classes=num_users)
        self.network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)


def train_resnet(images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int = 0) -> ResNet18:
    """A ResNet-18 trained like a judge (`judge.train_judge`), with the classical augmentation."""
    return trained(lambda: ResNet18(num_users, images.shape[1]), images, labels, steps, seed)
