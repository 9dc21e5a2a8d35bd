"""The forward and backward passes of a training step: eager, as one CUDA graph, or compiled.

A CUDA graph is launched as a whole: the GPU does not wait for Python between its kernels. It reads and writes the same
memory at every replay, and its random numbers follow the seed set before. The optimizer stays outside: it is a few
fused calls, and GradScaler may skip it (docs.pytorch.org, "CUDA Graphs").
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mdlib.models.layers import rank, world

MODES = ("auto", "graph", "compile", "no")
Batch = tuple[Tensor, ...]
Result = tuple[list[Tensor], dict[str, Tensor]]


def passes(state, batches: list[Batch], loss: Callable | None = None) -> Result:
    """Replace the gradients by those of the batches' mean loss; returns the losses and the last batch's logs."""
    losses = []
    for parameter in state.parameters:  # as optimizer.zero_grad(), but leaner
        parameter.grad = None
    for batch in batches:
        with state.autocast:
            value, logs = (loss or state.model.loss)(*batch)
        state.scaler.scale(value / len(batches)).backward()
        losses.append(value.detach())
    return losses, logs


def choose(state, batches: list[Batch]) -> Callable[[list[Batch]], Result]:
    """`passes` of `state` in the mode of its configuration, as a function of batches; where that fails, eager, and one
    line prints why. "auto" is eager. Leaves the model's buffers and the random state as they are.

    batches: an example, whose shapes all others have.
    """
    mode, eager = state.config.compile, lambda batches: passes(state, batches)
    if mode in ("auto", "no"):
        return eager
    buffers = list(state.model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.random.fork_rng():
            return (_graph if mode == "graph" else _compiled)(state, batches)
    except Exception as error:
        if rank() == 0:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"compile={mode!r} is not possible here, training continues in eager mode: {why}", flush=True)
        return eager
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _graph(state, batches: list[Batch]) -> Callable[[list[Batch]], Result]:
    if world() > 1:
        raise RuntimeError("several processes exchange gradients and codes within a step")
    inputs = [[tensor.clone() for tensor in batch] for batch in batches]
    replay, (losses, logs) = record(lambda: passes(state, inputs))

    def replayed(batches: list[Batch]) -> Result:
        for held, batch in zip(inputs, batches, strict=True):
            torch._foreach_copy_(held, list(batch))
        replay()
        return [loss.clone() for loss in losses], {key: torch.as_tensor(value).clone() for key, value in logs.items()}

    return replayed


def record(function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """A CUDA graph of `function`, after three calls that warm up: its replay, and the result that a replay overwrites.
    RuntimeError if `function` reads a value back, or without CUDA."""
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph needs a GPU with CUDA")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def _compiled(state, batches: list[Batch]) -> Callable[[list[Batch]], Result]:
    loss = torch.compile(state.model.loss)
    passes(state, batches, loss)  # compiles
    return lambda batches: passes(state, batches, loss)
