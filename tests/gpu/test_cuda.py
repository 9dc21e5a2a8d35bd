"""What only a GPU can show: half precision, no waiting, captured steps, resume. Run by `python -m pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch
from test_step import parts
from toys import windows

from mdlib.evaluation.evidence import train_classifier
from mdlib.models.classifier import ResNet18, SmallCNN
from mdlib.systems import SYSTEMS
from mdlib.training.fit import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


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


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("system, mode", [*((system, "graph") for system in SYSTEMS), ("vae-diffusion", "compile")])
def test_a_captured_training_ends_like_an_eager_one(system, mode, precision, capsys):
    if mode == "compile" and torch.cuda.get_device_capability()[0] < 7:
        pytest.skip("Triton needs compute capability 7")
    losses = {}
    for choice in ("no", mode):
        for name, model, data, config in parts(system):
            config = replace(config, mixed_precision=precision, compile=choice)
            history = fit(model, data, config, held_out=data, progress=False)
            losses[choice, name] = history[-1]["held_out_loss"]
    assert not capsys.readouterr().out, "it must not go on in eager mode"
    close = 0.01 if mode == "graph" else 0.2  # compiled code draws other random numbers
    for name in ("codec", "prior"):
        assert losses[mode, name] == pytest.approx(losses["no", name], rel=close), name


@pytest.mark.parametrize("kind", [SmallCNN, ResNet18])
def test_a_captured_classifier_ends_like_an_eager_one(kind, capsys):
    real = windows(8, 1)
    how = (real.images, real.labels, real.num_users, 20)
    eager, captured = (train_classifier(*how, compile=mode, kind=kind) for mode in ("no", "graph"))
    assert not capsys.readouterr().out, "it must not go on in eager mode"
    difference = captured.probabilities(real.images) - eager.probabilities(real.images)
    assert difference.abs().mean() < 0.02


@pytest.mark.parametrize("system", ["vae-diffusion", "vavae-dit"])
def test_a_compiled_prior_samples_like_an_eager_one(system):
    if torch.cuda.get_device_capability()[0] < 7:
        pytest.skip("Triton needs compute capability 7")
    *_, (_, prior, _, _) = parts(system)
    prior.cuda().eval()
    sample = lambda: prior.sample(torch.tensor([0, 1], device="cuda"), generator=torch.Generator().manual_seed(0))
    eager = sample()
    prior.compile(dynamic=False)
    torch.testing.assert_close(sample(), eager, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", ["no", "graph"])
@pytest.mark.parametrize("system", ["vqvae-transformer", "vae-diffusion"])
def test_a_resumed_training_ends_bit_for_bit_like_an_uninterrupted_one(system, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        finished = {}
        for whole in (True, False):
            for name, model, data, config in parts(system):
                config = replace(config, steps=6, evaluate_every=4, save_every=3, compile=mode)
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
