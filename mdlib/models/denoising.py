"""What the priors that denoise latents share: whom they are told, how they are guided, and the walk from noise.

Legend: B batch, D latent channels, h w latent grid, E width of a user's embedding.
"""

import inspect
from collections.abc import Callable

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils.torch_utils import randn_tensor


class LatentPrior(ModelMixin, ConfigMixin):
    """p(latents | user) by denoising.

    A subclass sets `latent_shape` and `null_label`, holds `users` (a `UserEmbedding`), has label_dropout in
    its configuration, and gives `_output`, `estimate` and `_class_change`.
    Timesteps are diffusers': from T (noise) to 0.
    """

    consumes = "latents"
    timesteps = 1000  # T

    def _output(self, noisy: torch.Tensor, timestep: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """What the sampler's step takes (B, D, h, w), at noisy latents (B, D, h, w), a timestep () and users (B, E)."""
        raise NotImplementedError

    def estimate(self, noisy: torch.Tensor, output: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The estimate of x_0 (B, D, h, w) that the network's output (B, D, h, w) at `timestep` () stands for."""
        raise NotImplementedError

    def _class_change(self, gradient: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Change of the output that a gradient of log p(label | x_0) (B, D, h, w) asks for."""
        raise NotImplementedError

    @torch.no_grad()
    def _walk(
        self,
        sampler,
        users: torch.Tensor,
        conditions: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        classifier: Callable | None,
        classifier_scale: float,
        towards: torch.Tensor | None,
        share: float | torch.Tensor,
        on_step: Callable | None,
    ) -> torch.Tensor:
        """Latents (B, D, h, w) for users (B,) in conditions (B,) along the timesteps of a diffusers
        scheduler; see `sample`."""
        embedded = self._embedded(users, conditions, towards, share)
        null = self.users(self.users.null(users), conditions)
        options = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
        shape = (len(users), *self.latent_shape)
        noisy = randn_tensor(shape, generator=generator, device=users.device, dtype=embedded.dtype)
        for number, timestep in enumerate(sampler.timesteps):
            inside = guidance_interval[0] <= float(timestep) / self.timesteps <= guidance_interval[1]
            output = self._guided(noisy, timestep, embedded, null, guidance_scale if inside else 1.0)
            estimate = self.estimate(noisy, output, timestep)
            if classifier_scale and inside:
                gradient = class_gradient(estimate, classifier, users)
                output = output + classifier_scale * self._class_change(gradient, timestep)
            if on_step:
                on_step(number, estimate)
            noisy = sampler.step(output, timestep, noisy, **options).prev_sample
        return noisy

    def _guided(self, noisy, timestep, users: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
        if scale == 1.0:
            return self._output(noisy, timestep, users)
        given, without = self._output(noisy.repeat(2, 1, 1, 1), timestep, torch.cat([users, null])).chunk(2)
        return without + scale * (given - without)

    def _embedded(self, users, conditions, towards: torch.Tensor | None, share: float | torch.Tensor) -> torch.Tensor:
        embedded = self.users(users, conditions)
        if towards is None:
            return embedded
        self.users.check(towards)
        way = check_share(share, users).to(embedded.dtype).unsqueeze(1)
        return embedded.lerp(self.users(towards, conditions), way)

    def _check_shape(self, latents: torch.Tensor) -> None:
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(f"this prior was made for latents {self.latent_shape}, got {tuple(latents.shape[1:])}")

    def _check_request(
        self, users, conditions, generator, scale: float, interval, classifier, classifier_scale: float
    ) -> None:
        """ValueError for an option of `sample` outside its range."""
        self.users.check(users, conditions)
        if not all(isinstance(s, int | float) and 0 <= s < float("inf") for s in (scale, classifier_scale)):
            raise ValueError(f"guidance scales must be 0 or more, got {scale} and {classifier_scale}")
        pair = isinstance(interval, (tuple, list)) and [isinstance(end, int | float) for end in interval] == [True] * 2
        if not pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must be two numbers in order within [0, 1], got {interval}")
        if classifier_scale and classifier is None:
            raise ValueError("classifier_scale needs a classifier, and this sampler was given none")
        if scale != 1 and self.config.label_dropout == 0:
            raise ValueError(
                "this prior was trained without label_dropout, so nothing can guide: guidance_scale must be 1"
            )
        if isinstance(generator, list) and len(generator) != len(users):
            raise ValueError(f"{len(users)} samples need {len(users)} generators, got {len(generator)}")


@torch.enable_grad()
def class_gradient(estimate: torch.Tensor, classifier: Callable, users: torch.Tensor) -> torch.Tensor:
    """∇ log p(user | x_0) (B, D, h, w) at the estimate of x_0. Through the network it would be multiplied by the
    network's errors, without bound."""
    estimate = estimate.detach().requires_grad_()
    return torch.autograd.grad(classifier(estimate, users).sum(), estimate)[0]


def evenly_spread(count: int, device: torch.device) -> torch.Tensor:
    """Numbers (count,) in [0, 1) at equal distances from a random start (Kingma et al. 2021): each is uniform, and a
    batch's loss varies less than with independent ones."""
    return (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1


def check_name(value: str, known: tuple[str, ...], name: str) -> None:
    """ValueError where `value` is not among the `known` ones."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_share(share: float | torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """The way from one user to another (B,) for users (B,); ValueError where it leaves [0, 1]."""
    share = torch.as_tensor(share, dtype=torch.float32, device=users.device)
    if share.shape not in ((), (len(users),)) or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"share must lie in [0, 1], one number or one a sample, got {share.tolist()}")
    return share.expand(len(users))
