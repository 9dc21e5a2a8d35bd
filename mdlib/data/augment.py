"""Augmentation that preserves gait: whole strides shifted or recombined, small gain and noise. No time flip."""

import torch
import torch.nn.functional as F

from mdlib.utils import to_float

STEPS = 4  # in the width of a window


def enlarge(images: torch.Tensor, groups: torch.Tensor, variants: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows uint8 (N, C, H, W), shifts of them by one stride, and `variants` copies of each, recombined within groups
    (N,): (N·(2 + variants), C, H, W); and the source row of each, (N·(2 + variants),)."""
    generator = torch.Generator().manual_seed(seed)
    copies = [images, stride_shift(images)] + [stride_recombine(images, groups, generator) for _ in range(variants)]
    return torch.cat(copies), torch.arange(len(images)).repeat(variants + 2)


def classical_augmentation(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator):
    """A uint8 batch for a classifier: half the windows shifted by a whole stride (left stays left), gain ±5 %, noise of
    1 % of the range; float in [−1, 1]. Without recombination: steps of several windows show another person."""
    images, options = to_float(images), dict(generator=generator, device=images.device)
    noise = torch.randn(images.shape, **options) * 0.02
    gain = 1 + 0.05 * (2 * torch.rand(len(images), 1, 1, 1, **options) - 1)
    shifted = torch.rand(len(images), 1, 1, 1, **options) < 0.5
    images = torch.where(shifted, stride_shift(images), images)
    return ((images + 1) * gain - 1 + noise).clamp(-1, 1), labels


def cutmix(images: torch.Tensor, labels: torch.Tensor, num_users: int, generator: torch.Generator):
    """CutMix (Yun et al. 2019) along time: a stretch of random place and length of each window (B, C, H, W) is another
    window's, and labels (B,) become the users' fractions of the time (B, num_users)."""
    count, width, options = len(images), images.shape[-1], dict(generator=generator, device=images.device)
    start, length = (width * torch.rand(count, 1, **options) for _ in range(2))
    pasted = (torch.arange(width, device=images.device) - start) % width < length  # it may run over the end
    other, users = torch.randperm(count, **options), torch.eye(num_users, device=labels.device)[labels]
    images = torch.where(pasted[:, None, None], images[other], images)
    return images, torch.lerp(users, users[other], pasted.float().mean(1, keepdim=True))


def radar_augmentation(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator):
    """A uint8 batch for a classifier that is to serve other radars: half the windows shifted by a whole stride; dynamic
    range 0.75 to 1.35 times, gain 0.85 to 1.1 times, blur, noise up to 6 % of the range and a noise threshold up to
    12 %, each drawn for every window; float in [−1, 1]."""
    options = dict(generator=generator, device=images.device)
    between = lambda low, high: low + (high - low) * torch.rand(len(images), 1, 1, 1, **options)
    shifted, dynamic, gain, sharp = between(0, 1) < 0.5, between(0.75, 1.35), between(0.85, 1.1), between(0, 1)
    noise = torch.randn(images.shape, **options) * between(0, 0.06)
    threshold, values = between(-0.1, 0.12), images.float() / 255
    values = torch.where(shifted, stride_shift(values), values)
    values = ((values - 1) * dynamic + 1).clamp(0, 1) * gain
    blurred = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, 1)
    values = sharp * values + (1 - sharp) * blurred + noise
    values = torch.where(values < threshold, 0.0, values).clamp(0, 1)
    return 2 * values - 1, labels


def no_augmentation(images: torch.Tensor, *labels_and_generator):
    """A uint8 batch without augmentation, float in [−1, 1]; labels pass through."""
    *labels, _ = labels_and_generator
    return to_float(images), *labels


def stride_shift(images: torch.Tensor) -> torch.Tensor:
    """Windows (B, C, H, W) shifted circularly by a stride, so that left and right steps stay where they were."""
    return images.roll(2 * images.shape[-1] // STEPS, -1)


def stride_recombine(images: torch.Tensor, groups: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Windows (B, C, H, W) assembled from steps of `images`, same shape, each step at its place in time; the steps of
    window i are of the group `groups[i]` (a user in one condition)."""
    order = groups.argsort(stable=True)
    _, group, number = groups.unique(return_inverse=True, return_counts=True)
    first = number.cumsum(0) - number
    sampled = torch.rand(len(groups), STEPS, generator=generator, device=generator.device).to(groups.device)
    source = order[first[group, None] + (sampled * number[group, None]).long()].to(images.device)
    steps = images.tensor_split([images.shape[-1] * step // STEPS for step in range(1, STEPS)], -1)
    return torch.cat([step[source[:, k]] for k, step in enumerate(steps)], -1)
