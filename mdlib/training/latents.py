"""What a codec makes of a set of windows, computed once and kept beside it; and back."""

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
        kind: "tokens" or "latents", what the prior consumes.
        cache: folder that keeps the result, keyed by the codec's weights and the images; None keeps nothing.
        labels: (N,), for a conditional codec.
    """
    path = Path(cache) / f"{kind}-{fingerprint(codec, images, labels)}.safetensors" if cache else None
    if path and path.exists():
        return load_file(path)[kind]
    codec.eval()
    encode = codec.encode_tokens if kind == "tokens" else codec.encode
    batches = parts(codec.device, batch_size, images, labels)
    result = torch.cat([encode(to_float(part), *users).cpu() for part, *users in batches])
    if path:
        with whole_file(path) as temporary:
            save_file({kind: result.contiguous()}, temporary)
    return result


@torch.no_grad()
def decode_all(codec, latents: torch.Tensor, batch_size: int = 64, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Images (N, C, H, W) in [−1, 1] of normalised latents (N, D, h, w); labels (N,) for a conditional codec."""
    codec.eval()
    return torch.cat([codec.decode(*part).cpu() for part in parts(codec.device, batch_size, latents, labels)])


def fingerprint(model: torch.nn.Module, *tensors: torch.Tensor | None) -> str:
    """16 hex digits over a model's weights and further tensors; None is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for tensor in filter(torch.is_tensor, tensors):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
