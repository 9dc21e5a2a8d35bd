"""Published weights: files are read without unpickling anything but tensors, and fit a model completely or not at all.

VA-VAE's weights (f16d32, Yao et al. 2025) come in the layout of latent diffusion's autoencoder (Rombach et al. 2022),
for RGB. For a codec of one channel the first convolution's weights are summed over RGB, and the last one's averaged:
grey images give the same latents, and the decoded intensity is the mean of the colours.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

INSIDE = ("ema", "model", "state_dict")  # entries of a training's checkpoint that hold weights, best first
NOT_OF_THE_CODEC = ("loss.", "foundation_model.")  # of a published VA-VAE
PROJECTION = "losses.alignment.projection.weight"
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


def load_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pt, .pth or .ckpt file, by name.

    Raises:
        FileNotFoundError: no file at `source`.
        ValueError: a file that holds something else.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"no weights at {source}: download the published file, or attach it, and give its path")
    if source.suffix == ".safetensors":
        try:
            return load_file(source)
        except SafetensorError as error:
            raise ValueError(f"{source} is no whole .safetensors file: {error}") from error
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle can raise anything
        raise ValueError(
            f"{source} holds more than tensors, or none, and is not unpickled: convert it to .safetensors if you "
            "trust its source"
        ) from error
    if isinstance(found, dict):
        found = next((found[name] for name in INSIDE if isinstance(found.get(name), dict)), found)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{source} holds no weights by name")
    return found


def load_completely(
    model: torch.nn.Module, found: dict[str, torch.Tensor], source: str | Path, optional: tuple[str, ...] = ()
) -> None:
    """Load weights that fit `model` name by name and shape by shape.

    optional: prefixes of names that may be missing on either side or differ; such weights are loaded if they fit.

    Raises:
        ValueError: an unknown name, a missing name or another shape; the model is then unchanged.
    """
    own = model.state_dict()
    fits = lambda name: name in own and own[name].shape == found[name].shape
    left = sorted(name for name in found if name not in own and not name.startswith(optional))
    missing = sorted(name for name in own if name not in found and not name.startswith(optional))
    other = sorted(name for name in found if name in own and not fits(name) and not name.startswith(optional))
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it does not know", left), ("it misses", missing), ("of another shape are", other))
        if names
    ]
    if problems:
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(own | {name: tensor for name, tensor in found.items() if fits(name)})


def load_ldm(codec: torch.nn.Module, weights: str | Path, statistics: str | Path | None = None) -> None:
    """Load published VA-VAE weights, and their latent statistics, into a `VAVAE` of the same sizes (`vavae.F16D32`),
    and their projection into an attached `Alignment` of the same width.

    Args:
        weights: .safetensors, or a torch file of tensors: a state dict, or a Lightning checkpoint with one.
        statistics: the published `latents_stats.pt`, mean and std of (1, D, 1, 1); without it call `calibrate`.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be read or does not fit the codec completely.
    """
    found = convert_ldm(load_weights(weights), codec)
    optional = codec.optional
    if statistics:
        found |= {f"stats.{name}": tensor for name, tensor in load_weights(statistics).items()}
        if missing := {"stats.mean", "stats.std"} - found.keys():
            raise ValueError(f"{statistics} misses {', '.join(sorted(missing))}")
    else:
        optional += ("stats.",)
    load_completely(codec, found, weights, optional)


def convert_ldm(state: dict[str, torch.Tensor], codec: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights in latent diffusion's layout under the names and in the shapes of `codec`."""
    levels = len(codec.config.block_out_channels)
    found = {}
    for name, tensor in state.items():
        if name.startswith(NOT_OF_THE_CODEC):
            continue
        if name.startswith(("linear_proj.", "reverse_proj.")):
            found[PROJECTION] = tensor
            continue
        # Latent diffusion counts the decoder's levels from the finest, diffusers from the coarsest.
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # a 1×1 convolution (C, C, 1, 1) is a linear layer (C, C)
        elif codec.config.in_channels == 1 and name == "encoder.conv_in.weight":
            tensor = tensor.sum(1, keepdim=True)
        elif codec.config.in_channels == 1 and name.startswith("decoder.conv_out."):
            tensor = tensor.mean(0, keepdim=True)
        found[f"vae.{name}"] = tensor
    return found
