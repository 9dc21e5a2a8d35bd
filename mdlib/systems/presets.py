"""The presets of every system: sizes and efforts, and nothing that acts.

A preset is where sizes meet a machine: `smoke` (seconds, for tests), `demo` (2 CPU cores, minutes), `demo-long` (the
same sizes, half an hour), and the GPU ones.
"""

from dataclasses import dataclass, field, replace

from mdlib.models.dit import SIZES
from mdlib.training.fit import TrainConfig


@dataclass(frozen=True)
class Preset:
    """Sizes and effort of a run."""

    codec: dict  # keyword arguments of the codec class, image_size among them
    prior: dict  # keyword arguments of the prior class that the codec and the users do not fix
    codec_training: TrainConfig
    prior_training: TrainConfig
    codec_class: type = None  # filled in by get_preset: the system's, or another kind of codec of the same sizes
    sampling: dict = field(default_factory=dict)  # keyword arguments of prior.sample
    losses: dict = field(default_factory=dict)  # options of LPIPS, alignment and adversary, see `attach_losses`
    teacher_steps: int = 0  # optimizer steps of the user classifier whose features the codec's loss compares; 0: none
    teacher_weight: float = 0.2  # of that distance
    foundation: str = "none"  # what latents are aligned with: none, classifier, or a transformers vision model
    stages: tuple = ()  # of the codec's training: pairs of a fraction of its steps and options of losses
    user_codec: bool = False  # the codec is told whose window it sees (VAVAE)
    variants: int = 15  # stride-recombined copies of each training window, for codec and prior
    images_per_user: int = 20  # windows generated
    windows_per_user: int = 0  # training windows kept a user; 0 keeps all
    validation: dict = field(default_factory=dict)  # keyword arguments of evidence.Protocol

    @property
    def image_size(self) -> int:
        return self.codec["image_size"]


def fine_tuning(preset: Preset) -> Preset:
    """The same sizes with the effort of a run that starts from a pipeline trained on other people.

    How people walk is known, these people are not: few small steps teach the codec their radar, and the prior mostly
    whom it sees, so users' embeddings learn fifty times as fast as the rest. Stride recombination keeps a prior from
    copying few windows, and from their variety; what is known of walking does the former better, and one copy is left.
    """
    codec, prior = preset.codec_training, preset.prior_training
    return replace(
        preset,
        codec_training=replace(codec, steps=max(1, codec.steps // 5), learning_rate=0.15 * codec.learning_rate),
        prior_training=replace(
            prior, steps=max(1, 2 * prior.steps // 5), learning_rate=0.2 * prior.learning_rate, user_rate=50.0
        ),
        variants=1,
        # A prior that knows many people takes more guidance to keep to one.
        sampling=preset.sampling | ({"guidance_scale": 2.0} if "guidance_scale" in preset.sampling else {}),
    )


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
        validation=dict(evaluation_steps=2000, seeds=5, multiples=(2, 4), keep=(0.75, 0.5, 0.25)),
    )


_DEMO = Preset(
    # Half as wide again wins .2 dB at equal steps, and loses much of the user at equal time.
    codec=dict(image_size=64, patch_size=(2, 4), block_out_channels=(32, 64), num_codes=256, code_dim=16),
    prior=dict(hidden_size=128, num_layers=4, num_heads=4),
    codec_training=TrainConfig(
        steps=1000, batch_size=8, learning_rate=2e-3, warmup_steps=20, evaluate_every=500, save_every=250
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
    validation=dict(evaluation_steps=300),
)

_DEMO_LONG = replace(
    _DEMO,
    codec_training=replace(_DEMO.codec_training, steps=4000, evaluate_every=500, save_every=500),
    prior_training=replace(_DEMO.prior_training, steps=2000, evaluate_every=250, save_every=250),
    teacher_steps=600,
    images_per_user=20,
    validation=dict(evaluation_steps=1000),
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
    validation=dict(evaluation_steps=4, seeds=2),
)

# A batch is that of all GPUs together: each of two T4 takes 32 windows, and the training is that of gpu-16gb.
_CARDS = {
    "gpu-6gb": (16, "fp16"),
    "gpu-8gb": (32, "fp16"),
    "gpu-16gb": (64, "fp16"),
    "p100": (64, "no"),  # Pascal: no tensor cores, half precision gains nothing
    "t4x2": (64, "fp16"),
}
TOKENS = {
    "demo": _DEMO,
    "demo-long": _DEMO_LONG,
    "smoke": _SMOKE,
    **{card: _gpu(*sizes) for card, sizes in _CARDS.items()},
}


# Diffusion over latents: the same codec training and evaluation, another codec and prior --------------------------

_LATENT_DEMO = dict(block_out_channels=(48, 96), norm_num_groups=8, head_dim=16, label_dropout=0.15)
_LATENT_SMOKE = dict(block_out_channels=(8, 16), norm_num_groups=4, head_dim=8)
_LATENT_GPU = dict(block_out_channels=(128, 256, 384), layers_per_block=2, norm_num_groups=32, head_dim=64, dropout=0.1)
_LARGE = dict(
    steps=20_000,
    learning_rate=2e-4,
    weight_decay=0.01,
    warmup_steps=500,
    evaluate_every=1000,
    ema_decay=0.9995,
    keep_best=False,
)


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
    demo, long = (
        _diffusion(base, codecs["demo"], _LATENT_DEMO | prior, None, 30, steps=steps, ema_decay=decay, **small)
        for base, steps, decay in ((_DEMO, 1500, 0.99), (_DEMO_LONG, 6000, 0.998))
    )
    on_gpu = {card: _diffusion(TOKENS[card], codecs["gpu"], _LATENT_GPU | prior, **_LARGE) for card in _CARDS}
    smoke = _diffusion(_SMOKE, codecs["smoke"], _LATENT_SMOKE | prior, dict(num_inference_steps=3), ema_decay=0.5)
    return {"demo": demo, "demo-long": long, "smoke": smoke, **on_gpu}


KL = _latent_presets(
    {
        "demo": dict(image_size=64, patch_size=(2, 4), block_out_channels=(32, 64), latent_channels=6),
        "gpu": _GPU_CODEC | dict(latent_channels=4),
        "smoke": dict(
            image_size=32, patch_size=(2, 2), block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2
        ),
    },
    dict(attention="full"),
)
_STANDARD = replace(
    KL["gpu-16gb"],
    codec_training=replace(KL["gpu-16gb"].codec_training, mixed_precision="auto"),
    prior_training=replace(KL["gpu-16gb"].prior_training, mixed_precision="auto"),
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
    codec=_STANDARD.codec | dict(block_out_channels=(128, 256, 512)),
    losses=dict(perceptual_weight=0.1, perceptual_net="vgg"),
    prior=_STANDARD.prior | dict(block_out_channels=(192, 384, 512)),
    prior_training=replace(_STANDARD.prior_training, steps=60_000, ema_decay=0.9999),
    sampling=dict(guidance_scale=1.5, num_inference_steps=50),
)

KL |= {"standard": _STANDARD, "memory-optimised": _MEMORY_OPTIMISED, "high-quality": _HIGH_QUALITY}

LDM = _latent_presets(
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
LDM["gpu-6gb"] = replace(LDM["gpu-6gb"], codec=LDM["gpu-6gb"].codec | dict(num_codes=128))

# Flow matching over aligned latents ---------------------------------------------------------------------------------

# On a GPU the authors' three stages, with an adversary; on a CPU the first one, without.
_STAGES = tuple(
    (epochs / 130, dict(alignment_weight=weight, distance_margin=distance, cosine_margin=cosine, adversarial_start=0))
    for epochs, weight, distance, cosine in ((100, 0.5, 0.0, 0.0), (15, 0.1, 0.0, 0.0), (15, 0.1, 0.25, 0.5))
)
_VA_SMALL = dict(image_size=64, patch_size=(4, 4), block_out_channels=(64, 128), latent_channels=16)
_VA_GPU = _GPU_CODEC | dict(latent_channels=16, reconstruction="l1")
_ADVERSARY = dict(adversarial_weight=0.5)


def _flow(base: Preset, codec: dict, prior: dict, sampling: dict, **changes) -> Preset:
    """`base`, a preset of latent diffusion, with an aligned codec and a velocity prior."""
    return replace(base, codec=codec, prior=prior, sampling=dict(guidance_scale=1.5) | sampling, **changes)


DIT = {
    name: _flow(
        KL[name],
        _VA_SMALL,
        dict(patch_size=1, hidden_size=128, depth=6, num_heads=4, label_dropout=0.15),
        dict(scheduler="euler", num_inference_steps=20),
        foundation="classifier",
        prior_training=replace(KL[name].prior_training, steps=steps, learning_rate=2e-3),
    )
    for name, steps in (("demo", 800), ("demo-long", 4000))
}
DIT["smoke"] = _flow(
    KL["smoke"],
    dict(
        image_size=32,
        patch_size=(2, 2),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    ),
    dict(patch_size=2, hidden_size=16, depth=2, num_heads=2),
    dict(num_inference_steps=3),
    losses=_ADVERSARY | dict(discriminator_width=8, discriminator_layers=2),
    foundation="classifier",
    stages=tuple((1 / 3, options) for _, options in _STAGES),
)
for _card in _CARDS:
    _small = _card in ("gpu-6gb", "gpu-8gb")
    _tight = _card in ("gpu-6gb", "p100")  # in float32 "B" would take 17 GB for a batch of 64
    DIT[_card] = _flow(
        KL[_card],
        _VA_GPU,
        SIZES["S" if _small else "B"] | dict(patch_size=1, qk_norm=True, gradient_checkpointing=_tight),
        dict(num_inference_steps=25),
        foundation="facebook/dinov2-large",
        losses=_ADVERSARY,
        stages=_STAGES,
        prior_training=replace(KL[_card].prior_training, learning_rate=1e-4, beta2=0.95),
    )

# The sizes of the published VA-VAE, for `codec_start`.
DIT["f16d32"] = replace(
    DIT["gpu-16gb"],
    codec=dict(
        image_size=256,
        block_out_channels=(128, 128, 256, 256, 512),
        layers_per_block=2,
        norm_num_groups=32,
        latent_channels=32,
        level_attention=True,
        reconstruction="l1",
        gradient_checkpointing=True,
    ),
    codec_training=replace(DIT["gpu-16gb"].codec_training, learning_rate=1e-4, batch_size=4, accumulation=4),
    prior=DIT["gpu-16gb"].prior | dict(gradient_checkpointing=True, qk_norm=False),  # as published
)

# Mask-and-replace diffusion over the transformer's tokens -------------------------------------------------------------


def _discrete(name: str, prior: dict, sampling: dict, **training) -> Preset:
    """The transformer's preset of that name with this prior."""
    images = 20 if name == "demo" else KL[name].images_per_user
    return _diffusion(TOKENS[name], TOKENS[name].codec, prior, sampling, images, **training)


# Without guidance: from 1.5 on it took windows further from real ones. Eight steps of mask-predict draw no worse than
# more of them and better than 25 of the ancestral sampler.
_FEW_STEPS = dict(sampler="mask_predict", num_inference_steps=8)
# More plain cross-entropy than the authors' 5e-4: the bound weighs states of few masks most, which decide little.
_DISCRETE = dict(auxiliary_weight=0.1)
DISCRETE = {
    name: _discrete(
        name,
        dict(hidden_size=128, depth=4, num_heads=4) | _DISCRETE,
        _FEW_STEPS,
        steps=steps,
        batch_size=16,
        ema_decay=decay,
        weight_decay=0.01,
        evaluate_every=200,
    )
    for name, steps, decay in (("demo", 600, 0.99), ("demo-long", 4000, 0.998))
}
DISCRETE["smoke"] = _discrete(
    "smoke", dict(hidden_size=16, depth=1, num_heads=2), dict(num_inference_steps=3), ema_decay=0.5
)
for _card in _CARDS:
    DISCRETE[_card] = _discrete(
        _card,
        dict(hidden_size=384, depth=8 if _card == "gpu-6gb" else 12, num_heads=6, qk_norm=True) | _DISCRETE,
        _FEW_STEPS,
        **_LARGE,
    )
