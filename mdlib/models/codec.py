"""What all codecs share, and the losses that train one: distances of frozen networks, alignment with a foundation's
features (VA-VAE, Yao et al. 2025), and an adversary (PatchGAN, Isola et al. 2017).

Legend: B batch, C image channels, H W pixels, h w latent grid, D latent channels, F width of a foundation's features.
"""

import math
from functools import wraps
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn
from torch.func import functional_call

from mdlib.models.classifier import SmallCNN
from mdlib.models.layers import all_mean, parts

GRADIENT_FLOOR = 1e-4
HALF_PRECISION_SCALE = 1024.0


class Codec(ModelMixin, ConfigMixin):
    """Image (B, C, H, W) in [−1, 1] ↔ normalised latents (B, D, h, w).

    A subclass defines `raw_latents` (not normalised), `decode` and `loss`. Methods take users (B,) as an optional
    second argument, which only a `conditional` codec uses. The attached `losses` are trained and checkpointed with the
    codec; `save_pretrained` leaves them out.

    Args of all subclasses:
        image_size: H = W.
        in_channels: C, 1 for intensity or 3 for RGB.
        patch_size: rows and columns folded into channels before the first convolution (space to depth).
        block_out_channels: widths of the levels; n levels down-sample n − 1 times.
        layers_per_block, norm_num_groups: residual blocks a level, and groups of their norms.
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
        self.stats = nn.Module()  # of each latent channel; a diffusion schedule assumes unit variance
        self.stats.register_buffer("mean", torch.zeros(1, latent_channels, 1, 1))
        self.stats.register_buffer("std", torch.ones(1, latent_channels, 1, 1))
        self.losses = nn.ModuleDict()

    def encode(self, images: Tensor, users: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] → latents (B, D, h, w), normalised per channel (see `calibrate`)."""
        return (self.raw_latents(images, users) - self.stats.mean) / self.stats.std

    @torch.no_grad()
    def calibrate(self, images: Tensor, users: Tensor | None = None, batch_size: int = 64) -> None:
        """Set the latents' mean and standard deviation from images (B, C, H, W), usually the training windows."""
        latents = torch.cat([self.raw_latents(*part) for part in parts(self.device, batch_size, images, users)])
        self.stats.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
        self.stats.std.copy_(latents.std((0, 2, 3), keepdim=True).clamp_min(1e-6))

    def attach(self, loss: nn.Module) -> None:
        """Add `loss` to the training objective, replacing one of the same name. A `Distance` is called with (outputs,
        images), any other loss with (images, outputs, latents, reconstruction, the codec's last layers); both return
        the weighted loss () and values to log. `loss.optimizer`: AdamW settings that differ from the codec's."""
        self.losses[loss.name] = loss

    def detach_losses(self) -> None:
        """Remove all attached losses."""
        self.losses = nn.ModuleDict()

    def configure(self, **options) -> None:
        """Change options of the attached losses by name, as a stage of training does. Others have no effect."""
        for loss in self.losses.values():
            for name in options.keys() & vars(loss).keys():
                setattr(loss, name, options[name])

    def parameter_groups(self) -> list[dict]:
        """Parameter groups for AdamW: codec and attached losses; a loss with `optimizer` settings has its own group."""
        groups = [{"params": [p for name, p in self.named_parameters() if not name.startswith("losses.")]}]
        for loss in self.losses.values():
            if hasattr(loss, "optimizer"):
                groups.append({"params": list(loss.parameters()), **loss.optimizer})
            else:
                groups[0]["params"] += loss.parameters()
        return groups

    @wraps(ModelMixin.save_pretrained)  # a pipeline reads the signature
    def save_pretrained(self, *arguments, **options) -> None:
        attached = self.losses
        self.detach_losses()
        try:
            super().save_pretrained(*arguments, **options)
        finally:
            self.losses = attached

    def _total(self, regularisation, images, outputs, latents, logs) -> tuple[Tensor, dict]:
        """Sum of reconstruction (mean square; or absolute), regularisation and attached losses, each (), and all logs.
        Distances count as reconstruction, which other losses are weighted by."""
        mse = F.mse_loss(outputs, images)
        logs = {"mse": mse, "psnr_db": -10 * torch.log10(mse / 4)} | logs
        reconstruction = F.l1_loss(outputs, images) if self.config.get("reconstruction") == "l1" else mse
        network = getattr(self, "vae", self)
        last_layers = network.encoder.conv_out.weight, network.decoder.conv_out.weight
        for loss in self.losses.values():
            if isinstance(loss, Distance):
                value, own_logs = loss(outputs, images)
                reconstruction, logs = reconstruction + value, logs | own_logs
        total = reconstruction + regularisation
        for loss in self.losses.values():
            if not isinstance(loss, Distance):
                value, own_logs = loss(images, outputs, latents, reconstruction, last_layers)
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


class Distance(nn.Module):
    """weight · network(outputs, images), logged as `name`. The network is frozen, and not saved."""

    def __init__(self, name: str, network: nn.Module, weight: float):
        super().__init__()
        self.name, self.weight = name, weight
        self._network = (network.requires_grad_(False),)  # in a tuple it is no part of the module

    def forward(self, outputs: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        distance = moved(self._network[0], images.device)(outputs, images).mean()
        return self.weight * distance, {self.name: distance}


class FeatureDistance(nn.Module):
    """Network for `Distance`: mean squared difference of a user classifier's features, relative to their variance, mean
    over its stages."""

    def __init__(self, classifier: SmallCNN):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)

    def forward(self, outputs: Tensor, images: Tensor) -> Tensor:
        """Distance () of outputs from images, both (B, C, H, W) in [−1, 1]; the gradient reaches `outputs` only."""
        with torch.no_grad():
            targets = self.classifier.stages(images)
        pairs = zip(self.classifier.stages(outputs), targets, strict=True)
        return torch.stack([F.mse_loss(found, real) / real.var().clamp_min(1e-6) for found, real in pairs]).mean()


class Alignment(nn.Module):
    """Aligns latents, projected by a 1×1 convolution, with features of a frozen network. In evaluation it is logged
    only: its weight depends on gradients, so losses would not be comparable.

    Args:
        foundation: `VisionFeatures` or `ClassifierFeatures` (`mdlib.models.pretrained`); it is not saved.
        latent_channels: D.
        alignment_weight: ratio of this loss's gradient to the reconstruction's, see `adaptive_weight`.
        cosine_margin, distance_margin: tolerances, see `cosine_loss` and `distance_loss`.
    """

    name = "alignment"

    def __init__(
        self, foundation: nn.Module, latent_channels: int, alignment_weight=0.5, cosine_margin=0.0, distance_margin=0.0
    ):
        super().__init__()
        self.alignment_weight = alignment_weight
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin
        self._foundation = (foundation.requires_grad_(False),)
        self.projection = nn.Conv2d(latent_channels, foundation.width, 1, bias=False)

    def forward(self, images, outputs, latents, reconstruction, last_layers) -> tuple[Tensor, dict[str, Tensor]]:
        zero = latents.new_zeros(())
        if not self.alignment_weight:
            return zero, {}
        features = moved(self._foundation[0], images.device).features(images, latents.shape[2:])
        projected = self.projection(latents)  # (B, F, h, w)
        with torch.autocast(images.device.type, enabled=False):  # half precision is too coarse for cosines near 1
            cosine = cosine_loss(projected.float(), features.float(), self.cosine_margin)
            distance = distance_loss(projected.float(), features.float(), self.distance_margin)
        logs = {"align_cosine": cosine, "align_distance": distance}
        if not torch.is_grad_enabled():
            return zero, logs
        weight = adaptive_weight(self.alignment_weight, reconstruction, cosine + distance, last_layers[0])
        return weight * (cosine + distance), logs | {"align_weight": weight}


class Adversary(nn.Module):
    """A PatchGAN discriminator with hinge loss. Both opponents learn in one backward pass, each from its own loss only.

    Args:
        channels, image_size: C and H = W of the images.
        adversarial_weight: ratio of the codec's adversarial gradient to the reconstruction's, see `adaptive_weight`.
        adversarial_start: batches before the discriminator trains and acts; accumulated batches count one by one.
        discriminator_width, discriminator_layers: channels of its first layer; number of its down-sampling layers.
    """

    name = "adversary"
    optimizer = {"betas": (0.5, 0.9), "weight_decay": 0.0}  # shorter memory: what it discriminates keeps changing

    def __init__(
        self,
        channels: int,
        image_size: int,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 0,
        discriminator_width: int = 64,
        discriminator_layers: int = 3,
    ):
        super().__init__()
        if image_size < 3 * 2**discriminator_layers:
            raise ValueError(f"discriminator_layers {discriminator_layers} is too many for {image_size} pixels")
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.discriminator = PatchGAN(channels, discriminator_width, discriminator_layers)
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, images, outputs, latents, reconstruction, last_layers) -> tuple[Tensor, dict[str, Tensor]]:
        acts = torch.is_grad_enabled() and (not self.adversarial_start or self.batches >= self.adversarial_start)
        if self.training:
            self.batches += 1
        if not acts:
            return outputs.new_zeros(()), {}
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        with torch.autocast(images.device.type, enabled=False):  # its logits are unbounded
            images, outputs = images.float(), outputs.float()
            generator = -functional_call(self.discriminator, frozen, (outputs,)).mean()
            real, fake = self.discriminator(torch.cat([images, outputs.detach()])).chunk(2)
        discriminator = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        weight = adaptive_weight(self.adversarial_weight, reconstruction, generator, last_layers[1])
        logs = {"generator": generator, "discriminator": discriminator, "generator_weight": weight}
        return weight * generator + discriminator, logs


class PatchGAN(nn.Sequential):
    """Images (B, C, H, W) → one logit for each overlapping patch, above 0 if it looks real. Group norm replaces the
    original's batch norm: batches are small and hold real and decoded windows together."""

    def __init__(self, channels: int, width: int = 64, layers: int = 3):
        sizes = [width * min(2**level, 8) for level in range(layers + 1)]
        steps = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (before, size) in enumerate(pairwise(sizes), start=1):
            convolution = nn.Conv2d(before, size, 4, stride=2 if level < layers else 1, padding=1, bias=False)
            steps += [convolution, nn.GroupNorm(math.gcd(size, 8), size), nn.LeakyReLU(0.2)]
        super().__init__(*steps, nn.Conv2d(sizes[-1], 1, 4, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)


def moved(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` on `device`. `Module.to` goes through all its parameters, also where they are there already."""
    first = next(network.parameters(), None)
    return network if first is not None and first.device == device else network.to(device)


def cosine_loss(projected: Tensor, features: Tensor, margin: float = 0.0) -> Tensor:
    """Mean over positions of relu(1 − margin − cos(z, f)), of maps (B, F, h, w)."""
    return F.relu(1 - margin - F.cosine_similarity(projected, features)).mean()


def distance_loss(projected: Tensor, features: Tensor, margin: float = 0.0) -> Tensor:
    """Mean over pairs of positions of relu(|cos(z_i, z_j) − cos(f_i, f_j)| − margin), of maps (B, F, h, w)."""
    directions = [F.normalize(maps.flatten(2), dim=1) for maps in (projected, features)]  # (B, F, h·w)
    z_pairs, f_pairs = (maps.transpose(1, 2) @ maps for maps in directions)  # (B, h·w, h·w)
    return F.relu((z_pairs - f_pairs).abs() - margin).mean()


def adaptive_weight(weight: float, reconstruction: Tensor, loss: Tensor, layer: nn.Parameter) -> Tensor:
    """weight · ‖∇reconstruction‖ / max(‖∇loss‖, 1e-4), gradients with respect to `layer`. The authors add 1e-4 and clip
    the quotient, for a reconstruction summed over pixels; ours is a mean, and the floor works at any scale."""
    # A mean over pixels has gradients below float16's smallest value: both are scaled, which cancels in the quotient.
    reference, own = (
        all_mean(torch.autograd.grad(HALF_PRECISION_SCALE * value, layer, retain_graph=True)[0].float()).norm()
        for value in (reconstruction, loss)
    )
    quotient = reference / own.clamp_min(HALF_PRECISION_SCALE * GRADIENT_FLOOR)
    return weight * quotient.nan_to_num(nan=0.0, posinf=0.0)  # 0 for a step whose half precision overflows
