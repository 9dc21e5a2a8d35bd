"""What all systems have in common: the effort at each size, and what each machine can take."""

from collections.abc import Sequence
from dataclasses import dataclass

# Arguments of the models and of TrainConfig, and fields of `Preset`. Sizes that are not named here start from base.
EFFORTS = {
    "smoke": dict(  # seconds: for tests
        codec=dict(image_size=32),
        codec_training=dict(steps=6, batch_size=8, warmup_steps=1, evaluate_every=3, save_every=3),
        prior_training=dict(steps=6, batch_size=8, warmup_steps=1, evaluate_every=3, save_every=3),
        teacher_steps=2,
        variants=1,
        images_per_user=3,
        validation=dict(evaluation_steps=4, seeds=2),
    ),
    "demo": dict(  # minutes on two CPU cores
        codec=dict(image_size=64),
        codec_training=dict(
            steps=1000, batch_size=8, learning_rate=2e-3, warmup_steps=20, evaluate_every=500, save_every=250
        ),
        prior_training=dict(batch_size=32, weight_decay=0.01, keep_best=False, evaluate_every=100, save_every=100),
        teacher_steps=300,
        images_per_user=10,
        windows_per_user=10,
        validation=dict(evaluation_steps=300),
    ),
    "demo-long": dict(  # the same sizes, half an hour
        codec=dict(image_size=64),
        codec_training=dict(
            steps=4000, batch_size=8, learning_rate=2e-3, warmup_steps=20, evaluate_every=500, save_every=500
        ),
        prior_training=dict(batch_size=32, weight_decay=0.01, keep_best=False, evaluate_every=250, save_every=250),
        teacher_steps=600,
        images_per_user=20,
        windows_per_user=10,
        validation=dict(evaluation_steps=1000),
    ),
    "base": dict(  # a GPU
        codec=dict(image_size=128),
        # No averaged weights: they would not fit a codebook.
        codec_training=dict(
            steps=6000,
            batch_size=64,
            learning_rate=5e-4,
            warmup_steps=200,
            evaluate_every=250,
            save_every=250,
            mixed_precision="auto",
        ),
        prior_training=dict(
            steps=20_000,
            batch_size=64,
            learning_rate=2e-4,
            warmup_steps=500,
            weight_decay=0.01,
            ema_decay=0.9995,
            keep_best=False,
            evaluate_every=1000,
            save_every=250,
            mixed_precision="auto",
        ),
        teacher_steps=1500,
        images_per_user=50,
        validation=dict(evaluation_steps=2000, seeds=5, multiples=(2, 4), keep=(0.75, 0.5, 0.25)),
    ),
}
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
