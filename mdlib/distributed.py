"""Several processes train one model, each on its part of every batch: what they tell one another.

Plain torch.distributed. Without a process group, or with one process, every function leaves things as they are. All
processes make the same calls in the same order, with tensors of the same shapes; "the first" is the one of rank 0.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over the processes; in each the same bits."""
    if world() == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of `tensor` over the processes; in each the same bits."""
    return all_sum(tensor) / world()


def gather(rows: torch.Tensor) -> torch.Tensor:
    """`rows` (N, …) of every process, one under the other in the order of ranks: (N·world, …)."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def broadcast_from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite each tensor by the first process's."""
    if world() == 1:
        return
    for tensor in tensors:
        values = tensor.detach().contiguous()
        dist.broadcast(values, src=0)
        tensor.detach().copy_(values)


def mean_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, all in one message.

    A parameter that one process's part of the batch did not reach counts there as zero; one that no part reached
    stays without gradient, so the optimizer leaves it alone as it would in a single process.
    """
    if world() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    reached = parameters[0].new_tensor([p.grad is not None for p in parameters])
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([reached, *(part.flatten() for part in parts)])
    dist.all_reduce(flat)
    reached, *means = (flat / world()).split([len(parameters), *(p.numel() for p in parameters)])
    for p, part, mean, anywhere in zip(parameters, parts, means, reached.tolist(), strict=True):
        if anywhere:
            p.grad = part.copy_(mean.view_as(p))


def on_first(function: Callable[[], T]) -> T:
    """Call `function` in the first process only; every process waits for its answer and returns it.

    Raises:
        RuntimeError: in the other processes, where `function` raised in the first.
    """
    if world() == 1:
        return function()
    message = [None, ""]
    if rank() == 0:
        try:
            message[0] = function()
        except Exception as error:
            dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    answer, failure = message
    if failure:
        raise RuntimeError(f"the first process stopped: {failure}")
    return answer
