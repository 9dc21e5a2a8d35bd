"""What a Kaggle session gives a notebook, and where it lies.

Data sets, wheels and the outputs of other notebooks are mounted somewhere below /kaggle/input, in folders whose names
differ from account to account and have changed over the years. So they are found by what they hold: windows by ID_k
folders, wheels by mdlib-*.whl, a run by run.json.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mdlib.data.windows import DataError, holds_users
from mdlib.systems.machines import Gpu, gpus, preset_for
from mdlib.utils import DEADLINE, batch_run, require_room, room, size, whole_file

INPUT = Path("/kaggle/input")
ROOT = Path(__file__).resolve().parents[2]  # of the repository, where relative paths of notebooks start
ASKED_FOR = "MDLIB_ACCELERATOR"  # environment variable: what the session was to have; a run without any GPU then stops
HOURS = 12  # Kaggle ends a session of a CPU or GPU then, and keeps nothing of it
MARGIN = 30 * 60  # seconds before that end in which training stops and files are written
DEPTH = 6  # folders below /kaggle/input that are looked into
NO_GPU = (
    "Kaggle gives one only to an account whose phone number is verified, while the week's quota lasts, to a notebook "
    "whose accelerator is set (GPU T4 x2)"
)


def on_kaggle() -> bool:
    return bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE"))


def begin(out: str | Path = "", data: str = "") -> str:
    """On Kaggle: tell what this session has, let training stop before its end, and bring in what is attached.

    A run among the inputs goes on in `out` where that holds none. Elsewhere the repository becomes the
    working folder of a notebook that was opened in it.

    Returns:
        The data folder: `data`, or else the one among the inputs; "" where the run in `out` goes on.

    Raises:
        DataError: a GPU was asked for and not given; several data folders, or runs of different settings, are attached.
    """
    if not on_kaggle():
        if Path.cwd().is_relative_to(ROOT) and not batch_run():
            os.chdir(ROOT)  # Jupyter starts a kernel in notebooks/
        return data
    found = gpus()
    end = float(os.environ.get(DEADLINE) or session_end())
    os.environ[DEADLINE] = str(end)
    print(told(found, end, room(out or ".")), flush=True)
    if os.environ.get(ASKED_FOR) and not found:
        raise DataError(f"{os.environ[ASKED_FOR]} was asked for and no GPU given: {NO_GPU}")
    if data or (out and (Path(out) / "run.json").exists()):
        return data
    if out and (attached := find_run(INPUT)):
        bring_run(attached, Path(out), INPUT)
        print(f"the run in {attached} goes on in {out}, with the settings it has", flush=True)
        return ""
    return str(find_data(INPUT) or "")


# ---- the session


def told(found: Sequence[Gpu], end: float, left: int) -> str:
    """One line: GPUs, preset, time and room."""
    kind = "a batch run" if batch_run() else "an interactive session"
    if found:
        cards = f"{len(found)} × {found[0].name}, {found[0].memory / 1e9:.0f} GB each"
    else:
        cards = f"no GPU (wanted one? {NO_GPU})"
    hours = max(0, end - time.time()) / 3600
    return (
        f"Kaggle, {kind}: {cards}; preset auto is {preset_for(found)}; training stops by itself in {hours:.1f} h; "
        f"{left / 1e9:.0f} GB may be written"
    )


def session_end(now: float | None = None) -> float:
    """When training has to stop, in seconds since 1970: MARGIN before the session is HOURS old."""
    now = time.time() if now is None else now
    start = next((start for start in session_starts() if 0 <= now - start < HOURS * 3600), now)
    return start + HOURS * 3600 - MARGIN


def session_starts() -> Iterator[float]:
    """When the session may have begun, in seconds since 1970: with its first process, or else with this one."""
    import psutil

    for process in (1, os.getpid()):
        try:
            yield psutil.Process(process).create_time()
        except psutil.Error:
            continue


# ---- the inputs


def find_data(root: Path) -> Path | None:
    """The folder of windows below `root`: the one that holds ID_k folders, or folders of conditions with such in them.

    Raises:
        DataError: there are several.
    """
    holding = [folder for folder in _folders(root) if holds_users(folder)]
    siblings = {f.parent for f in holding if sum(g.parent == f.parent for g in holding) > 1}
    found = {f.parent if f.parent in siblings and _within_one_input(f.parent, root) else f for f in holding}
    if len(found) > 1:
        raise DataError(f"several folders of windows are attached ({_list(found)}): give one of them as data")
    return next(iter(found), None)


def find_wheels(root: Path) -> Path | None:
    """The folder of wheels below `root`."""
    return next((folder for folder in _folders(root) if any(folder.glob("mdlib-*.whl"))), None)


def find_run(root: Path) -> Path | None:
    """The run folder below `root`; of several stages of one run the one that got furthest.

    Raises:
        DataError: there are runs of different settings.
    """
    found = {folder: _record(folder) for folder in _folders(root) if (folder / "run.json").exists()}
    kinds = {json.dumps({**record["settings"], "data": ""}, sort_keys=True) for record in found.values()}
    if len(kinds) > 1:
        raise DataError(f"runs of different settings are attached ({_list(found)}): leave one of them")
    # A later stage holds everything that an earlier one does, and more.
    return max(found, key=lambda f: (len(found[f]["steps"]), sum(1 for _ in f.rglob("*"))), default=None)


def bring_run(attached: Path, out: Path, root: Path) -> None:
    """Copy a run from the read-only inputs to `out`; windows that are mounted elsewhere by now are found below `root`.

    Raises:
        DataError: its windows are not attached.
        OSError: there is no room for it.
    """
    record = _record(attached)
    if not Path(record["settings"]["data"]).is_dir():
        if not (data := find_data(root)):
            raise DataError(f"the run in {attached} read {record['settings']['data']}: attach its windows too")
        record["settings"]["data"] = str(data)
    require_room(out, size(attached), "a copy of the run")
    last = shutil.ignore_patterns("run.json")  # with it the copy counts as a run
    shutil.copytree(attached, out, ignore=last, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
        folder.chmod(0o755)  # copied with the rest: inputs are read-only
    with whole_file(out / "run.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def home() -> Path:
    """The folder of check_environment.py: this package's own or, where its wheel is installed, a copy of what lies
    beside the wheels (it measures the disk it lies on, and inputs are read-only).

    Raises:
        DataError: it is in neither.
    """
    here = Path(__file__).resolve().parents[2]
    if (here / "check_environment.py").exists():
        return here
    if not (wheels := find_wheels(INPUT)):
        raise DataError(f"check_environment.py is neither in {here} nor beside mdlib's wheels below {INPUT}")
    ignored = shutil.ignore_patterns("*.whl")
    return Path(shutil.copytree(wheels, tempfile.mkdtemp(), ignore=ignored, dirs_exist_ok=True))


def _record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def _list(folders) -> str:
    return ", ".join(map(str, sorted(folders)))


def _folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, the nearer ones first; nothing within a run, generated windows or a user."""
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
    """Whether `folder` is one input or a part of it: older mounts are SLUG, newer ones KIND/OWNER/SLUG."""
    parts = folder.relative_to(root).parts
    return len(parts) >= ({"datasets": 3, "notebooks": 3}.get(parts[0], 1) if parts else 1)
