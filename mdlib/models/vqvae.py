"""VQ-VAE (van den Oord et al. 2017): a convolutional codec whose latent is a grid of codebook indices.

The quantiser is our own because the codebook must not collapse: it starts from data, follows an exponential moving
average with Laplace smoothing, and replaces unused codes.
Legend: B batch, C image channels, H W pixels, h w latent grid, D code width, K codes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from diffusers import ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from mdlib.models.codec import Codec
from mdlib.models.layers import all_sum, broadcast_from_first
from mdlib.models.pretrained import load_completely

EPSILON = 1e-5  # Laplace smoothing of the counts


class VectorQuantizer(nn.Module):
    """Nearest-code quantiser with an EMA codebook (van den Oord et al. 2017, appendix A.1). The codebook follows the
    vectors of all processes that train together.

    Args:
        num_codes, dim: K and D.
        decay: EMA decay of counts and sums.
        revive_below: fraction of the average use below which a code is reset, see `_reset_unused_codes`.
    """

    def __init__(self, num_codes: int, dim: int, decay: float = 0.95, revive_below: float = 0.1):
        super().__init__()
        self.num_codes, self.decay, self.revive_below = num_codes, decay, revive_below
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("initialised", torch.tensor(False))
        self._started = False  # copy of `initialised`, which takes a wait for the GPU to read

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._started = False

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise z (B, D, h, w): straight-through codes (B, D, h, w), indices (B, h, w), commitment loss ()."""
        z = z.float()
        flat = z.detach().movedim(1, -1).flatten(0, 2)  # (B·h·w, D): channels last, so a vector is a pixel
        if self.training and not self._started:
            if not self.initialised:  # the codebook starts with random rows of the data
                self.codebook.copy_(self._sample_rows(flat))
                self.sums.copy_(self.codebook)
                self.counts.fill_(1)
                self.initialised.fill_(True)
            self._started = True
        indices = self.nearest(z)
        if self.training:
            self._update(flat, indices.flatten())
        codes = self.lookup(indices)
        return z + (codes - z).detach(), indices, F.mse_loss(z, codes.detach())

    def nearest(self, z: Tensor) -> Tensor:
        """Indices (B, h, w) of the codes nearest to z (B, D, h, w): argmin |z−e|² = argmin |e|² − 2·z·e."""
        flat = z.movedim(1, -1).flatten(0, 2)
        with torch.autocast(z.device.type, enabled=False):  # half precision would confuse close codes
            codebook = self.codebook.float()
            distance = codebook.square().sum(1) - 2 * flat.float() @ codebook.T  # (B·h·w, K)
        return distance.argmin(1).view(z.shape[0], *z.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, D, h, w) of indices (B, h, w)."""
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def count(self, index: Tensor) -> Tensor:
        """How often index (N,) holds each code: (K,), without the wait for the GPU that `torch.bincount` costs."""
        return torch.zeros_like(self.counts).index_add_(0, index, torch.ones_like(index, dtype=self.counts.dtype))

    @torch.no_grad()
    def _update(self, flat: Tensor, index: Tensor) -> None:
        """Move each code towards the mean of the rows of flat (N, D) that index (N,) assigns to it (one EMA step)."""
        counts = all_sum(self.count(index))
        sums = all_sum(torch.zeros_like(self.sums).index_add_(0, index, flat))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + EPSILON) / (total + self.num_codes * EPSILON) * total
        self.codebook.copy_(self.sums / smoothed.unsqueeze(1))
        self._reset_unused_codes(flat)

    def _reset_unused_codes(self, flat: Tensor) -> None:
        """Reset rule of the codebook (Jukebox, Dhariwal et al. 2020), applied after each training step: a code whose
        moving count is below `revive_below` times the average becomes a random vector of the batch, flat (N, D), and
        its count the average. With a count near zero the next step would reset it again."""
        average = self.counts.sum() / self.num_codes
        unused = self.counts < self.revive_below * self.counts.sum() / self.num_codes  # (K,)
        # The n-th unused code takes the n-th sampled row. Masks instead of indexing: the GPU is not waited for.
        rows = self._sample_rows(flat)[(unused.cumsum(0) - 1).clamp_min(0)]  # (K, D)
        self.codebook.copy_(torch.where(unused[:, None], rows, self.codebook))
        self.counts.copy_(torch.where(unused, average, self.counts))
        self.sums.copy_(torch.where(unused[:, None], rows * average, self.sums))

    def _sample_rows(self, flat: Tensor) -> Tensor:
        """K random rows of flat (N, D) of all processes, the same in each; none repeats if N ≥ K."""
        flat = gather(flat)
        index = torch.randperm(len(flat), device=flat.device)
        index = index[torch.arange(self.num_codes, device=flat.device) % len(flat)]
        broadcast_from_first([index])
        return flat[index]


class VQVAE(Codec, ModelMixin):  # ModelMixin by name: diffusers looks for it in this module when it loads
    """Codec: image (B, C, H, W) in [−1, 1] ↔ tokens (B, h, w) ↔ normalised latents (B, D, h, w).

    Args (the others are in `Codec`):
        num_codes, code_dim: K and D.
        decay, revive_below: see `VectorQuantizer`.
        commitment_weight: β of the commitment loss.
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
        revive_below: float = 0.1,
        commitment_weight: float = 0.25,
    ):
        widths = tuple(block_out_channels)
        super().__init__(image_size, patch_size, len(widths), code_dim)
        self.num_codes, self.token_shape = num_codes, self.latent_shape[1:]  # rows Doppler, columns time
        shared = dict(block_out_channels=widths, layers_per_block=layers_per_block, norm_num_groups=norm_num_groups)
        channels = in_channels * self.patch[0] * self.patch[1]
        down, up = ("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths)
        self.encoder = Encoder(channels, code_dim, down_block_types=down, double_z=False, **shared)
        self.quantizer = VectorQuantizer(num_codes, code_dim, decay, revive_below)
        self.decoder = Decoder(code_dim, channels, up_block_types=up, **shared)

    def loss(self, images: Tensor, users: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean square error + weighted commitment + attached losses of images (B, C, H, W), and logs."""
        codes, indices, commitment = self.quantizer(self._features(images))
        outputs = self._pixels(codes)
        used = self.quantizer.count(indices.flatten()) / indices.numel()
        entropy = torch.special.entr(used).sum()  # nats, of this batch
        usage = {"usage": (used > 0).float().mean(), "perplexity": entropy.exp(), "entropy": entropy}
        logs = {"commitment": commitment} | usage
        return self._total(self.config.commitment_weight * commitment, images, outputs, codes, logs)

    def encode_tokens(self, images: Tensor, users: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] → tokens (B, h, w), long."""
        return self.quantizer.nearest(self._features(images))

    def decode_tokens(self, tokens: Tensor, users: Tensor | None = None) -> Tensor:
        """Tokens (B, h, w) → images (B, C, H, W), clipped to [−1, 1]."""
        return self._pixels(self.quantizer.lookup(tokens)).clamp(-1, 1)

    def decode(self, latents: Tensor, users: Tensor | None = None) -> Tensor:
        """Normalised latents (B, D, h, w) → images (B, C, H, W), clipped to [−1, 1]; each vector is replaced by its
        nearest code, with a straight-through gradient."""
        vectors = latents * self.stats.std + self.stats.mean
        codes = self.quantizer.lookup(self.quantizer.nearest(vectors))
        return self._pixels(codes + (vectors - vectors.detach())).clamp(-1, 1)

    def raw_latents(self, images: Tensor, users: Tensor | None = None) -> Tensor:
        return self.quantizer.lookup(self.encode_tokens(images))

    def _features(self, images: Tensor) -> Tensor:
        return self.encoder(self._fold(images))  # (B, D, h, w)

    def _pixels(self, codes: Tensor) -> Tensor:
        return self._unfold(self.decoder(codes))


@torch.no_grad()
def load_vqmodel(codec: Codec, folder: str | Path) -> None:
    """Load the weights of a diffusers `VQModel` of the same sizes, with patches of one pixel, into a `VQVAE`; else
    ValueError, and the codec is unchanged. Call `codec.calibrate` afterwards.

    Its two 1×1 convolutions become part of the 3×3 ones next to them, and the codes move by a vector that takes over
    the bias of the second: before a zero-padded convolution a bias is no constant. The codec then computes what the
    VQModel does; exactly, if the second convolution can be inverted.
    """
    model = VQModel.from_pretrained(folder, use_safetensors=True)
    if not isinstance(codec, VQVAE) or model.config.act_fn != "silu":
        raise ValueError(
            f"a VQModel with act_fn silu fits a VQVAE only; this is act_fn {model.config.act_fn} and a "
            f"{type(codec).__name__}"
        )
    found = model.state_dict()
    before, after = (found.pop(f"{name}.weight").flatten(1) for name in ("quant_conv", "post_quant_conv"))
    bias, last, first = found.pop("post_quant_conv.bias"), "encoder.conv_out", "decoder.conv_in"
    shift = torch.linalg.pinv(after, rtol=1e-3) @ bias  # (D,); with a larger inverse codes would lose precision
    found[f"{last}.bias"] = before @ found[f"{last}.bias"] + found.pop("quant_conv.bias") + shift
    found[f"{last}.weight"] = torch.einsum("dl,lcij->dcij", before, found[f"{last}.weight"])
    found[f"{first}.bias"] += found[f"{first}.weight"].sum((2, 3)) @ (bias - after @ shift)
    found[f"{first}.weight"] = torch.einsum("clij,ld->cdij", found[f"{first}.weight"], after)
    codes = found.pop("quantize.embedding.weight") + shift
    own = dict(codebook=codes, sums=codes, counts=codes.new_ones(len(codes)), initialised=torch.tensor(True))
    found |= {f"quantizer.{name}": tensor for name, tensor in own.items()}
    load_completely(codec, found, folder, (*codec.optional, "stats."))
