"""Weights that others published, read without unpickling anything but tensors, and fitted to a model completely."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

INSIDE = ("ema", "model", "state_dict")  # where a training's checkpoint keeps its weights, best first


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
    except Exception as error:  # what is no pickle fails in any way
        raise ValueError(
            f"{source} holds more than tensors, or none, and is not unpickled: convert it to .safetensors where you "
            "trust its source"
        ) from error
    for part in INSIDE:
        if isinstance(found, dict) and isinstance(found.get(part), dict):
            found = found[part]
            break
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{source} holds no weights by name")
    return found


def load_completely(
    model: torch.nn.Module, found: dict[str, torch.Tensor], source: str | Path, beside: tuple[str, ...] = ()
) -> None:
    """Load weights that fit `model` name by name and shape by shape.

    beside: beginnings of names of parts that a model may have or not; such weights are taken where they fit.

    Raises:
        ValueError: a name too many, a name missing or a shape that differs; the model is then as it was.
    """
    own = model.state_dict()
    fits = lambda name, tensor: name in own and own[name].shape == tensor.shape
    found = {name: tensor for name, tensor in found.items() if not name.startswith(beside) or fits(name, tensor)}
    found = {name: tensor for name, tensor in own.items() if name.startswith(beside)} | found
    wanted = {name: tensor.shape for name, tensor in own.items()}
    left, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name])
    told = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("it does not know", left), ("it misses", missing), ("of another shape are", other))
        if names
    ]
    if told:
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {'; '.join(told)}")
    model.load_state_dict(found)
