"""Whole-file writes, the progress bar, the device, and what a session may take (time and disk space)."""

import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm as notebook_or_terminal
from tqdm.std import tqdm as text_bar

DEADLINE = "MDLIB_DEADLINE"  # environment variable: when to stop, in seconds since 1970; absent or empty: never
KEPT = Path("/kaggle/working")  # what Kaggle keeps of a session, up to KEPT_BYTES
KEPT_BYTES = 20 * 10**9


class DataError(ValueError):
    """The user's data or request cannot be used; the message is one line that says what to do."""


@contextmanager
def whole_file(path: str | Path):
    """A temporary name to write to; once written and flushed to disk it takes the place of `path`, or goes away."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def bar(total: int, description: str, initial: int = 0, unit: str = "step", show: bool = True):
    """A tqdm bar over `total` units. Batch runs (papermill, Kaggle's Save & Run All) get plain text on stdout:
    a widget bar would be a dead picture there."""
    common = dict(total=total, desc=description, initial=initial, unit=unit, disable=not show)
    if batch_run():
        line = "{desc}: {n_fmt}/{total_fmt} {percentage:3.0f}% [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        return text_bar(**common, file=sys.stdout, mininterval=5, bar_format=line)
    return notebook_or_terminal(**common)


def batch_run() -> bool:
    """True when nobody can see widgets: under papermill through `mdlib.experiments.run`, or a Kaggle batch kernel."""
    return os.environ.get("MDLIB_BATCH") == "1" or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"


def best_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch  # slow to import, and the simulator does without

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_deadline() -> bool:
    return bool(os.environ.get(DEADLINE))


def time_is_up() -> bool:
    return has_deadline() and time.time() >= float(os.environ[DEADLINE])


def end_session(state: str) -> None:
    """Print what was reached, and leave: a notebook stops there without an error, so that its output is kept.

    Raises:
        SystemExit: with code 0; papermill takes it for a success and skips the cells that follow.
    """
    print(
        f"The session's time is up. {state}. Run the notebook again with this session's output attached as input "
        "(kaggle/push.py kernel NOTEBOOK --resume): it goes on there.",
        flush=True,
    )
    raise SystemExit(0)


def room(folder: str | Path) -> int:
    """Bytes that may still be written to `folder`: what its disk has left and, where Kaggle keeps it, its allowance."""
    folder = Path(folder).resolve()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if folder.is_relative_to(KEPT):
        free = min(free, KEPT_BYTES - size(KEPT))
    return max(0, free)


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_room(folder: str | Path, needed: int, what: str) -> None:
    """OSError where `folder` has no room for `needed` bytes."""
    if (left := room(folder)) < needed:
        raise OSError(
            f"{folder}: {what} takes up to {needed / 1e9:.1f} GB and {left / 1e9:.1f} GB are left: make room there, or "
            "take smaller sizes"
        )
