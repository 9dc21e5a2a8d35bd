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
from torch import Tensor

INSIDE = ("ema", "model", "state_dict")  # entries of a training's checkpoint that hold weights, best first
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


def load_weights(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .ckpt file by name; FileNotFoundError, or ValueError for a file that
    holds something else."""
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
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{source} holds no weights by name")
    return found


def load_completely(model, found: dict[str, Tensor], source: str | Path, optional: tuple[str, ...] = ()) -> None:
    """Load weights that fit `model` name by name and shape by shape; else ValueError, and the model is unchanged.
    Names that begin with one of `optional` may be missing on either side or differ; they are loaded if they fit."""
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in found.items() if name in own and own[name].shape == tensor.shape}
    problems = {
        "it does not know": found.keys() - own.keys(),
        "it misses": own.keys() - found.keys(),
        "of another shape are": (found.keys() & own.keys()) - fitting.keys(),
    }
    lines = []
    for problem, names in problems.items():
        if names := sorted(name for name in names if not name.startswith(optional)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{problem} {', '.join(names[:3])}{more}")
    if lines:
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {'; '.join(lines)}")
    model.load_state_dict(own | fitting)


def load_ldm(codec, weights: str | Path, statistics: str | Path | None = None) -> None:
    """Load published VA-VAE weights into a `VAVAE` of the same sizes (preset f16d32), and their projection into an
    attached `Alignment` of the same width; errors as in `load_weights` and `load_completely`.

    statistics: the published `latents_stats.pt`, mean and std of (1, D, 1, 1); without it call `codec.calibrate`.
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


def convert_ldm(state: dict[str, Tensor], codec) -> dict[str, Tensor]:
    """Weights in latent diffusion's layout under the names and in the shapes of `codec`."""
    levels, grey, found = len(codec.config.block_out_channels), codec.config.in_channels == 1, {}
    for name, tensor in state.items():
        if name.startswith(("loss.", "foundation_model.")):  # not part of the codec
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
        elif grey and name == "encoder.conv_in.weight":
            tensor = tensor.sum(1, keepdim=True)
        elif grey and name.startswith("decoder.conv_out."):
            tensor = tensor.mean(0, keepdim=True)
        found[f"vae.{name}"] = tensor
    return found
