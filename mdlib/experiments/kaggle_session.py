"""What a Kaggle session gives a notebook: time, GPUs and attached inputs.

Inputs are mounted somewhere below /kaggle/input, in folders whose names differ between accounts. They are found by
their content: windows by ID_k folders, wheels by mdlib-*.whl, a run by run.json.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from mdlib.data.files import holds_users, part_of
from mdlib.experiments.settings import read_record, write_record
from mdlib.systems.system import gpus, preset_for
from mdlib.utils import DEADLINE, DataError, batch_run, require_room, room, size

INPUT = Path("/kaggle/input")
ROOT = Path(__file__).resolve().parents[2]  # of the repository, where relative paths of notebooks start
REQUESTED = "MDLIB_ACCELERATOR"  # environment variable: the accelerator requested; a session without a GPU then stops
HOURS = 12  # after which Kaggle ends a session and discards its files
MARGIN = 30 * 60  # seconds before that end in which training stops and files are written
DEPTH = 6  # levels of folders below /kaggle/input that are searched
NO_GPU = (
    "a GPU needs a verified phone number, some of the weekly quota left, and the notebook's accelerator set to "
    "GPU T4 x2"
)


def begin(out: str | Path = "", data: str = "") -> str:
    """On Kaggle: print what the session offers, set the time at which training stops, and find the inputs.

    An attached run is copied to `out` where that holds none. Elsewhere a notebook that was opened in the repository
    gets its root as working folder.

    Returns:
        The data folder: `data`, or the one among the inputs; "" where the run in `out` continues.

    Raises:
        DataError: a requested GPU is missing; several data folders or runs with different settings are attached.
    """
    if not os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        if Path.cwd().is_relative_to(ROOT) and not batch_run():
            os.chdir(ROOT)  # Jupyter starts a kernel in notebooks/
        return data
    found = gpus()
    end = float(os.environ.get(DEADLINE) or session_end())
    os.environ[DEADLINE] = str(end)
    kind = "a batch run" if batch_run() else "an interactive session"
    cards = (
        f"{len(found)} × {found[0].name}, {found[0].total_memory / 1e9:.0f} GB each" if found else f"no GPU ({NO_GPU})"
    )
    hours, free = max(0, end - time.time()) / 3600, room(out or ".") / 1e9
    print(
        f"Kaggle, {kind}: {cards}; preset auto is {preset_for(found)}; training stops by itself in {hours:.1f} h; "
        f"{free:.0f} GB may be written",
        flush=True,
    )
    if os.environ.get(REQUESTED) and not found:
        raise DataError(f"{os.environ[REQUESTED]} was requested, but this session has no GPU: {NO_GPU}")
    if out and (Path(out) / "run.json").exists():
        return data
    attached = find_run(INPUT) if out else None
    if data:
        if attached:
            print(f"data starts a new run: leave data empty to continue the run in {attached}")
        return data
    if attached:
        copy_run(attached, Path(out), INPUT)
        print(f"the run in {attached} continues in {out}, with its own settings", flush=True)
        return ""
    return str(find_data(INPUT) or "")


def session_end() -> float:
    """When training has to stop, in seconds since 1970: MARGIN before the session is HOURS old.

    A session starts with its first process or, where that is older than a session can be, with this one.
    """
    now = start = time.time()
    for number in (os.getpid(), 1):
        with suppress(psutil.Error):
            created = psutil.Process(number).create_time()
            start = created if 0 <= now - created < HOURS * 3600 else start
    return start + HOURS * 3600 - MARGIN


def find_data(root: Path) -> Path | None:
    """The folder of windows below `root`: the one with ID_k folders, or with folders of conditions or parts that
    hold them; DataError if there are several."""
    holding = [folder for folder in _folders(root) if holds_users(folder)]
    siblings = {f.parent for f in holding if sum(g.parent == f.parent for g in holding) > 1}
    found = {f.parent if f.parent in siblings and _within_one_input(f.parent, root) else f for f in holding}
    parts = {f: next((one for one in (f, f.parent) if part_of(one.name)), None) for f in found}
    found = {part.parent if part and _within_one_input(part.parent, root) else f for f, part in parts.items()}
    if len(found) > 1:
        raise DataError(
            f"several folders of windows are attached ({', '.join(map(str, sorted(found)))}): give one of them as data"
        )
    return next(iter(found), None)


def find_run(root: Path) -> Path | None:
    """The run folder below `root`; of several stages of one run the most advanced. DataError if there are runs with
    different settings."""
    found = {folder: read_record(folder) for folder in _folders(root) if (folder / "run.json").exists()}
    kinds = {json.dumps({**record["settings"], "data": ""}, sort_keys=True) for record in found.values()}
    if len(kinds) > 1:
        raise DataError(
            f"runs with different settings are attached ({', '.join(map(str, sorted(found)))}): attach only one of them"
        )
    # A later stage has all files of an earlier one, and more.
    return max(found, key=lambda f: (len(found[f]["steps"]), sum(1 for _ in f.rglob("*"))), default=None)


def copy_run(attached: Path, out: Path, root: Path) -> None:
    """Copy a run from the read-only inputs to `out`; if its windows have moved, they are looked for below `root`.
    DataError if they are not attached, OSError if there is not enough room."""
    record = read_record(attached)
    if not Path(record["settings"]["data"]).is_dir():
        if not (data := find_data(root)):
            raise DataError(f"the run in {attached} read {record['settings']['data']}: attach its windows too")
        record["settings"]["data"] = str(data)
    require_room(out, size(attached), "a copy of the run")
    last = shutil.ignore_patterns("run.json")  # with it the copy counts as a run
    shutil.copytree(attached, out, ignore=last, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
        folder.chmod(0o755)  # inputs are read-only, and so would be the copies
    write_record(out, record)


def home() -> Path:
    """The folder of check_environment.py: the repository, or that of the wheels where mdlib is installed from one."""
    if (ROOT / "check_environment.py").exists():
        return ROOT
    if not (wheels := next((folder for folder in _folders(INPUT) if any(folder.glob("mdlib-*.whl"))), None)):
        raise DataError(f"check_environment.py is neither in {ROOT} nor next to mdlib's wheels below {INPUT}")
    return wheels


def _folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, nearest first; not those within a run, generated windows or a user."""
    level = [root] if root.is_dir() else []
    for _ in range(DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            if (folder / "generation.json").exists():
                continue
            yield folder
            if not (folder / "run.json").exists() and not holds_users(folder):
                below += sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        level = below


def _within_one_input(folder: Path, root: Path) -> bool:
    """Whether `folder` lies in one input: older mounts are SLUG, newer ones KIND/OWNER/SLUG."""
    parts = folder.relative_to(root).parts
    return len(parts) >= ({"datasets": 3, "notebooks": 3}.get(parts[0], 1) if parts else 1)
