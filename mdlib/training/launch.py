"""Training on several GPUs: a process for each, started by Accelerate, what they print told line by line.

A process that has used CUDA cannot be forked, and a notebook's has: so a module is started anew.
"""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

ERROR = "mdlib: "  # how the line begins by which a process tells why it stops
PATIENCE = 15  # seconds that processes are given to end before they are killed


def processes() -> int:
    """How many processes a training takes: one for each GPU, which talk by NCCL; within one of them, that one."""
    if "WORLD_SIZE" in os.environ or not (dist.is_available() and dist.is_nccl_available()):
        return 1
    return max(1, torch.cuda.device_count())


def check_batch(size: int) -> None:
    """ValueError where a training's processes cannot share a batch of `size`."""
    if size % (number := processes()):
        raise ValueError(
            f"{number} GPUs cannot share a batch of {size}: give a batch_size that {number} divides, in codec_options "
            "or prior_options, or fewer GPUs by CUDA_VISIBLE_DEVICES"
        )


def launch(number: int, module: str, *arguments) -> None:
    """Run `python -m module arguments` in `number` processes that train together, and print each line that they print
    when it comes. They end with this call, however it ends.

    Raises:
        RuntimeError: one of them failed; in one line the exit code and why: the first line that begins with ERROR, or
            else the last one.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what is kept here for later is taken from the process that trains on this GPU
    started = subprocess.Popen(
        [str(word) for word in (*_launcher(number), "-m", module, *arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | _variables(),
        start_new_session=True,  # a notebook's interrupt comes to the notebook alone, which ends them
    )
    why, last = "", ""
    with started:
        try:
            for line in map(str.rstrip, started.stdout):
                if line:
                    print(line, flush=True)
                if line.startswith(ERROR):
                    why = why or line.removeprefix(ERROR)
                if any(map(str.isalpha, line)):  # the launcher ends with a rule
                    last = line.strip()
            code = started.wait()
        except BaseException:
            _end(started)
            raise
    if code:
        raise RuntimeError(f"training in {number} processes ended with exit code {code}: {why or last}")


def python_path() -> str:
    """PYTHONPATH by which another process finds this very mdlib, also when it is not installed."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


def _launcher(number: int) -> list:
    """Accelerate's launcher and all that it would otherwise ask a configuration file for, or warn of."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--gpu_ids", "all"),
        *("--num_processes", number, "--num_machines", 1, "--machine_rank", 0, "--main_process_port", _free_port()),
        *("--num_cpu_threads_per_process", max(1, torch.get_num_threads() // number)),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),  # a default; TrainConfig's precision is what counts
    ]


def _variables() -> dict[str, str]:
    """What the processes' environment has beyond this one's: lines come at once, and progress is text."""
    return {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "MDLIB_BATCH": "1"}


def _free_port() -> int:
    """Accelerate before 1.7 cannot choose one by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(started: subprocess.Popen) -> None:
    """End the launcher and its processes, which are in sessions of their own."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]
        started.terminate()  # it passes that on
        try:
            psutil.wait_procs(family, timeout=PATIENCE)
        finally:
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
