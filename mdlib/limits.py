"""What a session may take: until when it runs, and how much it may write.

The end of the time is told by the environment, so that processes started from a notebook know it too.
"""

import os
import shutil
import time
from pathlib import Path

DEADLINE = "MDLIB_DEADLINE"  # environment variable: when to stop, in seconds since 1970; absent or empty: never
KEPT = Path("/kaggle/working")  # what Kaggle keeps of a session, up to KEPT_BYTES
KEPT_BYTES = 20 * 10**9


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
