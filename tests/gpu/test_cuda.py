"""What only a GPU can show: half precision, steps without waiting, resume. Run by `python -m pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch

from mdlib.data.augment import as_they_are
from mdlib.systems import SYSTEMS, get_preset, make_codec, make_prior
from mdlib.training.fit import Batches, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
USERS, WINDOWS = 2, 16


def parts(system: str):
    """Codec and prior of the smoke size, each with data and how to train it."""
    torch.manual_seed(0)
    preset = get_preset(system, "smoke")
    codec = make_codec(preset, 1, USERS)
    prior = make_prior(system, preset, codec, USERS)
    users = torch.arange(WINDOWS) % USERS
    images = torch.randint(0, 256, (WINDOWS, *([1] + [preset.image_size] * 2)), dtype=torch.uint8)
    if prior.consumes == "tokens":
        inputs = torch.randint(0, codec.num_codes, (WINDOWS, *codec.token_shape))
    else:
        inputs = torch.randn(WINDOWS, *codec.latent_shape)
    yield "codec", codec, Batches((images, users), as_they_are), preset.codec_training
    yield "prior", prior, Batches((inputs, users)), preset.prior_training


@pytest.mark.parametrize("system", SYSTEMS)
def test_codec_and_prior_train_in_half_precision_and_generate(system):
    for name, model, data, config in parts(system):
        history = fit(model, data, replace(config, mixed_precision="fp16"), held_out=data, progress=False)
        assert torch.tensor([history[-1]["held_out_loss"]]).isfinite(), name
        assert all(weight.isfinite().all() for weight in model.parameters())
    sampled = model.sample(torch.tensor([0, 1], device="cuda"), generator=torch.Generator().manual_seed(0))
    assert len(sampled) == 2 and sampled.device.type == "cuda"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_does_not_wait_for_the_gpu(system):
    for name, model, data, _ in parts(system):
        if (system, name) == ("vqvae-transformer", "prior"):
            continue  # transformers' GPT-2 reads its positions back at every step
        model.cuda().train()
        batch = data.to("cuda").take(torch.arange(8, device="cuda"), torch.Generator())
        for _ in range(2):
            model.loss(*batch)[0].backward()  # what is made once, at the first step, may wait
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            model.loss(*batch)[0].backward()
        except RuntimeError as error:
            pytest.fail(f"{name}: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("system", ["vqvae-transformer", "vae-diffusion"])
def test_a_resumed_training_ends_bit_for_bit_like_an_uninterrupted_one(system, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        finished = {}
        for whole in (True, False):
            for name, model, data, config in parts(system):
                config = replace(config, steps=6, evaluate_every=4, save_every=3)
                if not whole:
                    with pytest.raises(KeyboardInterrupt):
                        fit(model, data, config, tmp_path / name, preview=_interrupt, progress=False)
                    model = next(other for part, other, *_ in parts(system) if part == name)
                fit(model, data, config, None if whole else tmp_path / name, progress=False)
                finished[name, whole] = model.state_dict()
        for name in ("codec", "prior"):
            for key, value in finished[name, True].items():
                assert torch.equal(value, finished[name, False][key]), f"{name}: {key}"
    finally:
        torch.use_deterministic_algorithms(False)


def _interrupt(_, step):
    if step == 4:
        raise KeyboardInterrupt
