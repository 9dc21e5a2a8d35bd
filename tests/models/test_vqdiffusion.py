"""VQ-Diffusion: the noise by matrices, the bound by hand, diffusers' posterior, samplers under an exact denoiser."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import VQDiffusionScheduler
from priors import small_vqdiffusion

import mdlib.models.vqdiffusion
from mdlib.models.vqdiffusion import MaskAndReplace, VQDiffusion, masks_left

ENDS = (0.99999, 0.9)  # γ̄_T of the authors' code and of their paper


def steps_of(codes: int, timesteps: int, gamma_end: float) -> list[np.ndarray]:
    """Q_1…Q_T (K + 1)×(K + 1), rows x_{t−1} and columns x_t, from the definition of the schedule."""
    alpha = np.concatenate([[1], np.linspace(0.99999, 0.000009, timesteps)])
    gamma = np.concatenate([[0], np.linspace(0.000009, gamma_end, timesteps)])
    result = []
    for t in range(1, timesteps + 1):
        keep, mask = alpha[t] / alpha[t - 1], 1 - (1 - gamma[t]) / (1 - gamma[t - 1])
        matrix = np.full((codes + 1, codes + 1), (1 - keep - mask) / codes) + keep * np.eye(codes + 1)
        matrix[:, codes], matrix[codes, :codes], matrix[codes, codes] = mask, 0, 1
        result.append(matrix)
    return result


def way(matrices: list[np.ndarray], s: int, t: int) -> np.ndarray:
    """Q_{s+1}·…·Q_t."""
    product = np.eye(len(matrices[0]))
    for matrix in matrices[s:t]:
        product = product @ matrix
    return product


def by_bayes(matrices: list[np.ndarray], p0: np.ndarray, x_t: int, s: int, t: int) -> np.ndarray:
    """Σ_k q(x_s | x_t, x_0 = k)·p0[k], all of it by matrices."""
    first, second, both = way(matrices, 0, s), way(matrices, s, t), way(matrices, 0, t)
    return sum(p0[k] * first[k] * second[:, x_t] / both[k, x_t] for k in range(len(p0)))


def assert_same(log_p: torch.Tensor, probability: np.ndarray) -> None:
    expected = torch.tensor(probability)
    torch.testing.assert_close(log_p.double().exp(), expected, atol=2e-6, rtol=0)
    seen = expected > 1e-20
    torch.testing.assert_close(log_p.double()[seen], expected[seen].log(), atol=1e-3, rtol=0)
    assert abs(float(log_p.double().exp().sum()) - 1) < 1e-5


@pytest.mark.parametrize("end", ENDS)
def test_closed_forms_are_the_products_of_the_matrices(end):
    codes, timesteps = 3, 6
    noise, matrices = MaskAndReplace(codes, timesteps, end), steps_of(codes, timesteps, end)
    log_p0 = torch.tensor([0.2, 0.7, 0.1]).log()
    for s, t in itertools.combinations(range(timesteps + 1), 2):
        before, after, product = torch.tensor([s]), torch.tensor([t]), way(matrices, s, t)
        for x_t in range(codes + 1):
            x = torch.tensor([[x_t]])
            likelihood = noise.likelihood(x, before, after)[0, 0].double().exp()
            torch.testing.assert_close(likelihood, torch.tensor(product[:codes, x_t]), atol=1e-7, rtol=1e-4)
            posterior = noise.posterior(log_p0.view(1, 1, -1), x, before, after)[0, 0]
            assert_same(posterior, by_bayes(matrices, log_p0.double().exp().numpy(), x_t, s, t))
        marginal = noise.marginal(log_p0.view(1, 1, -1), after)[0, 0]
        assert_same(marginal, np.append(log_p0.double().exp(), 0) @ way(matrices, 0, t))


@pytest.mark.parametrize("end", ENDS)
def test_every_one_of_a_hundred_steps_is_right(end):
    codes, timesteps = 4, 100
    noise, matrices = MaskAndReplace(codes, timesteps, end), steps_of(codes, timesteps, end)
    t = torch.arange(1, timesteps + 1)
    p0 = torch.tensor([0.5, 0.1, 0.4, 0.0])
    log_p0 = p0.clamp_min(1e-30).log().expand(timesteps, 1, -1)
    marginal = noise.marginal(log_p0, t)
    for x_t in range(codes + 1):
        posterior = noise.posterior(log_p0, torch.full((timesteps, 1), x_t), t - 1, t)
        for time in range(1, timesteps + 1):
            assert_same(posterior[time - 1, 0], by_bayes(matrices, p0.double().numpy(), x_t, time - 1, time))
            assert_same(marginal[time - 1, 0], np.append(p0, 0) @ way(matrices, 0, time))


@pytest.mark.parametrize("end", ENDS)
def test_the_posterior_is_diffusers_own(end):
    codes, x_t = 7, torch.tensor([[0, 3, 7, 6, 7]])
    scheduler = VQDiffusionScheduler(codes + 1, gamma_cum_end=end)
    noise = MaskAndReplace(codes, 100, end)
    log_p0 = torch.randn(1, 5, codes, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for t in range(1, 100):  # diffusers counts from 0, and at 0 takes the network's word
        theirs = scheduler.q_posterior(log_p0.transpose(1, 2), x_t, t).transpose(1, 2)
        ours = noise.posterior(log_p0, x_t, torch.tensor([t]), torch.tensor([t + 1]))
        torch.testing.assert_close(ours.clamp_min(-40), theirs.clamp_min(-40), atol=2e-3, rtol=0)


@pytest.mark.parametrize("end", ENDS)
def test_at_the_end_every_code_is_the_prior(end):
    noise = MaskAndReplace(3, 100, end)
    prior = noise.prior().exp()
    assert abs(float(prior.sum()) - 1) < 1e-6 and float(prior[3]) == pytest.approx(end)
    for code in range(3):
        log_x0 = torch.full((1, 1, 3), -70.0)
        log_x0[..., code] = 0
        assert (noise.marginal(log_x0, torch.tensor([100]))[0, 0].exp() - prior).abs().sum() / 2 < 1e-5


@pytest.mark.parametrize("end", ENDS)
def test_noised_tokens_follow_the_marginal(end):
    noise, t = MaskAndReplace(3, 10, end), torch.tensor([1, 4, 7, 10])
    torch.manual_seed(0)
    drawn = noise.noised(torch.full((4, 20_000), 2), t)
    frequency = torch.stack([torch.bincount(row, minlength=4) for row in drawn]) / 20_000
    log_x0 = torch.tensor([-70.0, -70.0, 0.0]).expand(4, 1, 3)
    assert (frequency - noise.marginal(log_x0, t)[:, 0].exp()).abs().max() < 0.015  # 4 standard errors


# The loss ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
def test_the_loss_is_the_divergence_by_matrices(end, monkeypatch):
    prior = small_vqdiffusion(timesteps=10, gamma_end=end)
    matrices = steps_of(7, 10, end)
    t, tokens, labels = torch.tensor([1, 2, 5, 10]), torch.randint(7, (4, 3, 2)), torch.tensor([0, 4, 2, 5])
    noisy = torch.tensor([[0, 7, 7, 3, 7, 1]]).repeat(4, 1)
    noisy[0, 3], noisy[1, 0] = tokens[0, 1, 1], tokens[1, 0, 0]
    chance = torch.tensor([0.1, 0.2, 0.05, 0.4])
    monkeypatch.setattr(prior, "_times", lambda count, device: (t, chance))
    monkeypatch.setattr(prior.noise, "noised", lambda clean, times: noisy)
    loss, logs = prior.loss(tokens, labels)
    bound, entropy = np.zeros(4), np.zeros(4)
    for b, (x_0, time) in enumerate(zip(tokens.flatten(1), t.tolist(), strict=True)):
        p0 = prior(noisy[b : b + 1], t[b : b + 1], labels[b : b + 1])[0].double().exp().numpy()  # (N, K)
        for n in range(6):
            true = by_bayes(matrices, np.eye(7)[x_0[n]], int(noisy[b, n]), time - 1, time)
            made = by_bayes(matrices, p0[n], int(noisy[b, n]), time - 1, time)
            some = true > 0
            bound[b] += (true[some] * np.log(true[some] / made[some])).sum() / 6
            entropy[b] -= np.log(p0[n, x_0[n]]) / 6
    assert float(logs["vb"]) == pytest.approx((bound / chance.numpy()).mean(), rel=1e-3)
    weight = 5e-4 * ((1 - t.numpy() / 10) + 1)
    assert float(logs["aux"]) == pytest.approx((weight * entropy / chance.numpy()).mean(), rel=1e-3)
    assert float(loss) == pytest.approx(float(logs["vb"] + logs["aux"]))
    assert bound[0] == pytest.approx(entropy[0], rel=1e-3)  # t = 1: the bound is −log p(x_0 | x_1)


class Exact(VQDiffusion):
    """In place of the network: Bayes' rule for a known joint distribution of the tokens, the same for all users."""

    joint = torch.zeros(())

    def forward(self, noisy, t, labels, conditions=None):
        likelihood = self.noise.likelihood(noisy, torch.zeros_like(t), t).double()  # (B, N, K)
        tokens = list(itertools.product(range(self.noise.num_codes), repeat=self.num_tokens))
        log_p = [likelihood[:, range(self.num_tokens), x].sum(1) + self.joint[x].log() for x in tokens]
        weights = torch.stack(log_p, 1).softmax(1)  # (B, K^N)
        onehot = torch.nn.functional.one_hot(torch.tensor(tokens), self.noise.num_codes).double()
        return torch.einsum("bx,xnk->bnk", weights, onehot).clamp_min(1e-30).log().float()


def exact(joint: list, **changes) -> Exact:
    joint = torch.tensor(joint, dtype=torch.float64)
    prior = small_vqdiffusion(Exact, num_codes=len(joint), token_shape=(1, joint.dim()), **changes)
    prior.joint = joint
    return prior


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
def test_the_bound_of_an_exact_denoiser_of_one_token_is_the_entropy(end):
    """The reverse process is then exact; what is left is KL(q(x_T | x_0) ‖ prior), which nothing can change."""
    p0 = torch.tensor([0.6, 0.3, 0.1])
    prior, t = exact(p0.tolist(), timesteps=20, gamma_end=end), torch.arange(1, 21)
    total = 0.0
    for code, x_t in itertools.product(range(3), range(4)):
        clean, noisy = torch.full((20, 1), code), torch.full((20, 1), x_t)
        log_x0 = torch.full((20, 1, 3), -70.0)
        log_x0[..., code] = 0
        chance = prior.noise.marginal(log_x0, t)[:, 0, x_t].exp() * p0[code]
        total += float((chance * prior._bound(prior(noisy, t, torch.zeros_like(t)), clean, noisy, t)).sum())
    assert total == pytest.approx(float(torch.special.entr(p0).sum()), abs=2e-4)


@pytest.mark.parametrize("codes", [7, 64])
def test_a_new_prior_knows_nothing(codes):
    """Its cross-entropy is log K. The bound counts that once for the masks that fall, once for the tokens that are left
    at t = 1, and a little for those it would redraw on the way."""
    prior = VQDiffusion(codes, (8, 4), 5, hidden_size=16, depth=1, num_heads=2, auxiliary_weight=1e-2).train()
    torch.manual_seed(0)
    _, logs = prior.loss(torch.randint(codes, (500, 8, 4)), torch.randint(5, (500,)))
    assert float(logs["aux"]) == pytest.approx(1e-2 * 149.5 * math.log(codes), rel=1e-2)
    assert 2 * math.log(codes) < float(logs["vb"]) < 2 * math.log(codes) + 1.5


def test_half_precision_changes_the_loss_little():
    prior, tokens, labels = small_vqdiffusion(), torch.randint(7, (64, 3, 2)), torch.arange(64) % 5
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(prior.loss(tokens, labels)[0].detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


# Which timesteps --------------------------------------------------------------------------------------------------


def test_timesteps_drawn_by_their_loss_leave_its_sum_unbiased():
    prior = small_vqdiffusion(timesteps=10).train()
    prior.square_loss.copy_(torch.arange(1.0, 11) ** 4)
    prior.seen.fill_(10)
    torch.manual_seed(0)
    pairs = [prior._times(5, "cpu") for _ in range(4000)]
    t, chance = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    size = torch.tensor([2, *range(2, 11)]) ** 2.0 + 1e-4  # t = 1 counts as t = 2
    torch.testing.assert_close(chance, (size / size.sum())[t - 1])
    frequency = torch.stack([torch.bincount(column - 1, minlength=10) for column in t.T]).sum(0) / t.numel()
    assert (frequency - size / size.sum()).abs().max() < 0.01
    value = torch.randn(10) + 3  # of some loss at each t
    estimate = (value[t - 1] / chance).mean(1)
    assert float(estimate.mean()) == pytest.approx(float(value.sum()), abs=5 * float(estimate.std()) / 4000**0.5)


def test_timesteps_are_uniform_until_all_were_seen_ten_times_and_when_measuring():
    prior = small_vqdiffusion(timesteps=10).train()
    prior.square_loss.copy_(torch.arange(1.0, 11))
    prior.seen.copy_(torch.tensor([9] + [50] * 9))
    assert (prior._times(64, "cpu")[1] == 0.1).all()
    prior.seen[0] = 10
    assert not (prior._times(64, "cpu")[1] == 0.1).any()
    t, chance = prior.eval()._times(10, "cpu")
    assert (chance == 0.1).all() and sorted(t.tolist()) == list(range(1, 11))


def test_only_training_follows_the_loss_of_each_timestep():
    prior, batch = small_vqdiffusion(timesteps=10), (torch.randint(7, (50, 3, 2)), torch.arange(50) % 5)
    prior.eval().loss(*batch)
    assert int(prior.seen.sum()) == 0 and float(prior.square_loss.sum()) == 0
    prior.train().loss(*batch)
    assert (prior.seen == 5).all() and (prior.square_loss[1:] > 0).all()


def test_the_mean_square_is_a_true_mean_at_first_and_a_running_one_later():
    prior = small_vqdiffusion(timesteps=3)
    prior._remember(torch.tensor([2, 2, 3]), torch.tensor([1.0, 3.0, 2.0]))
    prior._remember(torch.tensor([2]), torch.tensor([4.0]))
    torch.testing.assert_close(prior.square_loss, torch.tensor([0.0, 26 / 3, 4.0]))
    assert prior.seen.tolist() == [0, 3, 1]
    prior.seen.fill_(1000)
    prior._remember(torch.tensor([3]), torch.tensor([1.0]))
    torch.testing.assert_close(prior.square_loss, torch.tensor([0.0, 26 / 3, 0.9 * 4 + 0.1]))


def test_processes_remember_what_all_of_them_saw(monkeypatch):
    t, bound = torch.tensor([1, 2, 2, 3, 2, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    whole = small_vqdiffusion(timesteps=3)
    whole._remember(t, bound)
    for here, there in ((slice(4), slice(4, 6)), (slice(4, 6), slice(4))):
        others = iter([torch.bincount(t[there] - 1, minlength=3), torch.zeros(3)])
        sums = torch.zeros(3).index_add_(0, t[there] - 1, bound[there] ** 2)
        monkeypatch.setattr(
            mdlib.models.vqdiffusion,
            "all_sum",
            lambda x, o=others, s=sums: x + (next(o) if x.dtype == torch.long else s),
        )
        part = small_vqdiffusion(timesteps=3)
        part._remember(t[here], bound[here])
        torch.testing.assert_close(part.square_loss, whole.square_loss)
        assert torch.equal(part.seen, whole.seen)


@torch.no_grad()
def test_each_sample_has_a_timestep_and_a_user_of_its_own():
    prior, tokens = small_vqdiffusion(), torch.randint(8, (1, 6)).repeat(4, 1)
    t, labels = torch.tensor([1, 40, 40, 100]), torch.tensor([2, 2, 3, 5])
    together = prior(tokens, t, labels)
    for n in range(4):
        torch.testing.assert_close(together[n : n + 1], prior(tokens[:1], t[n : n + 1], labels[n : n + 1]))
    assert all((together[a] - together[b]).abs().amax(1).min() > 1e-3 for a, b in ((0, 1), (1, 2), (2, 3)))


@torch.no_grad()
def test_the_network_tells_places_apart():
    prior = small_vqdiffusion()
    log_x0 = prior(torch.full((1, 6), 7), torch.tensor([100]), torch.tensor([0]))[0]
    assert torch.pdist(log_x0).min() > 1e-3
    torch.testing.assert_close(log_x0.exp().sum(1), torch.ones(6))


# Sampling under an exact denoiser ---------------------------------------------------------------------------------

JOINT = [[0.30, 0.02, 0.03], [0.05, 0.23, 0.02], [0.10, 0.05, 0.20]]  # of two tokens that know of each other


def frequencies(tokens: torch.Tensor, codes: int) -> torch.Tensor:
    """How often each pair (codes, codes) of tokens (B, 1, 2) occurs."""
    return torch.bincount(tokens[:, 0, 0] * codes + tokens[:, 0, 1], minlength=codes**2).view(codes, codes) / len(
        tokens
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Total variation."""
    return float((a - b).abs().sum() / 2)


@torch.no_grad()
def of_the_chain(prior: Exact, steps: int) -> torch.Tensor:
    """The distribution (K, K) that ancestral sampling of two tokens has: (K + 1)² states, a matrix a step."""
    codes = prior.noise.num_codes
    states = torch.tensor(list(itertools.product(range(codes + 1), repeat=2)))
    now = torch.outer(*[prior.noise.prior().double().exp()] * 2).flatten()
    times = np.linspace(100, 0, steps + 1).astype(int).tolist()
    for t, s in itertools.pairwise(times):
        t, s = torch.full((len(states),), t), torch.full((len(states),), s)
        log_p = prior.noise.posterior(prior(states, t, torch.zeros_like(t)), states, s, t).double()
        now = now @ (log_p[:, 0, :, None] + log_p[:, 1, None, :]).exp().flatten(1)
    return now.view(codes + 1, codes + 1)[:codes, :codes]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_ancestral_sampling_recovers_the_distribution(steps, end):
    """Tokens unmasked in one step are drawn apart: with S steps two are in 1 of S cases, and the distribution is
    S − 1 parts the joint one and 1 part the product of its margins. Noise that also replaces can only be near that."""
    prior = exact(JOINT, gamma_end=end)
    product = torch.outer(prior.joint.sum(1), prior.joint.sum(0))
    chain = of_the_chain(prior, steps)
    if end == 0.99999:
        torch.testing.assert_close(chain, prior.joint + (product - prior.joint) / steps, atol=1e-4, rtol=0)
    else:
        assert distance(chain, prior.joint) < 1.5 * distance(product, prior.joint) / steps + 1e-4
    label, generator = torch.zeros(8000, dtype=torch.long), torch.Generator().manual_seed(0)
    drawn = prior.sample(label, num_inference_steps=steps, generator=generator)
    assert (frequencies(drawn, 3) - chain).abs().max() < 0.02  # 3.9 standard errors of a share of 0.3


def test_tokens_fixed_one_by_one_recover_the_distribution(monkeypatch):
    """Two steps for two tokens: the second is sampled given the first (Tang et al. 2022, the pairs AA and BB)."""
    label = torch.zeros(20_000, dtype=torch.long)
    prior = exact(JOINT)
    # Which comes first must not depend on its code.
    monkeypatch.setattr(mdlib.models.vqdiffusion, "CHOICE_TEMPERATURE", 1e6)
    options = dict(sampler="mask_predict", num_inference_steps=2)
    drawn = prior.sample(label, generator=torch.Generator().manual_seed(1), **options)
    assert (frequencies(drawn, 3) - prior.joint).abs().max() < 0.012
    pairs = exact([[0.5, 0.0], [0.0, 0.5]])
    drawn = pairs.sample(label, generator=torch.Generator().manual_seed(1), **options)
    assert (frequencies(drawn, 2) - pairs.joint).abs().max() < 0.012
    assert frequencies(drawn, 2)[0, 1] == frequencies(drawn, 2)[1, 0] == 0


class Fixed(VQDiffusion):
    """In place of the network: p(x_0) (N, K) at every t; keeps what it was asked."""

    p = torch.zeros(())

    def forward(self, noisy, t, labels, conditions=None):
        self.asked.append((noisy.clone(), t.clone(), labels.clone()))
        return self.p.log().expand(len(noisy), -1, -1)


def fixed(p: list, shape: tuple[int, int], **changes) -> Fixed:
    prior = small_vqdiffusion(Fixed, num_codes=len(p[0]), token_shape=shape, **changes)
    prior.p, prior.asked = torch.tensor(p), []
    return prior


@pytest.mark.parametrize("steps, times", [(4, [100, 75, 50, 25]), (7, [100, 85, 71, 57, 42, 28, 14])])
def test_ancestral_sampling_calls_the_network_once_a_step(steps, times):
    prior = fixed([[0.5, 0.5]] * 4, (2, 2))
    prior.sample(torch.tensor([0, 3]), num_inference_steps=steps)
    assert [asked[1].tolist() for asked in prior.asked] == [[t, t] for t in times]
    assert all(asked[2].tolist() == [0, 3] for asked in prior.asked)


def test_mask_predict_calls_the_network_once_a_step_and_keeps_what_it_fixed():
    prior = fixed(torch.rand(12, 5, generator=torch.manual_seed(0)).softmax(1).tolist(), (4, 3), gamma_end=0.9)
    tokens = prior.sample(torch.tensor([0, 1, 4]), sampler="mask_predict", num_inference_steps=5)
    left = [12, 11, 9, 7, 3]  # 12·cos(π/2·step/5), rounded down
    assert tokens.shape == (3, 4, 3) and tokens.min() >= 0 and tokens.max() < 5
    assert [(asked[0] == 5).sum(1).tolist() for asked in prior.asked] == [[n] * 3 for n in left]
    share = np.linspace(0.000009, 0.9, 100)
    assert [set(asked[1].tolist()) for asked in prior.asked] == [{int(abs(share - n / 12).argmin()) + 1} for n in left]
    for asked in prior.asked:
        known = asked[0] != 5
        assert torch.equal(asked[0][known], tokens.flatten(1)[known])


@pytest.mark.parametrize("choice_temperature, first", [(0.0, [0.97, 0.01, 0.02, 0.0]), (1e6, [0.25] * 4)])
def test_mask_predict_fixes_what_is_most_certain(choice_temperature, first, monkeypatch):
    """Without noise a place comes first when it drew its likely code and no surer place did; with much, any does."""
    monkeypatch.setattr(mdlib.models.vqdiffusion, "CHOICE_TEMPERATURE", choice_temperature)
    prior = fixed([[0.97, 0.03], [0.6, 0.4], [0.9, 0.1], [0.7, 0.3]], (2, 2))
    prior.sample(
        torch.zeros(4000, dtype=torch.long),
        generator=torch.Generator().manual_seed(0),
        sampler="mask_predict",
        num_inference_steps=4,
    )
    share = (prior.asked[1][0] != 2).float().mean(0)
    assert (share - torch.tensor(first)).abs().max() < 0.03


@pytest.mark.parametrize("tokens, steps", [(128, 8), (128, 128), (6, 5), (1, 1)])
def test_every_step_of_mask_predict_fixes_a_token_at_least(tokens, steps):
    left = masks_left(tokens, steps)
    assert len(left) == steps + 1 and left[0] == tokens and left[-1] == 0
    assert all(before > after for before, after in itertools.pairwise(left))


# Sampling options -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_guidance_goes_from_the_null_label_to_the_user_and_beyond():
    prior, x, t = small_vqdiffusion(), torch.randint(8, (2, 6)), torch.tensor([50, 50])
    user, null = (prior(x, t, torch.tensor(labels)).exp() for labels in ([1, 2], [5, 5]))
    guided = prior._predict(x, 50, torch.tensor([1, 2]), None, None, torch.zeros(2), 3.0)
    expected = user**3 / null**2
    torch.testing.assert_close(guided.softmax(-1), expected / expected.sum(-1, keepdim=True))


@torch.no_grad()
def test_between_two_users_lies_the_geometric_mean_of_their_distributions():
    prior, x, t = small_vqdiffusion(), torch.randint(8, (2, 6)), torch.tensor([50, 50])
    first, second, null = (prior(x, t, torch.full((2,), label)).exp() for label in (1, 3, 5))
    between = (torch.tensor([1, 1]), None, torch.tensor([3, 3]), torch.tensor([0.5, 1.0]))
    plain = prior._predict(x, 50, *between, 1.0).softmax(-1)
    expected = (first[0] * second[0]).sqrt()
    torch.testing.assert_close(plain[0], expected / expected.sum(-1, keepdim=True))
    guided = prior._predict(x, 50, *between, 2.0).softmax(-1)[1]
    expected = second[1] ** 2 / null[1]
    torch.testing.assert_close(guided, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("options", [dict(), dict(sampler="mask_predict")])
def test_every_network_call_reports_the_likeliest_tokens(options):
    prior, seen = fixed([[0.2, 0.8], [0.9, 0.1]], (1, 2)), []
    prior.sample(
        torch.tensor([0, 1]), num_inference_steps=2, on_step=lambda n, tokens: seen.append((n, tokens)), **options
    )
    assert [n for n, _ in seen] == [0, 1] and all(tokens.tolist() == [[[1, 0]]] * 2 for _, tokens in seen)


@pytest.mark.parametrize(
    "options, share", [(dict(top_p=0.7), [5, 3, 0, 0]), (dict(temperature=0.5), [25, 9, 2.25, 0.25])]
)
def test_top_p_cuts_the_tail_and_temperature_sharpens(options, share):
    prior, users = fixed([[0.5, 0.3, 0.15, 0.05]], (1, 1)), torch.zeros(20_000, dtype=torch.long)
    options |= dict(sampler="mask_predict", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    frequency = torch.bincount(prior.sample(users, **options).flatten(), minlength=4) / 20_000
    assert (frequency - torch.tensor(share) / sum(share)).abs().max() < 0.015
    assert share[3] or not frequency[2:].any()


def test_a_trained_prior_recovers_the_distribution_of_each_user():
    """Pairs of tokens: of user 0 AA and BB, of user 1 AB, BA and, twice as often, CD."""
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1], [0, 1], [1, 0], [2, 3], [2, 3]])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    prior = VQDiffusion(4, (2, 1), 2, hidden_size=32, depth=2, num_heads=2).train()
    optimizer = torch.optim.AdamW(prior.parameters(), betas=(0.9, 0.99), weight_decay=0)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=200)
    for _ in range(200):
        loss, _ = prior.loss(tokens.repeat(12, 1).unsqueeze(2), labels.repeat(12))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        decay.step()
    prior.eval()
    for user in range(2):
        joint = frequencies(tokens[labels == user].unsqueeze(1), 4)
        for options in (dict(num_inference_steps=25), dict(num_inference_steps=2, sampler="mask_predict")):
            drawn = prior.sample(torch.full((1000,), user), generator=torch.Generator().manual_seed(0), **options)
            assert distance(frequencies(drawn.transpose(1, 2), 4), joint) < 0.15


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sampler="ddim"), "sampler must be one of ancestral, mask_predict, got 'ddim'"),
        (dict(num_inference_steps=0), "num_inference_steps must be a whole number in 1…100, got 0"),
        (dict(num_inference_steps=101), "num_inference_steps must be a whole number in 1…100, got 101"),
        (
            dict(num_inference_steps=7, sampler="mask_predict"),
            "num_inference_steps must be a whole number in 1…6, got 7",
        ),
        (dict(temperature=0.0), r"temperature must be above 0, got 0.0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
@pytest.mark.parametrize("labels", [[0, 1], []])
def test_bad_sampling_options_are_refused(options, message, labels):
    """With no label at all, too: so a pipeline checks a request before it writes anything."""
    with pytest.raises(ValueError, match=message) as error:
        small_vqdiffusion().sample(torch.tensor(labels, dtype=torch.long), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(hidden_size=18), "hidden_size 18 over num_heads 2 must be a multiple of 4"),
        (dict(label_dropout=1.5), r"label_dropout must be in \[0, 1\]"),
        (dict(auxiliary_weight=-1.0), r"auxiliary_weight must be 0 or more, got -1.0"),
    ],
)
def test_a_prior_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small_vqdiffusion(**options)
    assert "\n" not in str(error.value)
