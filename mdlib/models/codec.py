"""What all codecs share: patches folded into channels, latent statistics, and the losses attached for training.

Legend: B batch, C image channels, H W pixels, h w latent grid, D latent channels.
"""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from mdlib.models.codec_losses import OPTIONS
from mdlib.models.layers import LatentStats, parts


class Codec(ModelMixin, ConfigMixin):
    """Image (B, C, H, W) in [−1, 1] ↔ normalised latents (B, D, h, w).

    A subclass defines `raw_latents` (not normalised), `decode` and `loss`. Methods take users (B,) as an optional
    second argument, which only a `conditional` codec uses. The attached `losses` (`mdlib.models.codec_losses`) are
    trained and checkpointed with the codec; `save_pretrained` leaves them out.

    Args of the networks of all subclasses:
        image_size: H = W.
        in_channels: C, 1 for intensity or 3 for RGB.
        patch_size: rows and columns folded into channels before the first convolution (space to depth): (2, 2)
            quarters its cost, and unequal sides give Doppler and time different resolutions.
        block_out_channels: widths of the levels; n levels down-sample n − 1 times.
        layers_per_block, norm_num_groups: residual blocks a level, and groups of their norms.
        mid_attention: self-attention at the coarsest level.
    """

    conditional = False
    aligned = False
    optional = ("losses.", "users.", "encoder_shift.", "decoder_shift.")  # weights that another codec may lack

    def __init__(self, image_size: int, patch_size: tuple[int, int], levels: int, latent_channels: int):
        super().__init__()
        self.patch = tuple(patch_size)
        factors = [side * 2 ** (levels - 1) for side in self.patch]
        if any(image_size % factor for factor in factors):
            raise ValueError(
                f"image_size {image_size} must be a multiple of {factors[0]} and {factors[1]} "
                f"(patch {self.patch}, {levels} levels)"
            )
        self.latent_shape = (latent_channels, *(image_size // factor for factor in factors))
        self.stats = LatentStats(latent_channels)
        self.losses = nn.ModuleDict()

    def encode(self, images: Tensor, users: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] → latents (B, D, h, w), normalised per channel (see `calibrate`)."""
        return self.stats.normalise(self.raw_latents(images, users))

    @torch.no_grad()
    def calibrate(self, images: Tensor, users: Tensor | None = None, batch_size: int = 64) -> None:
        """Set the latents' mean and standard deviation from images (B, C, H, W), usually the training windows."""
        self.stats.fit(torch.cat([self.raw_latents(*part) for part in parts(self.device, batch_size, images, users)]))

    def attach(self, loss: nn.Module) -> None:
        """Train with `loss` as well; it replaces an attached loss of the same name."""
        self.losses[loss.name] = loss

    def detach_losses(self) -> None:
        """Remove all attached losses."""
        self.losses = nn.ModuleDict()

    def configure(self, **options) -> None:
        """Change options of the attached losses by name, as a stage of training does; ValueError for unknown names.
        Options of losses that are not attached have no effect."""
        if unknown := sorted(options.keys() - OPTIONS):
            raise ValueError(f"cannot change {', '.join(unknown)}: only {', '.join(sorted(OPTIONS))}")
        for loss in self.losses.values():
            for name in options.keys() & loss.options:
                setattr(loss, name, options[name])

    def parameter_groups(self) -> list[dict]:
        """Parameter groups for AdamW: codec and attached losses; a loss with `optimizer` settings has its own group."""
        groups = [{"params": [p for name, p in self.named_parameters() if not name.startswith("losses.")]}]
        for loss in self.losses.values():
            if loss.optimizer:
                groups.append({"params": list(loss.parameters()), **loss.optimizer})
            else:
                groups[0]["params"] += loss.parameters()
        return groups

    def save_pretrained(self, *arguments, **options) -> None:
        """Save weights and configuration without the attached losses, see `ModelMixin.save_pretrained`."""
        attached = self.losses
        self.detach_losses()
        super().save_pretrained(*arguments, **options)
        self.losses = attached

    @property
    def last_layers(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Weights of the encoder's and the decoder's last convolution, where gradients of losses are compared."""
        network = getattr(self, "vae", self)
        return network.encoder.conv_out.weight, network.decoder.conv_out.weight

    def _total(self, reconstruction, regularisation, images, outputs, latents, logs) -> tuple[Tensor, dict]:
        """Sum of reconstruction, regularisation and attached losses, each (), and logs with those of the losses.
        Distances count as reconstruction, which other losses are weighted by."""
        for loss in self.losses.values():
            if loss.is_distance:
                value, own_logs = loss(outputs, images)
                reconstruction, logs = reconstruction + value, logs | own_logs
        total = reconstruction + regularisation
        for loss in self.losses.values():
            if not loss.is_distance:
                value, own_logs = loss(images, outputs, latents, reconstruction, self.last_layers)
                total, logs = total + value, logs | own_logs
        return total, {name: value.detach() for name, value in logs.items()}

    def _fold(self, images: Tensor) -> Tensor:
        """Space to depth: (B, C, H, W) → (B, C·r·c, H/r, W/c)."""
        rows, columns = self.patch
        patches = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, C, H/r, r, W/c, c)
        return patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

    def _unfold(self, patches: Tensor) -> Tensor:
        """Depth to space: (B, C·r·c, H/r, W/c) → (B, C, H, W)."""
        pixels = patches.unflatten(1, (-1, *self.patch))  # (B, C, r, c, H/r, W/c)
        return pixels.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
