"""Common to all priors: checks of a sampling request, guidance by labels and classifiers, the loop from noise to data.

Legend: B batch, D latent channels, h w grid of tokens or latents, E width of a user's embedding.
"""

import inspect
from collections import namedtuple
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mdlib.models.layers import check_number, drop_labels
from mdlib.utils import DataError

# The arguments of `Prior.sample` that all priors have, checked; share is a tensor (B,).
Request = namedtuple("Request", "users conditions generator guidance_scale towards share on_step")


class Prior:
    """Base of p(tokens | user) and p(latents | user), mixed into a diffusers model.

    A subclass has `consumes` ("tokens" or "latents"), `token_shape` or `latent_shape`, `users` (a `UserEmbedding`),
    `null_label`, and two methods: `loss(z, users, conditions=None)` of tokens (B, h, w) or latents (B, D, h, w) returns
    the loss () and parts of it to log, `draw(request, *, ...)` checks its own options and returns tokens or latents.

    Args of the constructors:
        num_codes, token_shape: K and (h, w) of the codec's token grid.
        latent_shape: (D, h, w) of the codec's latents.
        num_users: n; label n is the null label of classifier-free guidance.
        num_conditions: carrying conditions, see `mdlib.models.layers.UserEmbedding`.
        label_dropout: fraction of training samples that get the null label.
        hidden_size, depth, num_heads: of a transformer: width, number of blocks, attention heads.
        gradient_checkpointing: recompute blocks in the backward pass: less memory, a third more time.
    """

    denoises = True  # can interpolate and show its steps

    @classmethod
    def sampling_options(cls) -> dict:
        """The arguments of `sample` that are plain values, with their defaults."""
        methods = (getattr(cls, name) for name in ("sample", "draw", "sampler") if hasattr(cls, name))
        known = {name: one.default for one in methods for name, one in inspect.signature(one).parameters.items()}
        plain = (int, float, str, tuple)
        return {name: value for name, value in known.items() if isinstance(value, plain) and name != "share"}

    @torch.no_grad()
    def sample(
        self,
        users: Tensor,
        *,
        conditions: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_scale: float = 1.0,
        towards: Tensor | None = None,
        share: float | Tensor = 0.0,
        on_step: Callable | None = None,
        **options,
    ) -> Tensor:
        """Tokens (B, h, w) or latents (B, D, h, w) for users (B,). ValueError for what cannot be sampled.

        Args:
            users: labels in 0…num_users, the last of which is the null label.
            conditions: labels (B,) of carrying conditions; None is condition 0 for all.
            generator: one for the batch, or one per sample: a sample then does not depend on its batch.
            guidance_scale: s in null + s·(user − null); 1 is plain conditional sampling.
            towards, share: second users (B,), and where to sample between the two: 0 is `users`, 1 is `towards`; one
                number or one per sample.
            on_step: called as on_step(number, estimate of the sample) after every network call.
            options: those of `draw`; num_inference_steps are the steps from noise to data.
        """
        self.users.check(users, conditions)
        self.users.check(users if towards is None else towards)
        check_number("guidance_scale", guidance_scale, 0)
        if guidance_scale != 1 and self.config.label_dropout == 0:
            raise ValueError("guidance needs a prior trained with label_dropout: guidance_scale must be 1")
        if isinstance(generator, list) and len(generator) != len(users):
            raise ValueError(f"{len(users)} samples need {len(users)} generators, got {len(generator)}")
        if not self.denoises and (towards is not None or on_step):
            name = type(self).__name__
            raise DataError(f"interpolation and denoising frames need a diffusion or flow prior, not {name}")
        share = torch.as_tensor(share, dtype=torch.float32, device=users.device)
        if share.shape not in ((), (len(users),)) or not ((share >= 0) & (share <= 1)).all():
            raise ValueError(f"share must lie in [0, 1], one number or one per sample, got {share.tolist()}")
        if towards is None and share.any():
            raise ValueError("share needs a second user: give towards as well")
        share = share.expand(len(users))
        return self.draw(Request(users, conditions, generator, guidance_scale, towards, share, on_step), **options)

    def drop_users(self, users: Tensor) -> Tensor:
        """Users (B,) after the label dropout of training."""
        return drop_labels(users, self.null_label, self.config.label_dropout if self.training else 0.0)


class LatentPrior(Prior):
    """p(latents | user) by denoising. Timesteps are diffusers': from T (noise) to 0.

    A subclass has `timesteps` (T), `sampler(scheduler=…, num_inference_steps=…)`: a diffusers scheduler on the CPU, so
    that its steps never wait for a GPU; and, for noisy latents (B, D, h, w) at a timestep (),
    `output(noisy, timestep, users (B, E))`: what the sampler's step takes (B, D, h, w); timestep on the model's device;
    `estimate(noisy, output, timestep)`: the estimate of x_0 (B, D, h, w) that follows from it; timestep on the CPU;
    `class_change(gradient, timestep)`: its change for a gradient of log p(label | x_0) (B, D, h, w); likewise.
    """

    consumes = "latents"

    def draw(
        self, request: Request, *, guidance_interval=(0.0, 1.0), classifier=None, classifier_scale=0.0, **sampler
    ) -> Tensor:
        """Latents (B, D, h, w) along the timesteps of a diffusers scheduler; between two users, of a mean of their
        embeddings.

        Args:
            guidance_interval: guide only where t/T lies in it (Kynkäänniemi et al. 2024); 1 is pure noise.
            classifier: log p(user | latents) as a function (latents (B, D, h, w), users (B,)) → (B,), evaluated at the
                estimate of x_0; needed where classifier_scale is not 0.
            classifier_scale: of the classifier's gradient (Dhariwal and Nichol 2021, there with a classifier of noisy
                latents); 0 turns it off.
            sampler: options of `sampler`.
        """
        users, conditions, generator, scale, towards, share, on_step = request
        sampler = self.sampler(**sampler)
        check_number("classifier_scale", classifier_scale, 0)
        if classifier_scale and classifier is None:
            raise ValueError("classifier_scale needs a classifier, and none was given")
        listed = isinstance(guidance_interval, tuple | list)
        pair = listed and [isinstance(end, int | float) for end in guidance_interval] == [True, True]
        if not pair or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval must be two numbers in order within [0, 1], got {guidance_interval}")
        if not len(users):
            return torch.empty(0, *self.latent_shape, device=users.device)
        embedded, null = self.users(users, conditions), self.users(self.users.null(users), conditions)
        if towards is not None:
            embedded = embedded.lerp(self.users(towards, conditions), share.to(embedded.dtype).unsqueeze(1))
        options = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
        shape = (len(users), *self.latent_shape)
        noisy = randn_tensor(shape, generator=generator, device=users.device, dtype=embedded.dtype)
        for number, (timestep, time) in enumerate(
            zip(sampler.timesteps, sampler.timesteps.to(users.device), strict=True)
        ):
            inside = guidance_interval[0] <= float(timestep) / self.timesteps <= guidance_interval[1]
            if inside and scale != 1:
                both = self.output(noisy.repeat(2, 1, 1, 1), time, torch.cat([embedded, null]))
                output = guided(*both.to(noisy.dtype).chunk(2), scale)  # under autocast it is in half precision
            else:
                output = self.output(noisy, time, embedded).to(noisy.dtype)
            estimate = self.estimate(noisy, output, timestep)
            if inside and classifier_scale:
                # The gradient at the estimate: through the network it would be multiplied by the network's errors.
                with torch.enable_grad():
                    here = estimate.detach().requires_grad_()
                    gradient = torch.autograd.grad(classifier(here, users).sum(), here)[0]
                output = output + classifier_scale * self.class_change(gradient, timestep)
            if on_step:
                on_step(number, estimate)
            noisy = sampler.step(output, timestep, noisy, **options).prev_sample
        return noisy


def guided(user: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) of a network's outputs for the user and for the null label."""
    return null + scale * (user - null)


def evenly_spread(count: int, device: torch.device) -> Tensor:
    """Numbers (count,) in [0, 1) at equal distances from a random start (Kingma et al. 2021): each is uniform, and the
    loss of a batch varies less than with independent ones."""
    return (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1
