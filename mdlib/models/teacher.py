"""A perceptual loss of the field's own: distance in the features of a user classifier.

LPIPS (Zhang et al. 2018) measures distance in the features of a network trained on photographs. A codec of gait needs
the features that tell people apart, so the network here is a user classifier trained on the codec's own training
windows. It is no judge: the judges that measure are trained anew, on other windows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mdlib.models.classifier import SmallCNN


class FeatureDistance(nn.Module):
    """Mean squared difference of each stage's features, relative to their variance, mean over stages."""

    def __init__(self, classifier: SmallCNN):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)

    def forward(self, outputs: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Distance () of outputs from images, both (B, C, H, W) in [−1, 1]; the gradient reaches `outputs`."""
        with torch.no_grad():
            wanted = self.classifier.stages(images)
        pairs = zip(self.classifier.stages(outputs), wanted, strict=True)
        return torch.stack([F.mse_loss(made, real) / real.var().clamp_min(1e-6) for made, real in pairs]).mean()
