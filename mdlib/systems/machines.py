"""GPUs and what they can take: one table for all systems."""

from collections.abc import Sequence
from dataclasses import dataclass

# Of size base: the batch of all GPUs together, and the precision. A size with a smaller batch keeps it.
MACHINES = {
    "cpu": dict(batch_size=64, mixed_precision="no"),
    "p100": dict(batch_size=64, mixed_precision="no"),  # Pascal has no tensor cores: half precision gains nothing
    "t4x2": dict(batch_size=64, mixed_precision="fp16"),
    "gpu-6gb": dict(batch_size=16, mixed_precision="fp16"),
    "gpu-8gb": dict(batch_size=32, mixed_precision="fp16"),
    "gpu-16gb": dict(batch_size=64, mixed_precision="fp16"),
}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes


def gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    import torch  # slow to import, and the names of presets do without

    if not torch.cuda.is_available():
        return []
    seen = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(one.name, (one.major, one.minor), one.total_memory) for one in seen]


def preset_for(found: Sequence[Gpu]) -> str:
    """The preset that "auto" stands for on these GPUs: a machine, or demo on a CPU."""
    if not found:
        return "demo"
    if found[0].capability[0] < 7:
        return "p100"
    if found[0].memory >= 14e9:
        return "t4x2" if len(found) > 1 else "gpu-16gb"
    return "gpu-8gb" if found[0].memory >= 7.5e9 else "gpu-6gb"
