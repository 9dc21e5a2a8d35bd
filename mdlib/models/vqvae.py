"""VQ-VAE (van den Oord et al. 2017): a convolutional codec whose latent is a grid of codebook indices.

Encoder and decoder are diffusers' blocks; the quantiser is our own because the codebook must not collapse: it
starts from data, follows an exponential moving average with Laplace smoothing, and revives codes nobody uses.
Legend: B batch, C image channels, H W pixels, h w latent grid, D code width, K codes.
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

from mdlib.models.codec import Codec
from mdlib.models.layers import all_sum, broadcast_from_first, gather


class VectorQuantizer(nn.Module):
    """Nearest-code quantiser with an EMA codebook (van den Oord et al. 2017, appendix A.1).

    Where several processes train (`mdlib.training.distributed`), the codebook follows the vectors of all and stays one.

    Args:
        num_codes: K.
        dim: D, the width of a code.
        decay: EMA decay of counts and sums.
        epsilon: Laplace smoothing of the counts.
        cosine: compare directions instead of points (ViT-VQGAN, Yu et al. 2022); codes then lie on the unit sphere.
        revive_below: a code whose EMA share of the batch is below this fraction of the uniform share 1/K is dead and
            is replaced by a vector of the current batch (Jukebox, Dhariwal et al. 2020).
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float = 0.95,
        epsilon: float = 1e-5,
        cosine: bool = False,
        revive_below: float = 0.1,
    ):
        super().__init__()
        self.decay, self.epsilon, self.cosine, self.revive_below = decay, epsilon, cosine, revive_below
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def num_codes(self) -> int:
        return self.codebook.shape[0]

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise z (B, D, h, w): straight-through codes (B, D, h, w), indices (B, h, w), commitment loss ()."""
        z = z.float()
        flat = self.project(z.movedim(1, -1).flatten(0, 2))  # (B·h·w, D): channels last, so a vector is a pixel
        if self.training and not self.initialised:
            self._start_from(flat.detach())
        index = self.nearest(flat)
        if self.training:
            self._update(flat.detach(), index)
        indices = index.view(z.shape[0], *z.shape[2:])  # (B, h, w)
        codes = self.lookup(indices)
        target = self.project(z.movedim(1, -1)).movedim(-1, 1)
        commitment = F.mse_loss(target, codes.detach())
        return target + (codes - target).detach(), indices, commitment

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (..., D) as they are compared with the codes."""
        return F.normalize(vectors, dim=-1) if self.cosine else vectors

    def nearest(self, flat: torch.Tensor) -> torch.Tensor:
        """Index (N,) of the code nearest to each row of flat (N, D); |z−e|² without its term that all codes share."""
        with torch.autocast(flat.device.type, enabled=False):  # half precision would confuse close codes
            distance = self.codebook.square().sum(1) - 2 * flat.float() @ self.codebook.T  # (N, K)
        return distance.argmin(1)

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes (B, D, h, w) of indices (B, h, w)."""
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def _start_from(self, flat: torch.Tensor) -> None:
        self.codebook.copy_(self._draw(flat, self.num_codes))
        self.sums.copy_(self.codebook)
        self.counts.fill_(1)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, flat: torch.Tensor, index: torch.Tensor) -> None:
        """One EMA step towards the mean of the vectors each code took, then revive the dead codes."""
        counts = all_sum(torch.bincount(index, minlength=self.num_codes).to(flat.dtype))
        sums = all_sum(torch.zeros_like(self.sums).index_add_(0, index, flat))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + self.num_codes * self.epsilon) * total
        self.codebook.copy_(self.project(self.sums / smoothed.unsqueeze(1)))
        dead = self.counts < self.revive_below * total / self.num_codes
        if dead.any():
            fresh = self._draw(flat, int(dead.sum()))
            self.codebook[dead] = fresh
            # The revived code starts with an average share: with a count near zero it would be dead again at once.
            self.counts[dead] = total / self.num_codes
            self.sums[dead] = fresh * (total / self.num_codes)

    @staticmethod
    def _draw(flat: torch.Tensor, n: int) -> torch.Tensor:
        """n rows of flat (N, D) of all processes, without repetition where N allows; in every process the same."""
        flat = gather(flat)
        if len(flat) >= n:
            index = torch.randperm(len(flat), device=flat.device)[:n]
        else:
            index = torch.randint(len(flat), (n,), device=flat.device)
        broadcast_from_first([index])
        return flat[index]


class VQVAE(Codec, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module when it loads
    """Codec: image (B, C, H, W) in [−1, 1] ↔ tokens (B, h, w) ↔ normalised latents (B, D, h, w).

    Args:
        image_size: H = W.
        in_channels: C, 1 for intensity or 3 for RGB.
        patch_size: rows and columns folded into channels before the first convolution (space to depth): (2, 2)
            quarters its cost, and unequal sides give Doppler and time different resolutions.
        block_out_channels: widths of the levels; n levels down-sample n − 1 times.
        layers_per_block: residual blocks a level.
        norm_num_groups: groups of the group norms.
        num_codes, code_dim: K and D.
        decay, cosine, revive_below: see `VectorQuantizer`.
        commitment_weight: β of the commitment loss.
        perceptual_weight: weight of LPIPS; 0 leaves it out (and needs no weights on disk).
        perceptual_net: LPIPS backbone, `squeeze`, `alex` or `vgg`.
        mid_attention: self-attention at the coarsest level.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 1,
        patch_size: tuple[int, int] = (1, 1),
        block_out_channels: tuple[int, ...] = (32, 64, 128, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        num_codes: int = 256,
        code_dim: int = 32,
        decay: float = 0.95,
        cosine: bool = False,
        revive_below: float = 0.1,
        commitment_weight: float = 0.25,
        perceptual_weight: float = 0.0,
        perceptual_net: str = "squeeze",
        mid_attention: bool = True,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        grid = self._grid(image_size, patch_size, len(widths))
        shared = dict(
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_attention,
        )
        channels = in_channels * self.patch[0] * self.patch[1]
        down, up = ("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths)
        self.encoder = Encoder(channels, code_dim, down_block_types=down, double_z=False, **shared)
        self.quantizer = VectorQuantizer(num_codes, code_dim, decay, cosine=cosine, revive_below=revive_below)
        self.decoder = Decoder(code_dim, channels, up_block_types=up, **shared)
        self._finish(code_dim, grid)

    @property
    def token_shape(self) -> tuple[int, int]:
        """(h, w) of the token grid: rows Doppler, columns time."""
        return self.latent_shape[1:]

    @property
    def num_codes(self) -> int:
        return self.quantizer.num_codes

    def loss(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstruction (mean square) + β·commitment [+ teachers] for images (B, C, H, W); scalar logs beside it."""
        codes, indices, commitment = self.quantizer(self._features(images))
        output = self._pixels(codes)
        mse = F.mse_loss(output, images)
        logs = {
            "mse": mse,
            "commitment": commitment,
            "psnr_db": -10 * torch.log10(mse / 4),
            **self._usage(indices),
        }
        loss = mse + self.config.commitment_weight * commitment + self._taught(output, images, logs)
        return loss, {name: value.detach() for name, value in logs.items()}

    def encode_tokens(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, C, H, W) in [−1, 1] → tokens (B, h, w), long."""
        flat = self.quantizer.project(self._features(images).float().movedim(1, -1))  # (B, h, w, D)
        return self.quantizer.nearest(flat.flatten(0, 2)).view(flat.shape[:3])

    def decode_tokens(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, h, w) → images (B, C, H, W), clipped to [−1, 1]."""
        return self._pixels(self.quantizer.lookup(tokens)).clamp(-1, 1)

    def encode(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images → quantised latents (B, D, h, w), normalised per channel (see `calibrate`)."""
        return self.stats.normalise(self.raw_latents(images))

    def decode(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised latents (B, D, h, w) → images; each vector is first snapped to its nearest code, through which a
        gradient passes as if it were not there."""
        vectors = self.quantizer.project(self.stats.denormalise(latents).movedim(1, -1))
        indices = self.quantizer.nearest(vectors.flatten(0, 2)).view(vectors.shape[:3])
        codes, vectors = self.quantizer.lookup(indices), vectors.movedim(-1, 1)
        return self._pixels(codes + (vectors - vectors.detach())).clamp(-1, 1)

    def raw_latents(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.quantizer.lookup(self.encode_tokens(images))

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder(self._fold(images))  # (B, D, h, w)

    def _pixels(self, codes: torch.Tensor) -> torch.Tensor:
        return self._unfold(self.decoder(codes))

    def _usage(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Share of codes used, perplexity and entropy (nats) of one batch of indices, counted."""
        share = torch.bincount(indices.flatten(), minlength=self.num_codes).float() / indices.numel()
        entropy = torch.special.entr(share).sum()
        return {"usage": (share > 0).float().mean(), "perplexity": entropy.exp(), "entropy": entropy}
