"""Training in several processes: how they are started, and what they exchange.

A notebook's process has used CUDA and cannot be forked, so every process starts a new Python. Without a process group
the collectives do nothing. All processes call them in the same order with tensors of the same shapes.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port

from mdlib.models.layers import all_mean, rank, world

ERROR = "mdlib: "  # starts the line in which a process prints why it fails


def processes() -> int:
    """The number of processes of a training: one for each GPU, if they can use NCCL; 1 within one of them."""
    if "WORLD_SIZE" in os.environ or not (dist.is_available() and dist.is_nccl_available()):
        return 1
    return max(1, torch.cuda.device_count())


def check_batch(size: int) -> None:
    """ValueError if a batch of `size` cannot be divided among the processes of a training."""
    if size % (number := processes()):
        raise ValueError(
            f"{number} GPUs cannot share a batch of {size}: set a batch_size divisible by {number} in codec_options "
            "or prior_options, or use fewer GPUs with --devices (CUDA_VISIBLE_DEVICES)"
        )


def launch(number: int, module: str, *arguments, on_line: Callable[[], None] | None = None) -> None:
    """Run `python -m module arguments` in `number` processes that train together, by Accelerate's launcher, and print
    their lines as they come, `on_line` called after each. The processes end with this call, however it ends.
    RuntimeError if one fails, with the exit code and why: the first line that starts with ERROR, or else the last one.
    """
    torch.cuda.empty_cache()  # memory cached here would be missing in the process that trains on this GPU
    # What the launcher would otherwise read from a configuration file or warn of; TrainConfig's precision counts.
    options = dict(gpu_ids="all", num_processes=number, num_machines=1, machine_rank=0, mixed_precision="no")
    options |= dict(dynamo_backend="no", num_cpu_threads_per_process=max(1, torch.get_num_threads() // number))
    options |= dict(main_process_port=get_free_port())  # Accelerate before 1.7 cannot choose one
    words = ["accelerate.commands.launch", "--multi_gpu"] + [f"--{key}={value}" for key, value in options.items()]
    # Lines come at once, and the progress bar is text.
    variables = {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "MDLIB_BATCH": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", *words, "-m", module, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | variables,
        start_new_session=True,  # a notebook's interrupt reaches the notebook alone, which ends them
    ) as started:
        why = last = ""
        try:
            for line in map(str.rstrip, started.stdout):
                if line:
                    print(line, flush=True)
                if on_line:
                    on_line()
                if line.startswith(ERROR):
                    why = why or line.removeprefix(ERROR)
                if any(map(str.isalpha, line)):  # the launcher ends with a rule
                    last = line.strip()
        except BaseException:
            started.terminate()  # the launcher ends its processes
            started.communicate()
            raise
    if started.returncode:
        raise RuntimeError(f"training in {number} processes ended with exit code {started.returncode}: {why or last}")


def python_path() -> str:
    """PYTHONPATH by which another process finds this mdlib, also when it is not installed."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


def mean_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, all in one message. The same parameters must have
    gradients in each."""
    if world() > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means = all_mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, means.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def on_first(function: Callable):
    """Call `function` in the first process only; all return its value. If it raises, the launcher ends the others."""
    value = [function() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(value, src=0)
    return value[0]
