"""Parts that several models use: embeddings of users, sampling of codes, checks, processes."""

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class UserEmbedding(nn.Embedding):
    """Vectors (B, size) of users (B,) and conditions (B,): the user's vector, plus the condition's. Conditions None are
    condition 0 for all.

    User num_users is the null label of classifier-free guidance. The vectors of conditions (carrying a bag …) start at
    zero and are shared by all users, so that a condition can be generated for a user who was not recorded in it. With
    one condition there are no such vectors.
    """

    def __init__(self, num_users: int, num_conditions: int, size: int):
        super().__init__(num_users + 1, size)
        self.num_conditions = num_conditions
        if num_conditions > 1:
            self.conditions = nn.Parameter(torch.zeros(num_conditions, size))

    def forward(self, users: Tensor, conditions: Tensor | None = None) -> Tensor:
        vectors = super().forward(users)
        if self.num_conditions == 1:
            return vectors
        return vectors + self.conditions[torch.zeros_like(users) if conditions is None else conditions]

    def null(self, users: Tensor) -> Tensor:
        """The null label, once for each of users (B,)."""
        return torch.full_like(users, self.num_embeddings - 1)

    def check(self, users: Tensor, conditions: Tensor | None = None) -> None:
        """Raise ValueError if one of users (B,) or conditions (B,) is unknown."""
        known = dict(users=(users, self.num_embeddings), conditions=(conditions, self.num_conditions))
        for name, (labels, count) in known.items():
            if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
                raise ValueError(f"{name} must lie in 0…{count - 1}, got {int(labels.min())}…{int(labels.max())}")


def drop_labels(users: Tensor, null_label: int, probability: float) -> Tensor:
    """Users (B,), each replaced by the null label with `probability` (classifier-free guidance)."""
    if probability <= 0:
        return users
    drop = torch.rand(users.shape, device=users.device) < probability
    return torch.where(drop, null_label, users)


def uniform(batch: int, length: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Uniform numbers (batch, length), row i from generator i where there is one per row."""
    if isinstance(generator, list):
        return torch.stack([torch.rand(length, generator=one) for one in generator])
    return torch.rand(batch, length, generator=generator)


def inverse_cdf(logits: Tensor, level: Tensor) -> Tensor:
    """Samples (…) of softmax(logits (…, K)), each by a uniform number of level (…); in float64, so that a probability
    of zero stays zero."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulative, level.double().unsqueeze(-1) * cumulative[..., -1:], right=True)
    return chosen.squeeze(-1).clamp_max(logits.shape[-1] - 1)


def parts(device: torch.device, size: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """Batches of `size` rows of the tensors that are not None, on `device`."""
    for part in zip(*(tensor.split(size) for tensor in tensors if tensor is not None), strict=True):
        yield tuple(tensor.to(device) for tensor in part)


def fingerprint(model: nn.Module, *tensors: Tensor | None) -> str:
    """16 hex digits over a model's weights and further tensors; None is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    for tensor in filter(torch.is_tensor, tensors):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not among the `known` ones."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_number(name: str, value: float, low: float, high: float = math.inf, above: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high], or in (low, high] where it must be `above`."""
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        limits = f"above {low}" if above else f"{low} or more"
        if math.isfinite(high):
            limits = f"in {'(' if above else '['}{low}, {high}]"
        raise ValueError(f"{name} must be {limits}, got {value!r}")


def check_each(name: str, value, count: int, device: torch.device) -> Tensor:
    """A positive number, or a list of `count` of them, as a tensor (count,); ValueError for anything else."""
    values = value if isinstance(value, list) else [value] * max(1, count)
    if count and len(values) != count:
        raise ValueError(f"{name} must be one number or {count}, one per sample, got {len(values)}")
    for one in values:
        check_number(name, one, 0, above=True)
    return torch.tensor(values[:count], dtype=torch.float32, device=device)


def check_steps(steps: int, most: int) -> None:
    """Raise ValueError unless `steps` is a whole number in 1…most."""
    if not isinstance(steps, int) or not 1 <= steps <= most:
        raise ValueError(f"num_inference_steps must be a whole number in 1…{most}, got {steps}")


# Several processes that train together -----------------------------------------------------------------------


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, the same bits in each."""
    if world() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all processes, the same bits in each."""
    return all_sum(tensor) / world()


def broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor by that of the first process."""
    for tensor in tensors if world() > 1 else ():
        values = tensor.detach().contiguous()
        dist.broadcast(values, src=0)
        tensor.detach().copy_(values)
