"""VQ-Diffusion (Gu et al. 2022, after Austin et al. 2021): tokens emerge from masks and noise, all positions at once.

Guidance: Tang et al. 2022. Few steps by confidence: Chang et al. 2022 (MaskGIT). The network has LightningDiT's blocks.
Legend: B batch, h w token grid, N = h·w tokens, K codes, token K is the mask, T timesteps: x_0 data, x_T masks.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from transformers.generation.logits_process import TopPLogitsWarper

from mdlib.models.dit import Transformer
from mdlib.models.layers import all_sum, check_choice, check_each, check_number, check_steps, inverse_cdf, uniform
from mdlib.models.prior import Prior, Request, evenly_spread, guided

TINY = 1e-30  # stands for a probability of zero, whose logarithm would be infinite
ENOUGH = 10  # samples of every timestep, after which timesteps are sampled by their loss
CHOICE_TEMPERATURE = 4.5  # of the Gumbel noise on token confidence in "mask_predict"; falls to 0 over the steps


class MaskAndReplace:
    """Noise: by time t a token stays with probability ᾱ_t, becomes a given code (β̄_t) or the mask (γ̄_t), which stays.

    ᾱ and γ̄ are linear in t, as in the authors' code: ᾱ from 0.99999 to 0.000009, γ̄ from 0.000009 to gamma_cum_end,
    and K·β̄ is the rest. Products of such (K + 1)×(K + 1) matrices have the same three numbers, so no matrix is formed.
    Times s < t are tensors (B,) in 0…T; results are float32 logarithms.
    """

    def __init__(self, num_codes: int, timesteps: int, gamma_cum_end: float):
        self.num_codes, self.timesteps = num_codes, timesteps
        # In float64, and no buffers: K·β̄ is 1e-6, which half precision would not hold.
        self.alpha = F.pad(torch.linspace(0.99999, 0.000009, timesteps, dtype=torch.float64), (1, 0), value=1.0)
        self.gamma = F.pad(torch.linspace(0.000009, gamma_cum_end, timesteps, dtype=torch.float64), (1, 0))
        self.copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """ᾱ and γ̄ of t = 0…T (T + 1,) on `device`, copied once."""
        if device not in self.copies:
            self.copies[device] = self.alpha.to(device), self.gamma.to(device)
        return self.copies[device]

    def rates(self, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """log (α, β, γ) of the way from x_s to x_t, each (B, 1, 1)."""
        alpha, gamma = self.tables(t.device)
        keep = alpha[t] / alpha[s]
        mask = (gamma[t] - gamma[s]) / (1 - gamma[s])
        replace = (1 - keep - mask) / self.num_codes
        return tuple(rate.clamp_min(TINY).log().float().view(-1, 1, 1) for rate in (keep, replace, mask))

    def marginal(self, log_x0: Tensor, t: Tensor) -> Tensor:
        """log q(x_t) (B, N, K + 1) where x_0 has log probabilities log_x0 (B, N, K)."""
        keep, replace, mask = self.rates(torch.zeros_like(t), t)
        codes = torch.logaddexp(log_x0 + keep, replace)
        return torch.cat([codes, mask.expand(-1, codes.shape[1], 1)], dim=-1)

    def likelihood(self, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """log q(x_t | x_s = k) (B, N, K) of tokens x_t (B, N) for every code k."""
        keep, replace, mask = self.rates(s, t)
        masked = (x_t == self.num_codes).unsqueeze(-1)  # (B, N, 1)
        same = torch.where(masked, mask, torch.logaddexp(keep, replace))
        others = torch.where(masked, mask, replace).expand(-1, -1, self.num_codes)
        return others.scatter(2, x_t.clamp_max(self.num_codes - 1).unsqueeze(-1), same)

    def posterior(self, log_x0: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """log Σ_k q(x_s | x_t, x_0 = k)·p(x_0 = k) (B, N, K + 1) of tokens x_t (B, N), p given by log_x0 (B, N, K)."""
        joint = log_x0 - self.likelihood(x_t, torch.zeros_like(t), t)
        total = joint.logsumexp(-1, keepdim=True)
        stays = torch.where(x_t == self.num_codes, 0.0, math.log(TINY)).unsqueeze(-1)  # only a mask comes from a mask
        onwards = torch.cat([self.likelihood(x_t, s, t), stays], dim=-1)
        return self.marginal(joint - total, s) + onwards + total

    def noised(self, x_0: Tensor, t: Tensor) -> Tensor:
        """A sample of x_t (B, N) for tokens x_0 (B, N)."""
        level = torch.rand(x_0.shape, device=x_0.device)
        alpha, gamma = (table[t].unsqueeze(1) for table in self.tables(t.device))
        replaced = torch.where(level < 1 - alpha, torch.randint_like(x_0, self.num_codes), x_0)
        return torch.where(level < gamma, self.num_codes, replaced)

    def prior(self) -> Tensor:
        """log probabilities (K + 1,) of a token of x_T, whatever x_0 was."""
        gamma = self.gamma[-1].float()
        return torch.cat([((1 - gamma) / self.num_codes).expand(self.num_codes), gamma.view(1)]).log()


class VQDiffusion(Transformer, Prior, ModelMixin, ConfigMixin):
    """p(tokens | user) by denoising.

    Args (the others are in `Prior`):
        qk_norm: RMSNorm of queries and keys: more stable in half precision.
        num_train_timesteps: T.
        gamma_cum_end: γ̄_T, the fraction of masks at the end: 0.99999 in the authors' code, 0.9 in their paper.
        auxiliary_weight: of the cross-entropy of x_0, added to the bound.
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
        qk_norm: bool = False,
        label_dropout: float = 0.1,
        num_train_timesteps: int = 100,
        gamma_cum_end: float = 0.99999,
        auxiliary_weight: float = 5e-4,
        num_conditions: int = 1,
    ):
        super().__init__()
        check_number("label_dropout", label_dropout, 0, 1)
        check_number("auxiliary_weight", auxiliary_weight, 0)
        check_number("num_train_timesteps", num_train_timesteps, 2)
        check_number("gamma_cum_end", gamma_cum_end, 0.1, 0.99999)
        self.token_shape, self.null_label = tuple(token_shape), num_users
        self.num_tokens = self.token_shape[0] * self.token_shape[1]
        self.noise = MaskAndReplace(num_codes, num_train_timesteps, gamma_cum_end)
        self.tokens = nn.Embedding(num_codes + 1, hidden_size)
        self.rows, self.columns = (nn.Embedding(side, hidden_size) for side in self.token_shape)
        self.build(token_shape, num_users, num_conditions, hidden_size, depth, num_heads, qk_norm, num_codes)
        self.register_buffer("square_loss", torch.zeros(num_train_timesteps))  # mean of bound² at t = 1…T
        self.register_buffer("seen", torch.zeros(num_train_timesteps, dtype=torch.long))
        for table in (self.tokens, self.rows, self.columns):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, noisy: Tensor, t: Tensor, users: Tensor, conditions: Tensor | None = None) -> Tensor:
        """log p(x_0 | x_t, t, user) (B, N, K), float32, of tokens x_t (B, N), t (B,) in 1…T, users, conditions (B,)."""
        places = self.rows.weight.unsqueeze(1) + self.columns.weight  # (h, w, d)
        x = self.tokens(noisy) + places.flatten(0, 1)  # (B, N, d)
        return self.run(x, t, self.users(users, conditions)).float().log_softmax(-1)

    def loss(self, tokens, users, conditions=None):
        """Variational bound on −log p (nats per token) + weighted cross-entropy of x_0, at one t per sample."""
        users = self.drop_users(users)
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

    def _bound(self, log_x0: Tensor, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) (B,), nats per token; at t = 1 it is −log p(x_0 | x_1)."""
        certain = torch.full_like(log_x0, math.log(TINY)).scatter_(2, clean.unsqueeze(2), 0.0)
        true = self.noise.posterior(certain, noisy, t - 1, t)
        found = self.noise.posterior(log_x0, noisy, t - 1, t)
        return (true.exp() * (true - found)).sum(2).mean(1)

    def _times(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """t (count,) in 1…T and the probability of each: in proportion to the root mean square of its bound once every
        t was sampled often enough (Nichol and Dhariwal 2021), which minimises the variance of the estimated sum."""
        steps = self.noise.timesteps
        chance = torch.full((steps,), 1 / steps, device=device)
        if self.training:
            size = self.square_loss.sqrt() + 1e-4
            size[0] = size[1]  # at t = 1 hardly a token is masked: its mean square stays unknown for long
            chance = torch.where((self.seen >= ENOUGH).all(), size / size.sum(), chance)
        index = torch.searchsorted(chance.cumsum(0), evenly_spread(count, device), right=True).clamp_max(steps - 1)
        return index + 1, chance[index]

    @torch.no_grad()
    def _remember(self, t: Tensor, bound: Tensor) -> None:
        """Update the mean square of the bound at each t, over all processes: a true mean, later a running one."""
        counts = all_sum(torch.zeros_like(self.seen).index_add_(0, t - 1, torch.ones_like(t)))
        sums = all_sum(torch.zeros_like(self.square_loss).index_add_(0, t - 1, bound.square()))
        self.seen += counts
        rate = (counts / self.seen.clamp_min(1)).clamp_min(0.1) * (counts > 0)
        self.square_loss.lerp_(sums / counts.clamp_min(1), rate)

    def draw(
        self, request: Request, *, sampler="ancestral", num_inference_steps=50, temperature=1.0, top_p=1.0
    ) -> Tensor:
        """Tokens (B, h, w); guidance and share act on the log probabilities of x_0.

        Args:
            sampler: "ancestral" (x_T to x_0 by the posterior) or "mask_predict" (all masks at first; every step fixes
                the most certain tokens, few at first, by a cosine).
            num_inference_steps: at most T (ancestral) or N (mask_predict).
            temperature: of p(x_0), one number or one per sample (B,).
            top_p: of p(x_0); the authors' truncation rate is a top_p of 0.86.
        """
        users, conditions, generator, guidance_scale, towards, share, on_step = request
        check_choice("sampler", sampler, ("ancestral", "mask_predict"))
        check_steps(num_inference_steps, self.num_tokens if sampler == "mask_predict" else self.noise.timesteps)
        temperature = check_each("temperature", temperature, len(users), users.device)
        check_number("top_p", top_p, 0, 1, above=True)
        if not len(users):
            return users.new_empty(0, *self.token_shape)
        draws = num_inference_steps + 1 if sampler == "ancestral" else 2 * num_inference_steps
        levels = torch.stack([uniform(len(users), self.num_tokens, generator) for _ in range(draws)])
        draw = iter(levels.to(users.device)).__next__  # (B, N); one copy, for which alone the host waits
        numbers = itertools.count()

        def predict(tokens: Tensor, time: int) -> Tensor:
            """log p(x_0) (B, N, K) of tokens (B, N)."""
            log_x0 = self._predict(tokens, time, users, conditions, towards, share, guidance_scale)
            log_x0 = (log_x0 / temperature.view(-1, 1, 1)).log_softmax(-1)
            if on_step:
                on_step(next(numbers), log_x0.argmax(-1).unflatten(1, self.token_shape))
            if top_p < 1:
                log_x0 = TopPLogitsWarper(float(top_p))(None, log_x0.flatten(0, 1)).log_softmax(-1).view_as(log_x0)
            return log_x0

        if sampler == "mask_predict":
            tokens = self._mask_predict(users, num_inference_steps, predict, draw)
        else:
            tokens = self._ancestral(users, num_inference_steps, predict, draw)
        return tokens.unflatten(1, self.token_shape)

    def _predict(self, tokens, time, users, conditions, towards, share, scale) -> Tensor:
        """log p(x_0) (B, N, K) up to a constant, of tokens (B, N), in one network call."""
        every = [users]
        every += [towards] if towards is not None else []
        every += [self.users.null(users)] if scale != 1 else []
        labels = torch.cat(every)
        conditions = conditions.repeat(len(every)) if conditions is not None else None
        log_x0 = self(tokens.repeat(len(every), 1), torch.full_like(labels, time), labels, conditions)
        user, *others = log_x0.chunk(len(every))
        if towards is not None:
            user = torch.lerp(user, others[0], share.view(-1, 1, 1))
        return user if scale == 1 else guided(user, others[-1], scale)

    def _ancestral(self, users: Tensor, steps: int, predict: Callable, draw: Callable) -> Tensor:
        """Tokens (B, N); a step may span several timesteps."""
        times = [self.noise.timesteps * step // steps for step in range(steps, -1, -1)]
        x = inverse_cdf(self.noise.prior().to(users.device).expand(len(users), self.num_tokens, -1), draw())
        for now, then in itertools.pairwise(times):
            s, t = torch.full_like(users, then), torch.full_like(users, now)
            x = inverse_cdf(self.noise.posterior(predict(x, now), x, s, t), draw())
        return x

    def _mask_predict(self, users: Tensor, steps: int, predict: Callable, draw: Callable) -> Tensor:
        """Tokens (B, N) in exactly `steps` network calls."""
        mask = self.noise.num_codes
        x = torch.full((len(users), self.num_tokens), mask, device=users.device)
        for step, (before, after) in enumerate(itertools.pairwise(masks_left(self.num_tokens, steps)), 1):
            masked = self.noise.gamma[1:] - before / self.num_tokens  # at each t; the nearest counts
            log_x0 = predict(x, int(masked.abs().argmin()) + 1)
            sampled = inverse_cdf(log_x0, draw())
            certainty = log_x0.gather(2, sampled.unsqueeze(2)).squeeze(2)  # (B, N)
            gumbel = -torch.log(-torch.log(draw().clamp_min(TINY)))
            certainty = certainty + CHOICE_TEMPERATURE * (1 - step / steps) * gumbel
            order = certainty.masked_fill(x != mask, -math.inf).argsort(1, descending=True)
            x = torch.where(order.argsort(1) < before - after, sampled, x)
        return x


def masks_left(tokens: int, steps: int) -> list[int]:
    """The number of masked `tokens` before the first of `steps` and after each: a quarter cosine, falling by at least
    one (Chang et al. 2022)."""
    left = [tokens]
    for step in range(1, steps + 1):
        wanted = int(tokens * math.cos(math.pi / 2 * step / steps))
        left.append(min(left[-1] - 1, max(wanted, steps - step)))
    return left
