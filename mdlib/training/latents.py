"""Encode windows to tokens or latents (cached), decode latents, and train codec and prior jointly."""

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mdlib.models.layers import fingerprint, parts
from mdlib.utils import atomic_file, to_float


@torch.no_grad()
def encode_all(
    codec, images: torch.Tensor, kind: str, cache: str | Path | None = None, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens (N, h, w) or latents (N, D, h, w), by `kind`, of uint8 images (N, C, H, W) and, for a conditional codec,
    users (N,). cache: folder for the result, in a file named by the codec's weights and the data."""
    path = Path(cache) / f"{kind}-{fingerprint(codec, images, labels)}.safetensors" if cache else None
    if path and path.exists():
        with suppress(SafetensorError, KeyError):  # damaged: computed again
            return load_file(path)[kind]
    encode = codec.eval().encode_tokens if kind == "tokens" else codec.eval().encode
    batches = parts(codec.device, 128, images, labels)
    result = torch.cat([encode(to_float(part), *users).cpu() for part, *users in batches])
    if path:
        with atomic_file(path) as temporary:
            save_file({kind: result.contiguous()}, temporary)
    return result


@torch.no_grad()
def decode_all(codec, latents: torch.Tensor, batch_size: int = 64, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Images (N, C, H, W) in [−1, 1] of normalised latents (N, D, h, w); users (N,) for a conditional codec."""
    decode = codec.eval().decode
    return torch.cat([decode(*part).cpu() for part in parts(codec.device, batch_size, latents, labels)])


class JointFineTuning(nn.Module):
    """The sum of a codec's and a prior's losses, end to end: latents become easier to predict. Call `codec.calibrate`
    again afterwards.

    Small latents would be the easiest to predict: normalising each batch by its own statistics rules that out (REPA-E,
    Leng et al. 2025).

    Args:
        codec: of continuous latents; a codebook's codes carry no gradient.
        prior: over its latents.
        prior_weight: of the prior's loss.
    """

    def __init__(self, codec: nn.Module, prior: nn.Module, prior_weight: float = 0.1):
        super().__init__()
        if hasattr(codec, "encode_tokens") or prior.consumes != "latents":
            raise ValueError("joint fine-tuning needs a codec of continuous latents (kl, va) and a prior over latents")
        self.codec, self.prior, self.prior_weight = codec, prior, prior_weight

    def parameter_groups(self) -> list[dict]:
        """The codec's groups (a discriminator has its own), and the prior."""
        return [*self.codec.parameter_groups(), {"params": list(self.prior.parameters())}]

    def loss(
        self, images: torch.Tensor, users: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """codec loss + prior_weight · prior loss for images (B, C, H, W) in [−1, 1], users and conditions (B,)."""
        codec_loss, codec_logs = self.codec.loss(images, users)
        latents = self.codec.raw_latents(images, users).float()  # the noise schedule is too fine for half precision
        spread = latents.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        prior_loss, prior_logs = self.prior.loss(
            (latents - latents.mean((0, 2, 3), keepdim=True)) / spread, users, conditions
        )
        return codec_loss + self.prior_weight * prior_loss, {**codec_logs, **prior_logs}
