"""Report what works in a Python environment and what to do about the rest. Standard library only.

    python check_environment.py            a table; the exit code is 1 if a check fails
    python check_environment.py --json     {"ok": bool, "python": path, "checks": [...]}

The command reports on .venv next to this file, else on the Python that runs it; --python names another one. `check()`
reports on the Python that calls it. One other process imports the packages: if it crashes, the report says where.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup_environment as setup

GIB = 1 << 30
LEAST_DISK, LEAST_MEMORY, LEAST_CORES, LEAST_SHARED = 5 * GIB, 6 * GIB, 2, GIB // 4
WORKING = Path("/kaggle/working")
# The machines of the presets: GPU name, at least this number of GPUs, each with at least this memory in MiB.
EXPECTED = {"cpu": ("", 0, 0), "gpu": ("", 1, 0), "p100": ("P100", 1, 0), "t4": ("T4", 1, 0)}
EXPECTED.update({"t4x2": ("T4", 2, 0), "gpu-6gb": ("", 1, 5500), "gpu-8gb": ("", 1, 7500), "gpu-16gb": ("", 1, 14500)})
CAUSES = {
    "kernels": "a build of torch has kernels for some GPUs only: on the others the first operation fails",
    "replaced": "a later pip install replaced torch, or added parts of a second CUDA",
    "pair": "torchvision and torchaudio are compiled for one build of torch; diffusers and transformers fail with them",
    "window": "huggingface-hub, transformers and diffusers accept only certain releases of one another",
    "loaded": "pip changed the files of a package that this process had already imported",
    "accelerator": "Kaggle gives another accelerator, or none, without an error",
    "driver": "CUDA 12 needs driver 525 or later, CUDA 13 driver 580",
    "data": "the path of a data set below /kaggle/input differs between sessions and accounts",
    "precision": "before capability 8.0 bf16 is emulated, before 7.0 nothing is compiled for the GPU",
    "foreign": "diffusers and transformers import peft, xformers, bitsandbytes and tensorflow where they are installed",
    "resources": "a run that fills the disk or the memory ends without its results",
    "widgets": "the page shows widgets of one major version; another one stays at 'Loading widget...'",
    "package": "the package is missing, damaged or outside the range that mdlib supports",
}


def row(name: str, detail: str, remedy: str | None = "", cause: str = "package", status: str = "warn") -> dict:
    """A line of the report. Without a remedy the status is 'ok'; 'warn' means that mdlib works without it."""
    status, cause = (status, cause) if remedy else ("ok", "")
    return {"name": name, "status": status, "detail": detail, "cause": CAUSES.get(cause, ""), "remedy": remedy or ""}


def check(python: Path | str | None = None, *, expect: str = "") -> list[dict]:
    """Check an interpreter (default: this one, and the modules it has loaded) and this machine; nothing is changed.

    expect: the machine, a key of EXPECTED; '' accepts any.
    Returns a list of {"name", "status": "ok" | "warn" | "fail", "detail", "cause", "remedy"}; cause and remedy are ''
    if the status is ok.
    """
    if expect not in ("", *EXPECTED):
        raise setup.Stop(f"unknown machine {expect!r}: choose from {', '.join(EXPECTED)}")
    here, python = python is None, Path(python or sys.executable)
    with ThreadPoolExecutor() as pool:
        online = pool.submit(setup.index_answers, python)
        conflicts = pool.submit(setup.unmet_requirements, python)
        try:
            setup.refuse_old_python(sys.version_info)
            s = setup.State(setup.read_pins(), python)
            if not s.exists:
                raise setup.Stop(f"{python} does not exist")
        except setup.Stop as stop:
            return [row("python", stop.args[0], f"use Python {setup.TESTED_PYTHON}", status="fail"), *check_machine()]
    s.strict = bool(s.host)  # elsewhere a CPU build of torch next to a GPU is a warning
    version, path = ".".join(map(str, s.interpreter["version"])), s.interpreter["executable"]
    label = ".venv" if s.ours else "the running Python" if python == Path(sys.executable) else "another Python"
    rows = [row("python", f"{version}, {label} ({path})"), *check_machine()]
    rows += [*check_torch(s, conflicts.result()), *check_gpus(s, expect)]
    return [*rows, *check_packages(s, here, conflicts.result()), *check_files(online.result())]


def check_machine():
    """Cores, memory, disk and shared memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    for file in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = file.read_text().strip() if file.is_file() else ""  # of the container
        limits += [int(text)] if text.isdigit() else []
    memory, place, shared = min(limits, default=0), WORKING if WORKING.is_dir() else setup.ROOT, Path("/dev/shm")
    free, size = shutil.disk_usage(place).free, shutil.disk_usage(shared).total if shared.is_dir() else 0
    room, more = f"free some space: an environment takes 6 GiB, a run 1 GiB ({place})", "use a smaller preset"
    table = [
        ("cores", f"{cores} on {platform.machine()}", cores < LEAST_CORES, "expect to wait longer"),
        ("memory", f"{memory / GIB:.1f} GiB" if memory else "unknown", 0 < memory < LEAST_MEMORY, more),
        ("disk", f"{free / GIB:.1f} GiB free", free < LEAST_DISK, room),
    ]
    if size:  # several GPUs and data workers exchange data here
        remedy = "start the container with --shm-size=1g, or train in one process without workers"
        table.append(("shared memory", f"{size / GIB:.2f} GiB", size < LEAST_SHARED, remedy))
    return [row(name, detail, remedy if bad else "", "resources") for name, detail, bad, remedy in table]


def check_torch(s: setup.State, conflicts):
    """torch, torchvision and torchaudio, and a convolution, a sum and a backward pass on every device."""
    trouble, hosted = setup.torch_trouble(s), setup.hosted_remedy(s)
    cause = "driver" if trouble.startswith("driver") else "kernels" if "kernel" in trouble else "package"
    build = f"CUDA {s.torch.get('cuda')}" if s.torch.get("cuda") else "CPU build"
    remedy = trouble and (hosted or s.repair)
    yield row("torch", trouble or f"{s.torch['version']}, {build}", remedy, "accelerator" if hosted else cause, "fail")
    pair = "not checked: it needs a torch that works" if trouble else setup.pair_trouble(s)
    other = [wanted for name, wanted, _ in conflicts if name == "torchvision" and wanted.startswith("torch=")]
    if other and not pair:
        detail = f"{s.installed['torchvision']} is built for {other[0]}, found torch {s.torch['version']}"
        yield row("torchvision", detail, f"{s.repair}, if images cannot be read", "pair")
    else:
        detail = pair or f"{s.modules['torchvision']['version']}, same build as torch"
        yield row("torchvision", detail, pair and s.repair, "pair", "fail")
    file, have = s.folder / "constraints.txt", s.installed.get("torch")
    held = re.findall(r"^torch===(.+)$", file.read_text(encoding="utf-8") if file.is_file() else "", re.MULTILINE)
    changed = [f"{version} was set up, found {have}" for version in held if version != have]
    families = sorted(set(re.findall(r"^nvidia-\S+-(cu\d\d)$", "\n".join(s.installed), re.MULTILINE)))
    changed += [f"libraries of {' and '.join(families)} are installed together"] if len(families) > 1 else []
    if held or changed:
        yield row("torch since set-up", "; ".join(changed) or "the same", changed and s.repair, "replaced")
    for device, error in s.torch.get("ops", {}).items():
        restart = "restart the process that uses the GPU, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        remedy = error and (s.repair if device == "cpu" or "no kernel image" in error else restart)
        yield row(f"compute on {device}", error or "convolution, sum and backward work", remedy, "kernels", "fail")


def precision_of(capability: tuple[int, int]) -> str:
    """The fast precision of a GPU. Before 8.0 bf16 is emulated, although torch reports it as supported."""
    return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "no"


def check_gpus(s: setup.State, expect: str):
    """GPUs: whether torch uses them, they are expected, and other processes use them."""
    seen = sum(device != "cpu" for device in s.torch.get("ops", {}))
    if not s.gpus:
        yield row("gpu", "none: use the presets demo and smoke")
    for index, gpu in enumerate(s.gpus):
        fast = precision_of(gpu.capability).replace("no", "fp32, no torch.compile")
        detail = f"{gpu.name}, capability {gpu.capability[0]}.{gpu.capability[1]}, driver {gpu.driver}, use {fast}"
        remedy, cause = "", "accelerator"
        if gpu.driver < setup.OLDEST_DRIVER:
            detail, cause = f"{detail}; the driver is too old", "driver"
            remedy = f"update its driver to {setup.OLDEST_DRIVER} or later; until then everything runs on the CPU"
        elif not seen:
            detail, remedy = f"{detail}; torch does not see it", s.torch.get("warning") or s.repair
        yield row(f"gpu {index}", detail, remedy, cause)
    missing = " ".join(f"{name}={value}" for name, value in s.variables.items() if os.environ.get(name) != value)
    headers = s.interpreter["compiles"] or os.environ.get("TORCH_DISABLE_NATIVE_JIT")
    if missing:
        yield row("triton", "a GPU is too old for it", f"set {missing} before Python starts", "precision")
    elif seen and not headers and setup.satisfies(s.installed.get("torch"), ">=2.13"):
        detail = "no compiler or no Python.h, which torch 2.13 and later use at run time"
        yield row("triton", detail, "set TORCH_DISABLE_NATIVE_JIT=1 before Python starts", "precision")
    if expect:
        name, number, memory = EXPECTED[expect]
        have = ", ".join(gpu.name for gpu in s.gpus) or "no GPU"
        fits = sum(name in gpu.name and gpu.memory >= memory for gpu in s.gpus)
        right = min(fits, seen) >= number and (number > 0 or not s.gpus)
        remedy = "choose the accelerator in the notebook's settings"
        if s.host == "Kaggle":
            remedy += "; verify the account's phone number; check machine_shape and docker_image of the metadata"
        detail = f"{expect}: {have}" if right else f"expected {expect}, found {have}; torch sees {seen}"
        yield row("accelerator", detail, "" if right else remedy, "accelerator", "fail")
    if not s.gpus:
        return
    holders = re.findall(r"^\s*(\d+)", setup.ask_driver("compute-apps=pid,used_memory"), re.MULTILINE)
    others = ", ".join(pid for pid in holders if int(pid) != os.getpid())
    remedy = others and "end processes of earlier runs: they keep GPU memory"
    yield row("gpu processes", f"in use by {others}" if others else "no others", remedy, "resources")


def check_packages(s: setup.State, here: bool, conflicts):
    """Whether each package imports, is in the range of pyproject.toml, fits the others, and is the one loaded."""
    loaded = []
    for name, accepted in s.pins.accepted.items():
        version, module = s.installed.get(name, ""), setup.module_of(name)
        memory = str(getattr(sys.modules.get(module), "__version__", ""))
        if re.match(r"\d", memory) and version and setup.release(memory) != setup.release(version):
            loaded.append(f"{name} {memory} is loaded, {version} is on disk")
        error, cause, status, detail = s.modules[module]["error"] or "", "package", "warn", version
        if error or not version:
            status = "warn" if name in setup.OPTIONAL else "fail"
            without = f" ({setup.OPTIONAL[name]})" if name in setup.OPTIONAL else ""
            detail = f"{version} does not import{without}: {error}" if version else f"missing{without}"
            window = "window" if setup.HUB_ERROR.search(error) and version else cause
            cause = "pair" if "torchvision::" in error else window
        elif name in s.half and s.ours:
            detail = f"{version} is half installed"
        elif not setup.satisfies(version, accepted):
            detail = f"{version} is outside {accepted}"
        repair = s.repair
        if foreign := s.modules[module].get("culprit"):
            detail, cause = f"{detail} (in {foreign}, which mdlib does not need)", "foreign"
            repair = s.uninstall(foreign)
        if name not in ("torch", "torchvision"):
            yield row(name, detail, detail != version and repair, cause, status)
    text = {True: [], False: []}
    for package, wanted, have in conflicts:
        text[package in s.pins.accepted].append(f"{package} requires {wanted}, found {have or 'nothing'}")
    yield row("requirements", "; ".join(text[True]) or "all are met", text[True] and s.repair, "window")
    if text[False]:
        yield row("other packages", f"not used by mdlib, with unmet requirements: {'; '.join(text[False][:3])}")
    if here:
        restart = "restart the kernel, and install before anything is imported"
        yield row("loaded modules", "; ".join(loaded) or "as on disk", loaded and restart, "loaded", "fail")
    error = s.modules["mdlib"]["error"] if not here or "mdlib" not in sys.modules else ""
    yield row("mdlib", error or "imports", error and s.repair, status="fail")
    major, version = {"Kaggle": 8, "Colab": 7}.get(s.host), s.installed.get("ipywidgets")
    if major and version:
        wrong = setup.release(version)[0] != major
        remedy = f"start a fresh {s.host} session, and do not install ipywidgets in it"
        batch = "; a batch run shows images" if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch" else ""
        yield row("widgets", f"{version}, {s.host} shows version {major}{batch}", wrong and remedy, "widgets")


def check_files(online: bool):
    """The network, and data and wheels below /kaggle/input, found by what they hold."""
    offline = "" if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0") else ", HF_HUB_OFFLINE is set"
    answer = "answers" if online else "does not answer: nothing can be downloaded"
    yield row("network", f"the package index {answer}{offline}")
    choose = "choose by the notebooks' parameter data; for conditions give the folder above"
    inputs = (("data", "ID_[0-9]*/", choose), ("wheels", setup.WHEELHOUSE_MARKER, "attach one data set of wheels"))
    for name, marker, remedy in inputs if setup.INPUTS.is_dir() else ():
        found = setup.find_marked(marker, setup.INPUTS)
        yield row(name, ", ".join(map(str, found)) or f"none below {setup.INPUTS}", len(found) > 1 and remedy, "data")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--python", help="the interpreter to report on (default: that of .venv, else this one)")
    parser.add_argument("--expect", default="", choices=EXPECTED, help="fail unless the machine is of this kind")
    args = parser.parse_args(argv)
    python = Path(args.python or (setup.venv_python() if setup.venv_python().exists() else sys.executable))
    rows = check(python, expect=args.expect)
    bad = [r["name"] for r in rows if r["status"] == "fail"]
    if args.json:
        print(json.dumps({"ok": not bad, "python": str(python), "checks": rows}, indent=1))
        return int(bool(bad))
    print(f"Environment: Python {rows[0]['detail']}")
    width = max(len(r["name"]) for r in rows)
    for r in rows:
        print(f"{r['status']:<4}  {r['name']:<{width}}  {r['detail']}")
        notes = [f"{mark} {r[key]}" for mark, key in (("::", "cause"), ("->", "remedy")) if r[key]]
        print(*(f"{'':<{width + 8}}{note}\n" for note in notes), sep="", end="")
    if setup.is_ours(python) and not setup.is_ours(Path(sys.executable)):
        print(f"note: {sys.executable} runs this report; to use .venv, activate it: {setup.ACTIVATE}")
    print(f"not ready: {', '.join(bad)}" if bad else "ready")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
