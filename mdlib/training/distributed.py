"""Several processes train one model, each on its part of every batch: what they tell one another.

Plain torch.distributed. Without a process group, or with one process, every function leaves things as they are. All
processes make the same calls in the same order, with tensors of the same shapes; "the first" is the one of rank 0.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist

from mdlib.models.layers import rank, world

T = TypeVar("T")


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
