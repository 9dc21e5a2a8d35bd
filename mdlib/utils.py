"""Atomic writes, damaged files, histories, the progress bar, the device, and a session's limits (time, disk)."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm.auto import tqdm as notebook_or_terminal
from tqdm.std import tqdm as text_bar

DEADLINE = "MDLIB_DEADLINE"  # environment variable: when to stop, in seconds since 1970; absent or empty: never
KEPT = Path("/kaggle/working")  # the folder that Kaggle saves at the end of a session, up to KEPT_BYTES
KEPT_BYTES = 20 * 10**9


class DataError(ValueError):
    """The user's data or request cannot be used; the message is one line that says what to do."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button, after which the same call continues; the message is one line."""

    def _render_traceback_(self) -> list[str]:  # IPython shows it instead of a traceback
        return [f"{self}: run this cell again to resume"]


@contextmanager
def interrupts(act: Callable[[bool], None] | None = None, catch: bool = True):
    """Context manager: yields a list of interrupts (Ctrl-C). An interrupt calls `act(is_first)` instead of raising
    KeyboardInterrupt; without `act` the second one raises. No effect if `catch` is false, in threads, or if SIGINT is
    handled or ignored already."""
    seen, usual = [], signal.getsignal(signal.SIGINT)

    def note(*_) -> None:
        if act:
            act(not seen)
        elif seen:
            raise KeyboardInterrupt
        seen.append(True)

    catch = catch and usual is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if catch:
        signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if catch:
            signal.signal(signal.SIGINT, usual)


def failed_import(error: BaseException) -> str:
    """One line that names the installed package whose import raised `error`; "" where it is another error."""
    missing = isinstance(error, ModuleNotFoundError) and error.name
    if missing and not importlib.util.find_spec(missing.partition(".")[0]):
        return ""
    while cause := error.__cause__ or (not error.__suppress_context__ and error.__context__):
        error = cause
    pattern, frames = r"(?:site|dist)-packages[\\/](?!mdlib\b)(\w+)", traceback.extract_tb(error.__traceback__)
    places = [(found[1], one.name) for one in frames if (found := re.search(pattern, one.filename))]
    if not any(name == "<module>" for _, name in places):
        return ""
    packages = [package for package, _ in places]
    # If torch loads a library on behalf of a package, that package is at fault.
    culprit = next((one for one in reversed(packages) if one not in ("torch", packages[0])), packages[0])
    because = f" because of {culprit}" if culprit != packages[0] else ""
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{packages[0]} does not import{because} ({why}): run python check_environment.py for the remedy"


def count(n: int, what: str) -> str:
    """Such as "1 window", "2 windows"."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def to_float(images):
    """uint8 tensor 0…255 to float32 [−1, 1]."""
    return images.float() / 127.5 - 1


@contextmanager
def atomic_file(path: str | Path):
    """`with` a temporary name to write to; the complete file then replaces `path`. On an error it is removed; OSError
    names `path` and the free space where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        # Of a full disk torch raises RuntimeError, and safetensors SafetensorError.
        if not isinstance(error, (OSError, RuntimeError)) and type(error).__name__ != "SafetensorError":
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OSError(f"{path} cannot be written ({why}): {amount(room(path.parent))} are left there") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of `atomic_file` that killed processes left below `folder`."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            path.unlink()


@contextmanager
def readable(path: str | Path, remedy: str):
    """`with` the reading of a file, or of a folder of models. Where that fails because a file is missing or damaged,
    DataError names it and the remedy."""
    path = Path(path)
    try:
        yield
    except Exception as error:
        files = sorted(one for one in path.rglob("*") if one.suffix in (".json", ".safetensors"))
        damaged = next(filter(_damaged, files if path.is_dir() else [path]), None)
        if not damaged:
            raise
        raise DataError(f"{damaged} is missing or damaged: {remedy}") from error


def _damaged(file: Path) -> bool:
    """Whether a file cannot be read in full; True for kinds without a check (.csv)."""
    try:
        if file.suffix == ".json":
            return not isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
        if file.suffix == ".pt":
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is not None
        if file.suffix == ".safetensors":
            from safetensors import safe_open  # slow to import

            with safe_open(file, "np"):
                return False
    except PermissionError:
        return False
    except Exception:  # each kind has its own
        return True
    return True


def read_json(path: str | Path, remedy: str) -> dict:
    """The content of a JSON file; DataError with the remedy where it is missing or damaged."""
    with readable(path, remedy):
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}


def write_history(history: list[dict], path: Path) -> None:
    """Write a training's history as a CSV file, a row an evaluation."""
    import pandas as pd  # slow to import

    with atomic_file(path) as temporary:
        pd.DataFrame(history).to_csv(temporary, index=False)


def read_history(folder: Path) -> list[dict[str, float]]:
    """The history of a training's folder, as `write_history` left it; a row lacks what it did not measure."""
    import pandas as pd

    path = folder / "history.csv"
    with readable(path, f"restore it, or train the {folder.name} again (run --from, with its notebook's number)"):
        table = pd.read_csv(path, dtype=float, float_precision="round_trip")
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


def peak_memory_gb() -> float | None:
    """Largest resident memory of this process, or of the GPU where one is used, in GB (10⁹ bytes); None if unknown."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def best_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu". On a GPU float32 matrix products then use TF32, as its convolutions
    do by default; cards before Ampere have none."""
    import torch  # slow to import, and the simulator does without

    if not torch.cuda.is_available():
        return "cpu"
    torch.set_float32_matmul_precision("high")
    return "cuda"


def use_gpus(number: int) -> None:
    """Limit this process and its children to the first `number` visible GPUs; 0: no limit. 1 is also valid without a
    GPU. DataError if there are fewer. Call it before CUDA is used."""
    import torch  # slow to import

    there = torch.cuda.device_count()
    if number > max(1, there):
        raise DataError(f"devices={number}, but torch sees {count(there, 'GPU')}: give at most {max(1, there)}")
    if number and there:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:number])


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
            f"{folder}: {what} takes up to {amount(needed)} and {amount(left)} are left: make room there, or take "
            "smaller sizes"
        )


def amount(number: float) -> str:
    """Bytes in words, such as "1.2 GB", "35 MB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
