"""What a system is, the preset that a name stands for, and how a codec and a prior are built and loaded.

Nothing here imports torch before a model is needed, so the names of systems and presets can be checked at once.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name

from mdlib.utils import DataError, read_json, readable

CODECS = {"vq": "mdlib.models.vqvae:VQVAE", "kl": "mdlib.models.kl:KLVAE", "va": "mdlib.models.kl:VAVAE"}
TEACHER_WEIGHT = 0.2  # of the distance of the teacher's features in the codec's loss
# Of TrainConfig.
SMOKE = dict(steps=6, batch_size=8, learning_rate=1e-3, warmup_steps=1, evaluate_every=3, save_every=3)
DEMO = dict(batch_size=8, learning_rate=2e-3, warmup_steps=20, evaluate_every=500)
BASE = dict(batch_size=64, mixed_precision="auto", save_every=250)
PRIOR = dict(batch_size=32, learning_rate=1e-3, weight_decay=0.01, keep_best=False)
# What all systems have in common at a size: arguments of the models and of TrainConfig, and fields of `Preset`. Sizes
# that are not named here start from base.
COMMON_SIZES = {
    "smoke": dict(  # seconds: for tests
        codec=dict(image_size=32, patch_size=(2, 2), block_out_channels=(8, 16), norm_num_groups=4),
        codec_training=SMOKE,
        prior_training=SMOKE | dict(ema_decay=0.5),
        teacher_steps=2,
        variants=1,
        images_per_user=3,
        validation=dict(evaluation_steps=4, seeds=2),
    ),
    "demo": dict(  # minutes on two CPU cores
        codec=dict(image_size=64),
        codec_training=DEMO | dict(steps=1000, save_every=250),
        prior_training=PRIOR | dict(evaluate_every=100, save_every=100),
        teacher_steps=300,
        images_per_user=10,
        windows_per_user=10,
        validation=dict(evaluation_steps=300, seeds=2, fractions=(0.25,), counts=()),
    ),
    "demo-long": dict(  # the same sizes, half an hour
        codec=dict(image_size=64),
        codec_training=DEMO | dict(steps=4000, save_every=500),
        prior_training=PRIOR | dict(evaluate_every=250, save_every=250),
        teacher_steps=600,
        images_per_user=20,
        windows_per_user=10,
        validation=dict(evaluation_steps=1000),
    ),
    "base": dict(  # a GPU
        codec=dict(image_size=128, layers_per_block=2, norm_num_groups=32),
        # No averaged weights of a codec: they would not fit a codebook.
        codec_training=BASE | dict(steps=6000, learning_rate=5e-4, warmup_steps=200, evaluate_every=250),
        prior_training=PRIOR
        | BASE
        | dict(steps=20_000, learning_rate=2e-4, warmup_steps=500, ema_decay=0.9995, evaluate_every=1000),
        teacher_steps=1500,
        images_per_user=50,
        validation=dict(evaluation_steps=1500, multiples=(2, 4)),  # time: docs/gpus.md
    ),
}
# Of size base: the batch of all GPUs together, and the precision. A size with a smaller batch keeps it.
MACHINES = {
    "cpu": dict(batch_size=64, mixed_precision="no"),
    "p100": dict(batch_size=64, mixed_precision="no"),  # Pascal has no tensor cores: half precision gains nothing
    "t4": dict(batch_size=64, mixed_precision="fp16"),  # a card of 16 GB: as gpu-16gb
    "t4x2": dict(batch_size=64, mixed_precision="fp16"),
    "gpu-6gb": dict(batch_size=16, mixed_precision="fp16"),
    "gpu-8gb": dict(batch_size=32, mixed_precision="fp16"),
    "gpu-16gb": dict(batch_size=64, mixed_precision="fp16"),
}


def gpus() -> list:
    """torch's properties of the GPUs that it sees: name, major and minor (compute capability), total_memory (bytes)."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(number) for number in range(count)]


def preset_for(found: Sequence) -> str:
    """The preset that "auto" stands for on these GPUs: a machine, or demo on a CPU."""
    if not found:
        return "demo"
    if found[0].major < 7:
        return "p100"
    if found[0].total_memory >= 14e9:
        return "t4x2" if len(found) > 1 else "gpu-16gb"
    return "gpu-8gb" if found[0].total_memory >= 7.5e9 else "gpu-6gb"


@dataclass(frozen=True)
class System:
    """A codec and a prior over its tokens or latents.

    Args:
        codec_class, prior_class: "module:Class".
        sizes: for each size what it adds to COMMON_SIZES: fields of `Preset` with arguments of models and TrainConfig.
        base_on: the same for a machine that takes another model of size base.
        notebooks: those that train and evaluate it, in order; the default trains a prior that denoises.
    """

    name: str
    codec_class: str
    prior_class: str
    sizes: dict[str, dict]
    base_on: dict[str, dict] = field(default_factory=dict)
    notebooks: tuple[str, ...] = ("01_env_check", "02_train_vqvae", "04_train_diffusion", "05_generate", "06_validate")

    @property
    def codec(self) -> type:
        return resolve_name(self.codec_class)

    @property
    def prior(self) -> type:
        return resolve_name(self.prior_class)

    @property
    def presets(self) -> tuple[str, ...]:
        """The names of its sizes and machines; besides them there are "auto" and "size@machine"."""
        return (*self.sizes, *(MACHINES if "base" in self.sizes else ()))

    def sampling_options(self) -> dict:
        """Sampling options with plain values (of `prior.sample`, and speckle), and their defaults."""
        return self.prior.sampling_options() | {"speckle": True}

    def table(self, preset: str) -> dict:
        """The preset's fields as nested dictionaries; DataError for an unknown name."""
        name = preset_for(gpus()) if preset == "auto" else preset
        size, _, machine = ("base", "", name) if name in MACHINES else name.partition("@")
        if size not in self.sizes or "@" in name and machine not in MACHINES:
            known = f"choose one of {', '.join(('auto', *self.presets))}, or SIZE@MACHINE such as demo@t4x2"
            raise DataError(f"unknown preset {preset!r} of system {self.name}: {known}")
        table = COMMON_SIZES.get(size, COMMON_SIZES["base"])
        for changes in (self.sizes[size], self.base_on.get(machine, {}) if size == "base" else {}):
            joined = ("codec", "prior", "codec_training", "prior_training", "losses", "sampling")
            table = {**table, **changes, **{part: table.get(part, {}) | changes.get(part, {}) for part in joined}}
        for part in ("codec_training", "prior_training") if machine else ():
            batch = min(MACHINES[machine]["batch_size"], table[part]["batch_size"])
            table[part] |= MACHINES[machine] | {"batch_size": batch}
        return table


SYSTEMS: dict[str, System] = {}


@dataclass(frozen=True)
class Preset:
    """Sizes and effort of a run."""

    codec: dict  # keyword arguments of the codec class, image_size among them
    prior: dict  # keyword arguments of the prior class that the codec and the users do not fix
    codec_training: "TrainConfig"  # noqa: F821
    prior_training: "TrainConfig"  # noqa: F821
    codec_class: type = None  # the system's, or another kind of codec of the same sizes
    sampling: dict = field(default_factory=dict)  # keyword arguments of prior.sample
    losses: dict = field(default_factory=dict)  # options of LPIPS, alignment and adversary, see `attach_losses`
    teacher_steps: int = 0  # optimizer steps of the user classifier whose features the codec's loss compares; 0: none
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
    foundation: str = "",
    user_codec: bool = False,
    windows_per_user: int = 0,
    variants: int = -1,
    init: str = "none",
    seed: int = 0,
) -> Preset:
    """A preset with some of its values changed; 0, "" and -1 leave the preset's.

    Args:
        name: a size (smoke, demo, base, ...), a machine (size base on it), size@machine, or auto.
        codec_steps: -1 for a codec that is not trained, see `mdlib.experiments.settings.RunSettings`.
        init: a pipeline trained on other people from which both models start (fewer and smaller steps), or "none".
        the others: see `mdlib.experiments.settings.RunSettings`. DataError if one cannot be used.
    """
    from mdlib.models.codec import Adversary, Alignment
    from mdlib.training.fit import TrainConfig

    known = get_system(system)
    table = known.table(name)
    if codec and codec not in CODECS:
        raise DataError(f"unknown codec {codec!r}: choose one of {', '.join(CODECS)}, or leave it empty")
    kind = resolve_name(CODECS[codec]) if codec else known.codec
    if known.prior.consumes == "tokens" and not hasattr(kind, "encode_tokens"):
        raise DataError(f"this system's prior needs tokens, which a {codec} codec lacks: leave codec empty")
    if not kind.aligned and (foundation not in ("", "none") or user_codec):
        raise DataError("foundation and user_codec need a VA-VAE: use system vavae-dit, or codec va")
    if init != "none":
        _fine_tune(table)
    aligned = _options(Alignment) | _options(Adversary) if kind.aligned else set()
    of_losses = {"perceptual_weight", "perceptual_net"} | aligned
    # Keep the sizes and losses that this kind of codec has.
    table |= dict(codec=_only(table["codec"], _options(kind)), losses=_only(table["losses"], of_losses))
    if not kind.aligned:
        table |= dict(foundation="none", stages=())
    elif kind is not known.codec:
        table |= dict(foundation="classifier")
    changes = dict(foundation=foundation, user_codec=user_codec, windows_per_user=windows_per_user)
    table |= {key: value for key, value in changes.items() if value}
    table |= dict(codec_class=kind, windows_per_user=max(0, table.get("windows_per_user", 0)))
    if variants >= 0:
        table["variants"] = variants
    for part, model, steps, options in (
        ("codec", kind, 0 if codec_steps == -1 else codec_steps, codec_options),
        ("prior", known.prior, prior_steps, prior_options),
    ):
        training = table[f"{part}_training"]
        if steps:
            short = TrainConfig(**training).with_steps(steps)
            training |= dict(steps=steps, warmup_steps=short.warmup_steps)
        training |= dict(seed=seed, preview_every=500)
        # Where each option belongs; users, conditions and channels follow from the data.
        places = dict.fromkeys(_options(model) - {"in_channels", "num_users", "num_conditions"}, table[part])
        places |= dict.fromkeys(_options(TrainConfig) - {"steps", "seed", "max_minutes"}, training)
        places |= dict.fromkeys(of_losses, table["losses"]) if part == "codec" else {}
        for key, value in (options or {}).items():
            if key not in places:
                raise DataError(f"{part}_options has no {key!r}; there are {', '.join(sorted(places))}")
            places[key][key] = value
        table[f"{part}_training"] = TrainConfig(**training)
    preset = Preset(**table)
    if preset.codec_training.ema_decay and hasattr(kind, "encode_tokens"):
        raise DataError("a VQ codec trains without ema_decay: averaged weights would not fit its codebook")
    # An option that is given by name holds in every stage.
    stages = ((part, _only(options, options.keys() - (codec_options or {}))) for part, options in preset.stages)
    return replace(preset, stages=tuple(stages))


def _fine_tune(table: dict) -> None:
    """Adapt a preset's table to fine-tuning a pipeline trained on other people.

    Few small steps adapt the codec to the radar. The prior has to learn its users, so their embeddings learn fifty
    times as fast as the rest. One stride-recombined copy is enough: pretraining already keeps a prior from copying.
    """
    codec, prior = table["codec_training"], table["prior_training"]
    codec |= dict(steps=max(1, codec["steps"] // 5), learning_rate=0.15 * codec["learning_rate"])
    prior |= dict(steps=max(1, 2 * prior["steps"] // 5), learning_rate=0.2 * prior["learning_rate"], user_rate=50.0)
    table["variants"] = 1
    if "guidance_scale" in table["sampling"]:
        table["sampling"]["guidance_scale"] = 2.0  # a prior of many people needs more guidance to stay with one user


def _options(model: type) -> set[str]:
    """Names of the arguments of a class that have a default."""
    return {name for name, one in inspect.signature(model).parameters.items() if one.default is not one.empty}


def _only(options: dict, names: set[str]) -> dict:
    return {key: value for key, value in options.items() if key in names}


def make_codec(preset: Preset, channels: int = 1, num_users: int = 0):
    """A new codec of the preset's size for images of `channels`, conditioned on num_users if the preset says so."""
    users = dict(num_users=num_users) if preset.user_codec else {}
    return preset.codec_class(in_channels=channels, **preset.codec, **users)


def attach_losses(codec, preset: Preset, teacher=None, lpips=None, foundation=None) -> None:
    """Attach the preset's losses to a codec: the distances of the frozen networks `teacher` and `lpips`, and the
    alignment with the features of `foundation`, where these are given; and the adversary, where it has a weight."""
    from mdlib.models.codec import Adversary, Alignment, Distance

    options = preset.losses
    if teacher:
        codec.attach(Distance("teacher", teacher, TEACHER_WEIGHT))
    if lpips:
        codec.attach(Distance("lpips", lpips, options["perceptual_weight"]))
    if foundation:
        codec.attach(Alignment(foundation, codec.latent_shape[0], **_only(options, _options(Alignment))))
    if options.get("adversarial_weight"):
        sizes = (codec.config.in_channels, codec.config.image_size)
        codec.attach(Adversary(*sizes, **_only(options, _options(Adversary))))


def make_prior(system: str, preset: Preset, codec, num_users: int, num_conditions: int = 1):
    """A new prior that fits `codec` and the numbers of users and conditions."""
    prior = get_system(system).prior
    tokens = prior.consumes == "tokens" and dict(num_codes=codec.num_codes, token_shape=codec.token_shape)
    shape = tokens or dict(latent_shape=codec.latent_shape)
    return prior(num_users=num_users, num_conditions=num_conditions, **shape, **preset.prior)


def seeded(seed: int, make, *arguments):
    """`make(*arguments)` with the random weights of `seed`; the caller's random state stays as it is."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*arguments)


def load_codec(path: str | Path):
    """The codec of the codec/ folder of a run, of whichever kind; DataError if there is none."""
    config = Path(path) / "config.json"
    classes = {*CODECS.values(), *(system.codec_class for system in SYSTEMS.values())}
    kinds = {name.split(":")[1]: name for name in classes}
    name = json.loads(config.read_text()).get("_class_name") if config.exists() else None
    if name not in kinds:
        raise DataError(f"{path} holds no codec: give the codec/ folder of a run")
    return resolve_name(kinds[name]).from_pretrained(path)


def check_same(codec, folder: str | Path) -> None:
    """DataError unless the codec of `folder` has the class and the configuration of `codec`."""
    found = load_codec(folder)
    if type(found) is not type(codec):
        raise DataError(f"{folder} holds a {type(found).__name__}, this run's codec is a {type(codec).__name__}")
    pairs = {key: json.loads(json.dumps([found.config.get(key), own])) for key, own in codec.config.items()}
    differ = [
        f"{key} {one} (here {own})" for key, (one, own) in pairs.items() if one != own and not key.startswith("_")
    ]
    if differ:
        advice = "give preset, channels and codec_options of the run that trained it"
        raise DataError(f"the codec in {folder} differs from this run's in {', '.join(differ)}: {advice}")


def start(model, source: str | Path, other_users: bool = False) -> None:
    """Initialise a new codec or prior from the folder of another (codec/, pipeline/prior/ of a run), a diffusers
    VQModel's, or from a published VA-VAE or LightningDiT file; DataError if the weights do not fit.

    other_users: the folder's model was trained on other people. Each user starts as the mean of its users; all other
    weights are taken as they are, the null label among them. Conditions are taken where their number fits, else they
    start from zero.
    """
    import torch

    from mdlib.models.pretrained import load_completely, load_ldm
    from mdlib.models.vqvae import load_vqmodel

    is_codec, users = hasattr(model, "encode"), getattr(model, "users", None)
    config = Path(source) / "config.json"
    kind = read_json(config, "copy the folder again").get("_class_name") if config.exists() else ""
    if kind and not is_codec and kind != type(model).__name__:  # the weights' names and shapes may fit all the same
        raise DataError(f"{source} holds a {kind}, this system's prior is a {type(model).__name__}: take its own run")
    try:
        if kind == "VQModel":
            with readable(source, "copy the folder again"):
                load_vqmodel(model, source)
        elif Path(source).is_dir():
            with readable(source, "copy the folder again"):
                found = (load_codec if is_codec else type(model).from_pretrained)(source).state_dict()
            if other_users and users is not None and "users.weight" in found:
                table, fresh = found["users.weight"], users.state_dict()
                mean = table[:-1].mean(0, keepdim=True).expand(len(fresh["weight"]) - 1, -1)
                found["users.weight"] = torch.cat([mean, table[-1:]])
                known = found.pop("users.conditions", None)
                if (wanted := fresh.get("conditions")) is not None:
                    fits = known is not None and known.shape == wanted.shape
                    found["users.conditions"] = known if fits else torch.zeros_like(wanted)
            load_completely(model, found, source, getattr(model, "optional", ()))
        elif is_codec:
            load_ldm(model, source)
        elif hasattr(model, "load_published"):
            model.load_published(source)
        else:
            raise DataError(f"there are no published weights of a {type(model).__name__}: give a folder")
    except (ValueError, OSError) as error:
        raise DataError(f"cannot start from {source}: {error}") from error
