"""Diffusion over a codec's latents by diffusers' UNet, schedules and samplers, conditioned on the user.

Ho et al. 2020 (DDPM), Salimans and Ho 2022 (v-prediction), Hang et al. 2023 (Min-SNR weights).
Legend: B batch, D latent channels, h w latent grid (Doppler × time), x_t = α_t·x_0 + σ_t·ε.
"""

import copy

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, ModelMixin, PNDMScheduler, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from mdlib.models.layers import UserEmbedding, check_choice, check_number, check_steps
from mdlib.models.prior import LatentPrior, evenly_spread

# timestep_spacing "trailing" starts at pure noise (Lin et al. 2024). A clipped sample would be wrong: latents have unit
# variance, not a range.
SAMPLERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "lambda_min_clipped": -5.1}),
}
# First and last β; the cosine has none.
SCHEDULES = {"squaredcos_cap_v2": (0.0, 0.0), "linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012)}


class LatentDiffusion(LatentPrior, ModelMixin, ConfigMixin):
    """p(latents | user) by denoising.

    Args (the others are in `Prior`):
        block_out_channels: widths of the levels; n levels down-sample n − 1 times.
        layers_per_block, norm_num_groups, dropout: residual blocks per level, groups of their norms, their dropout.
        attention: "full" (at all levels but the first), "window_axial" (windows in the first half of the levels, both
            axes in the others and the middle) or "none". For n positions full attention costs O(n²), windows of w × w
            (Liu et al. 2021, without shifts) O(n·w²), and axial attention (Ho et al. 2019) O(n·√n).
        window: w in latent positions.
        head_dim: channels of an attention head.
        prediction: what the network predicts, "epsilon" or "v_prediction".
        schedule: of the noise, "squaredcos_cap_v2" (also called "cosine", Nichol and Dhariwal 2021), "linear" or
            "scaled_linear".
        num_train_timesteps: T.
        min_snr_gamma: γ of the Min-SNR weights (Hang et al. 2023).
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
        check_choice("attention", attention, ("full", "window_axial", "none"))
        check_choice("prediction", prediction, ("epsilon", "v_prediction"))
        if schedule == "cosine":
            schedule = "squaredcos_cap_v2"
            self.register_to_config(schedule=schedule)  # earlier versions load it too
        check_choice("schedule", schedule, tuple(SCHEDULES))
        if prediction == "epsilon" and schedule == "squaredcos_cap_v2":
            # At the end of this schedule α is 5e-5: the estimate of x_0 would be the network's error times 20,000.
            raise ValueError("prediction epsilon fails at the end of squaredcos_cap_v2: choose schedule scaled_linear")
        check_number("label_dropout", label_dropout, 0, 1)
        self.latent_shape, self.null_label = tuple(latent_shape), num_users
        self.timesteps, self.velocity = num_train_timesteps, prediction == "v_prediction"
        halvings = len(block_out_channels) - 1
        if any(side % 2**halvings for side in self.latent_shape[1:]):
            raise ValueError(f"latents of {self.latent_shape[1:]} cannot be halved {halvings} times: use fewer levels")
        sides = [side >> level for level in range((halvings + 2) // 2) for side in self.latent_shape[1:]]
        if attention == "window_axial" and window > 0 and any(side % min(window, side) for side in sides):
            raise ValueError(f"window {window} must divide the sides of the latents at its levels, {sides}")
        attends = [attention == "window_axial" or (attention == "full" and level > 0) for level in range(halvings + 1)]
        if any(here and width % head_dim for here, width in zip(attends, block_out_channels, strict=True)):
            raise ValueError(f"block_out_channels {block_out_channels} must be multiples of head_dim {head_dim}")
        self.unet = UNet(
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
            resnet_time_scale_shift="scale_shift",  # time and user also scale every feature
            class_embed_type="identity",
        )
        if attention == "window_axial":
            use_window_axial(self.unet, window)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        # Not the UNet's own table, which takes labels: interpolation needs vectors between those of two users.
        self.users = UserEmbedding(num_users, num_conditions, 4 * block_out_channels[0])
        nn.init.normal_(self.users.weight, std=0.5)
        # The usual values for a thousand timesteps; with fewer, each adds more noise.
        first, last = (beta * 1000 / num_train_timesteps for beta in SCHEDULES[schedule])
        self.schedule = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=first,
            beta_end=last,
            beta_schedule=schedule,
            prediction_type=prediction,
            clip_sample=False,
            timestep_spacing="trailing",
        )
        self.alphas_cumprod = self.schedule.alphas_cumprod  # stays on the CPU; the schedule moves its own

    def forward(self, noisy: Tensor, timesteps: Tensor, users: Tensor) -> Tensor:
        """ε or v (B, D, h, w) at noisy latents (B, D, h, w), timesteps (B,) and user embeddings (B, E)."""
        return self.unet(noisy, timesteps, class_labels=users).sample

    def loss(self, latents, users, conditions=None):
        """Min-SNR weighted mean square error at one timestep per sample, see `Prior`."""
        users = self.drop_users(users)
        noise = torch.randn_like(latents)
        timesteps = (evenly_spread(len(latents), latents.device) * self.timesteps).long().clamp_max(self.timesteps - 1)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.get_velocity(latents, noise, timesteps) if self.velocity else noise
        output = self(noisy, timesteps, self.users(users, conditions)).float()
        error = (output - target).square().mean((1, 2, 3))  # (B,)
        snr = compute_snr(self.schedule, timesteps)
        # min(SNR, γ) in x_0, written for the error in ε or v.
        weighted = snr.clamp_max(self.config.min_snr_gamma) / (snr + 1 if self.velocity else snr) * error
        return weighted.mean(), {"denoising_mse": error.mean().detach()}

    def sampler(self, *, scheduler: str = "dpm++", num_inference_steps: int = 20):
        """The diffusers scheduler "ddpm", "ddim", "pndm" or "dpm++" (DPM-Solver++, Lu et al. 2022) over the noise
        schedule of training, with its timesteps set."""
        check_choice("scheduler", scheduler, tuple(SAMPLERS))
        check_steps(num_inference_steps, self.timesteps)
        if scheduler in ("ddim", "pndm") and self.timesteps % num_inference_steps:
            # They step by T // n; timesteps that lie T / n apart would leave noise in the sample.
            wanted = f"a number of steps that divides {self.timesteps}, got {num_inference_steps}"
            raise ValueError(f"scheduler {scheduler} needs {wanted}")
        kind, options = SAMPLERS[scheduler]
        sampler = kind.from_config(self.schedule.config, **options)
        sampler.set_timesteps(num_inference_steps)
        if sampler.timesteps[-1] < 0:
            raise ValueError(f"{scheduler} cannot take {num_inference_steps} steps: choose another number")
        return sampler

    def output(self, noisy: Tensor, timestep: Tensor, users: Tensor) -> Tensor:
        return self(noisy, timestep, users)

    def estimate(self, noisy: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(timestep)
        return alpha * noisy - sigma * output if self.velocity else (noisy - sigma * output) / alpha

    def class_change(self, gradient: Tensor, timestep: Tensor) -> Tensor:
        """−σ·∇ log p(label | x_t) in ε, 1/α of it in v (Dhariwal and Nichol 2021). The gradient at x_0 is that at x_t
        times α, which is right for latents of unit variance."""
        alpha, sigma = self._alpha_sigma(timestep)
        return -sigma * gradient * (1 if self.velocity else alpha)

    def _alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        alpha_squared = self.alphas_cumprod[timestep]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


class UNet(UNet2DModel):
    """diffusers' UNet without its search through all parameters for their dtype, twice a call."""

    dtype = property(lambda self: self.conv_in.weight.dtype)


class TiledAttnProcessor:
    """Processor of diffusers' Attention in which a position attends to its own tile of rows × columns positions. A side
    of 0 spans the grid."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns

    def __call__(self, attn: Attention, hidden_states: Tensor, **_) -> Tensor:
        """(B, C, h, w) → (B, C, h, w)."""
        height, width = hidden_states.shape[2:]
        rows, columns = min(self.rows or height, height), min(self.columns or width, width)
        normed = attn.group_norm(hidden_states).permute(0, 2, 3, 1)
        tiles = normed.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)  # (B, h/r, w/c, r, c, C)
        # Tiles stand in the batch: with more than four dimensions torch has no fused attention.
        flat = tiles.flatten(3, 4).flatten(0, 2)  # (B·tiles, r·c, C)
        shape = (*flat.shape[:2], attn.heads, -1)
        query, key, value = (part(flat).view(shape).transpose(1, 2) for part in (attn.to_q, attn.to_k, attn.to_v))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B·tiles, heads, r·c, d)
        output = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        grid = output.view(tiles.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return (grid + hidden_states if attn.residual_connection else grid) / attn.rescale_output_factor


class AxialAttention(nn.Module):
    """Attention along time, then along Doppler, each with its own norm, projections and residual."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.time, self.doppler = attention, copy.deepcopy(attention)
        for part in self.doppler.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        self.time.set_processor(TiledAttnProcessor(1, 0))
        self.doppler.set_processor(TiledAttnProcessor(0, 1))

    def forward(self, hidden_states: Tensor, **_) -> Tensor:
        """(B, C, h, w) → (B, C, h, w)."""
        return self.doppler(self.time(hidden_states))


def use_window_axial(unet: UNet2DModel, window: int) -> None:
    """Give `unet` window attention in the first half of its levels and axial attention in the second and the middle."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    levels = len(unet.down_blocks)
    pairs = zip(unet.down_blocks, reversed(unet.up_blocks), strict=True)  # of each level, the finest first
    for place, block in enumerate([*(block for pair in pairs for block in pair), unet.mid_block]):
        for number, attention in enumerate(getattr(block, "attentions", None) or ()):
            if place < levels + levels % 2:
                attention.set_processor(TiledAttnProcessor(window, window))
            else:
                block.attentions[number] = AxialAttention(attention)
