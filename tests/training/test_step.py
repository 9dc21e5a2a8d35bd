"""A training step and the loop of a sampler never wait for the device: nothing is read back on the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdlib.data.augment import classical_augmentation, cutmix, no_augmentation, radar_augmentation
from mdlib.models.classifier import SmallCNN
from mdlib.models.codec import FeatureDistance
from mdlib.models.pretrained import ClassifierFeatures
from mdlib.models.prior import Request
from mdlib.systems import SYSTEMS, attach_losses, get_preset, make_codec, make_prior
from mdlib.training import fit as loop
from mdlib.training.fit import Batches, TrainConfig, fit

USERS, WINDOWS = 2, 16
# Their results, or the sizes of their results, depend on the values of a tensor: the host waits for them.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal", "is_nonzero"}


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            torch.is_tensor(index) and index.dtype == torch.bool for part in arguments[1:2] for index in listed(part)
        )
        if name in WAITS or masks:
            raise AssertionError(f"{name} waits for the GPU")
        return function(*arguments, **(options or {}))


def listed(part) -> list:
    return list(part) if isinstance(part, list | tuple) else [part]


def parts(system: str, **options):
    """Codec, with the losses that need no download, and prior of the smoke size, each with data and its training."""
    torch.manual_seed(0)
    preset = get_preset(system, "smoke", **options)
    codec = make_codec(preset, 1, USERS)
    prior = make_prior(system, preset, codec, USERS)
    users = torch.arange(WINDOWS) % USERS
    images = torch.randint(0, 256, (WINDOWS, *([1] + [preset.image_size] * 2)), dtype=torch.uint8)
    teacher = SmallCNN(USERS)
    foundation = ClassifierFeatures(teacher, images) if codec.aligned else None
    attach_losses(codec, preset, FeatureDistance(teacher), foundation=foundation)
    if prior.consumes == "tokens":
        inputs = torch.randint(0, codec.num_codes, (WINDOWS, *codec.token_shape))
    else:
        inputs = torch.randn(WINDOWS, *codec.latent_shape)
    yield "codec", codec, Batches((images, users), no_augmentation), preset.codec_training
    yield "prior", prior, Batches((inputs, users)), preset.prior_training


@pytest.fixture
def watched(monkeypatch):
    """The steps of `fit` after the first fail where the host waits; at the first a codebook may look at itself."""
    step, seen = loop._step, []

    def strict(state, *arguments):
        if not state.step:
            return step(state, *arguments)
        seen.append(state.step)
        with NoWaiting():
            return step(state, *arguments)

    monkeypatch.setattr(loop, "_step", strict)
    return seen


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_of_codec_and_prior_does_not_wait(system, watched):
    for _, model, data, config in parts(system):
        fit(model, data, config, held_out=data, progress=False)
    assert len(watched) == 10


ENCODED = dict(prior_options=dict(conditioning="cross", user_layers=1))


@pytest.mark.parametrize("changes", [ENCODED, dict(prior_options=dict(user_layers=1, user_dim=8))])
def test_nor_does_one_of_a_prior_with_a_user_encoder(changes, watched):
    *_, (_, prior, data, config) = parts("vqvae-transformer", **changes)
    fit(prior, data, config, held_out=data, progress=False)
    assert len(watched) == 5


def test_nor_does_one_of_a_conditional_codec_or_a_classifier(watched):
    _, codec, data, config = next(parts("vavae-dit", user_codec=True))
    fit(codec, data, config, progress=False)
    mixed = lambda images, users, generator: cutmix(*no_augmentation(images, users, generator), USERS, generator)
    for augmentation in (classical_augmentation, radar_augmentation, mixed):
        fit(SmallCNN(USERS), Batches(data.tensors, augmentation), TrainConfig(steps=3, batch_size=8), progress=False)
    assert len(watched) == 5 + 3 * 2


@pytest.mark.parametrize("read", [float, torch.nonzero, lambda tensor: tensor[tensor > 0], bool])
def test_reading_a_value_back_would_be_seen(read):
    with pytest.raises(AssertionError, match="waits for the GPU"), NoWaiting():
        read(torch.ones(()) if read in (float, bool) else torch.ones(3))


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to the device; `meta` stands for a GPU, and raises where a value is read."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result, name = function(*arguments, **(options or {})), function.overloadpacket.__name__
        source = arguments[0] if name == "_to_copy" else arguments[1] if name == "copy_" else result
        self.number += torch.is_tensor(result) and source.device.type == "cpu" and result.device.type == "meta"
        return result


LOOPS = [
    ("vqvae-transformer", dict(top_p=0.9, top_k=5), {}),
    ("vqvae-transformer", dict(top_p=0.9, top_k=5), ENCODED),
    *(("vae-diffusion", dict(scheduler=name), {}) for name in ("dpm++", "ddim", "pndm")),
    ("vqvae-ldm", {}, {}),
    *(("vavae-dit", dict(scheduler=name), {}) for name in ("heun", "euler")),
    *(("vq-diffusion", dict(sampler=name), {}) for name in ("ancestral", "mask_predict")),
]


@pytest.mark.parametrize("system, options, changes", LOOPS)
def test_the_loop_of_a_sampler_neither_waits_nor_copies(system, options, changes):
    *_, (_, prior, _, _) = parts(system, **changes)
    prior, users = prior.to("meta").eval(), torch.zeros(2, dtype=torch.long, device="meta")
    counted = []
    for steps in (4, 4, 8):  # the first call copies tables
        generators = [torch.Generator().manual_seed(number) for number in range(2)]
        request = Request(users, None, generators, 1.5, users, torch.zeros(2, device="meta"), None)
        with torch.no_grad(), Copies() as copies:
            prior.draw(request, **options, **(dict(num_inference_steps=steps) if prior.denoises else {}))
        counted.append(copies.number)
    assert counted[1] == counted[2] < 5


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "vqvae-transformer"])
def test_the_network_of_a_prior_that_denoises_compiles_as_one_graph(system):
    *_, (_, prior, _, _) = parts(system)
    users, options = torch.arange(USERS), dict(guidance_scale=1.5, num_inference_steps=2)
    drawn = []
    for _ in range(2):
        drawn.append(prior.eval().sample(users, generator=torch.Generator().manual_seed(0), **options))
        prior.compile(backend="eager", dynamic=False, fullgraph=True)
    torch.testing.assert_close(*drawn)
