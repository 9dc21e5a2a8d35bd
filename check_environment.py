"""Print what works in a Python environment and what to do about what does not. Standard library only.

    python check_environment.py            a table; the exit code is 1 if something fails
    python check_environment.py --json     {"ok": bool, "python": path, "checks": [...]}

The command looks at .venv beside this file if it is there, else at the Python that runs it (or at --python);
`check()` looks at the Python that calls it, and at what that process has loaded. Nothing is imported here: torch
and the rest are tried in another process, so that one that crashes is a line of the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import setup_environment as setup

LPIPS_BACKBONES = {
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}
GIB = 1 << 30
LEAST_DISK, LEAST_MEMORY, LEAST_CORES, LEAST_SHARED = 5 * GIB, 6 * GIB, 2, GIB // 4
WORKING = Path("/kaggle/working")
KAGGLE_OUTPUT, KAGGLE_HOURS = 20 * GIB, 12
LAUNCHER_PORT = 29500  # of accelerate and torchrun
EXPECTED = {"t4x2": ("T4", 2), "p100": ("P100", 1), "gpu": ("", 1), "cpu": ("", 0)}  # GPU name, least number

# Why each check can fail: the breakages that are met again and again, in one line each.
CAUSES = {
    "kernels": "a build of torch holds kernels for some GPUs only: it sees the others, and fails at the first sum",
    "replaced": "a later pip install exchanged torch, or brought parts of a second CUDA",
    "pair": "torchvision and torchaudio are compiled for one build of torch; diffusers and transformers fail with them",
    "window": "huggingface-hub, transformers and diffusers accept only certain releases of one another",
    "loaded": "pip changed the files of a package that this process had imported already",
    "accelerator": "Kaggle gives another accelerator, or none, without an error",
    "driver": "CUDA 12 needs driver 525 or later, CUDA 13 driver 580",
    "data": "the place of a data set below /kaggle/input differs between sessions and accounts",
    "download": "weights are downloaded when they are first used, which fails without a network",
    "launcher": "notebook_launcher forks: CUDA must not have started, its port must be free, the GPU too",
    "precision": "before capability 8.0 bf16 is emulated, before 7.0 nothing is compiled for the GPU",
    "resources": "a run that fills disk or memory, or outlasts the session, is ended without its results",
    "widgets": "the page draws widgets of one major version; another shows 'Loading widget...' for ever",
    "package": "the package is missing, damaged or outside the range that mdlib was tried with",
}


def row(name: str, status: str, detail: str, remedy: str = "", cause: str = "package") -> dict:
    """status: 'ok', 'warn' (goes on without it) or 'fail'. cause: a key of CAUSES, of what is not ok."""
    told = "" if status == "ok" else CAUSES[cause]
    return {"name": name, "status": status, "detail": detail, "cause": told, "remedy": remedy}


def check(python: Path | str | None = None, *, expect: str = "", precision: str = "") -> list[dict]:
    """Look at an interpreter (default: this one, with what it has loaded) and at this machine; nothing is changed.

    expect: the accelerator that should be there, of EXPECTED; '' is content with any.
    precision: what will be asked of accelerate: 'no', 'fp16', 'bf16' or ''.

    Returns a list of {"name", "status": "ok" | "warn" | "fail", "detail", "cause", "remedy"}, one for each check;
    cause and remedy are empty where nothing has to be done.
    """
    here, python = python is None, Path(python or sys.executable)
    path = str(Path(sys.modules["mdlib"].__file__).parents[1]) if here and "mdlib" in sys.modules else ""
    with ThreadPoolExecutor() as pool:
        online = pool.submit(setup.index_answers, python)
        try:
            setup.refuse_old_python(sys.version_info)
            s = setup.detect(setup.read_pins(), python, mend=True, more=("torchaudio", "mdlib"), path=path)
            if s.python is None:
                raise setup.Stop(f"{python} is not there")
        except setup.Stop as stop:
            return [row("python", "fail", stop.args[0], f"use Python {setup.TESTED_PYTHON}"), *check_machine()]
    s = replace(s, mend=bool(s.host))  # elsewhere a CPU build beside a GPU is a warning
    version = ".".join(map(str, s.interpreter["version"]))
    packages = [name for name in s.pins.accepted if name not in ("torch", "torchvision")]
    return [
        row("python", "ok", f"{version} ({s.interpreter['executable']})"),
        *check_machine(),
        check_torch(s),
        *check_replaced(s),
        *check_devices(s),
        *check_gpus(s),
        *check_accelerator(s, expect),
        *check_precision(s, precision),
        *check_launcher(s, here),
        check_pair(s),
        *check_audio(s),
        *(check_package(name, s) for name in packages),
        check_window(s),
        *(check_loaded(s) if here else ()),
        check_network(online.result(), s),
        check_backbones(online.result()),
        *check_inputs(),
        *check_widgets(s),
        check_mdlib(s),
    ]


def repair(s: setup.State) -> str:
    """What to type. Beside .venv pip is held back from what has not to be changed."""
    return "python setup_environment.py repair" + ("" if s.ours else f" --python {shlex.quote(str(s.python))}")


# -- machine ---------------------------------------------------------------------------------------


def check_machine() -> list[dict]:
    return [check_cores(), check_memory(), check_disk(), *check_shared_memory(), *check_kaggle()]


def check_cores() -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{cores} on {platform.machine()}"
    if cores < LEAST_CORES:
        return row("cores", "warn", detail, "expect to wait longer", "resources")
    return row("cores", "ok", detail)


def memory_limit() -> int | None:
    """Bytes this process may use: of the machine or of its container; None where the system does not say."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits) if limits else None


def check_memory() -> dict:
    limit = memory_limit()
    if limit is None:
        return row("memory", "ok", "unknown")
    if limit < LEAST_MEMORY:
        remedy = "close other programs, or take a smaller preset"
        return row("memory", "warn", f"{limit / GIB:.1f} GiB", remedy, "resources")
    return row("memory", "ok", f"{limit / GIB:.1f} GiB")


def check_disk() -> dict:
    place = WORKING if WORKING.is_dir() else setup.ROOT
    free = shutil.disk_usage(place).free
    if free < LEAST_DISK:
        remedy = f"make room: an environment takes 6 GiB, a run 1 GiB ({place})"
        return row("disk", "warn", f"{free / GIB:.1f} GiB free", remedy, "resources")
    return row("disk", "ok", f"{free / GIB:.0f} GiB free")


def check_shared_memory() -> list[dict]:
    """What processes on two GPUs, and workers that load data, hand one another."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return []
    size = shutil.disk_usage(place).total
    if size < LEAST_SHARED:
        remedy = "start the container with --shm-size=1g, or train in one process without workers"
        return [row("shared memory", "warn", f"{size / GIB:.2f} GiB", remedy, "resources")]
    return [row("shared memory", "ok", f"{size / GIB:.1f} GiB")]


def session_hours() -> float | None:
    """How long this container has been running; None where the system does not say."""
    try:
        started = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return (float(Path("/proc/uptime").read_text().split()[0]) - started) / 3600
    except (OSError, ValueError, IndexError):
        return None


def check_kaggle() -> list[dict]:
    """The limits of a Kaggle session: 12 hours, 20 GB of output with the checkpoints in it."""
    if setup.hosted() != "Kaggle":
        return []
    hours, used = session_hours(), sum(f.stat().st_size for f in WORKING.rglob("*") if f.is_file())
    rows = []
    if hours is not None:
        late = hours > KAGGLE_HOURS - 2
        remedy = "save a version now and go on in a new session: a run resumes from its folder" if late else ""
        detail = f"{hours:.1f} of {KAGGLE_HOURS} hours"
        rows.append(row("session", "warn" if late else "ok", detail, remedy, "resources"))
    full = used > KAGGLE_OUTPUT - LEAST_DISK
    remedy = f"remove what is not needed below {WORKING}" if full else ""
    rows.append(row("output", "warn" if full else "ok", f"{used / GIB:.1f} of 20 GiB", remedy, "resources"))
    return rows


# -- torch -----------------------------------------------------------------------------------------


def check_torch(s: setup.State) -> dict:
    trouble = setup.torch_trouble(s)
    cause = "driver" if trouble.startswith("driver") else "kernels" if "kernel" in trouble else "package"
    if setup.hosted_trouble(s):
        return row("torch", "fail", trouble, setup.use_another_session(s), "accelerator")
    if trouble:
        return row("torch", "fail", trouble, repair(s), cause)
    build = f"CUDA {s.torch['cuda']}" if s.torch["cuda"] else "CPU build"
    return row("torch", "ok", f"{s.torch['version']}, {build}")


def check_replaced(s: setup.State) -> list[dict]:
    """Whether torch is still the one that was set up, and belongs to one CUDA alone."""
    found = []
    try:
        noted = json.loads((s.folder / "torch.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        noted = {}
    have = {"torch": s.torch.get("version"), "cuda": s.torch.get("cuda")}
    if noted and not s.torch["error"] and noted != have:
        found.append(f"{noted['torch']} was set up, {have['torch']} is there")
    families = sorted(set(re.findall(r"^nvidia-\S+-(cu\d\d)$", "\n".join(s.installed), re.MULTILINE)))
    if len(families) > 1:
        found.append(f"libraries of {' and '.join(families)} lie beside one another")
    if found:
        return [row("torch since set-up", "warn", "; ".join(found), repair(s), "replaced")]
    return [row("torch since set-up", "ok", "the same")] if noted else []


def check_devices(s: setup.State) -> list[dict]:
    """A convolution, a sum and a backward pass on the CPU and on every GPU."""
    rows = []
    for device, error in s.torch.get("ops", {}).items():
        if error:
            remedy = "restart the process that holds the GPU, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            remedy = repair(s) if device == "cpu" or "no kernel image" in error else remedy
            rows.append(row(f"compute on {device}", "fail", error, remedy, "kernels"))
        else:
            rows.append(row(f"compute on {device}", "ok", "convolution, sum and backward run"))
    return rows


def precision_of(capability: tuple[int, int]) -> str:
    """The precision that a GPU is fast in. Before 8.0 bf16 is emulated, though torch says it is supported."""
    if capability >= (8, 0):
        return "bf16"
    return "fp16" if capability >= (7, 0) else "no"


def check_gpus(s: setup.State) -> list[dict]:
    """What each GPU can do, and whether torch sees it."""
    if not s.gpus:
        return [row("gpu", "ok", "none: the presets demo and smoke are made for a CPU")]
    visible = visible_gpus(s)
    rows = []
    for index, gpu in enumerate(s.gpus):
        capability = ".".join(map(str, gpu.capability))
        fast = {"no": "fp32, no torch.compile"}.get(precision_of(gpu.capability), precision_of(gpu.capability))
        detail = f"{gpu.name}, capability {capability}, driver {gpu.driver}, use {fast}"
        if gpu.driver < setup.OLDEST_DRIVER:
            remedy = f"update its driver to {setup.OLDEST_DRIVER} or later; until then everything runs on the CPU"
            rows.append(row(f"gpu {index}", "warn", f"{detail}; the driver is too old", remedy, "driver"))
        elif visible:
            rows.append(row(f"gpu {index}", "ok", detail))
        else:
            remedy = s.torch.get("warning") or repair(s)
            rows.append(row(f"gpu {index}", "warn", f"{detail}; torch does not see it", remedy, "accelerator"))
    missing = {k: v for k, v in setup.variables(s).items() if os.environ.get(k) != v}
    if missing:
        remedy = f"set {' '.join(f'{name}={value}' for name, value in missing.items())} before Python starts"
        rows.append(row("triton", "warn", "a GPU is too old for it", remedy, "precision"))
    elif visible and not s.interpreter["compiles"] and not os.environ.get("TORCH_DISABLE_NATIVE_JIT"):
        if setup.satisfies(s.installed.get("torch", "0"), ">=2.13"):
            detail = "no compiler or no Python.h, which torch 2.13 and later call while they run"
            remedy = "set TORCH_DISABLE_NATIVE_JIT=1 before Python starts"
            rows.append(row("triton", "warn", detail, remedy, "precision"))
    return rows


def visible_gpus(s: setup.State) -> int:
    return sum(device != "cpu" for device in s.torch.get("ops", {}))


def check_accelerator(s: setup.State, expect: str) -> list[dict]:
    """Whether the GPUs are those that were asked for."""
    if not expect:
        return []
    if expect not in EXPECTED:
        raise setup.Stop(f"unknown accelerator {expect!r}: choose among {', '.join(EXPECTED)}")
    name, number = EXPECTED[expect]
    have = ", ".join(gpu.name for gpu in s.gpus) or "no GPU"
    right = [gpu for gpu in s.gpus if name in gpu.name]
    if len(right) >= number and visible_gpus(s) >= number and (number or not s.gpus):
        return [row("accelerator", "ok", f"{expect}: {have}")]
    detail = f"{expect} was expected, {have} is there, torch sees {visible_gpus(s)}"
    remedy = "choose the accelerator in the notebook's settings"
    if s.host == "Kaggle":
        remedy += "; verify the account's phone number; look at machine_shape and docker_image of kernel-metadata.json"
    return [row("accelerator", "fail", detail, remedy, "accelerator")]


def asked_of_accelerate(setting: str, environment: str) -> str:
    """A setting of accelerate, from the environment or from its configuration file; '' if there is none."""
    if environment in os.environ:
        return os.environ[environment].lower()
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    try:
        text = Path(home, "accelerate", "default_config.yaml").expanduser().read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^\s*{setting}: *['\"]?(\w+)", text, re.MULTILINE)
    return found[1].lower() if found else ""


def check_precision(s: setup.State, precision: str) -> list[dict]:
    """Whether what is asked for is more than the oldest GPU can do."""
    wanted = precision or asked_of_accelerate("mixed_precision", "ACCELERATE_MIXED_PRECISION")
    compiler = asked_of_accelerate("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND")
    if not s.gpus:
        return []
    oldest = min(gpu.capability for gpu in s.gpus)
    fast = precision_of(oldest)
    told = ".".join(map(str, oldest))
    if wanted == "bf16" and fast != "bf16":
        return [row("precision", "fail", f"bf16 on capability {told}", f"mixed_precision={fast}", "precision")]
    if compiler not in ("", "no") and oldest < (7, 0):
        remedy = "ACCELERATE_DYNAMO_BACKEND=no"
        return [row("precision", "fail", f"torch.compile ({compiler}) on capability {told}", remedy, "precision")]
    return [row("precision", "ok", wanted)] if wanted else []


def check_launcher(s: setup.State, here: bool) -> list[dict]:
    """What keeps several processes from starting on the GPUs."""
    if not s.gpus:
        return []
    found = []
    torch = sys.modules.get("torch")
    if here and len(s.gpus) > 1 and torch is not None and torch.cuda.is_initialized():
        found.append("this process has started CUDA")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", LAUNCHER_PORT))
        except OSError:
            found.append(f"port {LAUNCHER_PORT} is taken")
    holders = [line.partition(",")[0] for line in setup.ask_driver("compute-apps=pid,used_memory").splitlines()]
    others = [pid for pid in holders if pid.strip().isdigit() and int(pid) != os.getpid()]
    if others:
        found.append(f"processes {', '.join(others)} hold a GPU")
    if not found:
        return [row("launcher", "ok", "several processes can start")]
    remedy = (
        "train in processes of their own: accelerate launch --multi_gpu (--main_process_port 29501); end stale ones"
    )
    return [row("launcher", "warn", "; ".join(found), remedy, "launcher")]


def check_pair(s: setup.State) -> dict:
    if setup.torch_trouble(s):
        return row("torchvision", "fail", "cannot be tried without a torch that works", repair(s), "pair")
    trouble = setup.pair_trouble(s)
    if trouble:
        return row("torchvision", "fail", trouble, repair(s), "pair")
    other = [wanted for package, wanted, _ in s.conflicts if package == "torchvision" and wanted.startswith("torch=")]
    if other:
        detail = f"{s.installed['torchvision']} was made for {other[0]}, torch is {s.torch['version']}"
        return row("torchvision", "warn", detail, f"{repair(s)}, if images cannot be read", "pair")
    return row("torchvision", "ok", f"{s.modules['torchvision']['version']}, of the same build as torch")


def check_audio(s: setup.State) -> list[dict]:
    """torchaudio is not needed; where it is installed and broken, transformers may fail with it."""
    if "torchaudio" not in s.installed:
        return []
    error = s.modules["torchaudio"]["error"]
    if error:
        remedy = shlex.join([str(s.python), "-m", "pip", "uninstall", "torchaudio"])
        return [row("torchaudio", "warn", error, remedy, "pair")]
    return [row("torchaudio", "ok", s.installed["torchaudio"])]


# -- packages --------------------------------------------------------------------------------------


def check_package(name: str, s: setup.State) -> dict:
    """Whether a distribution imports and lies in the range of pyproject.toml."""
    accepted, version = s.pins.accepted[name], s.installed.get(name)
    error = s.modules[setup.module_of(name)]["error"]
    bad = "warn" if name in setup.OPTIONAL else "fail"
    without = f" ({setup.OPTIONAL[name]})" if name in setup.OPTIONAL else ""
    if version is None:
        return row(name, bad, f"missing{without}", repair(s))
    if error:
        cause = "pair" if "torchvision::" in error else "window" if setup.HUB_ERROR.search(error) else "package"
        return row(name, bad, f"{version} does not import{without}: {error}", repair(s), cause)
    if name in s.half and s.ours:
        return row(name, "warn", f"{version} is half installed", repair(s))
    if not setup.satisfies(version, accepted):
        return row(name, "warn", f"{version} is outside {accepted}", repair(s))
    return row(name, "ok", version)


def check_window(s: setup.State) -> dict:
    """Whether the packages' own requirements are met by one another."""
    ours = [c for c in s.conflicts if c[0] in s.pins.accepted and c[0] != "torchvision"]
    if not ours:
        return row("requirements", "ok", "met by one another")
    told = "; ".join(f"{package} wants {wanted}, {have or 'nothing'} is there" for package, wanted, have in ours)
    return row("requirements", "warn", told, repair(s), "window")


def check_loaded(s: setup.State) -> list[dict]:
    """Whether what this process has loaded is still what lies on disk."""
    changed = []
    for name in s.pins.accepted:
        module = sys.modules.get(setup.module_of(name))
        memory = str(getattr(module, "__version__", "") or "")
        disk = s.installed.get(name, "")
        if re.match(r"\d", memory) and disk and setup.release(memory) != setup.release(disk):
            changed.append(f"{name} {memory} is loaded, {disk} on disk")
    if changed:
        remedy = "restart the kernel, and install before anything is imported"
        return [row("loaded modules", "fail", "; ".join(changed), remedy, "loaded")]
    return [row("loaded modules", "ok", "as on disk")]


def check_network(online: bool, s: setup.State) -> dict:
    offline = "" if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0") else ", HF_HUB_OFFLINE is set"
    if online:
        return row("network", "ok", f"the package index answers{offline}")
    return row("network", "ok", f"the package index does not answer: nothing can be downloaded{offline}")


def checkpoints() -> Path:
    """Where torch.hub keeps downloaded weights."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints"


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_backbones(online: bool) -> dict:
    """The weights' names end in the beginning of their SHA-256."""
    folder = checkpoints()
    there = {net: folder / file for net, file in LPIPS_BACKBONES.items() if (folder / file).is_file()}
    damaged = [str(file) for file in there.values() if not sha256(file).startswith(file.stem.rpartition("-")[2])]
    if damaged:
        return row("lpips weights", "warn", f"{', '.join(damaged)}: not whole", "delete it", "download")
    if there:
        return row("lpips weights", "ok", ", ".join(there))
    file = LPIPS_BACKBONES["squeeze"]
    remedy = "LPIPS downloads them when it is first used" if online else f"put {file} (5 MB) into {folder}"
    return row("lpips weights", "warn", "no backbone is there yet", remedy, "download")


# -- Kaggle's inputs, widgets ----------------------------------------------------------------------


def find_people(base: Path, depth: int = 5) -> list[Path]:
    """The folders below a base that hold folders of users (ID_k)."""
    folders = [entry for entry in sorted(base.iterdir()) if entry.is_dir()] if base.is_dir() else []
    if any(re.fullmatch(r"ID_\d+", folder.name) for folder in folders):
        return [base]
    return [found for folder in folders if depth for found in find_people(folder, depth - 1)]


def damaged_files(folder: Path) -> list[str]:
    """The files that differ from the SHA-256 sums (as of sha256sum) that a folder holds of itself."""
    manifest = folder / "SHA256SUMS"
    text = manifest.read_text(encoding="utf-8") if manifest.is_file() else ""
    sums = re.findall(r"^([0-9a-f]{64}) [ *](.+)$", text, re.MULTILINE)
    return [name for digest, name in sums if not (folder / name).is_file() or sha256(folder / name) != digest]


def check_inputs() -> list[dict]:
    """Where data and wheels are below /kaggle/input: found by what they hold, never by their path."""
    if not setup.INPUTS.is_dir():
        return []
    rows = []
    for name, found, choose in (
        (
            "data",
            find_people(setup.INPUTS),
            "choose by the notebooks' parameter data; of conditions give the folder above",
        ),
        ("wheelhouse", setup.find_marked(setup.WHEELHOUSE_MARKER, setup.INPUTS), "choose by --wheelhouse"),
    ):
        told = ", ".join(map(str, found)) or f"none below {setup.INPUTS}"
        damaged = [f"{folder / file}" for folder in found for file in damaged_files(folder)]
        if damaged:
            detail = f"{len(damaged)} files differ from their sums: {', '.join(damaged[:3])}"
            rows.append(row(name, "fail", detail, "upload the data set again, or attach another version", "data"))
        elif len(found) > 1:
            rows.append(row(name, "warn", told, choose, "data"))
        else:
            rows.append(row(name, "ok", told))
    return rows


def check_widgets(s: setup.State) -> list[dict]:
    """Whether ipywidgets is of the major version that the host's page can draw."""
    major = {"Kaggle": 8, "Colab": 7}.get(s.host)
    version = s.installed.get("ipywidgets")
    if major is None or version is None:
        return []
    kind = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    if setup.release(version)[0] != major:
        remedy = f"start a fresh {s.host} session, and do not install ipywidgets in it"
        return [row("widgets", "warn", f"{version}, {s.host} draws version {major}", remedy, "widgets")]
    return [row("widgets", "ok", f"{version}; {'drawn' if kind == 'Interactive' else 'a batch run shows pictures'}")]


def check_mdlib(s: setup.State) -> dict:
    facts = s.modules["mdlib"]
    if facts["error"] is None:
        return row("mdlib", "ok", f"{facts['version']} imports")
    return row("mdlib", "fail", facts["error"], repair(s))


# -- command ---------------------------------------------------------------------------------------


def as_table(rows: list[dict]) -> str:
    width = max(len(r["name"]) for r in rows)
    lines = []
    for r in rows:
        lines.append(f"{r['status']:<4}  {r['name']:<{width}}  {r['detail']}")
        lines += [
            f"{'':<4}  {'':<{width}}  {mark} {r[key]}" for mark, key in (("::", "cause"), ("->", "remedy")) if r[key]
        ]
    bad = [r["name"] for r in rows if r["status"] == "fail"]
    lines.append(f"not ready: {', '.join(bad)}" if bad else "ready")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--python", help="the interpreter to look at (default: that of .venv, else this one)")
    parser.add_argument("--expect", default="", choices=EXPECTED, help="fail if the accelerator is another one")
    args = parser.parse_args(argv)
    python = args.python or (setup.venv_python() if setup.venv_python().exists() else sys.executable)
    rows = check(python, expect=args.expect)
    ok = not any(r["status"] == "fail" for r in rows)
    print(json.dumps({"ok": ok, "python": str(python), "checks": rows}, indent=1) if args.json else as_table(rows))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
