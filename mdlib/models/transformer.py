"""Token prior: transformers' GPT-2 (Radford et al. 2019) over a codec's token grid, without pretrained weights. The
user is added at every position, or attended to. Tokens run column by column (time first, as they were measured), each
column from the fastest Doppler row down. Legend: B batch, h w token grid, T = h·w tokens, K codes, U user tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, GPT2Config, GPT2Model
from transformers.generation import logits_process
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mdlib.models.layers import UserEmbedding, check_choice, check_each, check_number, inverse_cdf, uniform
from mdlib.models.prior import Prior, Request, guided

# torch's attention under another name: for "sdpa" transformers looks for packed sequences, and the host waits for it.
AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
USER_TOKENS = 4  # U


class TokenPrior(Prior, ModelMixin, ConfigMixin):
    """p(tokens | user) as a product over positions.

    Args (the others are in `Prior`):
        num_layers, dropout: of GPT-2.
        conditioning: "add" the user's vector at every position, or "cross": attend to the user's tokens in every block.
        user_layers: layers of the encoder between the embedding of user and condition and what the blocks get. With
            "add" and 0 there is none.
        user_dim: width of embedding and encoder; 0 is hidden_size.
    """

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
        conditioning: str = "add",
        user_layers: int = 0,
        user_dim: int = 0,
    ):
        super().__init__()
        check_choice("conditioning", conditioning, ("add", "cross"))
        check_number("label_dropout", label_dropout, 0, 1)
        check_number("user_layers", user_layers, 0)
        check_number("user_dim", user_dim, 0)
        cross, encoded, width = conditioning == "cross", conditioning == "cross" or user_layers, user_dim or hidden_size
        if user_dim and not encoded:
            raise ValueError(f"user_dim {user_dim} is the width of a user encoder: add user_layers, or leave it at 0")
        if user_layers and width % num_heads:
            raise ValueError(f"user_dim must be a multiple of num_heads {num_heads}, got {width}")
        self.token_shape, self.null_label = tuple(token_shape), num_users
        self.num_tokens = self.token_shape[0] * self.token_shape[1]
        self.start = num_codes  # the input at position 0: no token yet
        self.tokens = nn.Embedding(num_codes + 1, hidden_size)
        self.users = UserEmbedding(num_users, num_conditions, width)
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
            add_cross_attention=cross,
        )
        self.gpt = GPT2Model(config)
        self.head = nn.Linear(hidden_size, num_codes, bias=False)
        for table in (self.tokens, self.users, self.head):
            nn.init.normal_(table.weight, std=0.02)
        if encoded:
            sizes = dict(dim_feedforward=4 * width, dropout=dropout, activation="gelu")
            layer = partial(nn.TransformerEncoderLayer, width, num_heads, batch_first=True, norm_first=True, **sizes)
            self.user_encoder = nn.Sequential(
                # A linear map for each token: with a common one all of a user's keys would differ by the same vector.
                nn.Linear(width, USER_TOKENS * width),
                nn.Unflatten(1, (USER_TOKENS, width)),
                *(layer() for _ in range(user_layers)),
                nn.LayerNorm(width),
                nn.Linear(width, hidden_size),
            )

    def loss(self, tokens, users, conditions=None):
        """Mean cross-entropy in nats per token, see `Prior`."""
        sequence = self.to_sequence(tokens)
        logits = self(sequence, self.drop_users(users), conditions)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), sequence.flatten())
        return loss, {"nats_per_token": loss.detach()}

    def forward(self, sequence: Tensor, users: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Logits (B, T, K) of every token of sequence (B, T) given the tokens before it, users and conditions (B,)."""
        start = sequence.new_full((len(sequence), 1), self.start)
        hidden, _ = self._step(torch.cat([start, sequence[:, :-1]], 1), self.encoded_users(users, conditions))
        return self.head(hidden)

    def encoded_users(self, users: Tensor, conditions: Tensor | None = None) -> Tensor:
        """What the blocks get of users and conditions (B,): (B, 1, hidden) to add, or (B, U, hidden) to attend to."""
        vectors = self.users(users, conditions)
        if not hasattr(self, "user_encoder"):
            return vectors.unsqueeze(1)
        encoded = self.user_encoder(vectors)
        return encoded if self.config.conditioning == "cross" else encoded.mean(1, keepdim=True)

    def _step(self, inputs: Tensor, users: Tensor, cache: DynamicCache | None = None):
        """Hidden states (B, t, hidden) of tokens (B, t) and of `encoded_users`, and the cache."""
        embeddings, attended = self.tokens(inputs), users
        if self.config.conditioning == "add":
            embeddings, attended = embeddings + users, None
        options = dict(encoder_hidden_states=attended, past_key_values=cache, use_cache=cache is not None)
        output = self.gpt(inputs_embeds=embeddings, **options)
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
        embedded = self.encoded_users(users, conditions)
        if guidance_scale != 1:
            embedded = torch.cat([embedded, self.encoded_users(self.users.null(users), conditions)])
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
