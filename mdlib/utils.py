"""Whole-file writes, histories, the progress bar, the device, and the limits of a session (time and disk space)."""

import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm as notebook_or_terminal
from tqdm.std import tqdm as text_bar

DEADLINE = "MDLIB_DEADLINE"  # environment variable: when to stop, in seconds since 1970; absent or empty: never
KEPT = Path("/kaggle/working")  # the folder that Kaggle saves at the end of a session, up to KEPT_BYTES
KEPT_BYTES = 20 * 10**9


class DataError(ValueError):
    """The user's data or request cannot be used; the message is one line that says what to do."""


def count(n: int, what: str) -> str:
    """Such as "1 window", "2 windows"."""
    return f"{n} {what}" + ("" if n == 1 else "s")


@contextmanager
def whole_file(path: str | Path):
    """`with` a temporary name to write to; the complete file then replaces `path`. On an error it is removed."""
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


def write_history(history: list[dict], path: Path) -> None:
    """Write a training's history as a CSV file, a row an evaluation."""
    import pandas as pd  # slow to import

    with whole_file(path) as temporary:
        pd.DataFrame(history).to_csv(temporary, index=False)


def read_history(folder: Path) -> list[dict[str, float]]:
    """The history of a training's folder, as `write_history` left it; a row lacks what it did not measure."""
    import pandas as pd

    table = pd.read_csv(folder / "history.csv", dtype=float, float_precision="round_trip")
    return [row.dropna().to_dict() for _, row in table.iterrows()]


def bar(total: int, description: str, initial: int = 0, unit: str = "step", show: bool = True):
    """A tqdm bar over `total` units; plain text on stdout in batch runs, where a widget would stay empty."""
    common = dict(total=total, desc=description, initial=initial, unit=unit, disable=not show)
    if batch_run():
        line = "{desc}: {n_fmt}/{total_fmt} {percentage:3.0f}% [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        return text_bar(**common, file=sys.stdout, mininterval=5, bar_format=line)
    return notebook_or_terminal(**common)


def batch_run() -> bool:
    """Whether a notebook runs unattended: under papermill (`mdlib.experiments`), or in a Kaggle batch session."""
    return os.environ.get("MDLIB_BATCH") == "1" or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"


def best_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    import torch  # slow to import, and the simulator does without

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_deadline() -> bool:
    """Whether the session has a time limit."""
    return bool(os.environ.get(DEADLINE))


def time_is_up() -> bool:
    """Whether the session's time limit has passed."""
    return has_deadline() and time.time() >= float(os.environ[DEADLINE])


def end_session(state: str) -> None:
    """Print `state` and how to resume, and raise SystemExit(0), which papermill takes for success."""
    print(
        f"The session's time is up. {state}. Run the notebook again with this session's output attached as input "
        "(kaggle/push.py kernel NOTEBOOK --resume): training continues there.",
        flush=True,
    )
    raise SystemExit(0)


def room(folder: str | Path) -> int:
    """Bytes that can still be written to `folder`: free on its disk and, on Kaggle, left of the session's output."""
    folder = Path(folder).resolve()
    free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free
    return max(0, min(free, KEPT_BYTES - size(KEPT)) if folder.is_relative_to(KEPT) else free)


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_room(folder: str | Path, needed: int, what: str) -> None:
    """Raise OSError if `folder` has no room for `needed` bytes."""
    if (left := room(folder)) < needed:
        raise OSError(
            f"{folder}: {what} takes up to {needed / 1e9:.1f} GB and {left / 1e9:.1f} GB are left: make room there, or "
            "take smaller sizes"
        )
