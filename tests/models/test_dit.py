"""LightningDiT: a plain reference of the published one, the loss by hand, exact and learned velocities, its parts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models.embeddings import apply_rotary_emb
from helpers import Trap
from priors import assert_within_noise, energy, mixture_mean, mixture_points, small_dit
from safetensors.torch import save_file
from torch import nn

from mdlib.models.dit import LightningDiT, ModulatedNorm, rotation, sine_positions


@pytest.mark.parametrize(
    "width, depth, heads, millions", [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)]
)
def test_sizes_are_the_published_ones(width, depth, heads, millions):
    """S, B, L and XL of Peebles and Xie 2023, table 4, with 1000 classes; SwiGLU and RMSNorm keep them."""
    with torch.device("meta"):
        prior = LightningDiT((32, 16, 16), 1000, hidden_size=width, depth=depth, num_heads=heads)
    count = sum(parameter.numel() for parameter in prior.parameters())
    assert round(count / 1e6) == millions
    if width == 1152:
        assert count + prior.positions.numel() == 675_256_736  # which counts the fixed positions


# The published network, written after its description, with the names of its weights.


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


class PublishedAttention(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = Norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = Norm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x, turn):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = turn(self.q_norm(q)), turn(self.k_norm(k))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class PublishedMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        first, second = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(first) * second)


class PublishedBlock(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn = PublishedAttention(width, heads, qk_norm)
        self.mlp = PublishedMLP(width, int(2 / 3 * 4 * width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, turn):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa, turn)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class PublishedFinal(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final, self.linear = Norm(width), nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Published(nn.Module):
    def __init__(self, shape=(3, 4, 4), patch=1, width=16, depth=2, heads=2, qk_norm=False, classes=7):
        super().__init__()
        self.channels, self.patch = shape[0], patch
        self.rows, self.columns = shape[1] // patch, shape[2] // patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(shape[0], width, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(PublishedBlock(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = PublishedFinal(width, patch * patch * shape[0])
        torch.manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.pos_embed = nn.Parameter(positions_one_by_one(width, self.rows, self.columns), requires_grad=False)
        dim = width // heads // 2
        frequencies = (1 / 10_000 ** (torch.arange(0, dim, 2) / dim)).repeat_interleave(2)
        row = (torch.arange(self.rows)[:, None] * frequencies)[:, None].expand(-1, self.columns, -1)
        column = (torch.arange(self.columns)[:, None] * frequencies)[None].expand(self.rows, -1, -1)
        angles = torch.cat([row, column], dim=-1).reshape(self.rows * self.columns, 2 * dim)
        self.feat_rope = nn.Module()
        self.feat_rope.register_buffer("freqs_cos", angles.cos())
        self.feat_rope.register_buffer("freqs_sin", angles.sin())

    def turn(self, x):
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        half_turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return x * self.feat_rope.freqs_cos + half_turned * self.feat_rope.freqs_sin

    def forward(self, noisy, t, classes):
        x = self.x_embedder["proj"](noisy).flatten(2).transpose(1, 2) + self.pos_embed
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1))
        c = c + self.y_embedder["embedding_table"](classes)
        for block in self.blocks:
            x = block(x, c, self.turn)
        x = self.final_layer(x, c).reshape(-1, self.rows, self.columns, self.patch, self.patch, self.channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(-1, self.channels, self.rows * self.patch, self.columns * self.patch)


def positions_one_by_one(width: int, rows: int, columns: int) -> torch.Tensor:
    """(1, rows·columns, width): sines, then cosines of the column, then of the row."""
    result = torch.empty(1, rows * columns, width)
    quarter = width // 4
    for row, column, number in itertools.product(range(rows), range(columns), range(quarter)):
        for part, place in enumerate((column, row)):
            angle = place / 10_000 ** (number / quarter)
            result[0, row * columns + column, 2 * part * quarter + number] = math.sin(angle)
            result[0, row * columns + column, (2 * part + 1) * quarter + number] = math.cos(angle)
    return result


def save_published(weights: dict[str, torch.Tensor], file) -> None:
    """As it is published: a training's checkpoint of a wrapped model, or bare weights."""
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    else:
        kept = {f"module.{name}": tensor for name, tensor in weights.items()}
        torch.save({"model": {name: 0 * tensor for name, tensor in kept.items()}, "ema": kept, "opt": {"lr": 1}}, file)


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "shape, patch, qk_norm", [((3, 4, 4), 1, False), ((3, 4, 4), 1, True), ((3, 8, 8), 2, False), ((2, 4, 12), 2, True)]
)
def test_published_weights_do_what_they_did(tmp_path, shape, patch, qk_norm, suffix):
    published = Published(shape, patch, qk_norm=qk_norm)
    file = tmp_path / f"published{suffix}"
    save_published(published.state_dict(), file)
    prior = small_dit(latent_shape=shape, patch_size=patch, qk_norm=qk_norm)
    prior.load_published(file)
    noisy, t = torch.randn(6, *shape), torch.linspace(0, 1, 6)
    expected = published(noisy, t, torch.full((6,), 7))  # its null class
    for label in range(6):  # five users and the null label
        found = prior(noisy, t, prior.users(torch.full((6,), label)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1 and (expected - published(noisy, t, torch.zeros(6).long())).abs().max() > 0.01


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(depth=3), "does not fit this LightningDiT: unexpected keys blocks.2.attn.proj.bias, .* and 9 more"),
        (dict(depth=1), "does not fit this LightningDiT: missing keys blocks.1.attn.proj.bias, .* and 9 more"),
        (dict(width=32), "does not fit this LightningDiT: shape mismatch in blocks.0.attn.proj.bias, .* more"),
        (dict(qk_norm=True), "unexpected keys blocks.0.attn.k_norm.weight, blocks.0.attn.q_norm.weight, .* 1 more"),
        (dict(shape=(3, 4, 8)), "was trained on 32 tokens, this prior has 16"),
        (dict(shape=(3, 8, 8), patch=2), "shape mismatch in final_layer.linear.bias, .*, x_embedder.weight"),
    ],
)
def test_weights_of_other_sizes_are_refused(tmp_path, changes, message):
    file = tmp_path / "other.pt"
    save_published(Published(**changes).state_dict(), file)
    refused(file, message)


def refused(file, message: str, error=ValueError) -> None:
    prior = small_dit(latent_shape=(3, 4, 4))
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    with pytest.raises(error, match=message) as answer:
        prior.load_published(file)
    assert str(file) in str(answer.value) and "\n" not in str(answer.value)
    torch.testing.assert_close(prior.state_dict(), before, rtol=0, atol=0)


def test_what_is_no_lightningdit_is_refused(tmp_path):
    weights, file = Published().state_dict(), tmp_path / "file.pt"
    for missing in ("y_embedder.embedding_table.weight", "pos_embed"):
        save_published({name: tensor for name, tensor in weights.items() if name != missing}, file)
        refused(file, "holds no LightningDiT: it has no class table or no pos_embed")
    torch.save(nn.Linear(2, 2).state_dict(), file)
    refused(file, "holds no LightningDiT")
    file.write_text("<html>404: Not Found</html>")
    refused(file, "cannot be loaded safely, it is not a file of tensors only")
    refused(tmp_path / "absent.pt", "no weights at", FileNotFoundError)
    torch.save({**weights, "extra": Trap(tmp_path / "sprung")}, file)
    refused(file, "cannot be loaded safely, it is not a file of tensors only")
    assert not (tmp_path / "sprung").exists()


@torch.no_grad()
def test_a_new_prior_answers_zero_and_its_blocks_change_nothing():
    prior = LightningDiT((3, 4, 2), 5, hidden_size=16, depth=2, num_heads=2)
    x, c = torch.randn(2, 8, 16), torch.randn(2, 16)
    assert torch.equal(prior.blocks[0](x, c, prior.rotation), x)
    assert not prior(torch.randn(2, 3, 4, 2), torch.rand(2), prior.users(torch.tensor([0, 5]))).any()


@torch.no_grad()
def test_the_loss_is_the_velocity_error_and_its_angle():
    prior = small_dit()
    latents, labels = torch.randn(8, 3, 4, 2), torch.arange(8) % 5
    torch.manual_seed(3)
    loss, logs = prior.loss(latents, labels)
    torch.manual_seed(3)
    noise = torch.randn(8, 3, 4, 2)
    shares = (torch.rand(()) + torch.arange(8) / 8) % 1
    t = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(shares))
    along = t.view(-1, 1, 1, 1)
    made = prior(along * latents + (1 - along) * noise, t, prior.users.weight[labels])  # t = 1 is data
    velocity = latents - noise
    mse = (made - velocity).square().mean()
    angle = 1 - ((made * velocity).sum(1) / (made.norm(dim=1) * velocity.norm(dim=1))).mean()
    torch.testing.assert_close(loss, mse + angle, rtol=1e-4, atol=0)
    torch.testing.assert_close(logs, {"velocity_mse": mse, "cosine": angle}, rtol=1e-4, atol=0)


def test_the_first_gradient_fits_in_half_precision():
    """A gradient that overflows is thrown away and halves the loss scale; the cosine has a pole where training
    begins."""
    prior = LightningDiT((4, 8, 8), 5, hidden_size=16, depth=1, num_heads=2).train()
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _ = prior.loss(torch.randn(8, 4, 8, 8), torch.arange(8) % 5)
    (loss * 2**16).backward()  # the first scale of torch's GradScaler
    assert all(p.grad.isfinite().all() for p in prior.parameters())
    assert prior.final_layer.linear.weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_samplers_are_diffusers_own(name):
    prior, labels = small_dit(), torch.tensor([0, 3, 1])
    options = dict(num_inference_steps=8, guidance_scale=2.5, scheduler=name)
    drawn = prior.sample(labels, generator=torch.Generator().manual_seed(7), **options)
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - step / 8 for step in range(8)])
    else:
        scheduler = FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(8)
    noisy = torch.randn(3, 3, 4, 2, generator=torch.Generator().manual_seed(7))
    for timestep in scheduler.timesteps:
        t = (1 - timestep / 1000).expand(3)
        user, null = (prior(noisy, t, prior.users(which)) for which in (labels, torch.full((3,), 5)))
        noisy = scheduler.step(-(null + 2.5 * (user - null)), timestep, noisy).prev_sample
    torch.testing.assert_close(drawn, noisy, rtol=1e-4, atol=1e-4)


def calls(prior: LightningDiT, **options) -> tuple[list[float], list[int]]:
    """t and batch of every network call while one sample is drawn."""
    times, batches = [], []

    def note(module, arguments):
        times.append(float(arguments[1]))
        batches.append(len(arguments[0]))

    handle = prior.register_forward_pre_hook(note)
    prior.sample(torch.tensor([0]), **options)
    handle.remove()
    return times, batches


@pytest.mark.parametrize("shift", [0.1, 0.3, 1, 1.5, 3.0, 7.0])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_the_shift_bends_the_times_and_guidance_misses_no_step(name, shift):
    times, batches = calls(
        small_dit(), scheduler=name, num_inference_steps=10, timestep_shift=shift, guidance_scale=2.0
    )
    if name == "euler":
        plain = [step / 10 for step in range(10)]
    else:  # diffusers' last step but one ends at σ = 0.001; all noise levels but the first are seen twice
        plain = [0.999 * step / 9 for step in range(10) for _ in range(2)][1:]
    expected = [shift * t / (1 + (shift - 1) * t) for t in plain]
    assert times == pytest.approx(expected, abs=1e-6)
    assert min(times) >= 0 and batches == [2] * len(times)


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_euler_asks_once_a_step_and_heun_twice_but_for_the_last(steps):
    prior = small_dit()
    assert len(calls(prior, scheduler="euler", num_inference_steps=steps)[0]) == steps
    assert len(calls(prior, scheduler="heun", num_inference_steps=steps)[0]) == 2 * steps - 1
    for name in ("heun", "euler"):
        assert prior.sampler(scheduler=name, num_inference_steps=steps).sigmas[-1] == 0


# Of latents (1, 1, 2) and two users: user 0 is a Gaussian, user 1 the mixture of `priors`.
SHAPE = (1, 1, 2)
MEAN = torch.tensor([0.5, -1.0], dtype=torch.double)
SPREAD = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.double)


def gaussian_points(count: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(count, 2, generator=generator, dtype=torch.double)
    return MEAN + noise @ torch.linalg.cholesky(SPREAD).T


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x_1 − x_0 | x_t = x] (B, 2) of N(m, S): m + (t·S − (1 − t)·I)·(t²·S + (1 − t)²·I)⁻¹·(x − t·m)."""
    total = t**2 * SPREAD + (1 - t) ** 2 * torch.eye(2)
    return MEAN + (x - t * MEAN) @ torch.linalg.inv(total) @ (t * SPREAD - (1 - t) * torch.eye(2))


class Gaussian(LightningDiT):
    """In place of the network, the exact velocity."""

    def forward(self, noisy, t, users):
        return gaussian_velocity(noisy.flatten(1).double(), t.double()).to(noisy.dtype).view_as(noisy)


class Mixture(LightningDiT):
    """In place of the network, the exact velocity (E[x_1 | x_t] − x_t)/(1 − t)."""

    def forward(self, noisy, t, users):
        x, t = noisy.flatten(1).double(), t.double()
        return ((mixture_mean(x, t, 1 - t) - x) / (1 - t)).to(noisy.dtype).view_as(noisy)


def draw(prior: LightningDiT, count: int, label: int = 0, seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return prior.sample(torch.full((count,), label), generator=generator, **options).flatten(1).double()


@pytest.mark.parametrize("scheduler, error", [("heun", 0.005), ("euler", 0.3)])
def test_the_exact_velocity_carries_noise_to_the_gaussian(scheduler, error):
    """Without chance: along a Gaussian's path noise ε ends at m + S^½·ε, and an Euler step errs to the first order."""
    values, vectors = torch.linalg.eigh(SPREAD)
    root = vectors @ values.sqrt().diag() @ vectors.T
    noise = torch.randn(500, *SHAPE, generator=torch.Generator().manual_seed(0)).flatten(1).double()
    prior = small_dit(Gaussian, latent_shape=SHAPE)
    for steps, bound in ((25, error), (250, error / 10)):
        found = draw(prior, 500, num_inference_steps=steps, scheduler=scheduler)
        assert (found - (MEAN + noise @ root)).abs().max() < bound


@pytest.fixture(scope="module")
def straight() -> list[torch.Tensor]:
    """Six independent runs of 250 Euler steps with the mixture's exact velocity."""
    prior = small_dit(Mixture, latent_shape=SHAPE)
    return list(draw(prior, 6 * 1500, scheduler="euler", num_inference_steps=250).split(1500))


def test_the_exact_velocity_carries_noise_to_the_mixture(straight):
    assert_within_noise(mixture_points(1500, torch.Generator().manual_seed(1)), straight)


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_25_heun_steps_draw_what_250_euler_steps_draw(straight, shift):
    points = draw(small_dit(Mixture, latent_shape=SHAPE), 1500, seed=1, timestep_shift=shift)
    assert_within_noise(points, straight)


@pytest.fixture(scope="module")
def learned() -> LightningDiT:
    """Trained for 300 steps of 256 points, half of each user."""
    torch.manual_seed(0)
    # Beside the cosine the best velocity is no longer the mean, so it is left out.
    sizes = dict(hidden_size=48, depth=1, num_heads=2)
    prior = LightningDiT(SHAPE, 2, **sizes, label_dropout=0.0).train()
    optimizer = torch.optim.AdamW(prior.parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0, fused=True)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=300)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdlib.models.dit.COSINE_WEIGHT", 0.0)
        patch.setattr("mdlib.models.dit.TIME_STD", 1.5)
        for _ in range(300):
            points = torch.stack([gaussian_points(128, generator), mixture_points(128, generator)], dim=1)
            loss, _ = prior.loss(points.float().view(256, *SHAPE), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return prior.eval()


@torch.no_grad()
def test_it_learns_the_velocity_of_a_gaussian(learned):
    """Root mean square error below a quarter of the velocity's own size everywhere, and a sixth on average."""
    generator, errors = torch.Generator().manual_seed(5), []
    for t in torch.linspace(0.05, 0.95, 10, dtype=torch.double):
        x = t * gaussian_points(1000, generator) + (1 - t) * torch.randn(1000, 2, generator=generator)
        exact = gaussian_velocity(x, t)
        users = learned.users(torch.zeros(1000, dtype=torch.long))
        made = learned(x.float().view(-1, *SHAPE), t.float(), users).flatten(1)
        errors.append(float((made - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
    assert max(errors) < 0.25 and sum(errors) / 10 < 1 / 6


def test_it_learns_a_mixture_beside_the_gaussian(learned):
    """By chance draws of 1500 points lie up to 0.006 apart; the mixture and a Gaussian of its mean and covariance lie
    0.16 apart, the two users 0.7."""
    generator = torch.Generator().manual_seed(5)
    for label, exact in ((0, gaussian_points(1500, generator)), (1, mixture_points(1500, generator))):
        assert energy(draw(learned, 1500, label, num_inference_steps=10), exact) < 0.04


def test_gradient_checkpointing_recomputes_and_changes_no_gradient():
    gradients, counts = [], []
    for checkpointing in (False, True):
        prior = small_dit(gradient_checkpointing=checkpointing).train()
        counted = []
        for block in prior.blocks:
            block.attn.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(0)
        prior.loss(torch.randn(4, 3, 4, 2), torch.tensor([0, 1, 2, 3]))[0].backward()
        gradients.append({name: parameter.grad for name, parameter in prior.named_parameters()})
        counts.append(len(counted))
    assert counts == [2, 4]
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("rows, columns", [(4, 4), (2, 5), (5, 2), (1, 3)])
def test_positions_are_those_of_row_and_column(rows, columns):
    torch.testing.assert_close(sine_positions(16, rows, columns), positions_one_by_one(16, rows, columns))
    turns = torch.view_as_complex(rotation(16, rows, columns))
    for row, column, pair in itertools.product(range(rows), range(columns), range(8)):
        place = row if pair < 4 else column
        angle = torch.tensor(place / 10_000 ** (pair % 4 / 4))
        torch.testing.assert_close(turns[row * columns + column, pair], torch.polar(torch.ones(()), angle))


@pytest.mark.parametrize("rows, columns", [(3, 5), (5, 3)])
def test_attention_scores_depend_on_relative_places_alone(rows, columns):
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    turns = torch.view_as_complex(rotation(16, rows, columns)).unsqueeze(0)
    turned = apply_rotary_emb(torch.stack([q, k]).expand(1, rows * columns, 2, 16), turns, use_real=False)[0]
    scores = (turned[:, 0] @ turned[:, 1].T).view(rows, columns, rows, columns)
    seen = {}
    for r, c, r2, c2 in itertools.product(range(rows), range(columns), range(rows), range(columns)):
        seen.setdefault((r2 - r, c2 - c), []).append(float(scores[r, c, r2, c2]))
    assert len(seen) == (2 * rows - 1) * (2 * columns - 1)
    assert all(values == pytest.approx(values[:1] * len(values), abs=1e-4) for values in seen.values())
    assert seen[0, 0][0] == pytest.approx(float(q @ k), abs=1e-4)
    firsts = sorted(values[0] for values in seen.values())
    assert min(b - a for a, b in itertools.pairwise(firsts)) > 1e-4  # a step down is no step to the right, nor up


def test_modulated_norm_is_the_norm_scaled_and_shifted():
    x, weight = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True), torch.randn(12).double()
    shift, scale = torch.randn(2, 2, 1, 12, dtype=torch.double)
    norm = ModulatedNorm(12, eps=1e-6).double()
    norm.weight.data.copy_(weight)
    found, expected = norm(x, shift, scale), F.rms_norm(x, (12,), weight, eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    first, second = (torch.autograd.grad(out, x, direction)[0] for out in (found, expected))
    torch.testing.assert_close(first, second)


def test_queries_and_keys_are_normalised_where_asked():
    """Then their size changes no score."""
    for qk_norm in (False, True):
        attention, x = small_dit(qk_norm=qk_norm).blocks[0].attn, torch.randn(1, 8, 16)
        nn.init.zeros_(attention.qkv.bias)
        turns = rotation(8, 4, 2)
        before = attention(x, turns)
        attention.qkv.weight.data[:32] *= 10
        assert torch.allclose(attention(x, turns), before, atol=1e-4) == qk_norm


@pytest.mark.filterwarnings("error:Mismatch dtype:UserWarning")
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_full(dtype, qk_norm):
    prior = small_dit(qk_norm=qk_norm)
    noisy, t, users = torch.randn(4, 3, 4, 2), torch.rand(4), prior.users(torch.tensor([0, 1, 2, 5]))
    full = prior(noisy, t, users)
    with torch.autocast("cpu", dtype=dtype):
        half = prior(noisy, t, users)
        loss, _ = prior.loss(noisy, torch.tensor([0, 1, 2, 5]))
    loss.backward()
    assert (half - full).norm() < 0.05 * full.norm() and loss.isfinite() and loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in prior.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(patch_size=3), r"^latents of \(4, 2\) cannot be cut into patches of 3$"),
        (dict(patch_size=0), r"^latents of \(4, 2\) cannot be cut into patches of 0$"),
        (dict(hidden_size=18, num_heads=4), "^hidden_size 18 over num_heads 4 must be a multiple of 4$"),
        (dict(hidden_size=24, num_heads=4), "^hidden_size 24 over num_heads 4 must be a multiple of 4$"),
        (dict(num_heads=0), "^hidden_size 16 over num_heads 0 must be a multiple of 4$"),
        (dict(label_dropout=1.5), r"^label_dropout must be in \[0, 1\], got 1.5$"),
    ],
)
def test_a_prior_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small_dit(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scheduler="dpm++"), "^scheduler must be one of euler, heun, got 'dpm[+][+]'$"),
        (dict(timestep_shift=0), r"^timestep_shift must be in \[0.01, 100\], got 0$"),
        (dict(timestep_shift=0.005), r"^timestep_shift must be in \[0.01, 100\], got 0.005$"),
        (dict(timestep_shift=math.inf), r"^timestep_shift must be in \[0.01, 100\], got inf$"),
        (dict(timestep_shift=math.nan), r"^timestep_shift must be in \[0.01, 100\], got nan$"),
        (dict(timestep_shift="0.3"), r"^timestep_shift must be in \[0.01, 100\], got '0.3'$"),
    ],
)
def test_bad_sampling_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_dit().sample(torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_a_prior_in_half_precision_samples(scheduler):
    prior = LightningDiT((4, 4, 2), 3, hidden_size=32, depth=1, num_heads=2).to(torch.bfloat16).eval()
    drawn = prior.sample(torch.tensor([0, 2]), scheduler=scheduler, num_inference_steps=2, guidance_scale=2.0)
    assert drawn.dtype == torch.bfloat16 and drawn.isfinite().all()
