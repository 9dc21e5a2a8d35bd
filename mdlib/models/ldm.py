"""Published VA-VAE weights (f16d32, Yao et al. 2025) for our codec: they come in the layout of latent diffusion's
autoencoder (Rombach et al. 2022), ours is diffusers'.

Their images are RGB. Into a codec of one channel, the first convolution's weights are summed over RGB, as if the
intensity stood in all three, and the last one's are averaged: so grey images give the same latents, and the decoded
intensity is the mean of the decoded colours.
"""

import re
from pathlib import Path

import torch

from mdlib.data.windows import DataError
from mdlib.models.pretrained import load_weights

# `VAVAE(**F16D32)` takes the published weights; foundation_width=1024 (DINOv2 large) takes their projection too.
F16D32 = dict(
    image_size=256,
    block_out_channels=(128, 128, 256, 256, 512),
    layers_per_block=2,
    norm_num_groups=32,
    latent_channels=32,
    level_attention=True,
)
OF_TRAINING = ("loss.", "foundation_model.")  # LPIPS, discriminator, the frozen foundation: no part of the codec
PROJECTIONS = ("linear_proj.", "reverse_proj.")
RENAMES = (
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def load_ldm(codec, weights: str | Path, statistics: str | Path | None = None) -> None:
    """Fill a `VAVAE` of the same sizes (`F16D32`) with published weights, and its latent statistics.

    Args:
        weights: .safetensors, or a torch file of tensors: a state dict, or a Lightning checkpoint with one.
        statistics: the published `latents_stats.pt`, mean and std of (1, D, 1, 1); without it call `calibrate`.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read, or does not fit the codec to the last name.
    """
    converted = convert_ldm(load_weights(weights), codec)
    if statistics:
        wanted = codec.stats.state_dict()
        converted |= {f"stats.{name}": tensor for name, tensor in _statistics(statistics, wanted).items()}
    codec.load_state_dict({**codec.state_dict(), **converted})


def convert_ldm(state: dict[str, torch.Tensor], codec) -> dict[str, torch.Tensor]:
    """The part of the codec's state dict that `state`, in latent diffusion's layout, holds: all of `vae.`, and
    `projection.weight` where both have one of the same shape.

    Raises:
        DataError: names left over or missing, or shapes that differ; it names them.
    """
    own = codec.state_dict()
    levels = len(codec.config.block_out_channels)
    found, source = {}, {}
    for name, tensor in state.items():
        if name.startswith(PROJECTIONS):
            if "projection.weight" in own and own["projection.weight"].shape == tensor.shape:
                found["projection.weight"] = tensor
        elif not name.startswith(OF_TRAINING):
            new = _renamed(name, levels)
            source[new] = name
            found[new] = _fitted(new, tensor, codec.config.in_channels)
    wanted = {name for name in own if name.startswith("vae.")} | found.keys() & {"projection.weight"}
    problems = {
        "not of this codec": {source[name] for name in found.keys() - wanted},
        "missing": wanted - found.keys(),
        "of another shape": {name for name in wanted & found.keys() if found[name].shape != own[name].shape},
    }
    told = [f"{what}: {', '.join(_few(names))}" for what, names in problems.items() if names]
    if told:
        raise DataError(f"the weights do not fit the codec ({'; '.join(told)}): build it with the weights' sizes")
    return found


def _renamed(name: str, levels: int) -> str:
    # Latent diffusion counts the decoder's levels from the finest, diffusers from the coarsest.
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
    for old, new in RENAMES:
        name = re.sub(old, new, name)
    return f"vae.{name}"


def _fitted(name: str, tensor: torch.Tensor, channels: int) -> torch.Tensor:
    """The tensor: of attention's 1×1 convolution a linear layer, of RGB intensity where the codec has one channel."""
    if ".attentions." in name and tensor.ndim == 4:
        return tensor.flatten(1)  # (C, C, 1, 1) → (C, C)
    if channels == 1 and name == "vae.encoder.conv_in.weight":
        return tensor.sum(1, keepdim=True)
    if channels == 1 and name.startswith("vae.decoder.conv_out."):
        return tensor.mean(0, keepdim=True)
    return tensor


def _statistics(path: str | Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = load_weights(path)
    if any(name not in found or found[name].shape != tensor.shape for name, tensor in wanted.items()):
        shape = tuple(wanted["mean"].shape)
        raise DataError(f"{path} holds no latent statistics of this codec: they are mean and std of shape {shape}")
    return {name: found[name] for name in wanted}


def _few(names: set[str]) -> list[str]:
    return sorted(names)[:5] + ([f"and {len(names) - 5} more"] if len(names) > 5 else [])
