"""Token prior: transformers' GPT-2 (Radford et al. 2019) over a codec's token grid, without pretrained weights. The
user's embedding is added at every position. Tokens run column by column (time first, as they were measured), each
column from the fastest Doppler row down. Legend: B batch, h w token grid, T = h·w tokens, K codes.
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, GPT2Config, GPT2Model
from transformers.generation import logits_process
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mdlib.models.layers import UserEmbedding, check_each, check_number, inverse_cdf, uniform
from mdlib.models.prior import Prior, Request, guided

# torch's attention under another name: for "sdpa" transformers looks for packed sequences, and the host waits for it.
AttentionInterface.register("causal_sdpa", sdpa_attention_forward)


class TokenPrior(Prior, ModelMixin, ConfigMixin):
    """p(tokens | user) as a product over positions. num_layers and dropout are GPT-2's, the other arguments are in
    `Prior`."""

    consumes, denoises = "tokens", False

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
        self.token_shape, self.null_label = tuple(token_shape), num_users
        self.num_tokens = self.token_shape[0] * self.token_shape[1]
        self.start = num_codes  # the input at position 0: no token yet
        self.tokens = nn.Embedding(num_codes + 1, hidden_size)
        self.users = UserEmbedding(num_users, num_conditions, hidden_size)
        config = GPT2Config(
            vocab_size=1,  # unused: `tokens` also holds the start symbol
            n_positions=self.num_tokens,
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=num_heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="causal_sdpa",
        )
        self.gpt = GPT2Model(config)
        self.head = nn.Linear(hidden_size, num_codes, bias=False)
        for table in (self.tokens, self.users, self.head):
            nn.init.normal_(table.weight, std=0.02)

    def loss(self, tokens, users, conditions=None):
        """Mean cross-entropy in nats per token, see `Prior`."""
        sequence = self.to_sequence(tokens)
        logits = self(sequence, self.drop_users(users), conditions)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), sequence.flatten())
        return loss, {"nats_per_token": loss.detach()}

    def forward(self, sequence: Tensor, users: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Logits (B, T, K) of every token of sequence (B, T) given the tokens before it, users and conditions (B,)."""
        start = sequence.new_full((len(sequence), 1), self.start)
        hidden, _ = self._step(torch.cat([start, sequence[:, :-1]], 1), self.users(users, conditions))
        return self.head(hidden)

    def _step(self, inputs: Tensor, users: Tensor, cache: DynamicCache | None = None):
        """Hidden states (B, t, hidden) of tokens (B, t) and embeddings of users (B, hidden), and the cache."""
        embeddings = self.tokens(inputs) + users.unsqueeze(1)
        output = self.gpt(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state, output.past_key_values

    def draw(
        self, request: Request, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, use_cache: bool = True
    ) -> Tensor:
        """Tokens (B, h, w); guidance acts on the logits.

        Args:
            temperature: of the logits, one number or one per sample (B,); 1 leaves the distribution as it is.
            top_k, top_p: transformers' logits warpers; 0 and 1 leave the distribution as it is.
            use_cache: store keys and values of earlier positions instead of computing them again.
        """
        users, conditions, generator, guidance_scale, *_ = request
        temperature = check_each("temperature", temperature, len(users), users.device)
        check_number("top_k", top_k, 0)
        check_number("top_p", top_p, 0, 1, above=True)
        warpers = [logits_process.TopKLogitsWarper(top_k)] if top_k else []
        warpers += [logits_process.TopPLogitsWarper(float(top_p))] if top_p < 1 else []
        if not len(users):
            return users.new_empty(0, *self.token_shape)
        levels = uniform(len(users), self.num_tokens, generator).to(users.device)  # (B, T)
        embedded = self.users(users, conditions)
        if guidance_scale != 1:
            embedded = torch.cat([embedded, self.users(self.users.null(users), conditions)])
        cache = DynamicCache() if use_cache else None
        sequence = users.new_full((len(users), 1), self.start)
        for position in range(self.num_tokens):
            inputs = sequence[:, -1:] if use_cache else sequence
            hidden, cache = self._step(inputs.repeat(len(embedded) // len(users), 1), embedded, cache)
            logits = self.head(hidden[:, -1]).float()  # (B, K), or (2B, K) with guidance
            if guidance_scale != 1:
                logits = guided(*logits.chunk(2), guidance_scale)
            logits = logits / temperature.unsqueeze(1)
            for warper in warpers:
                logits = warper(sequence, logits)
            chosen = inverse_cdf(logits, levels[:, position])
            sequence = torch.cat([sequence, chosen.unsqueeze(1)], 1)
        return self.to_grid(sequence[:, 1:])

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """(B, h, w) → (B, T), column by column."""
        return tokens.transpose(1, 2).flatten(1)

    def to_grid(self, sequence: Tensor) -> Tensor:
        """(B, T) → (B, h, w)."""
        return sequence.unflatten(1, self.token_shape[::-1]).transpose(1, 2)
