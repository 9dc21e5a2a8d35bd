"""Diffusion over a codec's latents by a UNet, conditional on the user.

Ho et al. 2020 (DDPM), Salimans and Ho 2022 (v-prediction), Hang et al. 2023 (Min-SNR weights), Ho and Salimans 2022
(classifier-free guidance). Network, noise schedules and samplers are diffusers'.
Legend: B batch, D latent channels, h w latent grid, x_t = α_t·x_0 + σ_t·ε.
"""

from collections.abc import Callable

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    ModelMixin,
    PNDMScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.training_utils import compute_snr
from torch import nn

from mdlib.models.attention import use_window_axial
from mdlib.models.denoising import LatentPrior, check_name, evenly_spread
from mdlib.models.layers import UserEmbedding, drop_labels

# timestep_spacing "trailing" starts at pure noise (Lin et al. 2024). A clipped sample would be wrong: latents have unit
# variance, not a range.
SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "lambda_min_clipped": -5.1}),
}
SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")


class LatentDiffusion(LatentPrior, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module
    """p(latents | user) by denoising.

    Args:
        latent_shape: (D, h, w) of the codec.
        num_users: n; label n is the null label of classifier-free guidance.
        num_conditions: carrying conditions, see `mdlib.models.layers.UserEmbedding`.
        block_out_channels: widths of the levels; n levels down-sample n − 1 times.
        layers_per_block: residual blocks a level.
        norm_num_groups: groups of the group norms.
        attention: "full" (at all levels but the first), "window_axial" (see `mdlib.models.attention`) or "none".
        window: side of the windows in latent positions.
        head_dim: channels of an attention head.
        dropout: of the residual blocks.
        label_dropout: share of training samples whose label is the null label.
        prediction: what the network predicts, "epsilon" or "v_prediction".
        schedule: of the noise, "squaredcos_cap_v2", "linear" or "scaled_linear".
        num_train_timesteps: T.
        min_snr_gamma: γ of the Min-SNR weights; 0 weighs all timesteps alike.
        gradient_checkpointing: recompute the residual blocks in the backward pass: less memory, a third more time.

    Raises:
        ValueError: sizes or names that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_users: int,
        block_out_channels: tuple[int, ...] = (64, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 16,
        attention: str = "full",
        window: int = 4,
        head_dim: int = 16,
        dropout: float = 0.0,
        label_dropout: float = 0.1,
        prediction: str = "v_prediction",
        schedule: str = "squaredcos_cap_v2",
        num_train_timesteps: int = 1000,
        min_snr_gamma: float = 5.0,
        gradient_checkpointing: bool = False,
        num_conditions: int = 1,
    ):
        super().__init__()
        _check_names(attention, prediction, schedule)
        if min_snr_gamma < 0 or not 0 <= label_dropout <= 1:
            raise ValueError(
                f"min_snr_gamma must be 0 or more and label_dropout within [0, 1], got {min_snr_gamma}, {label_dropout}"
            )
        self.latent_shape, self.null_label = tuple(latent_shape), num_users
        levels = len(block_out_channels)
        attends = [attention == "window_axial" or (attention == "full" and level > 0) for level in range(levels)]
        _check_sizes(latent_shape, block_out_channels, head_dim, attends)
        self.unet = UNet2DModel(
            in_channels=self.latent_shape[0],
            out_channels=self.latent_shape[0],
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=norm_num_groups,
            attention_head_dim=head_dim,
            add_attention=attention != "none",
            dropout=dropout,
            resnet_time_scale_shift="scale_shift",  # time and user scale every feature, not only shift it
            class_embed_type="identity",
        )
        if attention == "window_axial":
            use_window_axial(self.unet, window)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        # A table of our own instead of the UNet's: between two users lie points that are no label.
        self.users = UserEmbedding(num_users, num_conditions, 4 * block_out_channels[0])
        nn.init.normal_(self.users.weight, std=0.5)
        self.schedule = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_schedule=schedule,
            # The customary ends for a thousand timesteps; fewer must each take away more.
            beta_start=(0.00085 if schedule == "scaled_linear" else 0.0001) * 1000 / num_train_timesteps,
            beta_end=(0.012 if schedule == "scaled_linear" else 0.02) * 1000 / num_train_timesteps,
            prediction_type=prediction,
            clip_sample=False,
            timestep_spacing="trailing",
        )

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """ε or v (B, D, h, w) at noisy latents (B, D, h, w), timesteps (B,) and user embeddings (B, E)."""
        return self.unet(noisy, timesteps, class_labels=users).sample

    def loss(
        self, latents: torch.Tensor, users: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Min-SNR weighted mean square error at one timestep a sample, for latents (B, D, h, w), users (B,)
        and conditions (B,)."""
        self._check_shape(latents)
        users = drop_labels(users, self.null_label, self.config.label_dropout if self.training else 0.0)
        noise = torch.randn_like(latents)
        timesteps = self._timesteps(len(latents), latents.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        velocity = self.config.prediction == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, timesteps) if velocity else noise
        error = (
            (self(noisy, timesteps, self.users(users, conditions)).float() - target).square().mean((1, 2, 3))
        )  # (B,)
        loss = (self._weights(timesteps) * error).mean()
        return loss, {"denoising_mse": error.mean().detach()}

    def _timesteps(self, count: int, device: torch.device) -> torch.Tensor:
        total = self.config.num_train_timesteps
        return (evenly_spread(count, device) * total).long().clamp_max(total - 1)

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Min-SNR-γ weights (B,) of the squared error in ε or v (Hang et al. 2023): min(SNR, γ) in x_0."""
        gamma = self.config.min_snr_gamma
        if not gamma:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr = compute_snr(self.schedule, timesteps)
        return snr.clamp_max(gamma) / (snr + 1 if self.config.prediction == "v_prediction" else snr)

    @torch.no_grad()
    def sample(
        self,
        users: torch.Tensor,
        *,
        conditions: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 20,
        scheduler: str = "dpm++",
        classifier: Callable | None = None,
        classifier_scale: float = 0.0,
        towards: torch.Tensor | None = None,
        share: float | torch.Tensor = 0.0,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """Latents (B, D, h, w) for users (B,) in conditions (B,).

        Args:
            generator: one for the batch, or one a sample: a sample then does not depend on its batch.
            guidance_scale: s in null + s·(user − null) on all channels; 1 is plain conditional sampling.
            guidance_interval: guide only where t/T lies in it (Kynkäänniemi et al. 2024); 1 is pure noise.
            num_inference_steps: denoising steps.
            scheduler: "ddpm", "ddim", "pndm" or "dpm++" (DPM-Solver++, Lu et al. 2022).
            classifier: log p(user | latents) as a function (latents (B, D, h, w), users (B,)) → (B,), asked at the
                estimate of x_0; needed where classifier_scale is not 0.
            classifier_scale: of the classifier's gradient (Dhariwal and Nichol 2021, there with a classifier of noisy
                latents); 0 leaves it out.
            towards, share: second users (B,), and how far (0 to 1, a number or (B,)) the user's embedding lies
                towards theirs.
            on_step: called as on_step(number, x_0 estimate (B, D, h, w)) after every denoising step.

        Raises:
            ValueError: an option outside its range, a user outside 0…num_users, too few generators.
        """
        self._check_request(
            users, conditions, generator, guidance_scale, guidance_interval, classifier, classifier_scale
        )
        self._check_steps(scheduler, num_inference_steps)
        if not len(users):
            return torch.empty(0, *self.latent_shape, device=users.device)
        sampler = make_sampler(scheduler, self.schedule)
        sampler.set_timesteps(num_inference_steps, device=users.device)
        if sampler.timesteps[-1] < 0:
            raise ValueError(f"{scheduler} cannot take {num_inference_steps} steps: choose another number")
        guidance = (guidance_scale, guidance_interval, classifier, classifier_scale)
        return self._walk(sampler, users, conditions, generator, *guidance, towards, share, on_step)

    @property
    def timesteps(self) -> int:
        return self.config.num_train_timesteps

    def _output(self, noisy: torch.Tensor, timestep: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        return self(noisy, timestep, users)

    def estimate(self, noisy: torch.Tensor, output: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self._alpha_sigma(timestep)
        if self.config.prediction == "v_prediction":
            return alpha * noisy - sigma * output
        return (noisy - sigma * output) / alpha

    def _alpha_sigma(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_squared = self.schedule.alphas_cumprod.to(timestep.device)[timestep.long()]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def _class_change(self, gradient: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """−σ·∇ log p(label | x_t) in ε, 1/α of it in v (Dhariwal and Nichol 2021). The gradient at x_0 comes back to
        x_t as a factor α, which is right for latents of unit variance."""
        alpha, sigma = self._alpha_sigma(timestep)
        return -sigma * gradient * (1 if self.config.prediction == "v_prediction" else alpha)

    def _check_steps(self, scheduler: str, steps: int) -> None:
        check_name(scheduler, tuple(SAMPLERS), "scheduler")
        total = self.config.num_train_timesteps
        if not isinstance(steps, int) or not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps must be a whole number in 1…{total}, got {steps}")
        if scheduler in ("ddim", "pndm") and total % steps:
            # They step by T // n; timesteps that lie T / n apart would leave noise in the sample.
            raise ValueError(f"scheduler {scheduler} needs a number of steps that divides {total}, got {steps}")


def make_sampler(name: str, schedule: DDPMScheduler):
    """The diffusers scheduler of that name, over the noise schedule a model was trained with."""
    kind, options = SAMPLERS[name]
    return kind.from_config(schedule.config, **options)


def _check_names(attention: str, prediction: str, schedule: str) -> None:
    check_name(attention, ("full", "window_axial", "none"), "attention")
    check_name(prediction, ("epsilon", "v_prediction"), "prediction")
    check_name(schedule, SCHEDULES, "schedule")
    if prediction == "epsilon" and schedule == "squaredcos_cap_v2":
        # At the end of this schedule α is 5e-5: the estimate of x_0 would be the network's error times 20,000.
        raise ValueError("prediction epsilon cannot start at the end of squaredcos_cap_v2: take schedule scaled_linear")


def _check_sizes(latent_shape: tuple, widths: tuple[int, ...], head_dim: int, attends: list[bool]) -> None:
    halvings = len(widths) - 1
    if any(side % 2**halvings for side in latent_shape[1:]):
        raise ValueError(f"latents of {tuple(latent_shape[1:])} cannot be halved {halvings} times: fewer levels")
    if any(here and width % head_dim for here, width in zip(attends, widths, strict=True)):
        raise ValueError(f"block_out_channels {tuple(widths)} must be multiples of head_dim {head_dim}")
