"""The systems and their presets: which classes, which sizes. Nothing else knows all of them.

A preset is where sizes meet a machine: `smoke` (seconds, for tests), `demo` (2 CPU cores, minutes), `demo-long` (the
same sizes, half an hour), and the GPU ones.
"""

from dataclasses import dataclass, field, replace

import torch

from mdlib.data import DataError
from mdlib.train import TrainConfig
from mdlib.transformer import TokenPrior
from mdlib.vqvae import VQVAE


@dataclass(frozen=True)
class Preset:
    """Sizes and effort of a run."""

    codec: dict  # keyword arguments of the codec class, image_size among them
    prior: dict  # keyword arguments of the prior class that the codec and the users do not fix
    codec_training: TrainConfig
    prior_training: TrainConfig
    sampling: dict = field(default_factory=dict)  # keyword arguments of prior.sample
    teacher_steps: int = 0  # optimizer steps of the codec's teacher (mdlib.teacher); 0 does without
    teacher_weight: float = 0.2  # of its distance in the codec's loss
    variants: int = 15  # stride-recombined copies of each training window, for codec and prior
    images_per_user: int = 20  # windows generated
    windows_per_user: int = 0  # training windows kept a user; 0 keeps all
    validation: dict = field(default_factory=dict)  # keyword arguments of validate.Protocol

    @property
    def image_size(self) -> int:
        return self.codec["image_size"]


@dataclass(frozen=True)
class System:
    """A codec and the prior over its tokens or latents; notebooks that train it, in order."""

    codec: type
    prior: type
    notebooks: tuple[str, ...]
    presets: dict[str, Preset]


def _gpu(batch_size: int, precision: str) -> Preset:
    """The sizes of a GPU run: 128 pixels, 16×16 tokens, 512 codes; only batch and precision differ by card."""
    codec = dict(
        image_size=128,
        patch_size=(2, 2),
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        norm_num_groups=32,
        num_codes=512,
        code_dim=32,
    )
    steps = 6000
    training = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=5e-4,
        warmup_steps=200,
        mixed_precision=precision,
        evaluate_every=250,
        save_every=250,
    )
    return Preset(
        codec=codec,
        prior=dict(hidden_size=384, num_layers=8, num_heads=6, dropout=0.2),
        codec_training=training,  # without an average: its codebook is none, and must fit the encoder
        prior_training=replace(training, steps=8000, learning_rate=3e-4, weight_decay=0.05, ema_decay=0.999),
        teacher_steps=1500,
        images_per_user=50,
        validation=dict(judge_steps=1500, seeds=5),
    )


_DEMO = Preset(
    codec=dict(image_size=64, patch_size=(2, 4), block_out_channels=(48, 96), num_codes=256, code_dim=16),
    prior=dict(hidden_size=128, num_layers=4, num_heads=4),
    codec_training=TrainConfig(
        steps=1500, batch_size=8, learning_rate=2e-3, warmup_steps=20, evaluate_every=300, save_every=300
    ),
    # With so few windows the held-out likelihood turns early, while samples go on gaining their user: the last weights
    # are taken, and the report watches for copies.
    prior_training=TrainConfig(
        steps=500,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=0.05,
        evaluate_every=100,
        save_every=100,
        keep_best=False,
    ),
    sampling=dict(guidance_scale=1.5, top_p=0.95),  # without the tail: guidance turns rare tokens into blobs
    teacher_steps=300,
    teacher_weight=0.2,
    images_per_user=10,
    windows_per_user=10,
    validation=dict(judge_steps=250),
)

_DEMO_LONG = replace(
    _DEMO,
    codec_training=replace(_DEMO.codec_training, steps=4000, evaluate_every=500, save_every=500),
    prior_training=replace(_DEMO.prior_training, steps=2000, evaluate_every=250, save_every=250),
    teacher_steps=600,
    images_per_user=20,
    validation=dict(judge_steps=300),
)

_SMOKE = Preset(
    codec=dict(
        image_size=32,
        patch_size=(2, 2),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        num_codes=16,
        code_dim=4,
    ),
    prior=dict(hidden_size=16, num_layers=1, num_heads=2),
    codec_training=TrainConfig(steps=6, batch_size=8, warmup_steps=1, evaluate_every=3, save_every=3),
    prior_training=TrainConfig(steps=6, batch_size=8, warmup_steps=1, evaluate_every=3, save_every=3),
    teacher_steps=2,
    variants=1,
    images_per_user=3,
    validation=dict(judge_steps=4, seeds=2, variants=1),
)

_GPU_PRESETS = {
    "gpu-6gb": _gpu(16, "fp16"),
    "gpu-8gb": _gpu(32, "fp16"),
    "gpu-16gb": _gpu(64, "fp16"),
    "p100": _gpu(64, "no"),  # Pascal: no tensor cores, half precision gains nothing
    "t4x2": _gpu(64, "fp16"),
}

SYSTEMS = {
    "vqvae-transformer": System(
        codec=VQVAE,
        prior=TokenPrior,
        notebooks=("01_env_check", "02_train_vqvae", "03_train_prior", "05_generate", "06_validate"),
        presets={"demo": _DEMO, "demo-long": _DEMO_LONG, "smoke": _SMOKE, **_GPU_PRESETS},
    ),
}


def get_system(name: str) -> System:
    """The system of that name; DataError with the known names otherwise."""
    if name not in SYSTEMS:
        raise DataError(f"unknown system {name!r}: choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def get_preset(
    system: str,
    name: str,
    *,
    codec_steps: int = 0,
    prior_steps: int = 0,
    perceptual_weight: float = 0.0,
    windows_per_user: int = 0,
    seed: int = 0,
) -> Preset:
    """A preset with some of its values changed; 0 leaves the preset's.

    Args:
        codec_steps, prior_steps: optimizer steps of the two trainings.
        perceptual_weight: of LPIPS in the codec's loss.
        windows_per_user: training windows kept a user; -1 keeps all.
        seed: of data order and noise in both trainings.
    """
    presets = get_system(system).presets
    if name not in presets:
        raise DataError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    preset = presets[name]
    codec_training = replace(preset.codec_training, seed=seed, steps=codec_steps or preset.codec_training.steps)
    prior_training = replace(preset.prior_training, seed=seed, steps=prior_steps or preset.prior_training.steps)
    codec = {**preset.codec, "perceptual_weight": perceptual_weight} if perceptual_weight else preset.codec
    kept = max(0, windows_per_user) if windows_per_user else preset.windows_per_user
    return replace(
        preset, codec=codec, codec_training=codec_training, prior_training=prior_training, windows_per_user=kept
    )


def make_codec(system: str, preset: Preset, channels: int = 1):
    """A new codec of the preset's size for images of `channels`."""
    return get_system(system).codec(in_channels=channels, **preset.codec)


def make_prior(system: str, preset: Preset, codec, num_users: int):
    """A new prior that fits `codec` and the number of users."""
    prior = get_system(system).prior
    shape = dict(num_codes=codec.num_codes, token_shape=codec.token_shape)
    return prior(num_users=num_users, **shape, **preset.prior)


def seeded(seed: int, make, *arguments):
    """`make(*arguments)` with the random weights of `seed`, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*arguments)
