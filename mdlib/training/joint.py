"""Joint fine-tuning of a trained codec and a trained prior.

The prior's loss reaches the encoder, so that latents become easier to predict. Small latents would be the easiest to
predict: normalising each batch by its own statistics rules that out (REPA-E, Leng et al. 2025).
"""

import torch
from torch import nn


class JointFineTuning(nn.Module):
    """The sum of a codec's and a prior's losses, end to end. Call `codec.calibrate` again afterwards.

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
        """The codec's own (a discriminator trains otherwise), and the prior."""
        own = getattr(self.codec, "parameter_groups", lambda: [{"params": list(self.codec.parameters())}])
        return [*own(), {"params": list(self.prior.parameters())}]

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
