"""Diffusion over latents by a UNet: the loss by hand, diffusers' samplers, exact denoisers, and bad options."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from priors import assert_within_noise, mixture_mean, mixture_points, signal_and_noise, small_unet

from mdlib.models.unet import LatentDiffusion

SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++")
PREDICTIONS = ("epsilon", "v_prediction")
ENDS = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (0.0001, 0.02)}


@torch.no_grad()
@pytest.mark.parametrize(
    "prediction, schedule",
    [("v_prediction", name) for name in ENDS] + [("epsilon", "linear"), ("epsilon", "scaled_linear")],
)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_weighted_error(schedule, prediction, gamma):
    """Min-SNR weighs the error of x_0 by min(SNR, γ), whatever the network predicts; γ = 0 weighs its output alike."""
    prior = small_unet(schedule=schedule, prediction=prediction, min_snr_gamma=gamma)
    latents, labels = torch.randn(8, 3, 4, 2), torch.arange(8) % 5
    torch.manual_seed(3)
    loss, logs = prior.loss(latents, labels)
    torch.manual_seed(3)
    noise = torch.randn(8, 3, 4, 2)
    timesteps = ((torch.rand(()) + torch.arange(8) / 8) % 1 * 1000).long()
    alpha, sigma = (torch.tensor(part)[timesteps].view(-1, 1, 1, 1) for part in signal_and_noise(schedule))
    noisy = alpha * latents + sigma * noise
    output = prior.unet(noisy.float(), timesteps, class_labels=prior.users.weight[labels]).sample
    if prediction == "epsilon":
        error, estimate = output - noise, (noisy - sigma * output) / alpha
    else:
        error, estimate = output - (alpha * noise - sigma * latents), alpha * noisy - sigma * output
    weighted = ((alpha / sigma) ** 2).clamp_max(gamma) * (estimate - latents) ** 2
    expected = weighted.mean() if gamma else (error**2).mean().double()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(logs["denoising_mse"].double(), (error**2).mean().double(), rtol=1e-3, atol=0)


def test_every_timestep_is_as_likely_and_a_batch_is_spread_over_them():
    prior = small_unet(num_train_timesteps=10)
    drawn = torch.stack([prior._timesteps(5, "cpu") for _ in range(5000)])
    share = torch.stack([torch.bincount(column, minlength=10) for column in drawn.T]) / 5000
    assert share.shape == (5, 10) and (share - 0.1).abs().max() < 0.02  # 4.7 standard errors
    assert all(len(set((row // 2).tolist())) == 5 for row in drawn[:100])  # one in each fifth


def reference(name: str, prediction: str, schedule: str):
    options = dict(
        num_train_timesteps=1000,
        beta_schedule=schedule,
        beta_start=ENDS[schedule][0],
        beta_end=ENDS[schedule][1],
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
    if name == "pndm":
        return PNDMScheduler(skip_prk_steps=True, **options)
    if name == "dpm++":
        return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", lambda_min_clipped=-5.1, **options)
    return {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[name](clip_sample=False, **options)


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction, schedule", [("v_prediction", "squaredcos_cap_v2"), ("epsilon", "scaled_linear")])
def test_samplers_are_diffusers_own(name, prediction, schedule):
    prior = small_unet(prediction=prediction, schedule=schedule)
    labels, options = torch.tensor([0, 3, 1]), dict(num_inference_steps=8, guidance_scale=2.5, scheduler=name)
    drawn = prior.sample(labels, generator=torch.Generator().manual_seed(7), **options)
    scheduler, generator = reference(name, prediction, schedule), torch.Generator().manual_seed(7)
    scheduler.set_timesteps(8)
    noisy = torch.randn(3, 3, 4, 2, generator=generator)
    for timestep in scheduler.timesteps:
        user, null = (
            prior.unet(noisy, timestep, class_labels=prior.users(which)).sample
            for which in (labels, torch.full((3,), 5))
        )
        noise = dict(generator=generator) if name == "ddpm" else {}
        noisy = scheduler.step(null + 2.5 * (user - null), timestep, noisy, **noise).prev_sample
    torch.testing.assert_close(drawn, noisy, rtol=1e-3, atol=1e-3 * float(noisy.abs().max()))


class Mixture(LatentDiffusion):
    """In place of the network, E[x_0 | x_t] of the mixture, as ε or v."""

    def forward(self, noisy, timesteps, users):
        x = noisy.flatten(1).double()  # (B, 2)
        alpha, sigma = (torch.tensor(part[timesteps]) for part in signal_and_noise(self.config.schedule))
        estimate = mixture_mean(x, alpha, sigma)
        noise = (x - alpha * estimate) / sigma
        output = noise if self.config.prediction == "epsilon" else alpha * noise - sigma * estimate
        return output.to(noisy.dtype).view_as(noisy)


def draw_mixture(count: int, prediction: str = "v_prediction", seed: int = 0, **options) -> torch.Tensor:
    schedule = "squaredcos_cap_v2" if prediction == "v_prediction" else "linear"
    sizes = dict(latent_shape=(2, 1, 1), block_out_channels=(8,))
    prior = small_unet(Mixture, prediction=prediction, schedule=schedule, **sizes)
    labels, generator = torch.zeros(count, dtype=torch.long), torch.Generator().manual_seed(seed)
    return prior.sample(labels, generator=generator, **options).flatten(1).double()


@pytest.fixture(scope="module")
def ancestral() -> list[torch.Tensor]:
    """Six independent DDPM runs of 1000 steps with the exact denoiser."""
    return list(draw_mixture(6 * 1500, scheduler="ddpm", num_inference_steps=1000).split(1500))


def test_ancestral_samples_follow_the_distribution_and_are_not_clipped(ancestral):
    exact = mixture_points(1500, torch.Generator().manual_seed(1))
    assert_within_noise(exact, ancestral)
    for level in (1.0, 2.0, 3.0):
        beyond = float((exact[:, 0] > level).double().mean())
        found = float((torch.cat(ancestral)[:, 0] > level).double().mean())
        assert beyond > 0.02 and abs(found - beyond) < 5 * math.sqrt(beyond / 1500)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scheduler, steps", [("ddim", 50), ("dpm++", 20)])
def test_few_steps_draw_what_a_thousand_draw(ancestral, prediction, scheduler, steps):
    points = draw_mixture(1500, prediction, seed=1, scheduler=scheduler, num_inference_steps=steps)
    assert_within_noise(points, ancestral)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(attention="linear"), "attention must be one of full, window_axial, none, got 'linear'"),
        (dict(prediction="x0"), "prediction must be one of epsilon, v_prediction, got 'x0'"),
        (dict(schedule="cosine"), "schedule must be one of squaredcos_cap_v2, linear, scaled_linear, got 'cosine'"),
        (dict(latent_shape=(3, 8, 6), block_out_channels=(8, 8, 8)), r"latents of \(8, 6\) cannot be halved 2 times"),
    ],
)
def test_a_prior_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small_unet(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attention", ["full", "window_axial"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(attention):
    gradients, calls = [], []
    for checkpointing in (False, True):
        prior = small_unet(gradient_checkpointing=checkpointing, attention=attention).train()
        counted = []
        for block in (prior.unet.down_blocks[1], prior.unet.up_blocks[0]):
            block.resnets[0].register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(0)
        prior.loss(torch.randn(4, 3, 4, 2), torch.tensor([0, 1, 2, 3]))[0].backward()
        gradients.append({name: parameter.grad for name, parameter in prior.named_parameters()})
        calls.append(len(counted))
    assert calls == [2, 4]
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_steps_that_do_not_divide_the_timesteps_are_refused(name):
    """diffusers steps by T // n there, while the timesteps lie T / n apart: noise would be left in the sample."""
    with pytest.raises(ValueError, match=f"{name} needs a number of steps that divides 1000, got 600"):
        small_unet().sample(torch.tensor([0]), scheduler=name, num_inference_steps=600)


def test_epsilon_cannot_start_where_the_image_is_gone():
    with pytest.raises(ValueError, match="epsilon fails at the end of squaredcos_cap_v2: choose schedule"):
        small_unet(prediction="epsilon", schedule="squaredcos_cap_v2")


@pytest.mark.parametrize("attention", ["full", "window_axial"])
def test_heads_wider_than_the_level_are_refused(attention):
    with pytest.raises(ValueError, match="head_dim"):
        small_unet(head_dim=32, attention=attention)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_fewer_timesteps_end_in_noise_too(schedule):
    prior = small_unet(schedule=schedule, num_train_timesteps=100)
    assert prior.schedule.alphas_cumprod[-1] < 0.02


def test_a_sampler_of_another_family_is_refused():
    with pytest.raises(ValueError, match=r"^scheduler must be one of ddpm, ddim, pndm, dpm\+\+, got 'euler'$"):
        small_unet().sample(torch.tensor([0]), scheduler="euler")


def test_steps_that_leave_the_schedule_are_refused():
    with pytest.raises(ValueError, match="dpm.. cannot take 230 steps: choose another number"):
        small_unet().sample(torch.tensor([0]), num_inference_steps=230)
