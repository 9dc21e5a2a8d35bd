"""What every codec shares: patches folded into channels, calibrated latents, and teachers in its loss.

Legend: B batch, C image channels, H W pixels, h w latent grid, D latent channels.
"""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from mdlib.models.layers import LatentStats, parts
from mdlib.models.perceptual import load_lpips


class Codec(ModelMixin, ConfigMixin):
    """Image (B, C, H, W) in [−1, 1] ↔ normalised latents (B, D, h, w).

    A subclass gives `encode`, `decode`, `raw_latents` (not yet normalised) and `loss`; its constructor ends with
    `_finish`. Its configuration holds image_size, patch_size, perceptual_weight and perceptual_net.
    All of these take labels (B,) after their first argument, which only a `conditional` codec looks at.
    """

    conditional = False

    def _grid(self, image_size: int, patch_size: tuple[int, int], levels: int) -> tuple[int, int]:
        """(h, w) of the latent grid: the patch and `levels` − 1 halvings divide the image."""
        self.patch = tuple(patch_size)
        factors = [side * 2 ** (levels - 1) for side in self.patch]
        if any(image_size % factor for factor in factors):
            raise ValueError(
                f"image_size {image_size} must be a multiple of {factors[0]} and {factors[1]} "
                f"(patch {self.patch}, {levels} levels)"
            )
        return tuple(image_size // factor for factor in factors)

    def _finish(self, latent_channels: int, grid: tuple[int, int]) -> None:
        self.stats = LatentStats(latent_channels)
        self.latent_shape = (latent_channels, *grid)
        # Frozen teachers are no part of the model: in a tuple they reach neither optimizer nor checkpoint.
        self._teachers: tuple = ()

    def add_teacher(self, name: str, distance: nn.Module, weight: float) -> None:
        """Add weight·distance(outputs, images) to the loss, logged as `name`; `distance` is frozen and not saved."""
        self._teachers += ((name, distance.requires_grad_(False), weight),)

    def _taught(self, outputs: torch.Tensor, images: torch.Tensor, logs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The teachers' share of the loss (); each one's distance is noted in `logs`."""
        if self.config.perceptual_weight and not any(name == "lpips" for name, *_ in self._teachers):
            # Loaded for training only: a trained codec must open where LPIPS's weights are not.
            self.add_teacher("lpips", load_lpips(self.config.perceptual_net), self.config.perceptual_weight)
        total = outputs.new_zeros(())
        for name, distance, weight in self._teachers:
            logs[name] = distance.to(images.device)(outputs, images).mean()
            total = total + weight * logs[name]
        return total

    @torch.no_grad()
    def calibrate(self, images: torch.Tensor, labels: torch.Tensor | None = None, batch_size: int = 64) -> None:
        """Fill the latent mean and standard deviation from images (B, C, H, W), usually the training windows; labels
        (B,) only where the codec is conditional."""
        self.stats.fit(torch.cat([self.raw_latents(*part) for part in parts(self.device, batch_size, images, labels)]))

    def _fold(self, images: torch.Tensor) -> torch.Tensor:
        """Space to depth: (B, C, H, W) → (B, C·r·c, H/r, W/c)."""
        rows, columns = self.patch
        patches = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, C, H/r, r, W/c, c)
        return patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

    def _unfold(self, patches: torch.Tensor) -> torch.Tensor:
        """Depth to space: (B, C·r·c, H/r, W/c) → (B, C, H, W)."""
        rows, columns = self.patch
        parts = patches.unflatten(1, (-1, rows, columns))  # (B, C, r, c, H/r, W/c)
        return parts.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
