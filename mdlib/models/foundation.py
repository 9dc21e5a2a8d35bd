"""Frozen features that `Alignment` aligns a codec's latents with (VA-VAE, Yao et al. 2025): of a vision transformer
trained on photographs (DINOv2, Oquab et al. 2023), or of a user classifier trained on the codec's own windows.

Both provide `width` and `features(images, grid)`. Legend: B batch, C image channels, H W pixels, h w grid, F width.
"""

import inspect
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from mdlib.data.windows import to_float
from mdlib.models.classifier import SmallCNN

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionFeatures(nn.Module):
    """Patch tokens of a vision transformer of the package transformers. Pixels are normalised by `mean` and `std` of
    RGB in [0, 1], as when the model was trained; the authors of VA-VAE leave that out."""

    def __init__(self, model: nn.Module, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        if not isinstance(getattr(model.config, "patch_size", None), int):
            raise ValueError(f"{type(model).__name__} has no patch_size: a foundation is a vision transformer (DINOv2)")
        self.model = model.eval().requires_grad_(False)
        self.width: int = model.config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        # DINOv2 always interpolates its position encodings; ViT and DeiT do on request.
        optional = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if optional else {}

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, F, h, w) of images (B, 1 or 3, H, W) in [−1, 1], resized to one patch a cell of `grid`."""
        size = [cells * self.model.config.patch_size for cells in grid]
        resized = F.interpolate(images.expand(-1, 3, -1, -1), size, mode="bicubic", antialias=True)  # (B, 3, h·p, w·p)
        pixels = ((resized + 1) / 2 - self.mean) / self.std
        tokens = self.model(pixel_values=pixels, **self.options).last_hidden_state  # (B, class and registers + h·w, F)
        cells = grid[0] * grid[1]
        if tokens.shape[1] < cells:
            raise ValueError(f"{type(self.model).__name__} merges patches: {tokens.shape[1]} tokens for {cells} cells")
        return tokens[:, -cells:].transpose(1, 2).unflatten(2, tuple(grid))


class ClassifierFeatures(nn.Module):
    """Features of all stages of a user classifier, concatenated, and standardised on (at most 512 of) uint8 images
    (N, C, S, S)."""

    def __init__(self, classifier: SmallCNN, images: Tensor):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        some = images[torch.linspace(0, len(images) - 1, min(len(images), 512)).long()]
        with torch.no_grad():
            stages = classifier.stages(to_float(some.to(classifier.device)))
        self.register_buffer("mean", torch.cat([stage.mean((0, 2, 3)) for stage in stages]).view(-1, 1, 1))
        std = torch.cat([stage.std((0, 2, 3)) for stage in stages]).view(-1, 1, 1)
        # A feature that is constant in these windows must not dominate where it is not.
        self.register_buffer("std", torch.where(std > 1e-6, std, 1.0))
        self.width: int = len(self.mean)

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, F, h, w) of images (B, C, H, W) in [−1, 1], each stage averaged or interpolated to `grid`."""
        stages = self.classifier.stages(images)
        same = [F.interpolate(stage.float(), grid, mode="bilinear", antialias=True) for stage in stages]
        return (torch.cat(same, 1) - self.mean) / self.std


def load_foundation(name_or_path: str | Path) -> VisionFeatures:
    """The vision transformer of a folder, or of a name on the Hugging Face hub; safetensors only. FileNotFoundError if
    it is not on disk and cannot be downloaded, ValueError if it is no vision transformer."""
    name = str(name_or_path)
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    try:
        with torch.random.fork_rng():  # its initial weights are random; the caller's random numbers stay as they are
            model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the foundation model {name} is not here as a folder of config.json and model.safetensors, and could not "
            "be downloaded: attach it (on Kaggle: as an input) and give its folder, or train without alignment by "
            "foundation=none"
        ) from error
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=offline)
    except OSError:  # a folder without preprocessor_config.json
        found = {}
    return VisionFeatures(model, found.get("image_mean", IMAGENET_MEAN), found.get("image_std", IMAGENET_STD))
