"""A perceptual loss of the field's own: distance in the features of a user classifier.

LPIPS (Zhang et al. 2018) measures distance in the features of a network trained on photographs. A codec of gait needs
the features that tell people apart, so the network here is a user classifier trained on the codec's own training
windows. It is no judge: the judges that measure are trained anew, on other windows.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mdlib.files import whole_file
from mdlib.judge import Judge, train_judge


class FeatureDistance(nn.Module):
    """Mean squared difference of each stage's features, relative to their variance, mean over stages."""

    def __init__(self, classifier: Judge):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)

    def forward(self, outputs: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Distance () of outputs from images, both (B, C, H, W) in [−1, 1]; the gradient reaches `outputs`."""
        with torch.no_grad():
            wanted = self.classifier.stages(images)
        pairs = zip(self.classifier.stages(outputs), wanted, strict=True)
        return torch.stack([F.mse_loss(made, real) / real.var().clamp_min(1e-6) for made, real in pairs]).mean()


def train_teacher(
    images: torch.Tensor, labels: torch.Tensor, num_users: int, steps: int, seed: int, kept: Path | None = None
) -> FeatureDistance:
    """The distance of a classifier trained on uint8 images (N, C, S, S) and labels (N,) for `steps` optimizer steps.

    kept: file of the classifier's weights; where it is there, they are read from it and nothing is trained.
    """
    if kept and kept.exists():
        with torch.random.fork_rng():  # weights are drawn before they are loaded
            classifier = Judge(num_users, images.shape[1]).to(memory_format=torch.channels_last)
        classifier.load_state_dict(load_file(kept))
        return FeatureDistance(classifier)
    classifier = train_judge(images, labels, num_users, steps, seed)
    if kept:
        with whole_file(kept) as path:
            save_file({key: value.contiguous() for key, value in classifier.state_dict().items()}, path)
    return FeatureDistance(classifier)
