"""Is a codec good enough to train a prior on, and which of two is to be taken?"""

import torch

from mdlib.data.windows import DataError, to_float
from mdlib.evaluation import metrics
from mdlib.models.layers import parts
from mdlib.models.perceptual import load_lpips, lpips_weights

GRADES = ((28.0, "excellent"), (25.0, "good"), (20.0, "fair"))  # PSNR in dB from which a codec is called so
FAR_MEAN, FAR_STD = 0.5, (0.5, 2.0)  # normalised latents beyond these were normalised by other windows' statistics
VQ_RATIO, VQ_USAGE = 1.1, 0.8  # a VQ codec is taken over a KL codec from this ratio of PSNR and beyond this usage


@torch.no_grad()
def check_codec(
    codec: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None, batch_size: int = 64
) -> dict:
    """A codec's figures on uint8 images (N, C, H, W) and labels (N,), best those it was not trained on.

    Returns:
        psnr_db and psnr_db_worst (of one window), ssim, lpips (None without its weights, then lpips_reason), latents
        (see `latent_figures`), n, and verdict: one sentence.

    Raises:
        DataError: images that are not the codec's.
    """
    _check_images(codec, images)
    codec.eval()
    distance, reason = _lpips(codec.device)
    latents, values = [], []
    for part, *users in parts(codec.device, batch_size, images, labels):
        real = to_float(part)
        latents.append(codec.encode(real, *users))
        decoded = codec.decode(latents[-1], *users)
        each = [metrics.psnr(decoded, real), metrics.ssim(decoded, real)]
        if distance is not None:
            each.append(distance(decoded, real).flatten())
        values.append(torch.stack(each).cpu())
    psnr, ssim, *lpips = torch.cat(values, 1)
    found = {
        "psnr_db": float(psnr.mean()),
        "psnr_db_worst": float(psnr.min()),
        "ssim": float(ssim.mean()),
        "lpips": float(lpips[0].mean()) if lpips else None,
        "latents": latent_figures(torch.cat(latents)),
        "n": len(images),
    } | ({} if lpips else {"lpips_reason": reason})
    return found | {"verdict": _verdict(found)}


def _check_images(codec: torch.nn.Module, images: torch.Tensor) -> None:
    wanted = (codec.config.in_channels, codec.config.image_size, codec.config.image_size)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted or not len(images):
        raise DataError(
            f"this codec takes uint8 windows (N, {', '.join(map(str, wanted))}), not {images.dtype} "
            f"{tuple(images.shape)}: load them with size={wanted[1]}, channels={wanted[0]}"
        )


def latent_figures(latents: torch.Tensor) -> dict:
    """Statistics of normalised latents (N, D, h, w): mean and std of each channel, min, max, and beyond_4_sigma: the
    share of values more than four of their channel's deviations from its mean (6·10⁻⁵ for a Gaussian)."""
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    far = (latents - mean.view(1, -1, 1, 1)).abs() > 4 * std.view(1, -1, 1, 1)
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "min": float(latents.min()),
        "max": float(latents.max()),
        "beyond_4_sigma": float(far.double().mean()),
    }


def choose_codec(vq: dict, kl: dict) -> dict:
    """Take the VQ codec when its PSNR is at least 1.1 times the KL codec's and more than 80 % of its codes are used,
    else the KL codec.

    Args:
        vq: psnr_db and usage (share of codes used, 0 to 1) on windows the codec was not trained on.
        kl: psnr_db on the same windows.
    """
    ratio = vq["psnr_db"] / max(kl["psnr_db"], 1e-9)
    choice = "vq" if ratio >= VQ_RATIO and vq["usage"] > VQ_USAGE else "kl"
    sentence = (
        f"Take the {choice.upper()} codec: the VQ codec's PSNR of {vq['psnr_db']:.1f} dB is {ratio:.2f} times the KL "
        f"codec's {kl['psnr_db']:.1f} dB (VQ needs {VQ_RATIO}) and {100 * vq['usage']:.0f} % of its codes are used "
        f"(VQ needs more than {100 * VQ_USAGE:.0f} %)."
    )
    return {
        "vq_psnr_db": vq["psnr_db"],
        "kl_psnr_db": kl["psnr_db"],
        "ratio": ratio,
        "usage": vq["usage"],
        "choice": choice,
        "sentence": sentence,
    }


def _lpips(device: torch.device) -> tuple[torch.nn.Module | None, str]:
    """LPIPS, or None and why not. Nothing is downloaded for a figure nobody asked for."""
    weights = lpips_weights("squeeze")
    if not weights.exists():
        return None, f"{weights.name} is not in {weights.parent}"
    try:
        return load_lpips().to(device), ""
    except FileNotFoundError as error:
        return None, str(error)


def _verdict(found: dict) -> str:
    psnr, latents = found["psnr_db"], found["latents"]
    grade = next((word for least, word in GRADES if psnr >= least), "poor")
    customary = ", ".join(f"{least:.0f} {word}" for least, word in GRADES)
    sentence = f"Reconstruction is {grade}: PSNR {psnr:.1f} dB, worst {found['psnr_db_worst']:.1f} dB ({customary})"
    normalised = all(abs(mean) <= FAR_MEAN for mean in latents["mean"]) and all(
        FAR_STD[0] <= std <= FAR_STD[1] for std in latents["std"]
    )
    if normalised:
        return f"{sentence}; latents are normalised."
    means, stds = (f"{min(latents[name]):.2g} to {max(latents[name]):.2g}" for name in ("mean", "std"))
    return (
        f"{sentence}; latents are far from mean 0 and std 1 (means {means}, stds {stds}): "
        "calibrate() was not called on windows like these."
    )
