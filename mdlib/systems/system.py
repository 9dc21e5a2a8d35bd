"""What a system is, the preset that a name stands for, and how a codec and a prior are built, started and loaded.

Nothing here imports torch before a model is needed, so the names of systems and presets can be checked at once.
"""

import inspect
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from mdlib.systems.machines import EFFORTS, MACHINES, gpus, preset_for
from mdlib.utils import DataError

if TYPE_CHECKING:
    import torch

    from mdlib.training.fit import TrainConfig

CODECS = {
    "vq": "mdlib.models.vqvae:VQVAE",
    "kl": "mdlib.models.kl:KLVAE",
    "va": "mdlib.models.kl:VAVAE",
}

# Arguments of prior.sample that are no plain values.
NO_OPTIONS = {"self", "users", "conditions", "generator", "classifier", "towards", "share", "fraction", "on_step"}


@dataclass(frozen=True)
class System:
    """A codec and a prior over its tokens or latents.

    Args:
        codec_class, prior_class: "module:Class".
        notebooks: those that train and evaluate it, in order.
        curves: columns of history.csv worth plotting, of codec and prior; those that a training lacks are left out.
        sizes: for each size what it adds to EFFORTS: fields of `Preset` with arguments of models and TrainConfig.
        base_on: the same for a machine that takes another model of size base.
    """

    name: str
    codec_class: str
    prior_class: str
    notebooks: tuple[str, ...]
    curves: tuple[str, ...]
    sizes: dict[str, dict]
    base_on: dict[str, dict] = field(default_factory=dict)

    @property
    def codec(self) -> type:
        return resolve_name(self.codec_class)

    @property
    def prior(self) -> type:
        return resolve_name(self.prior_class)

    def sampling_options(self) -> dict:
        """What `prior.sample` can be given as plain values, with its defaults."""
        known = inspect.signature(self.prior.sample).parameters.items()
        return {name: one.default for name, one in known if name not in NO_OPTIONS}

    @property
    def preset_names(self) -> tuple[str, ...]:
        """Sizes and machines; besides them there are "auto" and "size@machine"."""
        return (*self.sizes, *(MACHINES if "base" in self.sizes else ()))

    @property
    def presets(self) -> dict[str, "Preset"]:
        return {name: get_preset(self.name, name) for name in self.preset_names}

    def table(self, preset: str) -> dict:
        """The preset's table: nested dictionaries as in `sizes`.

        Raises:
            DataError: an unknown name.
        """
        name = preset_for(gpus()) if preset == "auto" else preset
        size, _, machine = ("base", "", name) if name in MACHINES else name.partition("@")
        if size not in self.sizes or "@" in name and machine not in MACHINES:
            known = f"choose one of {', '.join(('auto', *self.preset_names))}, or SIZE@MACHINE such as demo@t4x2"
            raise DataError(f"unknown preset {preset!r} of system {self.name}: {known}")
        table = _joined(EFFORTS.get(size, EFFORTS["base"]), self.sizes[size])
        if size == "base":
            table = _joined(table, self.base_on.get(machine, {}))
        if machine:
            for part in ("codec_training", "prior_training"):
                here = MACHINES[machine]
                batch = min(here["batch_size"], table[part]["batch_size"])
                table[part] = table[part] | here | {"batch_size": batch}
        return table


SYSTEMS: dict[str, System] = {}


@dataclass(frozen=True)
class Preset:
    """Sizes and effort of a run."""

    codec: dict  # keyword arguments of the codec class, image_size among them
    prior: dict  # keyword arguments of the prior class that the codec and the users do not fix
    codec_training: "TrainConfig"
    prior_training: "TrainConfig"
    codec_class: type = None  # the system's, or another kind of codec of the same sizes
    sampling: dict = field(default_factory=dict)  # keyword arguments of prior.sample
    losses: dict = field(default_factory=dict)  # options of LPIPS, alignment and adversary, see `attach_losses`
    teacher_steps: int = 0  # optimizer steps of the user classifier whose features the codec's loss compares; 0: none
    teacher_weight: float = 0.2  # of that distance
    foundation: str = "none"  # what latents are aligned with: none, classifier, or a transformers vision model
    stages: tuple = ()  # of the codec's training: pairs of a fraction of its steps and options of its losses
    user_codec: bool = False  # the codec is conditioned on the user (VAVAE)
    variants: int = 15  # stride-recombined copies of each training window, for codec and prior
    images_per_user: int = 20  # windows generated
    windows_per_user: int = 0  # training windows of each user; 0 takes all
    validation: dict = field(default_factory=dict)  # keyword arguments of the evaluation's Protocol

    @property
    def image_size(self) -> int:
        return self.codec["image_size"]


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
        name: a size (smoke, demo, base, ...), a machine (size base on it), size@machine, or auto.
        init: a pipeline trained on other people from which both models start: fewer and smaller steps.
        the others: see `mdlib.experiments.settings.RunSettings`.

    Raises:
        DataError: a name that does not exist, or a codec that the system's prior cannot read.
    """
    from mdlib.training.fit import TrainConfig

    known = get_system(system)
    table = known.table(name)
    for part in ("codec_training", "prior_training"):
        table[part] = TrainConfig(**table[part])
    preset = fine_tuning(Preset(**table)) if init else Preset(**table)
    preset = _with_codec(preset, known, codec)
    if not preset.codec_class.aligned and (foundation not in ("", "none") or user_codec):
        raise DataError("foundation and user_codec are of a VA-VAE: take system vavae-dit, or codec va")
    preset = replace(
        preset,
        losses={**preset.losses, "perceptual_weight": perceptual_weight} if perceptual_weight else preset.losses,
        codec_training=replace(preset.codec_training, seed=seed, steps=codec_steps or preset.codec_training.steps),
        prior_training=replace(preset.prior_training, seed=seed, steps=prior_steps or preset.prior_training.steps),
        windows_per_user=max(0, windows_per_user) if windows_per_user else preset.windows_per_user,
        variants=preset.variants if variants < 0 else variants,
        foundation=foundation or preset.foundation,
        user_codec=user_codec or preset.user_codec,
        # An option that is given by name holds in every stage.
        stages=tuple(
            (fraction, {key: value for key, value in options.items() if key not in (codec_options or {})})
            for fraction, options in preset.stages
        ),
    )
    preset = _with_options(preset, "codec", preset.codec_class, codec_options or {})
    if preset.codec_training.ema_decay and hasattr(preset.codec_class, "encode_tokens"):
        raise DataError("a VQ codec trains without ema_decay: averaged weights would not fit its codebook")
    return _with_options(preset, "prior", known.prior, prior_options or {})


def fine_tuning(preset: Preset) -> Preset:
    """The same sizes with the effort of a run that starts from a pipeline trained on other people.

    Few small steps adapt the codec to the radar. The prior has to learn its users, so their embeddings learn fifty
    times as fast as the rest. One stride-recombined copy is enough: pretraining already keeps a prior from copying.
    """
    codec, prior = preset.codec_training, preset.prior_training
    return replace(
        preset,
        codec_training=replace(codec, steps=max(1, codec.steps // 5), learning_rate=0.15 * codec.learning_rate),
        prior_training=replace(
            prior, steps=max(1, 2 * prior.steps // 5), learning_rate=0.2 * prior.learning_rate, user_rate=50.0
        ),
        variants=1,
        # A prior that knows many people takes more guidance to stay with one.
        sampling=preset.sampling | ({"guidance_scale": 2.0} if "guidance_scale" in preset.sampling else {}),
    )


def _joined(table: dict, changes: dict) -> dict:
    """`table` with `changes`; the arguments of models and trainings are joined name by name."""
    parts = ("codec", "prior", "codec_training", "prior_training")
    return {**table, **changes, **{part: {**table.get(part, {}), **changes.get(part, {})} for part in parts}}


def _with_codec(preset: Preset, system: System, kind: str) -> Preset:
    """The preset with its codec's class, and with those of its sizes that the class takes."""
    if kind and kind not in CODECS:
        raise DataError(f"unknown codec {kind!r}: choose one of {', '.join(CODECS)}, or leave it empty")
    chosen = resolve_name(CODECS[kind]) if kind else system.codec
    if system.prior.consumes == "tokens" and not hasattr(chosen, "encode_tokens"):
        raise DataError(f"this system's prior reads tokens, which a {kind} codec does not make: leave codec empty")
    sizes = {key: value for key, value in preset.codec.items() if key in _arguments(chosen)}
    losses = {key: value for key, value in preset.losses.items() if key in _loss_options(chosen)}
    preset = replace(preset, codec_class=chosen, codec=sizes, losses=losses)
    if not chosen.aligned:
        return replace(preset, foundation="none", stages=())
    return preset if chosen is system.codec else replace(preset, foundation="classifier")


def _with_options(preset: Preset, part: str, model: type, options: dict) -> Preset:
    """The preset with `options` of its codec or prior changed: arguments of the model, options of the
    codec's losses, or fields of its training."""
    # Fixed by the data, the users and the other model.
    fixed = {"in_channels", "num_users", "latent_shape", "token_shape"}
    fixed |= {"num_codes"} if part == "prior" else set()
    training = getattr(preset, f"{part}_training")
    sizes, effort = _arguments(model) - fixed, {entry.name for entry in fields(training)} - {"steps", "seed"}
    losses = _loss_options(model) if part == "codec" else set()
    for key in options.keys() - sizes - effort - losses:
        raise DataError(f"{part}_options has no {key!r}; there are {', '.join(sorted(sizes | effort | losses))}")
    own = lambda names: {key: value for key, value in options.items() if key in names}
    return replace(
        preset,
        losses=preset.losses | own(losses),
        **{part: getattr(preset, part) | own(sizes), f"{part}_training": replace(training, **own(effort))},
    )


def _loss_options(codec: type) -> set[str]:
    """Names in `Preset.losses` that apply to a codec of that class."""
    from mdlib.models.codec import Adversary, Alignment

    aligned = (_arguments(Alignment) | _arguments(Adversary)) if codec.aligned else set()
    return {"perceptual_weight", "perceptual_net"} | aligned - {
        "foundation",
        "latent_channels",
        "channels",
        "image_size",
    }


def _arguments(model: type) -> set[str]:
    return set(inspect.signature(model.__init__).parameters) - {"self"}


# ---- models


def make_codec(preset: Preset, channels: int = 1, num_users: int = 0):
    """A new codec of the preset's size for images of `channels`, conditioned on num_users if the preset says so."""
    users = dict(num_users=num_users) if preset.user_codec else {}
    return preset.codec_class(in_channels=channels, **preset.codec, **users)


def attach_losses(codec, preset: Preset, teacher=None, lpips=None, foundation=None) -> None:
    """Attach the preset's losses to a codec: the distances of the frozen networks `teacher` and `lpips`, and the
    alignment with the features of `foundation`, where these are given; and the adversary, where it has a weight."""
    from mdlib.models.codec import Adversary, Alignment, Distance

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


def make_prior(system: str, preset: Preset, codec, num_users: int, num_conditions: int = 1):
    """A new prior that fits `codec` and the numbers of users and conditions."""
    prior = get_system(system).prior
    if prior.consumes == "tokens":
        shape = dict(num_codes=codec.num_codes, token_shape=codec.token_shape)
    else:
        shape = dict(latent_shape=codec.latent_shape)
    return prior(num_users=num_users, num_conditions=num_conditions, **shape, **preset.prior)


def seeded(seed: int, make, *arguments):
    """`make(*arguments)` with the random weights of `seed`; the caller's random state stays as it is."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*arguments)


def load_codec(path: str | Path):
    """The codec of a folder written by its `save_pretrained` (the codec/ folder of a run), of whichever kind.

    Raises:
        DataError: no codec at `path`.
    """
    config = Path(path) / "config.json"
    classes = {*CODECS.values(), *(system.codec_class for system in SYSTEMS.values())}
    kinds = {name.split(":")[1]: name for name in classes}
    name = json.loads(config.read_text()).get("_class_name") if config.exists() else None
    if name not in kinds:
        raise DataError(f"{path} holds no codec: give the codec/ folder of a run")
    return resolve_name(kinds[name]).from_pretrained(path)


def start_codec(codec, source: str | Path, other_users: bool = False) -> None:
    """Initialise a new codec from a codec/ folder, or from a published VA-VAE file.

    other_users: see `start_prior`; for a codec that is conditioned on users.

    Raises:
        DataError: weights that do not fit.
    """
    from mdlib.models.pretrained import load_ldm

    _start(codec, source, load_codec, load_ldm, other_users, codec.config.get("num_users", 0))


def start_prior(prior, source: str | Path, other_users: bool = False) -> None:
    """Initialise a new prior from a prior folder (pipeline/prior of a run), or from a published LightningDiT file.

    other_users: the folder's prior was trained on other people. Each user starts as the mean of its users; all other
    weights are taken as they are, the null label among them. Conditions are taken where their number fits, else they
    start from zero.

    Raises:
        DataError: weights that do not fit.
    """
    published = getattr(type(prior), "load_published", None)
    _start(prior, source, type(prior).from_pretrained, published, other_users, prior.null_label)


def _start(model, source: str | Path, from_folder, from_file, other_users: bool, num_users: int) -> None:
    from mdlib.models.pretrained import load_completely

    try:
        if Path(source).is_dir():
            found = from_folder(source).state_dict()
            if other_users and "users.weight" in found:
                found = _for_users(found, num_users, getattr(model.users, "conditions", None))
            load_completely(model, found, source, getattr(model, "optional", ()))
        elif from_file is None:
            raise DataError(f"there are no published weights of a {type(model).__name__}: give a folder")
        else:
            from_file(model, source)
    except (ValueError, OSError) as error:
        raise DataError(f"cannot start from {source}: {error}") from error


def _for_users(found: dict, num_users: int, conditions: "torch.Tensor | None") -> dict:
    """Weights by name with `num_users` new rows in the table of users; conditions: of the model that starts."""
    import torch

    table, known = found["users.weight"], found.get("users.conditions")
    mean = table[:-1].mean(0, keepdim=True).expand(num_users, -1)
    found = {key: value for key, value in found.items() if key != "users.conditions"}
    found["users.weight"] = torch.cat([mean, table[-1:]])
    if conditions is not None:
        fits = known is not None and known.shape == conditions.shape
        found["users.conditions"] = known if fits else torch.zeros_like(conditions)
    return found
