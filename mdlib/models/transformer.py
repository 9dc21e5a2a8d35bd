"""Token prior: a causal transformer over a codec's token grid, conditional on the user.

The network is transformers' GPT-2 (Radford et al. 2019) built from a configuration; nothing is downloaded. The user's
embedding is added at every position, so the condition cannot be forgotten along the sequence. Tokens run column by
column (time first, as they were measured), each column from the fastest Doppler row down.
Legend: B batch, h w token grid, T = h·w tokens, K codes.
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2Model
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mdlib.models.layers import UserEmbedding, drop_labels, inverse_cdf, uniform


class TokenPrior(ModelMixin, ConfigMixin):
    """p(tokens | user) as a product over positions.

    Args:
        num_codes: K of the codec.
        token_shape: (h, w) of the codec's token grid.
        num_users: n; label n is the null label of classifier-free guidance.
        num_conditions: carrying conditions, see `mdlib.models.layers.UserEmbedding`.
        hidden_size, num_layers, num_heads, dropout: GPT-2's.
        label_dropout: share of training samples whose label is the null label.
    """

    consumes = "tokens"

    @register_to_config
    def __init__(
        self,
        num_codes: int,
        token_shape: tuple[int, int],
        num_users: int,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        num_conditions: int = 1,
    ):
        super().__init__()
        self.token_shape = tuple(token_shape)
        self.num_tokens = self.token_shape[0] * self.token_shape[1]
        self.null_label = num_users
        self.start = num_codes  # the input at position 0: no token yet
        config = GPT2Config(
            vocab_size=1,  # the token table is our own: it also holds the start symbol and meets the user's embedding
            n_positions=self.num_tokens,
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=num_heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        self.tokens = nn.Embedding(num_codes + 1, hidden_size)
        self.users = UserEmbedding(num_users, num_conditions, hidden_size)
        self.gpt = GPT2Model(config)
        self.head = nn.Linear(hidden_size, num_codes, bias=False)
        for table in (self.tokens, self.users, self.head):
            nn.init.normal_(table.weight, std=0.02)

    def loss(
        self, tokens: torch.Tensor, users: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean cross-entropy (nats a token) of tokens (B, h, w) given users (B,) and conditions (B,)."""
        users = drop_labels(users, self.null_label, self.config.label_dropout if self.training else 0.0)
        sequence = self.to_sequence(tokens)
        logits = self(sequence, users, conditions)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), sequence.flatten())
        return loss, {"nats_per_token": loss.detach()}

    def forward(
        self, sequence: torch.Tensor, users: torch.Tensor, conditions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, T, K) of every token of sequence (B, T) given the tokens before it, users and conditions (B,)."""
        start = sequence.new_full((len(sequence), 1), self.start)
        hidden, _ = self._step(torch.cat([start, sequence[:, :-1]], 1), self.users(users, conditions))
        return self.head(hidden)

    def _step(self, inputs: torch.Tensor, users: torch.Tensor, cache: DynamicCache | None = None):
        """users: their embeddings (B, hidden)."""
        embeddings = self.tokens(inputs) + users.unsqueeze(1)  # (B, t, hidden)
        output = self.gpt(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state, output.past_key_values

    @torch.no_grad()
    def sample(
        self,
        users: torch.Tensor,
        *,
        conditions: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        use_cache: bool = True,
    ) -> torch.Tensor:
        """Tokens (B, h, w) for users (B,) in conditions (B,).

        Args:
            generator: one for the batch, or one a sample: a sample then does not depend on its batch.
            guidance_scale: s in null + s·(user − null) on the logits; 1 is plain conditional sampling.
            temperature, top_k, top_p: transformers' logits warpers; 1, 0 and 1 leave the distribution as it is.
            use_cache: keep keys and values of earlier positions instead of recomputing them.

        Raises:
            ValueError: a sampling option outside its range, a label outside 0…num_users, too few generators.
        """
        warpers = _warpers(temperature, top_k, top_p)
        self.users.check(users, conditions)
        if not len(users):
            return users.new_empty(0, *self.token_shape)
        shares = uniform(len(users), self.num_tokens, generator).to(users.device)  # (B, T)
        guided = guidance_scale != 1.0
        embedded = self.users(users, conditions)
        if guided:
            embedded = torch.cat([embedded, self.users(self.users.null(users), conditions)])
        cache = DynamicCache() if use_cache else None
        sequence = users.new_full((len(users), 1), self.start)
        for position in range(self.num_tokens):
            inputs = sequence[:, -1:] if use_cache else sequence
            hidden, cache = self._step(inputs.repeat(2, 1) if guided else inputs, embedded, cache)
            logits = self.head(hidden[:, -1]).float()  # (B or 2B, K)
            if guided:
                user, null = logits.chunk(2)
                logits = null + guidance_scale * (user - null)
            chosen = inverse_cdf(warpers(sequence, logits), shares[:, position])
            sequence = torch.cat([sequence, chosen.unsqueeze(1)], 1)
        return self.to_grid(sequence[:, 1:])

    def to_sequence(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, h, w) → (B, T), column by column."""
        if tuple(tokens.shape[1:]) != self.token_shape:
            raise ValueError(f"this prior was made for token grids {self.token_shape}, got {tuple(tokens.shape[1:])}")
        return tokens.transpose(1, 2).flatten(1)

    def to_grid(self, sequence: torch.Tensor) -> torch.Tensor:
        """(B, T) → (B, h, w)."""
        h, w = self.token_shape
        return sequence.view(-1, w, h).transpose(1, 2)


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be 0 (off) or more and top_p in (0, 1], got {top_k} and {top_p}")
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers
