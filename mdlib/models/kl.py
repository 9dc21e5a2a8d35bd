"""Codecs of continuous latents: a KL-regularised autoencoder (Kingma and Welling 2014; Rombach et al. 2022) and VA-VAE.
The network is diffusers' AutoencoderKL; latents are the posterior's mean, normalised per channel.

Legend: B batch, C image channels, H W pixels, h w latent grid, D latent channels.
"""

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from mdlib.models.codec import Codec
from mdlib.models.layers import UserEmbedding, check_choice, check_number, drop_labels


class KLVAE(Codec, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module when it loads
    """Codec: image (B, C, H, W) in [−1, 1] ↔ normalised latents (B, D, h, w).

    Args beyond those of `Codec`:
        latent_channels: D.
        kl_weight: weight of the KL divergence from N(0, 1), per latent value.
        reconstruction: "mse" or "l1".
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        level_attention: self-attention after every residual block of the coarsest level as well.
        num_users: users that encoder and decoder are conditioned on; 0 for none. The null label is `num_users`.
        label_dropout: fraction of training windows whose user is replaced by the null label.
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
        gradient_checkpointing: bool = False,
        level_attention: bool = False,
        num_users: int = 0,
        label_dropout: float = 0.1,
    ):
        widths = tuple(block_out_channels)
        super().__init__(image_size, patch_size, len(widths), latent_channels)
        check_choice("reconstruction", reconstruction, ("mse", "l1"))
        check_number("label_dropout", label_dropout, 0, 1)
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
        )
        # Start almost without noise: with the usual variance of 1 it would drown the encoder's signal.
        nn.init.constant_(self.vae.quant_conv.bias[latent_channels:], -6.0)
        if gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.conditional = num_users > 0
        if self.conditional:
            self.users = UserEmbedding(num_users, 1, 128)
            self.encoder_shift = nn.Linear(128, 2 * latent_channels)
            self.decoder_shift = nn.Linear(128, latent_channels)
            for layer in (self.encoder_shift, self.decoder_shift):  # at first users make no difference
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def loss(self, images: Tensor, users: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction (mean square or absolute) + kl_weight·KL + attached losses of images (B, C, H, W), and logs.

        In training mode latents are sampled from the posterior, in eval mode they are its mean.
        """
        if self.training and users is not None and (self.conditional or self.aligned):  # random numbers as in mdlib 0.1
            users = drop_labels(users, self.config.num_users, self.config.label_dropout)
        posterior = self._posterior(images, users)
        latents = posterior.sample() if self.training else posterior.mode()
        outputs = self._pixels(latents, users)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # nats a latent value
        logs = {"kl": kl, "latent_std": posterior.mean.std()}
        return self._total(self.config.kl_weight * kl, images, outputs, latents, logs)

    def decode(self, latents: Tensor, users: Tensor | None = None) -> Tensor:
        """Normalised latents (B, D, h, w) → images (B, C, H, W), clipped to [−1, 1]."""
        return self._pixels(latents * self.stats.std + self.stats.mean, users).clamp(-1, 1)

    def raw_latents(self, images: Tensor, users: Tensor | None = None) -> Tensor:
        return self._posterior(images, users).mode()

    def _posterior(self, images: Tensor, users: Tensor | None) -> DiagonalGaussianDistribution:
        features = self._shifted(self.vae.encoder(self._fold(images)), "encoder_shift", users)  # (B, 2D, h, w)
        return DiagonalGaussianDistribution(self.vae.quant_conv(features))

    def _pixels(self, latents: Tensor, users: Tensor | None) -> Tensor:
        return self._unfold(self.vae.decode(self._shifted(latents, "decoder_shift", users)).sample)

    def _shifted(self, maps: Tensor, layer: str, users: Tensor | None) -> Tensor:
        """maps (B, C, h, w) plus a vector of each user at every position; users None is the null label."""
        if not self.conditional:
            return maps
        if users is None:
            users = torch.full((len(maps),), self.config.num_users, device=maps.device)
        if not self.training:  # a training step must not wait for the GPU
            self.users.check(users)
        return maps + getattr(self, layer)(self.users(users))[:, :, None, None]


class VAVAE(KLVAE, ModelMixin):
    """VA-VAE (Yao et al. 2025): a `KLVAE` that is trained with `Alignment`, and optionally `Adversary`, so that a prior
    learns its latents sooner at the same reconstruction."""

    aligned = True
    _keys_to_ignore_on_load_unexpected = [r"projection\.weight", r"discriminator\..*", "batches"]  # saved by mdlib 0.1
