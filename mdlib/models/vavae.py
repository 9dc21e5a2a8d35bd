"""VA-VAE (Yao et al. 2025): a KL autoencoder whose latents are aligned with the features of a frozen vision model, so
that a prior learns them sooner at the same reconstruction. A PatchGAN (Isola et al. 2017) and user labels are optional.

Legend: B batch, C image channels, H W pixels, h w latent grid, D latent channels, F width of the foundation's features.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.func import functional_call

from mdlib.models.kl import KLVAE
from mdlib.models.layers import all_mean, check_labels, drop_labels

# The authors' three stages, each with its share of the optimizer steps (100, 15 and 15 epochs) and the options that
# `VAVAE.configure` sets before it. Their first stage lets the discriminator act after one epoch, 5001 steps.
RECIPE = (
    (100 / 130, dict(alignment_weight=0.5, distance_margin=0.0, cosine_margin=0.0, adversarial_start=5001)),
    (15 / 130, dict(alignment_weight=0.1, distance_margin=0.0, cosine_margin=0.0, adversarial_start=1)),
    (15 / 130, dict(alignment_weight=0.1, distance_margin=0.25, cosine_margin=0.5, adversarial_start=1)),
)
CONFIGURABLE = (
    "kl_weight",
    "alignment_weight",
    "cosine_margin",
    "distance_margin",
    "adaptive",
    "adversarial_weight",
    "adversarial_start",
    "label_dropout",
)
GRADIENT_FLOOR = 1e-4
HALF_PRECISION_SCALE = 1024.0


def cosine_loss(projected: torch.Tensor, features: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Mean over positions of relu(1 − margin − cos(z, f)), of maps (B, F, h, w)."""
    return F.relu(1 - margin - F.cosine_similarity(projected, features)).mean()


def distance_loss(projected: torch.Tensor, features: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Mean over pairs of positions of a window of relu(|cos(z_i, z_j) − cos(f_i, f_j)| − margin), of maps
    (B, F, h, w)."""
    return F.relu((_similarities(projected) - _similarities(features)).abs() - margin).mean()


def _similarities(maps: torch.Tensor) -> torch.Tensor:
    directions = F.normalize(maps.flatten(2), dim=1)  # (B, F, h·w)
    return directions.transpose(1, 2) @ directions  # (B, h·w, h·w)


class PatchGAN(nn.Sequential):
    """Images (B, C, H, W) → one logit for each overlapping patch, above 0 where it looks real (Isola et al. 2017).

    Group norm stands for the original's batch norm: batches are small, real and made windows go through together, and
    devices that train in parallel see different ones.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3):
        sizes = [width * min(2**level, 8) for level in range(layers + 1)]
        steps = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (before, size) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
            stride = 2 if level < layers else 1
            steps += [
                nn.Conv2d(before, size, 4, stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(size, 8), size),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*steps, nn.Conv2d(sizes[-1], 1, 4, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)


class VAVAE(KLVAE, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module when it loads
    """Codec: image (B, C, H, W) in [−1, 1] ↔ normalised latents (B, D, h, w).

    Beyond `KLVAE`'s arguments:

    Args:
        foundation_width: F of the foundation that `align_to` is given; 0 does without alignment.
        alignment_weight: of the alignment, relative to the reconstruction where `adaptive`.
        cosine_margin, distance_margin: how far from the foundation's features latents may stay, see `cosine_loss`
            and `distance_loss`.
        adaptive: weigh alignment and adversary so that their gradients are alignment_weight and adversarial_weight
            times the reconstruction's; else these are the weights themselves.
        adversarial_weight: of the PatchGAN's hinge loss; 0 builds no discriminator.
        adversarial_start: batches trained on before the discriminator acts and learns (with accumulation, several
            batches are one optimizer step).
        discriminator_width, discriminator_layers: channels of its first layer; its down-sampling layers.
        num_users: people the codec tells apart; 0 for none. The null label is `num_users`.
        label_dropout: share of training windows whose label is replaced by the null label.
    """

    # Parts that two codecs of the same autoencoder need not both have.
    beside = ("projection.", "discriminator.", "batches", "users.", "encoder_shift.", "decoder_shift.")

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
        foundation_width: int = 0,
        alignment_weight: float = 0.5,
        cosine_margin: float = 0.0,
        distance_margin: float = 0.0,
        adaptive: bool = True,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 0,
        discriminator_width: int = 64,
        discriminator_layers: int = 3,
        num_users: int = 0,
        label_dropout: float = 0.1,
    ):
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            patch_size=patch_size,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            latent_channels=latent_channels,
            kl_weight=kl_weight,
            reconstruction=reconstruction,
            perceptual_weight=perceptual_weight,
            perceptual_net=perceptual_net,
            mid_attention=mid_attention,
            gradient_checkpointing=gradient_checkpointing,
            level_attention=level_attention,
        )
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {label_dropout}")
        self._foundation: tuple = ()  # in a tuple, like the teachers
        self.conditional = num_users > 0
        if foundation_width:
            self.projection = nn.Conv2d(latent_channels, foundation_width, 1, bias=False)
        if adversarial_weight:
            if image_size < 3 * 2**discriminator_layers:
                raise ValueError(f"discriminator_layers {discriminator_layers} is too many for {image_size} pixels")
            self.discriminator = PatchGAN(in_channels, discriminator_width, discriminator_layers)
            self.register_buffer("batches", torch.tensor(0))
        if self.conditional:
            self.users = nn.Embedding(num_users + 1, 128)
            self.encoder_shift, self.decoder_shift = (
                nn.Linear(128, 2 * latent_channels),
                nn.Linear(128, latent_channels),
            )
            for layer in (self.encoder_shift, self.decoder_shift):  # it begins as a codec of no users
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def align_to(self, foundation: nn.Module) -> None:
        """Give the frozen `foundation` that training aligns with; it is neither trained nor saved.

        Raises:
            ValueError: its features' width is not the codec's.
        """
        if foundation.width != self.config.foundation_width:
            raise ValueError(
                f"the foundation's features are {foundation.width} wide, the codec was built with foundation_width="
                f"{self.config.foundation_width}: build it with {foundation.width}"
            )
        self._foundation = (foundation.requires_grad_(False),)

    def configure(self, **options) -> None:
        """Change options of the loss between stages of training (see `RECIPE`), in the saved configuration too.

        Raises:
            ValueError: an option that is fixed when the codec is built.
        """
        fixed = options.keys() - set(CONFIGURABLE)
        if fixed:
            raise ValueError(f"cannot change {', '.join(sorted(fixed))}: only {', '.join(CONFIGURABLE)}")
        if bool(options.get("adversarial_weight", self.config.adversarial_weight)) != bool(
            self.config.adversarial_weight
        ):
            raise ValueError("adversarial_weight 0 builds no discriminator: it cannot change from or to 0 later")
        self.register_to_config(**options)

    def parameter_groups(self) -> list[dict]:
        """For AdamW: the autoencoder, and the discriminator, which forgets sooner because its opponent moves."""
        apart = set(self.discriminator.parameters()) if self.config.adversarial_weight else set()
        groups = [{"params": [parameter for parameter in self.parameters() if parameter not in apart]}]
        if apart:
            groups.append({"params": list(self.discriminator.parameters()), "betas": (0.5, 0.9), "weight_decay": 0.0})
        return groups

    def loss(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`KLVAE.loss` + alignment + adversary, for one backward pass; logs beside it.

        Without gradients (a held-out loss) the sum is that of `KLVAE`, and the alignment is logged only: weights that
        follow gradients would make two evaluations incomparable.

        Raises:
            ValueError: alignment without a foundation; labels out of range.
        """
        if self.training and labels is not None:
            labels = drop_labels(labels, self.config.num_users, self.config.label_dropout)
        posterior = self._posterior(images, labels)
        latents = self._draw(posterior)
        output = self._pixels(latents, labels)
        reconstruction, divergence, logs = self._terms(posterior, output, images)
        loss = reconstruction + divergence
        if self.config.foundation_width and self.config.alignment_weight:
            loss = loss + self._alignment(latents, images, reconstruction, logs)
        if self.config.adversarial_weight and torch.is_grad_enabled():
            loss = loss + self._adversary(output, images, reconstruction, logs)
        return loss, {name: value.detach() for name, value in logs.items()}

    def encode(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, C, H, W) in [−1, 1] [and labels (B,)] → posterior means (B, D, h, w), normalised per channel."""
        return self.stats.normalise(self.raw_latents(images, labels))

    def decode(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised latents (B, D, h, w) [and labels (B,)] → images (B, C, H, W), clipped to [−1, 1]."""
        return self._pixels(self.stats.denormalise(latents), labels).clamp(-1, 1)

    def raw_latents(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self._posterior(images, labels).mode()

    def _posterior(self, images: torch.Tensor, labels: torch.Tensor | None) -> DiagonalGaussianDistribution:
        features = self._shifted(self.vae.encoder(self._fold(images)), "encoder_shift", labels)  # (B, 2D, h, w)
        return DiagonalGaussianDistribution(self.vae.quant_conv(features))

    def _pixels(self, latents: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return super()._pixels(self._shifted(latents, "decoder_shift", labels))

    def _shifted(self, maps: torch.Tensor, layer: str, labels: torch.Tensor | None) -> torch.Tensor:
        """maps (B, C, h, w) plus each user's vector at every position; no label is the null label."""
        if not self.conditional:
            return maps
        if labels is None:
            labels = torch.full((len(maps),), self.config.num_users, device=maps.device)
        check_labels(labels, self.config.num_users)
        return maps + getattr(self, layer)(self.users(labels))[:, :, None, None]

    def _alignment(self, latents, images, reconstruction, logs) -> torch.Tensor:
        """The weighed alignment (); its terms are noted in `logs`. Without gradients 0, and no foundation is needed."""
        if not self._foundation and torch.is_grad_enabled():
            raise ValueError(
                "alignment needs a foundation: call align_to(load_foundation(...)) first, or set alignment_weight=0"
            )
        if not self._foundation:
            return latents.new_zeros(())
        features = self._foundation[0].to(images.device).features(images, self.latent_shape[1:])
        projected = self.projection(latents)  # (B, F, h, w)
        with torch.autocast(images.device.type, enabled=False):  # cosines of near neighbours are too fine for half
            projected, features = projected.float(), features.float()
            logs["align_cosine"] = cosine_loss(projected, features, self.config.cosine_margin)
            logs["align_distance"] = distance_loss(projected, features, self.config.distance_margin)
        if not torch.is_grad_enabled():
            return latents.new_zeros(())
        term = logs["align_cosine"] + logs["align_distance"]
        logs["align_weight"] = self._weight(
            self.config.alignment_weight, reconstruction, term, self.vae.encoder.conv_out.weight
        )
        return logs["align_weight"] * term

    def _adversary(self, output, images, reconstruction, logs) -> torch.Tensor:
        """The weighed generator's loss + the discriminator's (); neither reaches the other's parameters."""
        acts = self.batches >= self.config.adversarial_start
        if self.training:
            self.batches += 1
        if not acts:
            return output.new_zeros(())
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        with torch.autocast(images.device.type, enabled=False):  # its logits have no bound that half precision keeps
            images, output = images.float(), output.float()
            generator = -functional_call(self.discriminator, frozen, (output,)).mean()
            real, made = self.discriminator(torch.cat([images, output.detach()])).chunk(2)
        logs["generator"] = generator
        logs["discriminator"] = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        logs["generator_weight"] = self._weight(
            self.config.adversarial_weight, reconstruction, generator, self.vae.decoder.conv_out.weight
        )
        return logs["generator_weight"] * generator + logs["discriminator"]

    def _weight(self, weight: float, reconstruction, term, layer: nn.Parameter) -> torch.Tensor:
        """`weight`, where adaptive times ‖∇reconstruction‖ / ‖∇term‖ at `layer`.

        The authors divide by ‖∇term‖ + 1e-4 and cut the quotient at 1e8 (1e4 for the adversary). That cut presumes
        their reconstruction, a sum over pixels: ours is a mean, some 10⁴ times smaller, and the weight has to follow
        by just that factor. Here the floor holds ‖∇term‖ from below instead, which is a mean in both: above it the
        two gradients stand exactly `weight` to one; below it, where a term has all but met its margin, the weight
        stays within 1e4·‖∇reconstruction‖, whatever the reconstruction's scale.
        """
        if not self.config.adaptive:
            return term.new_tensor(weight)
        # A mean over pixels has gradients below float16's smallest: both are scaled, which leaves the quotient.
        reference, own = (
            all_mean(torch.autograd.grad(HALF_PRECISION_SCALE * loss, layer, retain_graph=True)[0].float()).norm()
            for loss in (reconstruction, term)
        )
        quotient = reference / own.clamp_min(HALF_PRECISION_SCALE * GRADIENT_FLOOR)
        # Where half precision overflows all the same, the term is left out of this one step.
        return weight * quotient.nan_to_num(nan=0.0, posinf=0.0)
