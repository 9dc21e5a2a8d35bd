"""The few pieces more than one model needs: latent statistics, label dropout, draws, batches, the device."""

from collections.abc import Iterator

import torch
from torch import nn


class LatentStats(nn.Module):
    """Per-channel mean and standard deviation of a codec's latents, kept with its weights.

    A diffusion schedule assumes unit variance, so every codec normalises what it hands out.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def fit(self, latents: torch.Tensor) -> None:
        """Take the statistics of `latents` (B, C, h, w)."""
        self.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
        self.std.copy_(latents.std((0, 2, 3), keepdim=True).clamp_min(1e-6))

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self.mean) / self.std

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.std + self.mean


def drop_labels(labels: torch.Tensor, null_label: int, probability: float) -> torch.Tensor:
    """Replace each label by the null label with `probability`, sample by sample (classifier-free guidance)."""
    if probability <= 0:
        return labels
    drop = torch.rand(labels.shape, device=labels.device) < probability
    return torch.where(drop, torch.full_like(labels, null_label), labels)


def check_labels(labels: torch.Tensor, null_label: int) -> None:
    """ValueError where a label (B,) is neither a user's (0…null_label − 1) nor the null label."""
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= null_label):
        raise ValueError(f"labels must lie in 0…{null_label}, got {int(labels.min())}…{int(labels.max())}")


def uniform(batch: int, length: int, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Uniform numbers (batch, length), row i from generator i where there is one for each row.

    Raises:
        ValueError: a list of generators that is not as long as the batch.
    """
    if isinstance(generator, list):
        if len(generator) != batch:
            raise ValueError(f"{batch} samples need {batch} generators, got {len(generator)}")
        return torch.stack([torch.rand(length, generator=one) for one in generator])
    return torch.rand(batch, length, generator=generator)


def inverse_cdf(logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Draws (…) from softmax(logits (…, K)), each by one uniform number of share (…); in float64, so that a zero stays
    a zero."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulative, share.double().unsqueeze(-1) * cumulative[..., -1:], right=True)
    return chosen.squeeze(-1).clamp_max(logits.shape[-1] - 1)


def parts(device: torch.device, size: int, *tensors: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, ...]]:
    """`size` rows at a time of the tensors that are given (None is left out), on `device`."""
    for part in zip(*(tensor.split(size) for tensor in tensors if tensor is not None), strict=True):
        yield tuple(tensor.to(device) for tensor in part)


def best_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
