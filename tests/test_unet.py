"""Diffusion over latents: the loss by hand, diffusers' samplers, exact denoisers, guidance, and bad options."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from mdlib.unet import LatentDiffusion

SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++")
PREDICTIONS = ("epsilon", "v_prediction")
ENDS = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (0.0001, 0.02)}


def small_prior(kind=LatentDiffusion, **changes) -> LatentDiffusion:
    torch.manual_seed(0)
    options = dict(latent_shape=(3, 4, 2), num_users=5, block_out_channels=(8, 16), norm_num_groups=4, head_dim=4)
    return kind(**{**options, **changes}).eval()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def signal_and_noise(schedule: str, steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """(α, σ) of every timestep, from the definition of the schedule's betas."""
    if schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021
        share = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - share[1:] / share[:-1], 0.999)
    elif schedule == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
    else:
        betas = np.linspace(0.0001, 0.02, steps)
    alpha_squared = np.cumprod(1 - betas)
    return np.sqrt(alpha_squared), np.sqrt(1 - alpha_squared)


@torch.no_grad()
@pytest.mark.parametrize(
    "prediction, schedule",
    [("v_prediction", name) for name in ENDS] + [("epsilon", "linear"), ("epsilon", "scaled_linear")],
)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_weighted_error(schedule, prediction, gamma):
    """Min-SNR weighs the error of x_0 by min(SNR, γ), whatever the network predicts; γ = 0 weighs its output alike."""
    prior = small_prior(schedule=schedule, prediction=prediction, min_snr_gamma=gamma)
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
    prior = small_prior(num_train_timesteps=10)
    drawn = torch.stack([prior._timesteps(5, "cpu") for _ in range(5000)])
    share = torch.stack([torch.bincount(column, minlength=10) for column in drawn.T]) / 5000
    assert share.shape == (5, 10) and (share - 0.1).abs().max() < 0.02  # 4.7 standard errors
    assert all(len(set((row // 2).tolist())) == 5 for row in drawn[:100])  # one in each fifth


def test_dropped_labels_train_the_null_label_and_nobody_elses():
    prior = small_prior(label_dropout=1.0).train()
    assert prior.null_label == 5 and prior.users.num_embeddings == 6
    prior.loss(torch.randn(4, 3, 4, 2), torch.tensor([0, 1, 2, 3]))[0].backward()
    assert (prior.users.weight.grad.abs().sum(1) > 0).tolist() == [False] * 5 + [True]


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
    prior = small_prior(prediction=prediction, schedule=schedule)
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


# A toy whose denoiser is known: two correlated Gaussians in the plane, far beyond ±1.
SHARES = torch.tensor([0.7, 0.3], dtype=torch.double)
CENTRES = torch.tensor([[2.0, -1.0], [-1.5, 1.5]], dtype=torch.double)
SPREADS = torch.tensor([[[0.5, 0.3], [0.3, 0.4]], [[0.2, -0.1], [-0.1, 0.6]]], dtype=torch.double)


class Mixture(LatentDiffusion):
    """In place of the network, E[x_0 | x_t] of the mixture, as ε or v."""

    def forward(self, noisy, timesteps, users):
        x = noisy.flatten(1).double()  # (B, 2)
        alpha, sigma = (torch.tensor(part[timesteps]) for part in signal_and_noise(self.config.schedule))
        total = alpha**2 * SPREADS + sigma**2 * torch.eye(2)  # covariance of x_t in each Gaussian
        away = x - alpha * CENTRES.unsqueeze(1)  # (2, B, 2)
        scaled = away @ total.inverse()
        weight = (SHARES.log() - total.logdet() / 2).unsqueeze(1) - (scaled * away).sum(-1) / 2  # (2, B)
        means = CENTRES.unsqueeze(1) + alpha * scaled @ SPREADS
        estimate = (weight.softmax(0).unsqueeze(-1) * means).sum(0)
        noise = (x - alpha * estimate) / sigma
        output = noise if self.config.prediction == "epsilon" else alpha * noise - sigma * estimate
        return output.to(noisy.dtype).view_as(noisy)


def draw_mixture(count: int, prediction: str = "v_prediction", seed: int = 0, **options) -> torch.Tensor:
    schedule = "squaredcos_cap_v2" if prediction == "v_prediction" else "linear"
    sizes = dict(latent_shape=(2, 1, 1), block_out_channels=(8,))
    prior = small_prior(Mixture, prediction=prediction, schedule=schedule, **sizes)
    labels, generator = torch.zeros(count, dtype=torch.long), torch.Generator().manual_seed(seed)
    return prior.sample(labels, generator=generator, **options).flatten(1).double()


def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to points (N, 2)."""
    a, b = torch.cov(first.T), torch.cov(second.T)
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    return float((first.mean(0) - second.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def energy(first: torch.Tensor, second: torch.Tensor) -> float:
    """Energy distance (Székely and Rizzo 2013) of points (N, 2); it sees shape, not only two moments."""
    inside = torch.cdist(first, first).mean() + torch.cdist(second, second).mean()
    return float(2 * torch.cdist(first, second).mean() - inside)


@pytest.fixture(scope="module")
def ancestral() -> list[torch.Tensor]:
    """Six independent DDPM runs of 1000 steps with the exact denoiser."""
    return list(draw_mixture(6 * 1500, scheduler="ddpm", num_inference_steps=1000).split(1500))


def assert_within_noise(points: torch.Tensor, runs: list[torch.Tensor]) -> None:
    """Two of the runs differ by chance alone; the largest distance between two of them (15 pairs) bounds what chance
    does, and the points' mean distance to the runs must stay within it."""
    for distance in (frechet, energy):
        bound = max(distance(first, second) for first, second in itertools.combinations(runs, 2))
        assert np.mean([distance(points, run) for run in runs]) <= bound, distance.__name__


def test_ancestral_samples_follow_the_distribution_and_are_not_clipped(ancestral):
    generator = torch.Generator().manual_seed(1)
    which = torch.multinomial(SHARES, 1500, replacement=True, generator=generator)
    noise = torch.randn(1500, 2, 1, generator=generator, dtype=torch.double)
    exact = CENTRES[which] + (torch.linalg.cholesky(SPREADS)[which] @ noise).squeeze(-1)
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


@pytest.mark.parametrize("name", ["ddpm", "dpm++"])
def test_a_sample_does_not_depend_on_its_batch(name):
    prior, options = small_prior(), dict(scheduler=name, num_inference_steps=5, guidance_scale=2.0)
    together = prior.sample(torch.tensor([2, 0, 2, 4]), generator=generators(5, 6, 7, 8), **options)
    alone = prior.sample(torch.tensor([2]), generator=generators(7), **options)
    torch.testing.assert_close(together[2], alone[0], atol=1e-4, rtol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_shows_an_estimate_a_step_and_the_last_is_the_sample(name):
    seen = []
    drawn = small_prior().sample(
        torch.tensor([0, 1]),
        scheduler=name,
        num_inference_steps=5,  # which divides 1000: else DDIM ends a little short of x_0
        generator=torch.Generator().manual_seed(0),
        on_step=lambda number, estimate: seen.append((number, estimate)),
    )
    steps = 6 if name == "pndm" else 5  # PNDM asks twice in its first step
    assert [number for number, _ in seen] == list(range(steps))
    assert all(estimate.shape == drawn.shape for _, estimate in seen)
    if name != "pndm":  # which ends in a combination of its last estimates
        torch.testing.assert_close(seen[-1][1], drawn, atol=1e-4, rtol=1e-4)


def estimates(prior: LatentDiffusion, label: int = 1, **options) -> torch.Tensor:
    """x_0 estimates (steps, D, h, w) on the way to one DDIM sample of a fixed seed."""
    seen = []
    prior.sample(
        torch.tensor([label]),
        generator=generators(0),
        scheduler="ddim",
        num_inference_steps=10,
        on_step=lambda _, estimate: seen.append(estimate[0]),
        **options,
    )
    return torch.stack(seen)


def test_guidance_of_zero_is_the_null_label():
    prior = small_prior()
    unguided = estimates(prior, label=5)
    torch.testing.assert_close(estimates(prior, guidance_scale=0.0), unguided)
    assert (estimates(prior) - unguided).abs().max() > 0.01


def test_guidance_acts_on_every_channel():
    prior = small_prior(latent_shape=(6, 4, 4))
    null, plain, guided = (estimates(prior, guidance_scale=scale)[0] for scale in (0.0, 1.0, 3.0))
    assert ((plain - null).abs().amax((1, 2)) > 1e-3).all()
    torch.testing.assert_close(guided, null + 3 * (plain - null), atol=1e-5, rtol=1e-4)


def test_outside_its_interval_guidance_is_off():
    prior = small_prior()
    plain, guided = estimates(prior), estimates(prior, guidance_scale=4.0)
    torch.testing.assert_close(estimates(prior, guidance_scale=4.0, guidance_interval=(0.0, 0.05)), plain)
    torch.testing.assert_close(estimates(prior, guidance_scale=4.0, guidance_interval=(0.05, 1.0)), guided)
    late = estimates(prior, guidance_scale=4.0, guidance_interval=(0.0, 0.5))  # timesteps 999, 899, …, 99
    torch.testing.assert_close(late[:5], plain[:5])
    assert (late[5] - plain[5]).abs().max() > 1e-3
    early = estimates(prior, guidance_scale=4.0, guidance_interval=(0.5, 1.0))
    torch.testing.assert_close(early[:5], guided[:5])
    assert (early[5] - guided[5]).abs().max() > 1e-3


def test_a_share_leads_from_one_user_to_another():
    prior, options = small_prior(), dict(num_inference_steps=4)
    between = torch.tensor([0.0, 1.0, 0.5])
    drawn = prior.sample(
        torch.tensor([1, 1, 1]),
        towards=torch.tensor([3, 3, 3]),
        share=between,
        generator=generators(0, 0, 0),
        **options,
    )
    ends = prior.sample(torch.tensor([1, 3]), generator=generators(0, 0), **options)
    torch.testing.assert_close(drawn[:2], ends, atol=1e-4, rtol=1e-4)
    distances = (drawn[2] - ends).flatten(1).norm(dim=1)
    assert (distances < (ends[0] - ends[1]).norm()).all() and (distances > 1e-3).all()
    for share, end in ((0.0, ends[0]), (1, ends[1])):
        one = prior.sample(
            torch.tensor([1]), towards=torch.tensor([3]), share=share, generator=generators(0), **options
        )
        torch.testing.assert_close(one[0], end, atol=1e-4, rtol=1e-4)


class Standard(LatentDiffusion):
    """In place of the network, the exact denoiser of N(0, I): E[x_0 | x_t] = α·x_t, so ε = σ·x_t and v = 0."""

    def forward(self, noisy, timesteps, users):
        _, sigma = self._alpha_sigma(timesteps)
        return sigma * noisy if self.config.prediction == "epsilon" else 0 * noisy


def towards_two(latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p of latents (B, D, h, w) up to a constant: label 0 lies at −2, label 1 at +2, with variance 1."""
    target = (4.0 * labels - 2).view(-1, 1, 1, 1)
    return -(latents - target).square().sum((1, 2, 3)) / 2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_classifier_leads_samples_to_its_label(prediction):
    prior = small_prior(Standard, latent_shape=(2, 4, 4), prediction=prediction, schedule="linear")
    labels, scale = torch.tensor([0, 1] * 8), 0.7
    options = dict(scheduler="ddim", num_inference_steps=10, classifier=towards_two)
    drawn, plain, outside = (
        prior.sample(labels, generator=torch.Generator().manual_seed(0), **more, **options)
        for more in (
            dict(classifier_scale=scale),
            dict(classifier_scale=0.0),
            dict(classifier_scale=scale, guidance_interval=(0.0, 0.05)),
        )
    )
    assert abs(float(plain.mean())) < 0.2 and torch.equal(outside, plain)
    assert drawn[0::2].mean() < -0.5 and drawn[1::2].mean() > 0.5
    # By hand: the score gains s·∇ log p(label | α·x_t) = s·α·(target − α·x_t), x_0 gains σ²/α of that.
    target = (4.0 * labels - 2).view(-1, 1, 1, 1)
    alpha, sigma = (
        [*part[999::-100], end] for part, end in zip(signal_and_noise("linear"), (1.0, 0.0), strict=True)
    )  # at timesteps 999, 899, …, 99 and at the end
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for number in range(10):
        a, s = alpha[number], sigma[number]
        estimate = a * x + s**2 * scale * (target - a * x)
        x = alpha[number + 1] * estimate + sigma[number + 1] * (x - a * estimate) / s
    torch.testing.assert_close(drawn.double(), x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(guidance_scale=-1.0), "guidance scales must be 0 or more, got -1.0 and 0.0"),
        (dict(classifier_scale=-1.0), "guidance scales must be 0 or more, got 1.0 and -1.0"),
        (dict(classifier_scale=1.0), "classifier_scale needs a classifier, and this sampler was given none"),
        (dict(guidance_interval=(0.6, 0.4)), r"guidance_interval must be two numbers in order within \[0, 1\]"),
        (dict(guidance_interval=(0.0, 2.0)), r"guidance_interval must be .* got \(0.0, 2.0\)"),
        (dict(guidance_interval=(0.5,)), r"guidance_interval must be two numbers"),
        (dict(num_inference_steps=0), "num_inference_steps must be a whole number in 1…1000, got 0"),
        (dict(num_inference_steps=1001), "num_inference_steps must be a whole number in 1…1000, got 1001"),
        (dict(scheduler="euler"), r"scheduler must be one of ddpm, ddim, pndm, dpm\+\+, got 'euler'"),
        (dict(generator=generators(1)), "2 samples need 2 generators, got 1"),
    ],
)
def test_bad_sampling_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small_prior().sample(torch.tensor([0, 1]), **options)
    assert "\n" not in str(error.value)


def test_a_label_that_does_not_exist_is_refused():
    for label in (6, -1):
        with pytest.raises(ValueError, match=f"^labels must lie in 0…5, got {label}…{label}$"):
            small_prior().sample(torch.tensor([label]))


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
        small_prior(**options)
    assert "\n" not in str(error.value)


def test_latents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"^this prior was made for latents \(3, 4, 2\), got \(3, 2, 4\)$"):
        small_prior().loss(torch.zeros(1, 3, 2, 4), torch.tensor([0]))


@pytest.mark.parametrize("prediction, schedule", [("v_prediction", "squaredcos_cap_v2"), ("epsilon", "scaled_linear")])
def test_it_overfits_a_few_latents_and_returns_each_to_its_user(prediction, schedule):
    prior = small_prior(block_out_channels=(32,), prediction=prediction, schedule=schedule, label_dropout=0.0).train()
    latents = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(5).repeat(8)
    optimizer = torch.optim.AdamW(prior.parameters(), weight_decay=0, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=130)
    for _ in range(130):
        loss, _ = prior.loss(latents[labels], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    drawn = prior.eval().sample(labels, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(drawn.flatten(1), latents.flatten(1)) / 24**0.5  # root mean square a value
    assert (distance.argmin(1) == labels).float().mean() >= 0.9
    assert distance[torch.arange(40), labels].median() < 0.25  # two of the latents lie 0.98 apart at least


def test_save_and_load(tmp_path):
    prior, options = small_prior(schedule="scaled_linear"), dict(num_inference_steps=3, guidance_scale=2.0)
    prior.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = LatentDiffusion.from_pretrained(tmp_path)
    assert again.latent_shape == prior.latent_shape and again.null_label == 5
    labels = torch.tensor([0, 4])
    first, second = (model.sample(labels, generator=generators(1, 2), **options) for model in (prior, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("attention", ["full", "window_axial"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(attention):
    gradients, calls = [], []
    for checkpointing in (False, True):
        prior = small_prior(gradient_checkpointing=checkpointing, attention=attention).train()
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


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "dpm++"])
def test_a_classifier_does_not_blow_samples_up(name):
    """A network that was hardly trained: with default schedule and prediction samples stay of the latents' size."""
    drawn = small_prior().sample(
        torch.tensor([0, 1]),
        scheduler=name,
        generator=generators(0, 1),
        classifier_scale=1.0,
        classifier=lambda latents, labels: -(latents - 1).square().sum((1, 2, 3)) / 2,
    )
    assert drawn.abs().max() < 6


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_steps_that_do_not_divide_the_timesteps_are_refused(name):
    """diffusers steps by T // n there, while the timesteps lie T / n apart: noise would be left in the sample."""
    with pytest.raises(ValueError, match=f"{name} needs a number of steps that divides 1000, got 600"):
        small_prior().sample(torch.tensor([0]), scheduler=name, num_inference_steps=600)


def test_epsilon_cannot_start_where_the_image_is_gone():
    with pytest.raises(ValueError, match="epsilon cannot start at the end of squaredcos_cap_v2: take schedule"):
        small_prior(prediction="epsilon", schedule="squaredcos_cap_v2")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(towards=torch.tensor([9, 9]), share=0.5), "0…5, got 9…9"),
        (dict(towards=torch.tensor([2, 2]), share=3.0), "share must lie in"),
        (dict(guidance_scale=float("nan")), "guidance"),
        (dict(guidance_interval=0.5), "guidance_interval must be two numbers"),
    ],
)
def test_more_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small_prior().sample(torch.tensor([0, 1]), num_inference_steps=2, **options)


@pytest.mark.parametrize("attention", ["full", "window_axial"])
def test_heads_wider_than_the_level_are_refused(attention):
    with pytest.raises(ValueError, match="head_dim"):
        small_prior(head_dim=32, attention=attention)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_fewer_timesteps_end_in_noise_too(schedule):
    prior = small_prior(schedule=schedule, num_train_timesteps=100)
    assert prior.schedule.alphas_cumprod[-1] < 0.02


def test_steps_that_leave_the_schedule_are_refused():
    with pytest.raises(ValueError, match="dpm.. cannot take 230 steps: choose another number"):
        small_prior().sample(torch.tensor([0]), num_inference_steps=230)


def test_a_null_label_that_was_never_trained_guides_nobody():
    with pytest.raises(ValueError, match="trained without label_dropout"):
        small_prior(label_dropout=0.0).sample(torch.tensor([0]), guidance_scale=1.5)
