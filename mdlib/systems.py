"""The systems and their presets: which classes, which sizes. Nothing else knows all of them.

A preset is where sizes meet a machine: `smoke` (seconds, for tests), `demo` (2 CPU cores, minutes), `demo-long` (the
same sizes, half an hour), and the GPU ones.
"""

import inspect
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from mdlib.data import DataError
from mdlib.dit import SIZES, LightningDiT
from mdlib.ldm import F16D32, load_ldm
from mdlib.published import load_completely
from mdlib.train import TrainConfig
from mdlib.transformer import TokenPrior
from mdlib.unet import LatentDiffusion
from mdlib.vae import KLVAE
from mdlib.vavae import RECIPE, VAVAE
from mdlib.vqvae import VQVAE

CODECS = {"vq": VQVAE, "kl": KLVAE, "va": VAVAE}


@dataclass(frozen=True)
class Preset:
    """Sizes and effort of a run."""

    codec: dict  # keyword arguments of the codec class, image_size among them
    prior: dict  # keyword arguments of the prior class that the codec and the users do not fix
    codec_training: TrainConfig
    prior_training: TrainConfig
    codec_class: type = None  # filled in by get_preset: the system's, or another kind of codec of the same sizes
    sampling: dict = field(default_factory=dict)  # keyword arguments of prior.sample
    teacher_steps: int = 0  # optimizer steps of the codec's teacher (mdlib.teacher); 0 does without
    teacher_weight: float = 0.2  # of its distance in the codec's loss
    foundation: str = "none"  # what latents are aligned with: none, classifier, or a transformers vision model
    stages: tuple = ()  # of the codec's training: pairs of a share of its steps and options of `VAVAE.configure`
    user_codec: bool = False  # the codec is told whose window it sees (VAVAE)
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


_GPU_CODEC = dict(
    image_size=128, patch_size=(2, 2), block_out_channels=(64, 128, 256), layers_per_block=2, norm_num_groups=32
)


def _gpu(batch_size: int, precision: str) -> Preset:
    """The sizes of a GPU run: 128 pixels, 16×16 tokens, 512 codes; only batch and precision differ by card."""
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
        codec=_GPU_CODEC | dict(num_codes=512, code_dim=32),
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

_CARDS = {
    "gpu-6gb": (16, "fp16"),
    "gpu-8gb": (32, "fp16"),
    "gpu-16gb": (64, "fp16"),
    "p100": (64, "no"),  # Pascal: no tensor cores, half precision gains nothing
    "t4x2": (64, "fp16"),
}
_TOKEN_PRESETS = {
    "demo": _DEMO,
    "demo-long": _DEMO_LONG,
    "smoke": _SMOKE,
    **{card: _gpu(*sizes) for card, sizes in _CARDS.items()},
}


# Diffusion over latents: the same codec training and evaluation, another codec and prior --------------------------

_LATENT_DEMO = dict(block_out_channels=(48, 96), norm_num_groups=8, head_dim=16, label_dropout=0.15)
_LATENT_SMOKE = dict(block_out_channels=(8, 16), norm_num_groups=4, head_dim=8)
_LATENT_GPU = dict(block_out_channels=(128, 256, 384), layers_per_block=2, norm_num_groups=32, head_dim=64, dropout=0.1)


def _diffusion(
    base: Preset, codec: dict, prior: dict, sampling: dict | None = None, images_per_user: int = 0, **training
) -> Preset:
    """`base` with another codec's sizes, a diffusion prior's, and the training that diffusion needs: many steps whose
    weights are averaged. Twenty denoising steps are quick, so more windows are drawn."""
    return replace(
        base,
        codec=codec,
        prior=prior,
        prior_training=replace(base.prior_training, **training),
        sampling=sampling or dict(guidance_scale=1.5, num_inference_steps=20),
        images_per_user=max(base.images_per_user, images_per_user),
    )


def _latent_presets(codecs: dict[str, dict], prior: dict) -> dict[str, Preset]:
    """The presets of a diffusion system, from its codecs' sizes for demo, smoke and GPUs."""
    small = dict(batch_size=32, learning_rate=1e-3, weight_decay=0.01)
    large = dict(steps=20_000, learning_rate=2e-4, weight_decay=0.01, warmup_steps=500, evaluate_every=1000)
    demo, long = (
        _diffusion(base, codecs["demo"], _LATENT_DEMO | prior, None, 30, steps=steps, ema_decay=decay, **small)
        for base, steps, decay in ((_DEMO, 1500, 0.99), (_DEMO_LONG, 6000, 0.998))
    )
    on_gpu = {
        card: _diffusion(
            _TOKEN_PRESETS[card], codecs["gpu"], _LATENT_GPU | prior, ema_decay=0.9995, keep_best=False, **large
        )
        for card in _CARDS
    }
    smoke = _diffusion(_SMOKE, codecs["smoke"], _LATENT_SMOKE | prior, dict(num_inference_steps=3), ema_decay=0.5)
    return {"demo": demo, "demo-long": long, "smoke": smoke, **on_gpu}


_KL = _latent_presets(
    {
        "demo": dict(image_size=64, patch_size=(2, 4), block_out_channels=(48, 96), latent_channels=6),
        "gpu": _GPU_CODEC | dict(latent_channels=4),
        "smoke": dict(
            image_size=32, patch_size=(2, 2), block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2
        ),
    },
    dict(attention="full"),
)
_STANDARD = replace(
    _KL["gpu-16gb"],
    codec_training=replace(_KL["gpu-16gb"].codec_training, mixed_precision="auto"),
    prior_training=replace(_KL["gpu-16gb"].prior_training, mixed_precision="auto"),
)
_MEMORY_OPTIMISED = replace(
    _STANDARD,
    codec=_STANDARD.codec | dict(gradient_checkpointing=True),
    prior=_STANDARD.prior | dict(gradient_checkpointing=True),
    codec_training=replace(_STANDARD.codec_training, batch_size=8, accumulation=8),
    prior_training=replace(_STANDARD.prior_training, batch_size=8, accumulation=8),
)
_HIGH_QUALITY = replace(
    _STANDARD,
    codec=_STANDARD.codec | dict(block_out_channels=(128, 256, 512), perceptual_weight=0.1, perceptual_net="vgg"),
    prior=_STANDARD.prior | dict(block_out_channels=(192, 384, 512)),
    prior_training=replace(_STANDARD.prior_training, steps=60_000, ema_decay=0.9999),
    sampling=dict(guidance_scale=1.5, num_inference_steps=50),
)

_LDM = _latent_presets(
    {
        # Eight-fold in both directions: by a patch of four and one halving, or of two and two on a GPU.
        "demo": dict(image_size=64, patch_size=(4, 4), block_out_channels=(64, 128), num_codes=256, code_dim=8),
        "gpu": _GPU_CODEC | dict(num_codes=256, code_dim=8),
        "smoke": dict(
            image_size=32,
            patch_size=(2, 2),
            block_out_channels=(8, 8, 16),
            norm_num_groups=4,
            num_codes=16,
            code_dim=4,
        ),
    },
    dict(attention="window_axial", window=4),
)
_LDM["gpu-6gb"] = replace(_LDM["gpu-6gb"], codec=_LDM["gpu-6gb"].codec | dict(num_codes=128))

# Flow matching over aligned latents ---------------------------------------------------------------------------------

# On a GPU the authors' three stages, with an adversary; on a CPU the first one, without.
_STAGES = tuple((share, options | dict(adversarial_start=0)) for share, options in RECIPE)
_VA_SMALL = dict(image_size=64, patch_size=(4, 4), block_out_channels=(64, 128), latent_channels=16)
_VA_GPU = _GPU_CODEC | dict(latent_channels=16, reconstruction="l1", adversarial_weight=0.5)


def _flow(base: Preset, codec: dict, prior: dict, sampling: dict, **changes) -> Preset:
    """`base`, a preset of latent diffusion, with an aligned codec and a velocity prior."""
    return replace(base, codec=codec, prior=prior, sampling=dict(guidance_scale=1.5) | sampling, **changes)


_DIT = {
    name: _flow(
        _KL[name],
        _VA_SMALL,
        dict(patch_size=1, hidden_size=128, depth=6, num_heads=4, label_dropout=0.15),
        dict(scheduler="euler", num_inference_steps=20),
        foundation="classifier",
        prior_training=replace(_KL[name].prior_training, steps=steps, learning_rate=2e-3),
    )
    for name, steps in (("demo", 800), ("demo-long", 4000))
}
_DIT["smoke"] = _flow(
    _KL["smoke"],
    dict(
        image_size=32,
        patch_size=(2, 2),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        adversarial_weight=0.5,
        discriminator_width=8,
        discriminator_layers=2,
    ),
    dict(patch_size=2, hidden_size=16, depth=2, num_heads=2),
    dict(num_inference_steps=3),
    foundation="classifier",
    stages=tuple((1 / 3, options) for _, options in _STAGES),
)
for _card in _CARDS:
    _small = _card in ("gpu-6gb", "gpu-8gb")
    _DIT[_card] = _flow(
        _KL[_card],
        _VA_GPU,
        SIZES["S" if _small else "B"] | dict(patch_size=1, qk_norm=True, gradient_checkpointing=_card == "gpu-6gb"),
        dict(num_inference_steps=25),
        foundation="facebook/dinov2-large",
        stages=_STAGES,
        prior_training=replace(_KL[_card].prior_training, learning_rate=1e-4, beta2=0.95),
    )

# The sizes of the published VA-VAE, for `codec_start`.
_DIT["f16d32"] = replace(
    _DIT["gpu-16gb"],
    codec=F16D32 | dict(reconstruction="l1", adversarial_weight=0.5, gradient_checkpointing=True),
    codec_training=replace(_DIT["gpu-16gb"].codec_training, learning_rate=1e-4, batch_size=4, accumulation=4),
    prior=_DIT["gpu-16gb"].prior | dict(gradient_checkpointing=True, qk_norm=False),  # as published
)

_DIFFUSION_NOTEBOOKS = ("01_env_check", "02_train_vqvae", "04_train_diffusion", "05_generate", "06_validate")

SYSTEMS = {
    "vqvae-transformer": System(
        codec=VQVAE,
        prior=TokenPrior,
        notebooks=("01_env_check", "02_train_vqvae", "03_train_prior", "05_generate", "06_validate"),
        presets=_TOKEN_PRESETS,
    ),
    "vae-diffusion": System(
        codec=KLVAE,
        prior=LatentDiffusion,
        notebooks=_DIFFUSION_NOTEBOOKS,
        presets=_KL | {"standard": _STANDARD, "memory-optimised": _MEMORY_OPTIMISED, "high-quality": _HIGH_QUALITY},
    ),
    "vqvae-ldm": System(codec=VQVAE, prior=LatentDiffusion, notebooks=_DIFFUSION_NOTEBOOKS, presets=_LDM),
    "vavae-dit": System(codec=VAVAE, prior=LightningDiT, notebooks=_DIFFUSION_NOTEBOOKS, presets=_DIT),
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
    codec: str = "",
    codec_steps: int = 0,
    prior_steps: int = 0,
    codec_options: dict | None = None,
    prior_options: dict | None = None,
    perceptual_weight: float = 0.0,
    foundation: str = "",
    user_codec: bool = False,
    windows_per_user: int = 0,
    seed: int = 0,
) -> Preset:
    """A preset with some of its values changed; 0 and "" leave the preset's.

    Args:
        codec: "vq", "kl" or "va": that kind of codec, of the system's sizes, instead of the system's own.
        codec_steps, prior_steps: optimizer steps of the two trainings.
        codec_options, prior_options: arguments of the model's class or fields of its TrainConfig, by name.
        perceptual_weight: of LPIPS in the codec's loss.
        foundation: what a VA-VAE is aligned with, see `Preset.foundation`.
        user_codec: tell a VA-VAE whose window it sees.
        windows_per_user: training windows kept a user; -1 keeps all.
        seed: of data order and noise in both trainings.

    Raises:
        DataError: a name that does not exist, or a codec the system's prior cannot read.
    """
    presets = get_system(system).presets
    if name not in presets:
        raise DataError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    preset = _with_codec(presets[name], get_system(system), codec)
    prior_class = get_system(system).prior
    kept = max(0, windows_per_user) if windows_per_user else preset.windows_per_user
    preset = replace(
        preset,
        codec={**preset.codec, "perceptual_weight": perceptual_weight} if perceptual_weight else preset.codec,
        codec_training=replace(preset.codec_training, seed=seed, steps=codec_steps or preset.codec_training.steps),
        prior_training=replace(preset.prior_training, seed=seed, steps=prior_steps or preset.prior_training.steps),
        windows_per_user=kept,
        foundation=foundation or preset.foundation,
        user_codec=user_codec or preset.user_codec,
        # What is asked for by name holds in every stage.
        stages=tuple(
            (share, {key: value for key, value in options.items() if key not in (codec_options or {})})
            for share, options in preset.stages
        ),
    )
    if preset.codec_class is not VAVAE and (foundation not in ("", "none") or user_codec):
        raise DataError("foundation and user_codec are of a VA-VAE: take system vavae-dit, or codec va")
    preset = _with_options(preset, "codec", preset.codec_class, codec_options or {})
    if preset.codec_training.ema_decay and hasattr(preset.codec_class, "encode_tokens"):
        raise DataError("a VQ codec trains without ema_decay: averaged weights would not fit its codebook")
    return _with_options(preset, "prior", prior_class, prior_options or {})


def _with_codec(preset: Preset, system: System, kind: str) -> Preset:
    """The preset with its codec's class named, and with those of its sizes that the class knows."""
    if kind and kind not in CODECS:
        raise DataError(f"unknown codec {kind!r}: choose one of {', '.join(CODECS)}, or leave it empty")
    chosen = CODECS[kind] if kind else system.codec
    if system.prior.consumes == "tokens" and not hasattr(chosen, "encode_tokens"):
        raise DataError(f"this system's prior reads tokens, which a {kind} codec does not make: leave codec empty")
    known = _arguments(chosen)
    sizes = {key: value for key, value in preset.codec.items() if key in known}
    aligned = chosen is VAVAE
    return replace(
        preset,
        codec_class=chosen,
        codec=sizes,
        foundation=("classifier" if aligned and kind and system.codec is not VAVAE else preset.foundation)
        if aligned
        else "none",
        stages=preset.stages if aligned else (),
    )


def _with_options(preset: Preset, part: str, model: type, options: dict) -> Preset:
    """The preset with `options` of its codec or prior changed: the model's arguments, or its training's fields."""
    # Data, users and the other model fix these; steps and seed are settings of their own.
    fixed = {
        "in_channels",
        "num_users",
        "foundation_width",
        "latent_shape",
        "num_codes" if part == "prior" else "",
        "token_shape",
    }
    sizes = _arguments(model) - fixed
    effort = {entry.name for entry in fields(TrainConfig)} - {"steps", "seed"}
    for key in options.keys() - sizes - effort:
        raise DataError(f"{part}_options has no {key!r}; there are {', '.join(sorted(sizes | effort))}")
    training = {key: value for key, value in options.items() if key in effort}
    changed = {key: value for key, value in options.items() if key in sizes}
    return replace(
        preset,
        **{part: {**getattr(preset, part), **changed}},
        **{f"{part}_training": replace(getattr(preset, f"{part}_training"), **training)},
    )


def _arguments(model: type) -> set[str]:
    return set(inspect.signature(model.__init__).parameters) - {"self"}


def make_codec(preset: Preset, channels: int = 1, num_users: int = 0, foundation_width: int = 0):
    """A new codec of the preset's size for images of `channels`; num_users and foundation_width are a VA-VAE's."""
    told = dict(num_users=num_users if preset.user_codec else 0, foundation_width=foundation_width)
    return preset.codec_class(in_channels=channels, **preset.codec, **(told if preset.codec_class is VAVAE else {}))


def start_codec(codec, source: str | Path) -> None:
    """Give a new codec the weights of a codec/ folder, or of a published VA-VAE file.

    Raises:
        DataError: weights that do not fit.
    """
    _start(codec, source, load_codec, load_ldm)


def start_prior(prior, source: str | Path) -> None:
    """Give a new prior the weights of a prior folder (pipeline/prior of a run), or of a published LightningDiT file.

    Raises:
        DataError: weights that do not fit.
    """
    published = getattr(type(prior), "load_published", None)
    _start(prior, source, type(prior).from_pretrained, published)


def _start(model, source: str | Path, from_folder, from_file) -> None:
    try:
        if Path(source).is_dir():
            beside = getattr(model, "beside", ())
            load_completely(model, from_folder(source).state_dict(), source, beside)
        elif from_file is None:
            raise DataError(f"there are no published weights of a {type(model).__name__}: give a folder")
        else:
            from_file(model, source)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot start from {source}: {error}") from error


def load_codec(path: str | Path):
    """The codec of a folder written by its `save_pretrained` (the codec/ folder of a run), of whichever kind.

    Raises:
        DataError: no codec at `path`.
    """
    config = Path(path) / "config.json"
    kinds = {kind.__name__: kind for kind in CODECS.values()}
    name = json.loads(config.read_text()).get("_class_name") if config.exists() else None
    if name not in kinds:
        raise DataError(f"{path} holds no codec: give the codec/ folder of a run")
    return kinds[name].from_pretrained(path)


def make_prior(system: str, preset: Preset, codec, num_users: int):
    """A new prior that fits `codec` and the number of users."""
    prior = get_system(system).prior
    if prior.consumes == "tokens":
        shape = dict(num_codes=codec.num_codes, token_shape=codec.token_shape)
    else:
        shape = dict(latent_shape=codec.latent_shape)
    return prior(num_users=num_users, **shape, **preset.prior)


def seeded(seed: int, make, *arguments):
    """`make(*arguments)` with the random weights of `seed`, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*arguments)
