"""A codec's tokens or latents of a set of windows, computed once and cached; and their images."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mdlib.data.windows import to_float
from mdlib.models.layers import parts
from mdlib.utils import whole_file


@torch.no_grad()
def encode_all(
    codec,
    images: torch.Tensor,
    kind: str,
    cache: str | Path | None = None,
    batch_size: int = 128,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens (N, h, w) or latents (N, D, h, w) of uint8 images (N, C, H, W).

    Args:
        kind: "tokens" or "latents".
        cache: folder for the result, in a file named by the codec's weights and the data; None: no cache.
        labels: users (N,), for a conditional codec.
    """
    path = Path(cache) / f"{kind}-{fingerprint(codec, images, labels)}.safetensors" if cache else None
    if path and path.exists():
        return load_file(path)[kind]
    encode = codec.eval().encode_tokens if kind == "tokens" else codec.eval().encode
    batches = parts(codec.device, batch_size, images, labels)
    result = torch.cat([encode(to_float(part), *users).cpu() for part, *users in batches])
    if path:
        with whole_file(path) as temporary:
            save_file({kind: result.contiguous()}, temporary)
    return result


@torch.no_grad()
def decode_all(codec, latents: torch.Tensor, batch_size: int = 64, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Images (N, C, H, W) in [−1, 1] of normalised latents (N, D, h, w); users (N,) for a conditional codec."""
    decode = codec.eval().decode
    return torch.cat([decode(*part).cpu() for part in parts(codec.device, batch_size, latents, labels)])


def fingerprint(model: torch.nn.Module, *tensors: torch.Tensor | None) -> str:
    """16 hex digits over a model's weights and further tensors; None is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for tensor in filter(torch.is_tensor, tensors):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
