"""KL-regularised autoencoder (Kingma and Welling 2014; Rombach et al. 2022): a codec of continuous latents.

The network is diffusers' AutoencoderKL. What it hands out is the posterior's mean, normalised per channel: a diffusion
schedule assumes unit variance.
Legend: B batch, C image channels, H W pixels, h w latent grid, D latent channels.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from mdlib.models.codec import Codec


class KLVAE(Codec, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module when it loads
    """Codec: image (B, C, H, W) in [−1, 1] ↔ normalised latents (B, D, h, w).

    Args:
        image_size: H = W.
        in_channels: C, 1 for intensity or 3 for RGB.
        patch_size: rows and columns folded into channels before the first convolution, see `VQVAE`.
        block_out_channels: widths of the levels; n levels down-sample n − 1 times.
        layers_per_block: residual blocks a level.
        norm_num_groups: groups of the group norms.
        latent_channels: D.
        kl_weight: of the KL divergence from N(0, 1), per latent value.
        reconstruction: "mse" or "l1".
        perceptual_weight: weight of LPIPS; 0 leaves it out (and needs no weights on disk).
        perceptual_net: LPIPS backbone, `squeeze`, `alex` or `vgg`.
        mid_attention: self-attention at the coarsest level.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        level_attention: self-attention after every residual block of the coarsest level as well.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 1,
        patch_size: tuple[int, int] = (1, 1),
        block_out_channels: tuple[int, ...] = (32, 64, 128, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        latent_channels: int = 4,
        kl_weight: float = 1e-6,
        reconstruction: str = "mse",
        perceptual_weight: float = 0.0,
        perceptual_net: str = "squeeze",
        mid_attention: bool = True,
        gradient_checkpointing: bool = False,
        level_attention: bool = False,
    ):
        super().__init__()
        if reconstruction not in ("mse", "l1"):
            raise ValueError(f"reconstruction must be mse or l1, got {reconstruction!r}")
        widths = tuple(block_out_channels)
        grid = self._grid(image_size, patch_size, len(widths))
        channels = in_channels * self.patch[0] * self.patch[1]
        attention = "Attn" if level_attention else ""
        self.vae = AutoencoderKL(
            channels,
            channels,
            down_block_types=("DownEncoderBlock2D",) * (len(widths) - 1) + (f"{attention}DownEncoderBlock2D",),
            up_block_types=(f"{attention}UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (len(widths) - 1),
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_attention,
        )
        # Begin almost without noise: at the usual start its variance is 1, and drowns what the encoder has to say.
        nn.init.constant_(self.vae.quant_conv.bias[latent_channels:], -6.0)
        if gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self._finish(latent_channels, grid)

    def loss(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstruction (mean square or absolute) + kl_weight·KL [+ teachers] for images (B, C, H, W); logs beside it.

        In training mode latents are drawn from the posterior, in eval mode they are its mean.
        """
        posterior = self._posterior(images)
        output = self._pixels(self._draw(posterior))
        reconstruction, divergence, logs = self._terms(posterior, output, images)
        return reconstruction + divergence, {name: value.detach() for name, value in logs.items()}

    def encode(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, C, H, W) in [−1, 1] → posterior means (B, D, h, w), normalised per channel (see `calibrate`)."""
        return self.stats.normalise(self.raw_latents(images))

    def decode(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised latents (B, D, h, w) → images (B, C, H, W), clipped to [−1, 1]."""
        return self._pixels(self.stats.denormalise(latents)).clamp(-1, 1)

    def raw_latents(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self._posterior(images).mode()

    def _posterior(self, images: torch.Tensor) -> DiagonalGaussianDistribution:
        return self.vae.encode(self._fold(images)).latent_dist

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        return self._unfold(self.vae.decode(latents).sample)

    def _draw(self, posterior: DiagonalGaussianDistribution) -> torch.Tensor:
        return posterior.sample() if self.training else posterior.mode()

    def _terms(
        self, posterior: DiagonalGaussianDistribution, output: torch.Tensor, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstruction [+ teachers] (), kl_weight·KL (), and logs."""
        mse = F.mse_loss(output, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats a latent value
        logs = {"mse": mse, "kl": kl, "psnr_db": -10 * torch.log10(mse / 4), "latent_std": posterior.mean.std()}
        distance = mse if self.config.reconstruction == "mse" else F.l1_loss(output, images)
        return distance + self._taught(output, images, logs), self.config.kl_weight * kl, logs
