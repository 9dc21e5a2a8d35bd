"""VQ-Diffusion: a codec's tokens come out of masks and noise, all positions at once, conditional on the user.

Process and bound: Gu et al. 2022 (VQ-Diffusion), after Austin et al. 2021 (D3PM). Guidance and purity: Tang et al.
2022. Few steps by confidence: Chang et al. 2022 (MaskGIT). The network is made of LightningDiT's blocks.
Legend: B batch, h w token grid, N = h·w tokens, K codes, token K is the mask, T timesteps: x_0 data, x_T masks.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from mdlib.models.denoising import check_name, check_share, evenly_spread
from mdlib.models.dit import FREQUENCIES, Block, FinalLayer, initialise, rotation, time_embedding
from mdlib.models.layers import UserEmbedding, all_sum, drop_labels, inverse_cdf, uniform

SAMPLERS = ("ancestral", "mask_predict")
TINY = 1e-30  # stands for a probability of zero: its logarithm can still be multiplied by one
ENOUGH = 10  # sightings of every timestep, after which timesteps are drawn by their loss


class MaskAndReplace:
    """The noise: a token stays with ᾱ_t, becomes any given code with β̄_t and the mask with γ̄_t; a mask stays a mask.

    ᾱ and γ̄ are linear in t, as in the authors' code: ᾱ from 0.99999 to 0.000009, γ̄ from 0.000009 to gamma_cum_end,
    and K·β̄ is the rest. Products of such (K + 1)×(K + 1) matrices have the same three numbers, so no matrix is ever
    made. Times s < t are tensors (B,) in 0…T; answers are float32 logarithms.
    """

    def __init__(self, num_codes: int, timesteps: int, gamma_cum_end: float):
        self.num_codes, self.timesteps = num_codes, timesteps
        # In float64, and no buffers: K·β̄ is 1e-6, which half precision would not hold.
        self.alpha = F.pad(torch.linspace(0.99999, 0.000009, timesteps, dtype=torch.float64), (1, 0), value=1.0)
        self.gamma = F.pad(torch.linspace(0.000009, gamma_cum_end, timesteps, dtype=torch.float64), (1, 0))

    def rates(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """log (α, β, γ) of the way from x_s to x_t, each (B, 1, 1)."""
        alpha, gamma = self.alpha.to(t.device), self.gamma.to(t.device)
        keep = alpha[t] / alpha[s]
        mask = (gamma[t] - gamma[s]) / (1 - gamma[s])
        replace = (1 - keep - mask) / self.num_codes
        return tuple(rate.clamp_min(TINY).log().float().view(-1, 1, 1) for rate in (keep, replace, mask))

    def marginal(self, log_x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log q(x_t) (B, N, K + 1) where x_0 has log probabilities log_x0 (B, N, K)."""
        keep, replace, mask = self.rates(torch.zeros_like(t), t)
        codes = torch.logaddexp(log_x0 + keep, replace)
        return torch.cat([codes, mask.expand(-1, codes.shape[1], 1)], dim=-1)

    def likelihood(self, x_t: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log q(x_t | x_s = k) (B, N, K) of tokens x_t (B, N) for every code k."""
        keep, replace, mask = self.rates(s, t)
        masked = (x_t == self.num_codes).unsqueeze(-1)  # (B, N, 1)
        same = torch.where(masked, mask, torch.logaddexp(keep, replace))
        others = torch.where(masked, mask, replace).expand(-1, -1, self.num_codes)
        return others.scatter(2, x_t.clamp_max(self.num_codes - 1).unsqueeze(-1), same)

    def posterior(self, log_x0: torch.Tensor, x_t: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log Σ_k q(x_s | x_t, x_0 = k)·p(x_0 = k) (B, N, K + 1) of tokens x_t (B, N), p given by log_x0 (B, N, K)."""
        joint = log_x0 - self.likelihood(x_t, torch.zeros_like(t), t)
        total = joint.logsumexp(-1, keepdim=True)
        stays = torch.where(x_t == self.num_codes, 0.0, math.log(TINY)).unsqueeze(-1)  # only a mask comes from a mask
        onwards = torch.cat([self.likelihood(x_t, s, t), stays], dim=-1)
        return self.marginal(joint - total, s) + onwards + total

    def noised(self, x_0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A draw of x_t (B, N) for tokens x_0 (B, N)."""
        share = torch.rand(x_0.shape, device=x_0.device)
        gamma, alpha = (table.to(t.device)[t].unsqueeze(1) for table in (self.gamma, self.alpha))
        replaced = torch.where(share < 1 - alpha, torch.randint_like(x_0, self.num_codes), x_0)
        return torch.where(share < gamma, self.num_codes, replaced)

    def prior(self) -> torch.Tensor:
        """log probabilities (K + 1,) of a token of x_T, whatever x_0 was."""
        gamma = self.gamma[-1].float()
        return torch.cat([((1 - gamma) / self.num_codes).expand(self.num_codes), gamma.view(1)]).log()

    def time_of(self, share: float) -> int:
        """The t in 1…T whose share of masks is nearest."""
        return int((self.gamma[1:] - share).abs().argmin()) + 1


class VQDiffusion(ModelMixin, ConfigMixin):
    """p(tokens | user) by denoising.

    Args:
        num_codes: K of the codec.
        token_shape: (h, w) of the codec's token grid.
        num_users: n; label n is the null label of classifier-free guidance.
        num_conditions: carrying conditions, see `mdlib.models.layers.UserEmbedding`.
        hidden_size, depth, num_heads, mlp_ratio, qk_norm: as in `mdlib.models.dit.LightningDiT`.
        label_dropout: share of training samples whose label is the null label.
        num_train_timesteps: T.
        gamma_cum_end: γ̄_T, the share of masks at the end. The rest of the tokens are there drawn anew: one in a
            hundred thousand in the authors' code (the default), one in ten in their paper (0.9).
        auxiliary_weight: of the cross-entropy of x_0 beside the bound.

    Raises:
        ValueError: sizes that do not fit.
    """

    consumes = "tokens"

    @register_to_config
    def __init__(
        self,
        num_codes: int,
        token_shape: tuple[int, int],
        num_users: int,
        hidden_size: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        label_dropout: float = 0.1,
        num_train_timesteps: int = 100,
        gamma_cum_end: float = 0.99999,
        auxiliary_weight: float = 5e-4,
        num_conditions: int = 1,
    ):
        super().__init__()
        _check_sizes(hidden_size, num_heads, label_dropout, num_train_timesteps, gamma_cum_end, auxiliary_weight)
        self.token_shape, self.null_label = tuple(token_shape), num_users
        self.num_tokens = self.token_shape[0] * self.token_shape[1]
        self.noise = MaskAndReplace(num_codes, num_train_timesteps, gamma_cum_end)
        self.tokens = nn.Embedding(num_codes + 1, hidden_size)
        self.rows, self.columns = (nn.Embedding(side, hidden_size) for side in self.token_shape)
        self.t_embedder = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.users = UserEmbedding(num_users, num_conditions, hidden_size)
        hidden = int(mlp_ratio * hidden_size * 2 / 3)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, hidden, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, num_codes)
        self.register_buffer("rotation", rotation(hidden_size // num_heads, *self.token_shape), persistent=False)
        self.register_buffer("square_loss", torch.zeros(num_train_timesteps))  # mean of bound² at t = 1…T
        self.register_buffer("seen", torch.zeros(num_train_timesteps, dtype=torch.long))
        initialise(self)
        for table in (self.tokens, self.rows, self.columns):
            nn.init.normal_(table.weight, std=0.02)

    def forward(
        self, noisy: torch.Tensor, t: torch.Tensor, users: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log p(x_0 | x_t, t, user) (B, N, K), float32, of tokens x_t (B, N) at times t (B,) in 1…T, users (B,) and
        conditions (B,)."""
        places = self.rows.weight.unsqueeze(1) + self.columns.weight  # (h, w, d)
        x = self.tokens(noisy) + places.flatten(0, 1)  # (B, N, d)
        c = F.silu(self.t_embedder(time_embedding(t)) + self.users(users, conditions))  # (B, d)
        for block in self.blocks:
            x = block(x, c, self.rotation)
        return self.final_layer(x, c).float().log_softmax(-1)

    # Training ---------------------------------------------------------------------------------------------------

    def loss(
        self, tokens: torch.Tensor, users: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Variational bound on −log p (nats a token) + weighted cross-entropy of x_0, of tokens (B, h, w) given users
        (B,) and conditions (B,), estimated at one t a sample."""
        if tuple(tokens.shape[1:]) != self.token_shape:
            raise ValueError(f"this prior was made for token grids {self.token_shape}, got {tuple(tokens.shape[1:])}")
        users = drop_labels(users, self.null_label, self.config.label_dropout if self.training else 0.0)
        clean = tokens.flatten(1)
        t, chance = self._times(len(tokens), tokens.device)
        noisy = self.noise.noised(clean, t)
        log_x0 = self(noisy, t, users, conditions)
        bound = self._bound(log_x0, clean, noisy, t)
        if self.training:
            self._remember(t, bound.detach())
        vb = (bound / chance).mean()
        entropy = -log_x0.gather(2, clean.unsqueeze(2)).mean((1, 2))  # (B,)
        weight = self.config.auxiliary_weight * (2 - t / self.noise.timesteps)
        aux = (weight * entropy / chance).mean()
        return vb + aux, {"vb": vb.detach(), "aux": aux.detach()}

    def _bound(self, log_x0: torch.Tensor, clean: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) (B,), nats a token. At t = 1 it is −log p(x_0 | x_1)."""
        certain = torch.full_like(log_x0, math.log(TINY)).scatter_(2, clean.unsqueeze(2), 0.0)
        true = self.noise.posterior(certain, noisy, t - 1, t)
        made = self.noise.posterior(log_x0, noisy, t - 1, t)
        return (true.exp() * (true - made)).sum(2).mean(1)

    def _times(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """t (count,) in 1…T and the probability of each: in proportion to the root mean square of its bound once every
        t was seen often enough (Nichol and Dhariwal 2021), which makes the estimate of their sum the least noisy."""
        steps = self.noise.timesteps
        chance = torch.full((steps,), 1 / steps, device=device)
        if self.training:
            size = self.square_loss.sqrt() + 1e-4
            size[0] = size[1]  # at t = 1 hardly a token is masked: its mean square stays unknown for long
            chance = torch.where((self.seen >= ENOUGH).all(), size / size.sum(), chance)
        index = torch.searchsorted(chance.cumsum(0), evenly_spread(count, device), right=True).clamp_max(steps - 1)
        return index + 1, chance[index]

    @torch.no_grad()
    def _remember(self, t: torch.Tensor, bound: torch.Tensor) -> None:
        """Follow the mean square of the bound at each t: a true mean at first, then a running one; in all processes the
        same."""
        counts = all_sum(torch.bincount(t - 1, minlength=len(self.seen)))
        sums = all_sum(torch.zeros_like(self.square_loss).index_add_(0, t - 1, bound.square()))
        self.seen += counts
        rate = (counts / self.seen.clamp_min(1)).clamp_min(0.1) * (counts > 0)
        self.square_loss.lerp_(sums / counts.clamp_min(1), rate)

    # Sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        users: torch.Tensor,
        *,
        conditions: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_scale: float = 1.0,
        sampler: str = "ancestral",
        num_inference_steps: int = 50,
        temperature: float = 1.0,
        top_p: float = 1.0,
        purity: float | None = None,
        choice_temperature: float = 4.5,
        towards: torch.Tensor | None = None,
        share: float | torch.Tensor = 0.0,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """Tokens (B, h, w) for users (B,) in conditions (B,).

        Args:
            generator: one for the batch, or one a sample: a sample then does not depend on its batch.
            guidance_scale: s in null + s·(user − null) on the log probabilities of x_0; 1 is plain conditional
                sampling.
            sampler: "ancestral" (x_T to x_0 by the posterior) or "mask_predict" (all masks at first; every step fixes
                the tokens that are most certain, few at first, by a cosine).
            num_inference_steps: network calls; at most T (ancestral) or N (mask_predict).
            temperature: of p(x_0); below 1 likely codes become likelier.
            top_p: keep the likeliest codes that together reach it (the authors' truncation rate, 0.86); 1 keeps all.
            purity: None, or r ≥ 0: of the ancestral sampler. As many tokens are unmasked as are due, those first of
                whose code the network is sure, and p(x_0)^(1 + r·purity) is drawn from.
            choice_temperature: noise on the certainty by which "mask_predict" chooses, falling to 0 with the steps.
            towards, share: draw from log p between `users` (share 0) and `towards` (share 1), users (B,);
                share is one number or one a sample.
            on_step: called as on_step(number of the step, estimate of x_0: the likeliest tokens (B, h, w)).

        Raises:
            ValueError: a sampling option outside its range, a user outside 0…num_users, too few generators.
        """
        self._check_request(users, conditions, generator, guidance_scale, towards)
        self._check_options(sampler, num_inference_steps, temperature, top_p, purity, choice_temperature)
        if not len(users):
            return users.new_empty(0, *self.token_shape)
        draw = lambda: uniform(len(users), self.num_tokens, generator).to(users.device)  # (B, N)
        whom = (users, conditions, towards, check_share(share, users))
        numbers = itertools.count()

        def predict(tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            log_x0 = self._predict(whom, guidance_scale, temperature, tokens, t)
            if on_step:
                on_step(next(numbers), log_x0.argmax(-1).unflatten(1, self.token_shape))
            return truncated(log_x0, top_p)

        if sampler == "mask_predict":
            tokens = self._mask_predict(users, num_inference_steps, predict, draw, choice_temperature)
        else:
            tokens = self._ancestral(users, num_inference_steps, predict, draw, purity)
        return tokens.unflatten(1, self.token_shape)

    def _predict(
        self, whom: tuple, scale: float, temperature: float, tokens: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """log p(x_0) (B, N, K) of tokens (B, N) at times t (B,), guided and tempered, in one network call; whom: users
        (B,), conditions (B,) or None, towards (B,) or None, share (B,)."""
        users, conditions, towards, share = whom
        every = [users]
        every += [towards] if towards is not None else []
        every += [self.users.null(users)] if scale != 1 else []
        n = len(every)
        conditions = conditions.repeat(n) if conditions is not None else None
        user, *others = self(tokens.repeat(n, 1), t.repeat(n), torch.cat(every), conditions).chunk(n)
        if towards is not None:
            user = torch.lerp(user, others[0], share.view(-1, 1, 1))
        log_x0 = user if scale == 1 else others[-1] + scale * (user - others[-1])
        return (log_x0 / temperature).log_softmax(-1)

    def _ancestral(
        self, users: torch.Tensor, steps: int, predict: Callable, draw: Callable, purity: float | None
    ) -> torch.Tensor:
        """Tokens (B, N); a step may span several timesteps."""
        times = [self.noise.timesteps * step // steps for step in range(steps, -1, -1)]
        x = inverse_cdf(self.noise.prior().to(users.device).expand(len(users), self.num_tokens, -1), draw())
        for now, then in itertools.pairwise(times):
            t, s = torch.full_like(users, now), torch.full_like(users, then)
            log_x0 = predict(x, t)
            if purity is None:
                x = inverse_cdf(self.noise.posterior(log_x0, x, s, t), draw())
            else:
                x = self._unmask_pure(log_x0, x, s, t, draw, purity)
        return x

    def _unmask_pure(
        self, log_x0: torch.Tensor, x: torch.Tensor, s: torch.Tensor, t: torch.Tensor, draw: Callable, purity: float
    ) -> torch.Tensor:
        """x_s (B, N) from x_t (B, N) by the purity prior: which masks fall is drawn by the largest p(x_0) of each, how
        many is fixed."""
        mask = self.noise.num_codes
        pure = log_x0.amax(-1)  # (B, N)
        sharper = 1 + purity * (pure - pure.amax(1, keepdim=True)).exp()
        log_x0 = (sharper.unsqueeze(-1) * log_x0).log_softmax(-1)
        drawn = inverse_cdf(self.noise.posterior(log_x0, x, s, t)[..., :mask], draw())
        masked = x == mask
        due = masked.sum(1) - round(self.num_tokens * float(self.noise.gamma[int(s[0])]))
        fall = highest((pure + gumbel(draw())).masked_fill(~masked, -math.inf), due)
        return torch.where(masked & ~fall, mask, drawn)

    def _mask_predict(
        self, users: torch.Tensor, steps: int, predict: Callable, draw: Callable, choice_temperature: float
    ) -> torch.Tensor:
        """Tokens (B, N) in exactly `steps` network calls."""
        mask = self.noise.num_codes
        x = torch.full((len(users), self.num_tokens), mask, device=users.device)
        for step, (before, after) in enumerate(itertools.pairwise(masks_left(self.num_tokens, steps)), 1):
            time = self.noise.time_of(before / self.num_tokens)
            log_x0 = predict(x, torch.full_like(users, time))
            drawn = inverse_cdf(log_x0, draw())
            certainty = log_x0.gather(2, drawn.unsqueeze(2)).squeeze(2)  # (B, N)
            certainty = certainty + choice_temperature * (1 - step / steps) * gumbel(draw())
            fixed = highest(certainty.masked_fill(x != mask, -math.inf), torch.full_like(users, before - after))
            x = torch.where(fixed, drawn, x)
        return x

    def _check_request(self, users, conditions, generator, scale: float, towards: torch.Tensor | None) -> None:
        self.users.check(users, conditions)
        if towards is not None:
            self.users.check(towards)
        if not _within(scale, 0):
            raise ValueError(f"guidance_scale must be 0 or more, got {scale}")
        if scale != 1 and self.config.label_dropout == 0:
            raise ValueError(
                "this prior was trained without label_dropout, so nothing can guide: guidance_scale must be 1"
            )
        if isinstance(generator, list) and len(generator) != len(users):
            raise ValueError(f"{len(users)} samples need {len(users)} generators, got {len(generator)}")

    def _check_options(self, sampler, steps, temperature, top_p, purity, choice_temperature) -> None:
        check_name(sampler, SAMPLERS, "sampler")
        most = self.num_tokens if sampler == "mask_predict" else self.noise.timesteps
        if not isinstance(steps, int) or not 1 <= steps <= most:
            raise ValueError(f"num_inference_steps of {sampler} must be a whole number in 1…{most}, got {steps}")
        if not _within(temperature, 0) or temperature == 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if not _within(top_p, 0) or not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if not _within(choice_temperature, 0):
            raise ValueError(f"choice_temperature must be 0 or more, got {choice_temperature}")
        if purity is not None and (not _within(purity, 0) or sampler != "ancestral"):
            raise ValueError(f"purity must be None, or 0 or more with sampler ancestral, got {purity} with {sampler}")


def masks_left(tokens: int, steps: int) -> list[int]:
    """How many of `tokens` are masked before the first of `steps` and after each: a quarter cosine, falling by one at
    least (Chang et al. 2022)."""
    left = [tokens]
    for step in range(1, steps + 1):
        wanted = int(tokens * math.cos(math.pi / 2 * step / steps))
        left.append(min(left[-1] - 1, max(wanted, steps - step)))
    return left


def truncated(log_p: torch.Tensor, top_p: float) -> torch.Tensor:
    """log_p (…, K) of its likeliest codes that together reach top_p, the one that crosses it among them."""
    if top_p == 1:
        return log_p
    ordered, order = log_p.sort(-1, descending=True)
    probability = ordered.exp()
    beyond = probability.cumsum(-1) - probability >= top_p
    return log_p.masked_fill(beyond.gather(-1, order.argsort(-1)), -math.inf).log_softmax(-1)


def gumbel(share: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of uniform numbers in [0, 1)."""
    return -torch.log(-torch.log(share.clamp_min(TINY)))


def highest(score: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which of score (B, N) are among the highest count (B,) of their row, as booleans (B, N)."""
    return score.argsort(1, descending=True).argsort(1) < count.unsqueeze(1)


def _within(value, low: float) -> bool:
    return isinstance(value, int | float) and low <= value < math.inf


def _check_sizes(width: int, heads: int, dropout: float, timesteps: int, gamma: float, auxiliary: float) -> None:
    if heads < 1 or width % heads or width // heads % 4:
        raise ValueError(f"hidden_size {width} over num_heads {heads} must be a multiple of 4")
    if not 0 <= dropout <= 1 or auxiliary < 0:
        raise ValueError(
            f"label_dropout must lie in [0, 1] and auxiliary_weight be 0 or more, got {dropout}, {auxiliary}"
        )
    if timesteps < 2 or not 0.1 <= gamma <= 0.99999:
        raise ValueError(
            f"num_train_timesteps must be 2 or more and gamma_cum_end lie in [0.1, 0.99999], got {timesteps}, {gamma}"
        )
