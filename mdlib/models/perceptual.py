"""LPIPS and Inception. Their published weights are looked up where torch stores its downloads."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdlib.models.pretrained import load_weights

LPIPS_BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
INCEPTION = "inception_v3_google-0cc3c7bd.pth"


def lpips_weights(net: str) -> Path:
    """Path of the weights of an LPIPS backbone, whether they are there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONES[net]


def load_lpips(net: str = "squeeze") -> nn.Module:
    """LPIPS distance (Zhang et al. 2018) of the `lpips` package, frozen; inputs (B, 1 or 3, H, W) in [−1, 1].
    FileNotFoundError if the package is missing, or the backbone is not on disk and cannot be downloaded."""
    if net not in LPIPS_BACKBONES:
        raise ValueError(f"unknown LPIPS net {net!r}: choose one of {', '.join(LPIPS_BACKBONES)}")
    try:
        import lpips
    except ImportError as error:
        raise FileNotFoundError("LPIPS needs the package lpips: install it or set perceptual_weight=0") from error
    weights = lpips_weights(net)
    try:
        if not weights.exists() and os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("offline mode is on")
        with torch.random.fork_rng():  # its initial weights are random; the caller's random numbers stay as they are
            model = lpips.LPIPS(net=net, verbose=False)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"LPIPS needs {weights.name}, which is not in {weights.parent} and could not be downloaded ({error}): "
            "put the file there (on Kaggle: attach it as a dataset and copy it) or set perceptual_weight=0"
        ) from error
    return model.eval().requires_grad_(False)


def load_inception() -> nn.Module:
    """torchvision's Inception v3 (Szegedy et al. 2016) without its last layer, frozen: images (B, 1 or 3, H, W) in
    [−1, 1] → features (B, 2048). It is not the network of published FIDs: compare its figures with its own only.
    FileNotFoundError if its weights are not on this machine; they are not downloaded."""
    from torchvision.models import inception_v3

    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not weights.exists():
        raise FileNotFoundError(f"{weights.name} is not on this machine")
    network = inception_v3(weights=None, init_weights=False, transform_input=False)
    try:
        network.load_state_dict(load_weights(weights))
    except (ValueError, RuntimeError) as error:
        raise FileNotFoundError(f"{weights} is incomplete, or of another network: {error}") from error
    network.fc = nn.Identity()
    network.register_forward_pre_hook(lambda _, inputs: _resized(*inputs))
    return network.eval().requires_grad_(False)


def _resized(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) at the size of Inception's input (B, 3, 299, 299)."""
    return F.interpolate(images, size=(299, 299), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
