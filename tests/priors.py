"""Small priors, a mixture of Gaussians whose denoiser is known, and distances between sets of points."""

import itertools

import numpy as np
import torch
from torch import nn

from mdlib.models.dit import LightningDiT
from mdlib.models.transformer import TokenPrior
from mdlib.models.unet import LatentDiffusion
from mdlib.models.vqdiffusion import VQDiffusion


def small_unet(kind=LatentDiffusion, **changes) -> LatentDiffusion:
    torch.manual_seed(0)
    options = dict(latent_shape=(3, 4, 2), num_users=5, block_out_channels=(8, 16), norm_num_groups=4, head_dim=4)
    return kind(**{**options, **changes}).eval()


def small_dit(kind=LightningDiT, **changes) -> LightningDiT:
    """With weights at random: the output of a new one is zero."""
    torch.manual_seed(0)
    options = dict(latent_shape=(3, 4, 2), num_users=5, hidden_size=16, depth=2, num_heads=2)
    prior = kind(**{**options, **changes}).eval()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return prior


def small_transformer(kind=TokenPrior, **changes) -> TokenPrior:
    torch.manual_seed(0)
    options = dict(num_codes=7, token_shape=(3, 2), num_users=5, hidden_size=16, num_layers=2, num_heads=2, dropout=0.0)
    return kind(**{**options, **changes}).eval()


def small_vqdiffusion(kind=VQDiffusion, timesteps: int = 100, gamma_end: float = 0.99999, **changes) -> VQDiffusion:
    """With weights at random, those that start at zero as well."""
    if (timesteps, gamma_end) != (kind.timesteps, kind.gamma_end):
        kind = type(kind.__name__, (kind,), dict(timesteps=timesteps, gamma_end=gamma_end))
    torch.manual_seed(0)
    options = dict(num_codes=7, token_shape=(3, 2), num_users=5, hidden_size=16, depth=2, num_heads=2)
    prior = kind(**{**options, **changes}).eval()
    for part in (*prior.blocks, prior.final_layer):
        nn.init.normal_(part.modulation.weight, std=0.3)
    nn.init.normal_(prior.final_layer.linear.weight, std=0.5)
    return prior


def signal_and_noise(schedule: str, steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """(α, σ) of every timestep, from the definition of the schedule's betas."""
    if schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021
        share = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - share[1:] / share[:-1], 0.999)
    elif schedule == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
    else:
        betas = np.linspace(0.0001, 0.02, steps)
    alpha_squared = np.cumprod(1 - betas)
    return np.sqrt(alpha_squared), np.sqrt(1 - alpha_squared)


# Two correlated Gaussians in the plane, far beyond ±1.
SHARES = torch.tensor([0.7, 0.3], dtype=torch.double)
CENTRES = torch.tensor([[2.0, -1.0], [-1.5, 1.5]], dtype=torch.double)
SPREADS = torch.tensor([[[0.5, 0.3], [0.3, 0.4]], [[0.2, -0.1], [-0.1, 0.6]]], dtype=torch.double)


def mixture_mean(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x_0 | α·x_0 + σ·ε = x] (B, 2) of the mixture, at points (B, 2)."""
    total = alpha**2 * SPREADS + sigma**2 * torch.eye(2)  # covariance of x in each Gaussian
    away = x - alpha * CENTRES.unsqueeze(1)  # (2, B, 2)
    scaled = away @ total.inverse()
    weight = (SHARES.log() - total.logdet() / 2).unsqueeze(1) - (scaled * away).sum(-1) / 2  # (2, B)
    means = CENTRES.unsqueeze(1) + alpha * scaled @ SPREADS
    return (weight.softmax(0).unsqueeze(-1) * means).sum(0)


def mixture_points(count: int, generator: torch.Generator) -> torch.Tensor:
    """Points (count, 2) of the mixture."""
    which = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, 1, generator=generator, dtype=torch.double)
    return CENTRES[which] + (torch.linalg.cholesky(SPREADS)[which] @ noise).squeeze(-1)


def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to points (N, 2)."""
    a, b = torch.cov(first.T), torch.cov(second.T)
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    return float((first.mean(0) - second.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def energy(first: torch.Tensor, second: torch.Tensor) -> float:
    """Energy distance (Székely and Rizzo 2013) of points (N, 2); it sees shape, not only two moments."""
    inside = torch.cdist(first, first).mean() + torch.cdist(second, second).mean()
    return float(2 * torch.cdist(first, second).mean() - inside)


def assert_within_noise(points: torch.Tensor, runs: list[torch.Tensor]) -> None:
    """Two of the runs differ by chance alone; the largest distance between two of them (15 pairs of six) bounds what
    chance does, and the points' mean distance to the runs must stay within it."""
    for distance in (frechet, energy):
        bound = max(distance(first, second) for first, second in itertools.combinations(runs, 2))
        assert np.mean([distance(points, run) for run in runs]) <= bound, distance.__name__
