"""Diffusion over latents by a UNet: the loss by hand, diffusers' samplers, exact denoisers, attention in tiles."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from priors import assert_within_noise, mixture_mean, mixture_points, signal_and_noise, small_unet

from mdlib.models.unet import AxialAttention, LatentDiffusion, TiledAttnProcessor, use_window_axial

SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++")
PREDICTIONS = ("epsilon", "v_prediction")
ENDS = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (0.0001, 0.02)}


@torch.no_grad()
@pytest.mark.parametrize(
    "prediction, schedule",
    [("v_prediction", name) for name in ENDS] + [("epsilon", "linear"), ("epsilon", "scaled_linear")],
)
def test_the_loss_is_the_weighted_error(schedule, prediction):
    """Min-SNR weighs the error of x_0 by min(SNR, 5), whatever the network predicts."""
    prior = small_unet(schedule=schedule, prediction=prediction)
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
    weighted = ((alpha / sigma) ** 2).clamp_max(5.0) * (estimate - latents) ** 2
    torch.testing.assert_close(loss.double(), weighted.mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(logs["denoising_mse"].double(), (error**2).mean().double(), rtol=1e-3, atol=0)


def test_cosine_is_another_name_of_a_schedule(tmp_path):
    small_unet(schedule="cosine").save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert loaded.config.schedule == "squaredcos_cap_v2", "as earlier versions know it"
    assert torch.equal(loaded.alphas_cumprod, small_unet(schedule="squaredcos_cap_v2").alphas_cumprod)
    with pytest.raises(ValueError, match="prediction epsilon fails at the end of squaredcos_cap_v2"):
        small_unet(schedule="cosine", prediction="epsilon")


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
        (dict(schedule="sigmoid"), "schedule must be one of squaredcos_cap_v2, linear, scaled_linear, got 'sigmoid'"),
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


def test_a_sampler_of_another_family_is_refused():
    with pytest.raises(ValueError, match=r"^scheduler must be one of ddpm, ddim, pndm, dpm\+\+, got 'euler'$"):
        small_unet().sample(torch.tensor([0]), scheduler="euler")


def test_steps_that_leave_the_schedule_are_refused():
    with pytest.raises(ValueError, match="dpm.. cannot take 230 steps: choose another number"):
        small_unet().sample(torch.tensor([0]), num_inference_steps=230)


# Attention in tiles: which positions see which, and that norm and residual stay -----------------------------------

CHANNELS, HEADS = 8, 2


def attention(**changes) -> Attention:
    """As diffusers' UNet makes it, in double precision and with a norm that is not the identity's."""
    torch.manual_seed(0)
    options = dict(
        heads=HEADS,
        dim_head=CHANNELS // HEADS,
        norm_num_groups=2,
        residual_connection=True,
        rescale_output_factor=1.5,
        bias=True,
    )
    module = Attention(CHANNELS, **{**options, **changes}).double().eval()
    if module.group_norm is not None:
        torch.nn.init.normal_(module.group_norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(module.group_norm.bias, 0.0, 0.3)
    return module


def grid(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, height, width, dtype=torch.double, generator=torch.manual_seed(1))


def tiles(height: int, width: int, rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """Positions of every tile, by going through the grid."""
    found = {}
    for place in itertools.product(range(height), range(width)):
        found.setdefault((place[0] // rows, place[1] // columns), []).append(place)
    return list(found.values())


def by_hand(module: Attention, inputs: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Softmax attention of every head in every tile, one after the other."""
    normed, output = module.group_norm(inputs), torch.empty_like(inputs)
    for tile in tiles(*inputs.shape[2:], rows, columns):
        here = torch.stack([normed[:, :, row, column] for row, column in tile], 1)  # (B, places, C)
        query, key, value = module.to_q(here), module.to_k(here), module.to_v(here)
        heads = []
        for q, k, v in zip(*(part.chunk(HEADS, -1) for part in (query, key, value)), strict=True):
            heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        mixed = module.to_out[0](torch.cat(heads, -1))
        for number, (row, column) in enumerate(tile):
            output[:, :, row, column] = mixed[:, number]
    return (output + inputs) / module.rescale_output_factor


@torch.no_grad()
def moved(module, inputs: torch.Tensor, changed: torch.Tensor) -> set[tuple[int, int]]:
    """Positions of the grid at which the output changes with the input."""
    difference = (module(inputs) - module(changed)).abs().amax((0, 1))
    return {tuple(place) for place in (difference > 1e-9).nonzero().tolist()}


@pytest.mark.parametrize("tile", [(0, 0), (4, 6), (0, 6), (9, 9)])
def test_one_tile_is_diffusers_full_attention(tile):
    module, inputs = attention(), grid(4, 6)
    module.set_processor(AttnProcessor2_0())
    expected = module(inputs)
    module.set_processor(TiledAttnProcessor(*tile))
    torch.testing.assert_close(module(inputs), expected)


@pytest.mark.parametrize("size, tile", [((4, 6), (2, 3)), ((5, 9), (5, 3)), ((6, 8), (3, 2))])
def test_every_tile_is_attention_of_its_own(size, tile):
    module, inputs = attention(), grid(*size)
    module.set_processor(TiledAttnProcessor(*tile))
    torch.testing.assert_close(module(inputs), by_hand(module, inputs, *tile))


def test_a_window_that_does_not_divide_the_latents_is_refused():
    with pytest.raises(ValueError, match=r"window 4 must divide the sides of the latents at its levels, \[20, 20, 10"):
        LatentDiffusion((8, 20, 20), 3, (16, 16, 16), attention="window_axial")


@pytest.mark.parametrize("rows, columns", [(5, 2), (1, 0), (0, 1), (1, 3)])
def test_a_position_reaches_its_tile_and_nothing_else(rows, columns):
    module, inputs = attention(), grid(5, 6)
    module.group_norm = torch.nn.Identity()  # its statistics span the grid
    module.set_processor(TiledAttnProcessor(rows, columns))
    for tile in tiles(5, 6, rows or 5, columns or 6):
        for row, column in tile:
            changed = inputs.clone()
            changed[:, :, row, column] += 1
            assert moved(module, inputs, changed) == set(tile)


def test_with_the_norm_in_place_a_tile_does_not_see_the_others():
    module, inputs = attention(), grid(4, 6)
    module.set_processor(TiledAttnProcessor(2, 3))
    changed = inputs.clone()
    changed[:, :, 0, 0], changed[:, :, 0, 4] = inputs[:, :, 0, 4], inputs[:, :, 0, 0]  # the statistics stay
    assert moved(module, inputs, changed) == {(row, column) for row in (0, 1) for column in range(6)}


def test_axial_attention_mixes_a_doppler_row_then_a_time_column():
    module, inputs = AxialAttention(attention(norm_num_groups=None)).eval(), grid(4, 6)
    module.time.group_norm = module.doppler.group_norm = torch.nn.Identity()
    changed = inputs.clone()
    changed[:, :, 1, 2] += 1
    assert moved(module.time, inputs, changed) == {(1, column) for column in range(6)}
    assert moved(module.doppler, inputs, changed) == {(row, 2) for row in range(4)}
    assert moved(module, inputs, changed) == set(itertools.product(range(4), range(6)))


def test_the_two_axes_have_weights_of_their_own():
    module = AxialAttention(attention())
    module(grid(4, 6)).square().mean().backward()
    for (name, first), second in zip(module.time.named_parameters(), module.doppler.parameters(), strict=True):
        assert first is not second and first.grad is not None and second.grad is not None
        if name.startswith("to_"):
            assert not torch.equal(first, second), f"{name} starts alike along both axes"


@pytest.mark.parametrize("axial", [False, True])
def test_attention_that_adds_nothing_leaves_the_input(axial):
    module, inputs = attention(rescale_output_factor=1.0), grid(4, 6)
    torch.nn.init.zeros_(module.to_out[0].weight)
    torch.nn.init.zeros_(module.to_out[0].bias)
    module.set_processor(TiledAttnProcessor(2, 2))
    if axial:
        module = AxialAttention(module)
        module.doppler.load_state_dict(module.time.state_dict())
    torch.testing.assert_close(module(inputs), inputs)


@pytest.mark.parametrize("levels, windowed", [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_fine_levels_get_windows_and_coarse_ones_and_the_middle_both_axes(levels, windowed):
    widths = (8, 16, 24, 32)[:levels]
    unet = UNet2DModel(
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D",) * levels,
        up_block_types=("AttnUpBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        attn_norm_num_groups=4,
    )
    use_window_axial(unet, 4)
    found = {part: {} for part in ("down_blocks", "mid_block", "up_blocks")}
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            tile = (module.processor.rows, module.processor.columns)
            found[name.split(".")[0]].setdefault(module.to_q.in_features, set()).add(tile)
    window, axes = {(4, 4)}, {(1, 0), (0, 1)}
    expected = {width: window if level < windowed else axes for level, width in enumerate(widths)}
    assert found == {"down_blocks": expected, "mid_block": {widths[-1]: axes}, "up_blocks": expected}


def test_a_prior_with_tiled_attention_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    prior = LatentDiffusion((2, 8, 4), 3, (8, 16, 16), norm_num_groups=4, attention="window_axial", head_dim=4).eval()
    prior.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    noisy, users = torch.randn(2, 2, 8, 4), prior.users(torch.tensor([0, 3]))
    with torch.no_grad():
        first = prior(noisy, torch.tensor([10, 900]), users)
        assert torch.equal(again(noisy, torch.tensor([10, 900]), users), first)
        assert first.shape == noisy.shape


def test_windows_without_a_size_are_refused():
    for window in (0, -4):
        with pytest.raises(ValueError, match=f"^window must be at least 1, got {window}$"):
            LatentDiffusion(
                (2, 8, 8), 3, (8, 16), norm_num_groups=4, head_dim=4, attention="window_axial", window=window
            )
