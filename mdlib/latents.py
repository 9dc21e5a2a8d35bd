"""What a codec makes of a set of windows, computed once and kept beside the prior that trains on it; and back."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mdlib.data import to_float
from mdlib.files import whole_file


@torch.no_grad()
def encode_all(
    codec, images: torch.Tensor, kind: str, cache: str | Path | None = None, batch_size: int = 128
) -> torch.Tensor:
    """Tokens (N, h, w) or latents (N, D, h, w) of uint8 images (N, C, H, W).

    Args:
        kind: "tokens" or "latents", what the prior consumes.
        cache: folder that keeps the result, keyed by the codec's weights and the images; None keeps nothing.
    """
    path = Path(cache) / f"{kind}-{fingerprint(codec, images)}.safetensors" if cache else None
    if path and path.exists():
        return load_file(path)[kind]
    codec.eval()
    encode = codec.encode_tokens if kind == "tokens" else codec.encode
    result = torch.cat([encode(to_float(part).to(codec.device)).cpu() for part in images.split(batch_size)])
    if path:
        with whole_file(path) as temporary:
            save_file({kind: result.contiguous()}, temporary)
    return result


@torch.no_grad()
def decode_all(codec, latents: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Images (N, C, H, W) in [−1, 1] of normalised latents (N, D, h, w)."""
    codec.eval()
    return torch.cat([codec.decode(part.to(codec.device)).cpu() for part in latents.split(batch_size)])


def fingerprint(model: torch.nn.Module, *tensors: torch.Tensor) -> str:
    """16 hex digits over a model's weights and further tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
