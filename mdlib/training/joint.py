"""Codec and prior trained together, after each was trained alone.

The prior's loss reaches the encoder, so that latents become easier to predict. Making them small would be the easiest
way to that; normalising each batch by its own statistics closes it (REPA-E, Leng et al. 2025).
"""

import torch
from torch import nn


class JointFineTuning(nn.Module):
    """The sum of a codec's and a prior's losses, end to end; afterwards call `codec.calibrate` anew.

    Args:
        codec: of continuous latents (`mdlib.models.kl`); a codebook's codes carry no gradient.
        prior: over its latents (`mdlib.models.unet`).
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
