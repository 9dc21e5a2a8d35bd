"""Is a codec good enough to train a prior on, and what do its codes look like?"""

from dataclasses import dataclass

import torch

from mdlib.data.windows import WindowSet
from mdlib.evaluation.metrics import code_counts, psnr, ssim
from mdlib.models.layers import parts
from mdlib.models.pretrained import LPIPS_BACKBONES, checkpoint, load_lpips
from mdlib.training.latents import decode_all, encode_all
from mdlib.utils import DataError, to_float

GRADES = ((28.0, "excellent"), (25.0, "good"), (20.0, "fair"), (-torch.inf, "poor"))  # by PSNR in dB, at least
FAR_MEAN, FAR_STD = 0.5, (0.5, 2.0)  # latents beyond these were normalised with other windows' statistics


@torch.no_grad()
def check_codec(codec: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
    """A codec's metrics on uint8 images (N, C, H, W) and labels (N,), preferably unseen ones: psnr_db and psnr_db_worst
    (of one window), ssim, lpips (None without its weights, then lpips_reason), latents (see `latent_metrics`), n, and
    verdict: one sentence."""
    wanted = (codec.config.in_channels, codec.config.image_size, codec.config.image_size)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted or not len(images):
        raise DataError(
            f"this codec takes uint8 windows (N, {', '.join(map(str, wanted))}), not {images.dtype} "
            f"{tuple(images.shape)}: load them with size={wanted[1]}, channels={wanted[0]}"
        )
    latents, real = encode_all(codec, images, "latents", labels=labels), to_float(images)
    decoded = decode_all(codec, latents, labels=labels)
    try:
        distance = find_lpips(codec.device)
        each = [distance(*pair).flatten() for pair in parts(codec.device, 64, decoded, real)]
        perceptual = {"lpips": float(torch.cat(each).mean())}
    except FileNotFoundError as error:
        perceptual = {"lpips": None, "lpips_reason": str(error)}
    each = psnr(decoded, real)
    found = {
        "psnr_db": float(each.mean()),
        "psnr_db_worst": float(each.min()),
        "ssim": float(ssim(decoded, real).mean()),
        **perceptual,
        "latents": latent_metrics(latents),
        "n": len(images),
    }
    return found | {"verdict": _verdict(found)}


def latent_metrics(latents: torch.Tensor) -> dict:
    """Mean and std of each channel of latents (N, D, h, w), min, max, and beyond_4_sigma: the fraction of values more
    than four standard deviations from their channel's mean (6·10⁻⁵ for a Gaussian)."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    far = (latents - mean.view(1, -1, 1, 1)).abs() > 4 * std.view(1, -1, 1, 1)
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "min": float(latents.min()),
        "max": float(latents.max()),
        "beyond_4_sigma": float(far.double().mean()),
    }


def find_lpips(device: torch.device | str) -> torch.nn.Module:
    """LPIPS; FileNotFoundError if its weights are not on this machine: they are not downloaded for a metric."""
    weights = checkpoint(LPIPS_BACKBONES["squeeze"])
    if not weights.exists():
        raise FileNotFoundError(f"{weights.name} is not on this machine: run python -m mdlib fetch lpips")
    return load_lpips("squeeze").to(device)


def _verdict(found: dict) -> str:
    latents = found["latents"]
    grade = next(word for least, word in GRADES if found["psnr_db"] >= least)
    levels = ", ".join(f"{least:.0f} {word}" for least, word in GRADES[:-1])
    quality = f"PSNR {found['psnr_db']:.1f} dB, worst {found['psnr_db_worst']:.1f} dB ({levels})"
    near, state = all(abs(mean) <= FAR_MEAN for mean in latents["mean"]), "are normalised."
    if not near or not all(FAR_STD[0] <= std <= FAR_STD[1] for std in latents["std"]):
        means, stds = (f"{min(latents[name]):.2g} to {max(latents[name]):.2g}" for name in ("mean", "std"))
        state = f"are far from mean 0 and std 1 (means {means}, stds {stds}): "
        state += "calibrate() was not called on windows like these."
    return f"Reconstruction is {grade}: {quality}; latents {state}"


@dataclass(frozen=True, eq=False)
class Codebook:
    """The K codes of a codec, as N windows use them: token grid (h, w), cells of (r, c) pixels. See `survey`."""

    windows: WindowSet
    tokens: torch.Tensor  # (N, h, w)
    counts: torch.Tensor  # (num_users, K): how often each user uses each code
    decoded: torch.Tensor  # (K, C, r, c) in [−1, 1]: what each code decodes to
    real: torch.Tensor  # (K, C, r, c) in [−1, 1]: what the windows show in its place, nan where it is not used

    @property
    def times(self) -> torch.Tensor:
        """How often each code is used (K,)."""
        return self.counts.sum(0)

    @property
    def rates(self) -> torch.Tensor:
        """Uses in a window of each user, on average (num_users, K); nan for a user without windows."""
        return self.counts / self.windows.labels.bincount(minlength=self.windows.num_users).unsqueeze(1)

    def most_distinctive(self) -> int:
        """The code whose rate of one user exceeds the average user's most."""
        known = self.rates[~self.rates.isnan().any(1)]
        return int((known.amax(0) - known.mean(0)).argmax())

    def windows_with(self, code: int) -> list[int]:
        """Rows of at most six windows that hold `code` most often, one a user: neighbouring windows look alike."""
        times = (self.tokens == code).sum((1, 2))
        rows: dict[int, int] = {}
        for row in times.argsort(descending=True, stable=True).tolist():
            if times[row]:
                rows.setdefault(int(self.windows.labels[row]), row)
        return list(rows.values())[:6]


@torch.no_grad()
def survey(codec, windows: WindowSet, tokens: torch.Tensor) -> Codebook:
    """The codebook of `codec` as windows and their tokens (N, h, w) use it. What a code decodes to depends on its
    neighbours, so the cells that hold it are averaged; for an unused code, the centre of a grid of it alone is used."""
    codec.eval()
    batches = lambda grids: parts(codec.device, 64, grids)
    decode = lambda grids: torch.cat([codec.decode_tokens(part).float().cpu() for (part,) in batches(grids)])
    decoded = code_patches(decode(tokens), tokens, codec.num_codes)
    unused = decoded.isnan().flatten(1).any(1).nonzero().flatten()
    if len(unused):
        h, w = codec.token_shape
        decoded[unused] = cells(decode(unused.view(-1, 1, 1).expand(-1, h, w)), (h, w))[:, h // 2, w // 2]
    counts = code_counts(tokens, windows.labels, codec.num_codes, windows.num_users)
    return Codebook(windows, tokens, counts, decoded, real=code_patches(windows.float(), tokens, codec.num_codes))


def code_patches(images: torch.Tensor, tokens: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Mean (K, C, r, c) of images (N, C, H, W) over the cells of each code of tokens (N, h, w); nan where unused."""
    pieces = cells(images, tokens.shape[1:]).flatten(0, 2)  # (N·h·w, C, r, c)
    flat = tokens.flatten()
    sums = pieces.new_zeros(num_codes, *pieces.shape[1:]).index_add_(0, flat, pieces)
    return sums / flat.bincount(minlength=num_codes).view(-1, 1, 1, 1)


def cells(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Images (N, C, H, W) cut into the cells of a grid: (N, h, w, C, r, c)."""
    h, w = grid
    return images.unflatten(3, (w, -1)).unflatten(2, (h, -1)).permute(0, 2, 4, 1, 3, 5)
