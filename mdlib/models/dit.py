"""LightningDiT: a transformer that carries noise into latents along straight lines, conditional on the user.

Network: Peebles and Xie 2023 (DiT, AdaLN-Zero) with RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020) and
rotary positions in two dimensions (Su et al. 2021; Fang et al. 2024), as put together by Yao et al. 2025. Objective:
flow matching (Lipman et al. 2023; Liu et al. 2023) along x_t = t·x + (1 − t)·ε, so t = 1 is data; t from a
logit-normal (Esser et al. 2024). Samplers are diffusers'.
Legend: B batch, D latent channels, h w latent grid, N tokens, d width of a token.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.utils.checkpoint import checkpoint

from mdlib.models.denoising import LatentPrior, check_name, evenly_spread
from mdlib.models.layers import UserEmbedding, drop_labels
from mdlib.models.pretrained import load_completely, load_weights

SAMPLERS = ("euler", "heun")
SIZES = {
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}
FREQUENCIES = 256  # of the embedding of t


class LightningDiT(LatentPrior, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module
    """p(latents | user) by a velocity field.

    Args:
        latent_shape: (D, h, w) of the codec.
        num_users: n; label n is the null label of classifier-free guidance.
        num_conditions: carrying conditions, see `mdlib.models.layers.UserEmbedding`.
        patch_size: side of the square of latent positions that is one token, 1 or 2 in the published sizes.
        hidden_size: d, a multiple of num_heads; d / num_heads is a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: the SwiGLU's hidden width is 2/3 of mlp_ratio·d.
        qk_norm: RMSNorm of queries and keys: steadier in half precision.
        cosine_weight: of 1 − cos(velocity, its prediction) over the channels, beside the mean square error.
        time_mean, time_std: of logit(t) in training.
        label_dropout: share of training samples whose label is the null label.
        gradient_checkpointing: recompute the blocks in the backward pass: less memory, a third more time.

    Raises:
        ValueError: sizes that do not fit.
    """

    @register_to_config
    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_users: int,
        patch_size: int = 1,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        cosine_weight: float = 1.0,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        label_dropout: float = 0.1,
        gradient_checkpointing: bool = False,
        num_conditions: int = 1,
    ):
        super().__init__()
        _check_sizes(latent_shape, patch_size, hidden_size, num_heads)
        if not 0 <= label_dropout <= 1 or cosine_weight < 0 or time_std <= 0:
            raise ValueError(
                "label_dropout must lie in [0, 1], cosine_weight be 0 or more and time_std above 0, got "
                f"{label_dropout}, {cosine_weight}, {time_std}"
            )
        self.latent_shape, self.null_label = tuple(latent_shape), num_users
        channels = self.latent_shape[0]
        rows, columns = (side // patch_size for side in self.latent_shape[1:])
        self.grid = (rows, columns)
        self.x_embedder = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.users = UserEmbedding(num_users, num_conditions, hidden_size)
        hidden = int(mlp_ratio * hidden_size * 2 / 3)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, hidden, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels)
        self.register_buffer("positions", sine_positions(hidden_size, rows, columns), persistent=False)
        self.register_buffer("rotation", rotation(hidden_size // num_heads, rows, columns), persistent=False)
        initialise(self)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """Velocity (B, D, h, w) towards the data at latents (B, D, h, w), t () or (B,) in [0, 1], and users (B, d)."""
        x = self.x_embedder(noisy).flatten(2).transpose(1, 2) + self.positions  # (B, N, d)
        c = self.t_embedder(time_embedding(t.expand(len(noisy))).to(users.dtype)) + users  # (B, d)
        c = F.silu(c)
        for block in self.blocks:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, self.rotation, use_reentrant=False)
            else:
                x = block(x, c, self.rotation)
        return self._unpatch(self.final_layer(x, c))

    def _unpatch(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, p·p·D) → (B, D, h, w)."""
        side = self.config.patch_size
        parts = tokens.unflatten(2, (side, side, -1)).unflatten(1, self.grid)  # (B, h/p, w/p, p, p, D)
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def loss(
        self, latents: torch.Tensor, users: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean square error of the velocity + cosine_weight·(1 − cosine), at one t a sample, for latents (B, D, h, w),
        users (B,) and conditions (B,)."""
        self._check_shape(latents)
        users = drop_labels(users, self.null_label, self.config.label_dropout if self.training else 0.0)
        noise = torch.randn_like(latents)
        t = self._times(len(latents), latents.device)
        along = t.view(-1, 1, 1, 1)
        velocity = latents - noise
        made = self(noise + along * velocity, t, self.users(users, conditions)).float()
        mse = F.mse_loss(made, velocity)
        # A prior begins at a velocity of zero, where the cosine's slope is 1/eps: 1e8 as a rule, too much for float16.
        cosine = 1 - F.cosine_similarity(made, velocity, dim=1, eps=0.1).mean()
        return mse + self.config.cosine_weight * cosine, {"velocity_mse": mse.detach(), "cosine": cosine.detach()}

    def _times(self, count: int, device: torch.device) -> torch.Tensor:
        """t (count,): logit-normal, by the quantile function at evenly spread shares."""
        share = evenly_spread(count, device).clamp(1e-6, 1 - 1e-6)
        return torch.sigmoid(self.config.time_mean + self.config.time_std * torch.special.ndtri(share))

    @torch.no_grad()
    def sample(
        self,
        users: torch.Tensor,
        *,
        conditions: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 25,
        scheduler: str = "heun",
        timestep_shift: float = 1.0,
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
            guidance_interval: guide only where the share of noise 1 − t lies in it (Kynkäänniemi et al. 2024).
            num_inference_steps: steps from noise to data.
            scheduler: "euler" (a network call a step) or "heun" (two, but for the last).
            timestep_shift: s of t → s·t / (1 + (s − 1)·t): below 1 more of the steps are taken in noise.
            classifier, classifier_scale, towards, share, on_step: as in `LatentDiffusion.sample`; on_step is
                called after every network call.

        Raises:
            ValueError: an option outside its range, a user outside 0…num_users, too few generators.
        """
        self._check_request(
            users, conditions, generator, guidance_scale, guidance_interval, classifier, classifier_scale
        )
        _check_steps(scheduler, num_inference_steps, timestep_shift)
        if not len(users):
            return torch.empty(0, *self.latent_shape, device=users.device)
        sampler = make_sampler(scheduler, num_inference_steps, timestep_shift, users.device)
        guidance = (guidance_scale, guidance_interval, classifier, classifier_scale)
        return self._walk(sampler, users, conditions, generator, *guidance, towards, share, on_step)

    def _output(self, noisy: torch.Tensor, timestep: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """diffusers walks towards σ = 1 − t = 0, so its velocity is the other way round."""
        return -self(noisy, 1 - timestep / self.timesteps, users)

    def estimate(self, noisy: torch.Tensor, output: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return noisy - timestep / self.timesteps * output

    def _class_change(self, gradient: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """−σ/(α² + σ²)·∇ log p(label | x_0) with α = 1 − σ: that of `LatentDiffusion`, written for a straight path,
        where α² + σ² is not 1."""
        sigma = timestep / self.timesteps
        return -sigma / (sigma**2 + (1 - sigma) ** 2) * gradient

    def load_published(self, source: str | Path) -> None:
        """Take the weights of a published LightningDiT of these sizes (.pt, .ckpt or .safetensors).

        Its classes are none of ours: every user begins at its null class, and learns to differ.

        Raises:
            ValueError: a file of other sizes or of another model, told with the names that do not fit.
        """
        found = renamed(load_weights(source))
        if "classes" not in found or "positions" not in found:
            raise ValueError(f"{source} holds no LightningDiT: it has no class table or no pos_embed")
        tokens = found.pop("positions").shape[1]
        if tokens != self.positions.shape[1]:
            raise ValueError(f"{source} was made for {tokens} tokens, this prior has {self.positions.shape[1]}")
        found["users.weight"] = found.pop("classes")[-1:].repeat(self.null_label + 1, 1)
        if self.config.num_conditions > 1:
            found["users.conditions"] = torch.zeros_like(self.users.conditions)
        load_completely(self, found, source)


class Block(nn.Module):
    """Attention, then SwiGLU, each scaled, shifted and gated by the condition (AdaLN-Zero)."""

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = ModulatedNorm(width), ModulatedNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = SwiGLU(width, hidden)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, c: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """x (B, N, d), condition c (B, d) after its SiLU, rotation (N, d/heads/2) → (B, N, d)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate, self.attn(self.norm1(x, shift, scale), rotation))
        return torch.addcmul(x, gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class ModulatedNorm(nn.Module):
    """(1 + scale)·RMSNorm(x) + shift, in two passes over x: the norm's own weight is small beside x and joins the
    scale."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """x (B, N, d), shift and scale (B, 1, d) → (B, N, d)."""
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return torch.addcmul(shift, x * (mean_square + self.eps).rsqrt(), self.weight * (1 + scale))


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None for _ in range(2))

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """(B, N, d) → (B, N, d)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d/heads)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.q_norm:
            q, k = qk.float().unbind(2)  # the norms' weights are float32 under autocast too
            qk = torch.stack([self.q_norm(q), self.k_norm(k)], dim=2)
        q, k = rotate(qk, rotation).to(v.dtype).unbind(2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """silu(a)·b of one projection, then another (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w3(GatedSiLU.apply(self.w12(x)))


class GatedSiLU(torch.autograd.Function):
    """silu(a)·b of (…, 2·hidden) = (a, b). Autograd's own would keep silu(a) as well, and put the gradient together
    from two halves."""

    @staticmethod
    def forward(context, both: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(both)
        a, b = both.chunk(2, dim=-1)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        (both,) = context.saved_tensors
        a, b = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        of_a, of_b = result.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(a), out=of_b)
        of_a.copy_(torch.ops.aten.silu_backward(gradient * b, a))
        return result


class FinalLayer(nn.Module):
    """Tokens to latent patches."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final, self.linear = ModulatedNorm(width), nn.Linear(width, outputs)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x (B, N, d), condition c (B, d) after its SiLU → (B, N, outputs)."""
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))


def dit_s(latent_shape: tuple[int, int, int], num_users: int, **options) -> LightningDiT:
    """LightningDiT-S: 12 blocks of 384, 6 heads; 33 M parameters."""
    return LightningDiT(latent_shape, num_users, **SIZES["S"], **options)


def dit_b(latent_shape: tuple[int, int, int], num_users: int, **options) -> LightningDiT:
    """LightningDiT-B: 12 blocks of 768, 12 heads; 130 M parameters."""
    return LightningDiT(latent_shape, num_users, **SIZES["B"], **options)


def dit_l(latent_shape: tuple[int, int, int], num_users: int, **options) -> LightningDiT:
    """LightningDiT-L: 24 blocks of 1024, 16 heads; 458 M parameters."""
    return LightningDiT(latent_shape, num_users, **SIZES["L"], **options)


def dit_xl(latent_shape: tuple[int, int, int], num_users: int, **options) -> LightningDiT:
    """LightningDiT-XL: 28 blocks of 1152, 16 heads; 675 M parameters."""
    return LightningDiT(latent_shape, num_users, **SIZES["XL"], **options)


def make_sampler(name: str, steps: int, timestep_shift: float = 1.0, device: torch.device | str = "cpu"):
    """A diffusers flow-matching scheduler with its timesteps set: even steps in t, then shifted. Heun's are diffusers'
    own: even ones from 0 to .999, and a last one of a thousandth, without correction."""
    if name == "heun":
        sampler = FlowMatchHeunDiscreteScheduler()
        # LightningDiT shifts t, diffusers σ = 1 − t: the same curve with the reciprocal shift. Given above, it would
        # bend the end of the path twice.
        sampler.register_to_config(shift=1 / timestep_shift)
        sampler.set_timesteps(steps, device=device)
        return sampler
    sampler = FlowMatchEulerDiscreteScheduler()
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1]
    t = timestep_shift * t / (1 + (timestep_shift - 1) * t)  # diffusers' own shift may begin a little above σ = 1
    sampler.set_timesteps(sigmas=(1 - t).tolist(), device=device)
    return sampler


def initialise(model: nn.Module) -> None:
    """As in DiT: every block of `model` begins as the identity and its output as zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.users.weight, std=0.5)  # wider than DiT's: users must differ within a few hundred steps
    for layer in (model.t_embedder[0], model.t_embedder[2]):
        nn.init.normal_(layer.weight, std=0.02)
    for part in (*model.blocks, model.final_layer):
        nn.init.zeros_(part.modulation.weight)
    nn.init.zeros_(model.final_layer.linear.weight)


def time_embedding(t: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines (B, 256) of t (B,) in [0, 1] at frequencies from 1 down to 1/10,000, as in DiT."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = t.unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sine_positions(width: int, rows: int, columns: int) -> torch.Tensor:
    """Fixed sine-cosine embedding (1, rows·columns, width): of the column in the first half, of the row in the second,
    as in MAE and DiT."""
    place = torch.arange(rows * columns, dtype=torch.float64)
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [axis.unsqueeze(1) * frequencies for axis in (place % columns, place // columns)]
    return torch.cat([part for axis in angles for part in (axis.sin(), axis.cos())], dim=1).float().unsqueeze(0)


def rotation(head_dim: int, rows: int, columns: int) -> torch.Tensor:
    """Cosine and sine (rows·columns, head_dim/2, 2) by which pairs of neighbouring values turn: those of the first half
    of a head with the row, those of the second with the column (Su et al. 2021)."""
    frequencies = 10_000 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    row, column = (torch.arange(side).unsqueeze(1) * frequencies for side in (rows, columns))
    angles = torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of x (B, N, …, d/heads) by `rotation` (N, d/heads/2, 2): a product of complex numbers, float32."""
    turn = torch.view_as_complex(rotation.float()).view(1, len(rotation), *[1] * (x.dim() - 3), -1)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def renamed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published LightningDiT's tensors under the names they have here, without those that are computed."""
    names = {
        "x_embedder.proj.": "x_embedder.",
        "t_embedder.mlp.": "t_embedder.",
        "y_embedder.embedding_table.weight": "classes",
        "adaLN_modulation.1.": "modulation.",
        "pos_embed": "positions",
        "module.": "",
    }
    result = {}
    for key, value in found.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        if not key.startswith("feat_rope."):
            result[key] = value
    return result


def _check_steps(scheduler: str, steps: int, shift: float) -> None:
    check_name(scheduler, SAMPLERS, "scheduler")
    if not isinstance(steps, int) or not 1 <= steps <= LatentPrior.timesteps:
        raise ValueError(f"num_inference_steps must be a whole number in 1…{LatentPrior.timesteps}, got {steps}")
    if not isinstance(shift, int | float) or not 0.01 <= shift <= 100:
        raise ValueError(f"timestep_shift must lie in [0.01, 100], got {shift}")


def _check_sizes(latent_shape: tuple, patch: int, width: int, heads: int) -> None:
    if not isinstance(patch, int) or patch < 1 or any(side % patch for side in latent_shape[1:]):
        raise ValueError(f"latents of {tuple(latent_shape[1:])} cannot be cut into patches of {patch}")
    if heads < 1 or width % heads or width // heads % 4:
        raise ValueError(f"hidden_size {width} over num_heads {heads} must be a multiple of 4")
