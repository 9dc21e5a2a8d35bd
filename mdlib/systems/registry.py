"""The systems: which classes, which presets, and how they are changed and built. Nothing else knows all of them."""

import inspect
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from mdlib.data.windows import DataError
from mdlib.models.codec_losses import Adversary, Alignment, Distance
from mdlib.models.dit import LightningDiT
from mdlib.models.kl import KLVAE
from mdlib.models.pretrained import load_completely, load_ldm
from mdlib.models.transformer import TokenPrior
from mdlib.models.unet import LatentDiffusion
from mdlib.models.vavae import VAVAE
from mdlib.models.vqdiffusion import VQDiffusion
from mdlib.models.vqvae import VQVAE
from mdlib.systems import presets
from mdlib.systems.presets import Preset
from mdlib.training.fit import TrainConfig

CODECS = {"vq": VQVAE, "kl": KLVAE, "va": VAVAE}
PERCEPTUAL = {"perceptual_weight", "perceptual_net"}  # loss options of every codec; an aligned one has more


@dataclass(frozen=True)
class System:
    """A codec and the prior over its tokens or latents; notebooks that train it, in order."""

    codec: type
    prior: type
    notebooks: tuple[str, ...]
    presets: dict[str, Preset]


_DIFFUSION_NOTEBOOKS = ("01_env_check", "02_train_vqvae", "04_train_diffusion", "05_generate", "06_validate")

SYSTEMS = {
    "vqvae-transformer": System(
        codec=VQVAE,
        prior=TokenPrior,
        notebooks=("01_env_check", "02_train_vqvae", "03_train_prior", "05_generate", "06_validate"),
        presets=presets.TOKENS,
    ),
    "vae-diffusion": System(
        codec=KLVAE,
        prior=LatentDiffusion,
        notebooks=_DIFFUSION_NOTEBOOKS,
        presets=presets.KL,
    ),
    "vqvae-ldm": System(codec=VQVAE, prior=LatentDiffusion, notebooks=_DIFFUSION_NOTEBOOKS, presets=presets.LDM),
    "vavae-dit": System(codec=VAVAE, prior=LightningDiT, notebooks=_DIFFUSION_NOTEBOOKS, presets=presets.DIT),
    "vq-diffusion": System(codec=VQVAE, prior=VQDiffusion, notebooks=_DIFFUSION_NOTEBOOKS, presets=presets.DISCRETE),
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
    variants: int = -1,
    init: str = "",
    seed: int = 0,
) -> Preset:
    """A preset with some of its values changed; 0, "" and -1 leave the preset's.

    Args:
        codec: "vq", "kl" or "va": that kind of codec, of the system's sizes, instead of the system's own.
        codec_steps, prior_steps: optimizer steps of the two trainings.
        codec_options, prior_options: arguments of the model's class, options of the codec's losses, or fields of the
            TrainConfig, by name.
        perceptual_weight: of LPIPS in the codec's loss.
        foundation: what a VA-VAE is aligned with, see `Preset.foundation`.
        user_codec: tell a VA-VAE whose window it sees.
        windows_per_user: training windows kept a user; 0 leaves the preset's, -1 keeps all.
        variants: stride-recombined copies of each training window; 0 for none.
        init: a trained pipeline is where both models start from: the efforts of `presets.fine_tuning` instead of the
            preset's.
        seed: of data order and noise in both trainings.

    Raises:
        DataError: a name that does not exist, or a codec the system's prior cannot read.
    """
    known = get_system(system).presets
    if name not in known:
        raise DataError(f"unknown preset {name!r}: choose one of {', '.join(known)}")
    preset = presets.fine_tuning(known[name]) if init else known[name]
    preset = _with_codec(preset, get_system(system), codec)
    prior_class = get_system(system).prior
    kept = max(0, windows_per_user) if windows_per_user else preset.windows_per_user
    preset = replace(
        preset,
        losses={**preset.losses, "perceptual_weight": perceptual_weight} if perceptual_weight else preset.losses,
        codec_training=replace(preset.codec_training, seed=seed, steps=codec_steps or preset.codec_training.steps),
        prior_training=replace(preset.prior_training, seed=seed, steps=prior_steps or preset.prior_training.steps),
        windows_per_user=kept,
        variants=preset.variants if variants < 0 else variants,
        foundation=foundation or preset.foundation,
        user_codec=user_codec or preset.user_codec,
        # What is asked for by name holds in every stage.
        stages=tuple(
            (share, {key: value for key, value in options.items() if key not in (codec_options or {})})
            for share, options in preset.stages
        ),
    )
    if not preset.codec_class.aligned and (foundation not in ("", "none") or user_codec):
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
    aligned = chosen.aligned
    return replace(
        preset,
        codec_class=chosen,
        codec=sizes,
        losses={key: value for key, value in preset.losses.items() if key in _loss_options(chosen)},
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
        "latent_shape",
        "num_codes" if part == "prior" else "",
        "token_shape",
    }
    sizes = _arguments(model) - fixed
    effort = {entry.name for entry in fields(TrainConfig)} - {"steps", "seed"}
    losses = _loss_options(model) if part == "codec" else set()
    for key in options.keys() - sizes - effort - losses:
        raise DataError(f"{part}_options has no {key!r}; there are {', '.join(sorted(sizes | effort | losses))}")
    training = {key: value for key, value in options.items() if key in effort}
    changed = {key: value for key, value in options.items() if key in sizes}
    return replace(
        preset,
        losses=preset.losses | {key: value for key, value in options.items() if key in losses},
        **{part: {**getattr(preset, part), **changed}},
        **{f"{part}_training": replace(getattr(preset, f"{part}_training"), **training)},
    )


def _loss_options(codec: type) -> set[str]:
    """Names in `Preset.losses` that apply to a codec of that class."""
    aligned = (_arguments(Alignment) | _arguments(Adversary)) if codec.aligned else set()
    return PERCEPTUAL | aligned - {"foundation", "latent_channels", "channels", "image_size"}


def _arguments(model: type) -> set[str]:
    return set(inspect.signature(model.__init__).parameters) - {"self"}


def make_codec(preset: Preset, channels: int = 1, num_users: int = 0):
    """A new codec of the preset's size for images of `channels`, conditioned on num_users if the preset says so."""
    users = dict(num_users=num_users) if preset.user_codec else {}
    return preset.codec_class(in_channels=channels, **preset.codec, **users)


def attach_losses(codec, preset: Preset, teacher=None, lpips=None, foundation=None) -> None:
    """Attach the preset's losses to a codec: the distances of the frozen networks `teacher` and `lpips`, and the
    alignment with the features of `foundation`, where these are given; and the adversary, where it has a weight."""
    options = preset.losses
    own = lambda kind: {key: value for key, value in options.items() if key in _arguments(kind)}
    if teacher:
        codec.attach(Distance("teacher", teacher, preset.teacher_weight))
    if lpips:
        codec.attach(Distance("lpips", lpips, options["perceptual_weight"]))
    if foundation:
        codec.attach(Alignment(foundation, codec.latent_shape[0], **own(Alignment)))
    if options.get("adversarial_weight"):
        codec.attach(Adversary(codec.config.in_channels, codec.config.image_size, **own(Adversary)))


def start_codec(codec, source: str | Path, other_users: bool = False) -> None:
    """Give a new codec the weights of a codec/ folder, or of a published VA-VAE file.

    other_users: see `start_prior`; of a codec that is told users.

    Raises:
        DataError: weights that do not fit.
    """
    _start(codec, source, load_codec, load_ldm, _for_users(codec.config.get("num_users", 0), other_users))


def start_prior(prior, source: str | Path, other_users: bool = False) -> None:
    """Give a new prior the weights of a prior folder (pipeline/prior of a run), or of a published LightningDiT file.

    other_users: the folder's prior was trained on other people. What it knows of walking is kept; each user starts as
    the mean of its users, and the null label, which is nobody in particular, as it is. So do conditions where it knows
    as many, or else they begin anew.

    Raises:
        DataError: weights that do not fit.
    """
    published = getattr(type(prior), "load_published", None)
    change = _for_users(prior.null_label, other_users, getattr(prior.users, "conditions", None))
    _start(prior, source, type(prior).from_pretrained, published, change)


def _for_users(num_users: int, other_users: bool, conditions: torch.Tensor | None = None):
    """Changes weights by name: with other users, `num_users` new rows in the table of users; conditions: of the model
    that is to begin with them."""

    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = found.get("users.weight")
        if table is None or not other_users:
            return found
        mean = table[:-1].mean(0, keepdim=True).expand(num_users, -1)
        found = found | {"users.weight": torch.cat([mean, table[-1:]])}
        known = found.pop("users.conditions", None)
        if conditions is None:
            return found
        fits = known is not None and known.shape == conditions.shape
        return found | {"users.conditions": known if fits else torch.zeros_like(conditions)}

    return change


def _start(model, source: str | Path, from_folder, from_file, change=lambda found: found) -> None:
    """change: of the weights read from a folder."""
    try:
        if Path(source).is_dir():
            optional = getattr(model, "optional", ())
            load_completely(model, change(from_folder(source).state_dict()), source, optional)
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


def make_prior(system: str, preset: Preset, codec, num_users: int, num_conditions: int = 1):
    """A new prior that fits `codec` and the numbers of users and conditions."""
    prior = get_system(system).prior
    if prior.consumes == "tokens":
        shape = dict(num_codes=codec.num_codes, token_shape=codec.token_shape)
    else:
        shape = dict(latent_shape=codec.latent_shape)
    return prior(num_users=num_users, num_conditions=num_conditions, **shape, **preset.prior)


def seeded(seed: int, make, *arguments):
    """`make(*arguments)` with the random weights of `seed`, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*arguments)
