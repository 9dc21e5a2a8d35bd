"""The token prior: the right next token, the user in each way of conditioning, the cache, guidance, and samples that
stand on their own."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import generators
from priors import small_transformer

from mdlib.models.transformer import TokenPrior


def small_prior(**changes) -> TokenPrior:
    return small_transformer(**{**dict(num_codes=11, token_shape=(3, 4)), **changes})


def test_loss_is_the_cross_entropy_of_each_token_given_those_before_it():
    prior = small_prior()
    tokens, labels = torch.randint(11, (2, 3, 4)), torch.tensor([0, 4])
    loss, _ = prior.loss(tokens, labels)
    by_hand = []
    for grid, label in zip(tokens, labels, strict=True):
        sequence = [int(grid[row, column]) for column in range(4) for row in range(3)]  # column by column
        for position, token in enumerate(sequence):
            inputs = torch.tensor([[prior.start, *sequence[:position]]])
            hidden = prior.gpt(inputs_embeds=prior.tokens(inputs) + prior.users(label)).last_hidden_state
            by_hand.append(-F.log_softmax(prior.head(hidden[0, -1]), -1)[token])
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


WAYS = [{}, dict(user_layers=2, user_dim=8), dict(conditioning="cross"), dict(conditioning="cross", user_layers=1)]
all_ways = pytest.mark.parametrize("way", WAYS)


@all_ways
def test_a_token_does_not_see_itself_nor_what_follows(way):
    prior = small_prior(**way)
    sequence = torch.randint(11, (1, 12))
    changed = sequence.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 11
    first, second = prior(sequence, torch.tensor([1])), prior(changed, torch.tensor([1]))
    torch.testing.assert_close(first[0, :8], second[0, :8])
    assert not torch.allclose(first[0, 8:], second[0, 8:])


@all_ways
def test_user_and_condition_reach_every_position(way):
    prior = small_prior(num_conditions=2, **way)
    torch.nn.init.normal_(prior.users.conditions)
    sequence, one = torch.randint(11, (1, 12)), torch.ones(1, dtype=torch.long)
    plain, other, carrying = (
        prior(sequence, user, condition) for user, condition in ((one, None), (one + 1, None), (one, one))
    )
    for changed in (other, carrying):
        assert ((plain - changed).abs().amax(-1)[0] > 1e-6).all()


def test_attention_prefers_other_tokens_for_another_user():
    """Else the user would only add a vector to every position."""
    prior = small_prior(conditioning="cross")
    torch.nn.init.normal_(prior.users.weight)
    keys = prior.gpt.h[0].crossattention.c_attn(prior.encoded_users(torch.tensor([1, 2])))[..., :16]  # (2, U, hidden)
    first, second = (user - user.mean(0) for user in keys)
    assert (first - second).abs().max() > 1e-3


def test_a_prior_saved_before_users_had_an_encoder_is_the_same(tmp_path):
    prior, labels = small_prior(), torch.tensor([0, 3])
    prior.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("conditioning", "user_layers", "user_dim"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not any("encoder" in name or "cross" in name for name in prior.state_dict())
    drawn = [each.sample(labels, generator=generators(1, 2)) for each in (prior, TokenPrior.from_pretrained(tmp_path))]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(conditioning="film"), "conditioning must be one of add, cross, got 'film'"),
        (dict(user_dim=8), "user_dim 8 is the width of a user encoder: add user_layers, or leave it at 0"),
        (dict(user_dim=9, user_layers=1), "user_dim must be a multiple of num_heads 2, got 9"),
        (dict(user_layers=-1), "user_layers must be 0 or more, got -1"),
    ],
)
def test_bad_options_of_the_user_encoder_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_prior(**options)


@all_ways
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_cache_changes_nothing(guidance_scale, way):
    prior, labels = small_prior(**way), torch.tensor([0, 3, 1])
    options = dict(guidance_scale=guidance_scale, temperature=0.9, top_k=7, top_p=0.95)
    cached = prior.sample(labels, generator=generators(1, 2, 3), **options)
    plain = prior.sample(labels, generator=generators(1, 2, 3), use_cache=False, **options)
    assert cached.shape == (3, 3, 4) and torch.equal(cached, plain)


def test_samples_follow_the_distribution():
    """Two tokens, 20,000 draws: frequencies against the exact joint probabilities."""
    prior = small_prior(num_codes=3, token_shape=(2, 1), num_users=2)
    with torch.no_grad():
        for table in (prior.tokens, prior.users, prior.head):  # far from uniform
            table.weight.mul_(30)
    pairs = torch.tensor([[a, b] for a in range(3) for b in range(3)])
    logits = prior(pairs, torch.ones(9, dtype=torch.long)).log_softmax(-1)
    exact = logits.gather(2, pairs.unsqueeze(-1)).sum((1, 2)).exp()
    torch.testing.assert_close(exact.sum(), torch.tensor(1.0))
    drawn = prior.sample(torch.ones(20_000, dtype=torch.long), generator=torch.Generator().manual_seed(0)).flatten(1)
    frequency = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / 20_000
    assert (frequency - exact).abs().max() < 0.012


def test_top_k_of_one_is_greedy_and_top_p_cuts_the_tail():
    prior = small_prior()
    labels = torch.tensor([1, 1])
    greedy = prior.sample(labels, generator=generators(1, 2), top_k=1)
    assert torch.equal(greedy[0], greedy[1])
    sequence = prior.to_sequence(greedy)
    assert torch.equal(prior(sequence, labels).argmax(-1), sequence)
    nearly = prior.sample(labels, generator=generators(3, 4), top_p=1e-6)
    assert torch.equal(nearly, greedy)


def test_it_overfits_ten_sequences_and_reproduces_them():
    prior = small_prior(num_users=10, hidden_size=48, label_dropout=0.0).train()
    torch.manual_seed(1)
    tokens, labels = torch.randint(11, (10, 3, 4)), torch.arange(10)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(250):
        loss, _ = prior.loss(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    drawn = prior.eval().sample(labels, generator=torch.Generator().manual_seed(0))
    assert (drawn == tokens).float().mean() > 0.98


def test_grid_and_sequence_are_inverse():
    prior = small_prior()
    grid = torch.arange(12).view(1, 3, 4)
    assert prior.to_sequence(grid)[0, :4].tolist() == [0, 4, 8, 1]
    assert torch.equal(prior.to_grid(prior.to_sequence(grid)), grid)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(top_p=0.0), "top_p must be in"),
        (dict(top_k=-1), "top_k must be 0 or more"),
    ],
)
def test_bad_sampling_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_prior().sample(torch.tensor([0, 1]), **options)
