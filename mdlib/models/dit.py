"""LightningDiT (Yao et al. 2025): a transformer that moves noise to latents along straight lines.

Network: DiT with AdaLN-Zero (Peebles and Xie 2023), RMSNorm, SwiGLU (Shazeer 2020) and rotary positions in two
dimensions (Su et al. 2021; Fang et al. 2024). Objective: flow matching (Lipman et al. 2023; Liu et al. 2023) along
x_t = t·x + (1 − t)·ε, so t = 1 is data; t from a logit-normal (Esser et al. 2024). Samplers are diffusers'.
Legend: B batch, D latent channels, h w latent grid, N tokens, d width of a token.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import apply_rotary_emb, get_2d_sincos_pos_embed_from_grid, get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mdlib.models.layers import UserEmbedding, check_choice, check_number, check_steps
from mdlib.models.pretrained import load_completely, load_weights, renamed
from mdlib.models.prior import LatentPrior, evenly_spread

COSINE_WEIGHT = 1.0  # of 1 − cos(velocity, its prediction) over the channels, added to the mean square error
TIME_STD = 1.0  # of logit(t) in training
RENAMES = (  # of published weights, in this order; an empty name is computed here
    (r"module\.", ""),
    (r"x_embedder\.proj\.", "x_embedder."),
    (r"t_embedder\.mlp\.", "t_embedder."),
    (r"y_embedder\.embedding_table\.weight", "classes"),
    (r"adaLN_modulation\.1\.", "modulation."),
    ("pos_embed", "positions"),
    (r"^feat_rope\..*", ""),
)


class Transformer:
    """The network of LightningDiT and VQDiffusion, mixed into a model."""

    def build(self, grid, num_users, num_conditions, width, depth, heads, qk_norm, outputs) -> None:
        """Add embeddings of time and users, blocks and the last layer, and initialise as in DiT: every block is the
        identity and the output is zero."""
        self.t_embedder = TimeEmbedder(width)
        self.users = UserEmbedding(num_users, num_conditions, width)
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, outputs)
        self.register_buffer("rotation", rotation(width // heads, *grid), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.users.weight, std=0.5)  # wider than DiT's: users must differ within a few hundred steps
        for layer in (self.t_embedder[0], self.t_embedder[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.modulation.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def run(self, x: Tensor, t: Tensor, users: Tensor) -> Tensor:
        """Tokens x (B, N, d), times t (B,) and users (B, d) → (B, N, outputs)."""
        c = F.silu(self.t_embedder(t) + users)  # (B, d)
        for block in self.blocks:
            if self.config.get("gradient_checkpointing") and torch.is_grad_enabled():
                # A block has no random numbers to repeat, and a CUDA graph cannot read their state.
                x = checkpoint(block, x, c, self.rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, self.rotation)
        return self.final_layer(x, c)


class LightningDiT(Transformer, LatentPrior, ModelMixin, ConfigMixin):
    """p(latents | user) by a velocity field.

    Args (the others are in `Prior`):
        patch_size: side of the square of latent positions that is one token.
        qk_norm: RMSNorm of queries and keys: more stable in half precision.
    """

    timesteps = 1000

    @register_to_config
    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_users: int,
        patch_size: int = 1,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        qk_norm: bool = False,
        label_dropout: float = 0.1,
        gradient_checkpointing: bool = False,
        num_conditions: int = 1,
    ):
        super().__init__()
        channels, height, width = latent_shape
        if not isinstance(patch_size, int) or patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"latents of {(height, width)} cannot be cut into patches of {patch_size}")
        check_number("label_dropout", label_dropout, 0, 1)
        self.latent_shape, self.null_label = tuple(latent_shape), num_users
        self.grid = (height // patch_size, width // patch_size)
        self.x_embedder = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)
        outputs = patch_size**2 * channels
        self.build(self.grid, num_users, num_conditions, hidden_size, depth, num_heads, qk_norm, outputs)
        self.register_buffer("positions", sine_positions(hidden_size, *self.grid), persistent=False)

    def forward(self, noisy: Tensor, t: Tensor, users: Tensor) -> Tensor:
        """Velocity (B, D, h, w) towards the data at latents (B, D, h, w), t () or (B,) in [0, 1], and users (B, d)."""
        x = self.x_embedder(noisy).flatten(2).transpose(1, 2)  # (B, N, d)
        x = x + self.positions.to(x.dtype)
        side = self.config.patch_size
        outputs = self.run(x, t.expand(len(noisy)), users)
        patches = outputs.unflatten(2, (side, side, -1)).unflatten(1, self.grid)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # from (B, h/p, w/p, p, p, D)

    def loss(self, latents, users, conditions=None):
        """Mean square error of the velocity + COSINE_WEIGHT·(1 − cosine) at one t per sample, see `Prior`."""
        users = self.drop_users(users)
        noise = torch.randn_like(latents)
        level = evenly_spread(len(latents), latents.device).clamp(1e-6, 1 - 1e-6)
        t = torch.sigmoid(TIME_STD * torch.special.ndtri(level))  # logit-normal
        along = t.view(-1, 1, 1, 1)
        velocity = latents - noise
        output = self(noise + along * velocity, t, self.users(users, conditions)).float()
        mse = F.mse_loss(output, velocity)
        # A new prior's velocity is zero, where the cosine's slope is 1/eps: at the default 1e-8 too much for float16.
        cosine = 1 - F.cosine_similarity(output, velocity, dim=1, eps=0.1).mean()
        return mse + COSINE_WEIGHT * cosine, {"velocity_mse": mse.detach(), "cosine": cosine.detach()}

    def sampler(self, *, scheduler: str = "heun", num_inference_steps: int = 25, timestep_shift: float = 1.0):
        """A diffusers flow-matching scheduler: even steps in t, then shifted. Heun's are diffusers' own: even ones from
        0 to .999, and a last one of a thousandth, without correction.

        Args:
            scheduler: "euler" (one network call per step) or "heun" (two, but one in the last step).
            timestep_shift: s of t → s·t / (1 + (s − 1)·t): below 1 more of the steps are near noise.
        """
        check_choice("scheduler", scheduler, ("euler", "heun"))
        check_steps(num_inference_steps, self.timesteps)
        check_number("timestep_shift", timestep_shift, 0.01, 100)
        if scheduler == "heun":
            sampler = FlowMatchHeunDiscreteScheduler()
            # LightningDiT shifts t, diffusers σ = 1 − t: the same curve with the reciprocal shift. As an argument above
            # it would be applied twice at the end of the path.
            sampler.register_to_config(shift=1 / timestep_shift)
            sampler.set_timesteps(num_inference_steps)
        else:
            sampler = FlowMatchEulerDiscreteScheduler()
            t = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)[:-1]
            t = timestep_shift * t / (1 + (timestep_shift - 1) * t)  # diffusers' own may begin a little above σ = 1
            sampler.set_timesteps(sigmas=(1 - t).tolist())
        return sampler

    def output(self, noisy: Tensor, timestep: Tensor, users: Tensor) -> Tensor:
        """The velocity towards noise: diffusers' flow runs in σ = 1 − t."""
        return -self(noisy, 1 - timestep / self.timesteps, users)

    def estimate(self, noisy: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        return noisy - timestep / self.timesteps * output

    def class_change(self, gradient: Tensor, timestep: Tensor) -> Tensor:
        """−σ/(α² + σ²)·∇ log p(label | x_0), α = 1 − σ: as in `LatentDiffusion`, but here α² + σ² is not 1."""
        sigma = timestep / self.timesteps
        return -sigma / (sigma**2 + (1 - sigma) ** 2) * gradient

    def load_published(self, source: str | Path) -> None:
        """Load the weights of a published LightningDiT (.pt, .ckpt or .safetensors). Every user starts at its null
        class. ValueError for a file of other sizes or of another model."""
        found = renamed(load_weights(source), RENAMES)
        if "classes" not in found or "positions" not in found:
            raise ValueError(f"{source} holds no LightningDiT: it has no class table or no pos_embed")
        tokens = found.pop("positions").shape[1]
        if tokens != self.positions.shape[1]:
            raise ValueError(f"{source} was trained on {tokens} tokens, this prior has {self.positions.shape[1]}")
        found["users.weight"] = found.pop("classes")[-1:].repeat(self.null_label + 1, 1)
        if self.config.num_conditions > 1:
            found["users.conditions"] = torch.zeros_like(self.users.conditions)
        load_completely(self, found, source)


class TimeEmbedder(nn.Sequential):
    """Vectors (B, width) of times (B,): 256 cosines and sines at frequencies from 1 to 1/10,000, then two layers."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        waves = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        return super().forward(waves.to(self[0].weight.dtype))


class Block(nn.Module):
    """Attention, then SwiGLU, each scaled, shifted and gated by the condition (AdaLN-Zero)."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = ModulatedNorm(width, eps=1e-6), ModulatedNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, rotation: Tensor) -> Tensor:
        """x (B, N, d), condition c (B, d) after its SiLU, rotation (N, d/heads/2, 2) → (B, N, d)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = torch.addcmul(x, gate, self.attn(self.norm1(x, shift, scale), rotation))
        return torch.addcmul(x, gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class ModulatedNorm(nn.RMSNorm):
    """(1 + scale)·RMSNorm(x) + shift. The weight joins the scale: it may be float32 where x is in half precision."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x (B, N, d), shift and scale (B, 1, d) → (B, N, d)."""
        return torch.addcmul(shift, F.rms_norm(x, self.normalized_shape, eps=self.eps), self.weight * (1 + scale))


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        if heads < 1 or width % heads or width // heads % 4:
            raise ValueError(f"hidden_size {width} over num_heads {heads} must be a multiple of 4")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else None for _ in range(2))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x (B, N, d), rotation (N, d/heads/2, 2) → (B, N, d)."""
        qk, v = self.qkv(x).unflatten(2, (-1, x.shape[2] // self.heads)).tensor_split((2 * self.heads,), dim=2)
        if self.q_norm:
            q, k = qk.float().chunk(2, dim=2)  # the norms' weights are float32 under autocast too
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        turns = torch.view_as_complex(rotation.float()).unsqueeze(0)
        q, k = apply_rotary_emb(qk, turns, use_real=False).to(v.dtype).transpose(1, 2).chunk(2, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))  # (B, heads, N, d/heads)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """silu(a)·b of one projection, then another (Shazeer 2020)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(4.0 * width * 2 / 3)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class FinalLayer(nn.Module):
    """Tokens to latent patches."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final, self.linear = ModulatedNorm(width, eps=1e-6), nn.Linear(width, outputs)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, d), condition c (B, d) after its SiLU → (B, N, outputs)."""
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))


def sine_positions(width: int, rows: int, columns: int) -> Tensor:
    """Fixed sine-cosine embedding (1, rows·columns, width): of the column in the first half, of the row in the second,
    as in MAE and DiT."""
    place = torch.arange(rows * columns)
    return get_2d_sincos_pos_embed_from_grid(width, (place % columns, place // columns)).float().unsqueeze(0)


def rotation(head_dim: int, rows: int, columns: int) -> Tensor:
    """Cosine and sine (rows·columns, head_dim/2, 2) of the rotation of neighbouring values: those of the first half of
    a head by the row, those of the second by the column (Su et al. 2021)."""
    place = torch.arange(rows * columns)
    frequencies = 10_000 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = torch.cat([axis.unsqueeze(1) * frequencies for axis in (place // columns, place % columns)], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
