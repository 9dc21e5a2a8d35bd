"""Print what works in a Python environment and what to do about what does not. Standard library only.

    python check_environment.py            a table; the exit code is 1 if something fails
    python check_environment.py --json     {"ok": bool, "python": path, "checks": [...]}

The command looks at .venv beside this file if it is there, else at the Python that runs it (or at --python);
`check()` looks at the Python that calls it. Nothing is imported here: torch and the rest are tried in another
process, so that one that crashes is a line of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

import setup_environment as setup

# Distributions whose module has another name.
MODULE = {"pillow": "PIL", "scikit-learn": "sklearn"}
# Without these a part is left out; without any other package nothing runs.
OPTIONAL = {
    "ipywidgets": "no interactive views",
    "lpips": "no perceptual loss",
    "tensorboard": "no live curves",
}
LPIPS_BACKBONES = {
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}
GIB = 1 << 30
LEAST_DISK, LEAST_MEMORY, LEAST_CORES = 5 * GIB, 6 * GIB, 2


def row(name: str, status: str, detail: str, remedy: str = "") -> dict:
    """status: 'ok', 'warn' (goes on without it) or 'fail'."""
    return {"name": name, "status": status, "detail": detail, "remedy": remedy}


def module_of(name: str) -> str:
    return MODULE.get(name, name.replace("-", "_"))


def check(python: Path | str | None = None) -> list[dict]:
    """Look at an interpreter (default: this one) and at this machine; nothing is changed.

    Returns a list of {"name", "status": "ok" | "warn" | "fail", "detail", "remedy"}, one for each check; the
    remedy is empty where nothing has to be done.
    """
    python = Path(python or sys.executable)
    rows = [check_cores(), check_memory(), check_disk()]
    try:
        setup.refuse_old_python(sys.version_info)
        pins = setup.read_pins()
        modules = dict.fromkeys(["torch", *setup.STACK, *map(module_of, pins.accepted), "mdlib"])
        facts = setup.ask(python, tuple(modules))
        setup.refuse_old_python(facts["interpreter"]["version"], str(python))
    except setup.Stop as stop:
        return [row("python", "fail", stop.args[0], "use Python 3.12 or another supported one"), *rows]
    gpus = setup.find_gpus()
    state = setup.State(pins, gpus, python, facts["installed"], torch=facts["torch"], modules=facts)
    remedies = Remedies(python, pins)
    version = ".".join(map(str, facts["interpreter"]["version"]))
    rows = [row("python", "ok", f"{version} ({facts['interpreter']['executable']})"), *rows]
    rows += [
        check_torch(state, remedies),
        *check_devices(state),
        *check_gpus(state),
        check_pair(state, remedies),
    ]
    rows += [check_package(name, state, remedies) for name in pins.accepted if name not in ("torch", "torchvision")]
    return [*rows, check_backbones(), check_mdlib(facts["mdlib"], remedies)]


class Remedies:
    """What to type: in .venv the set-up program; elsewhere pip, which then must not touch torch."""

    def __init__(self, python: Path, pins: setup.Pins):
        self.ours = python.parent.absolute() == setup.venv_python().parent
        self.python, self.pins = python, pins

    def package(self, name: str) -> str:
        if self.ours:
            return "python setup_environment.py repair"
        # lpips requires torch and torchvision: left to itself, pip might exchange them.
        alone = ["--no-deps"] if name == "lpips" else []
        return shlex.join([str(self.python), "-m", "pip", "install", *alone, name + self.pins.accepted[name]])

    def pair(self, s: setup.State) -> str:
        if self.ours:
            return "python setup_environment.py repair"
        return shlex.join([str(self.python), "-m", "pip", "install", *setup.pair_arguments(s)])

    def torch(self) -> str:
        return f"python setup_environment.py {'repair' if self.ours else 'install'}"


# -- machine ---------------------------------------------------------------------------------------


def check_cores() -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    status = "ok" if cores >= LEAST_CORES else "warn"
    return row("cores", status, f"{cores} on {platform.machine()}", "" if status == "ok" else "expect to wait longer")


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
        return row("memory", "warn", f"{limit / GIB:.1f} GiB", "close other programs, or take a smaller preset")
    return row("memory", "ok", f"{limit / GIB:.1f} GiB")


def check_disk() -> dict:
    free = shutil.disk_usage(setup.ROOT).free
    if free < LEAST_DISK:
        remedy = f"make room: an environment takes 6 GiB, a run 1 GiB ({setup.ROOT})"
        return row("disk", "warn", f"{free / GIB:.1f} GiB free", remedy)
    return row("disk", "ok", f"{free / GIB:.0f} GiB free")


# -- torch -----------------------------------------------------------------------------------------


def check_torch(s: setup.State, remedies: Remedies) -> dict:
    trouble = setup.torch_trouble(s)
    if trouble:
        return row("torch", "fail", trouble, remedies.torch())
    build = f"CUDA {s.torch['cuda']}" if s.torch["cuda"] else "CPU build"
    return row("torch", "ok", f"{s.torch['version']}, {build}")


def check_devices(s: setup.State) -> list[dict]:
    """A convolution, a sum and a backward pass on the CPU and on every GPU."""
    rows = []
    for device, error in s.torch.get("ops", {}).items():
        if error:
            remedy = "restart the process that holds the GPU, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            rows.append(row(f"compute on {device}", "fail", error, remedy if device != "cpu" else ""))
        else:
            rows.append(row(f"compute on {device}", "ok", "convolution, sum and backward run"))
    return rows


def precision(capability: tuple[int, int]) -> str:
    """The precision that a GPU is fast in. Before 8.0 bf16 is emulated, though torch says it is supported."""
    if capability >= (8, 0):
        return "bf16"
    return "fp16" if capability >= (7, 0) else "fp32, no torch.compile"


def check_gpus(s: setup.State) -> list[dict]:
    """What each GPU can do, and whether torch sees it."""
    if not s.gpus:
        return [row("gpu", "ok", "none: the presets demo and smoke are made for a CPU")]
    visible = sum(device != "cpu" for device in s.torch.get("ops", {}))
    rows = []
    for index, gpu in enumerate(s.gpus):
        capability = ".".join(map(str, gpu.capability))
        detail = f"{gpu.name}, capability {capability}, driver {gpu.driver}, use {precision(gpu.capability)}"
        if visible:
            rows.append(row(f"gpu {index}", "ok", detail))
        else:
            remedy = s.torch.get("warning") or "delete .venv and run python setup_environment.py install"
            rows.append(row(f"gpu {index}", "warn", f"{detail}; torch does not see it", remedy))
    if setup.needs_no_jit(s) and not os.environ.get("TORCH_DISABLE_NATIVE_JIT"):
        rows.append(row("triton", "warn", "a GPU is too old for it", "set TORCH_DISABLE_NATIVE_JIT=1"))
    return rows


def check_pair(s: setup.State, remedies: Remedies) -> dict:
    if setup.torch_trouble(s):
        return row("torchvision", "fail", "cannot be tried without torch", remedies.torch())
    trouble = setup.pair_trouble(s)
    if trouble:
        return row("torchvision", "fail", trouble, remedies.pair(s))
    return row("torchvision", "ok", f"{s.modules['torchvision']['version']}, of the same build as torch")


# -- packages --------------------------------------------------------------------------------------


def check_package(name: str, s: setup.State, remedies: Remedies) -> dict:
    """Whether a distribution imports and lies in the range of pyproject.toml."""
    accepted, version = s.pins.accepted[name], s.installed.get(name)
    error = s.modules[module_of(name)]["error"]
    bad = "warn" if name in OPTIONAL else "fail"
    without = f" ({OPTIONAL[name]})" if name in OPTIONAL else ""
    if version is None:
        return row(name, bad, f"missing{without}", remedies.package(name))
    if error:
        return row(name, bad, f"{version} does not import{without}: {error}", remedies.package(name))
    if not setup.satisfies(version, accepted):
        return row(name, "warn", f"{version} is outside {accepted}", remedies.package(name))
    return row(name, "ok", version)


def checkpoints() -> Path:
    """Where torch.hub keeps downloaded weights."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints"


def check_backbones() -> dict:
    folder = checkpoints()
    there = [net for net, file in LPIPS_BACKBONES.items() if (folder / file).is_file()]
    if there:
        return row("lpips weights", "ok", ", ".join(there))
    file = LPIPS_BACKBONES["squeeze"]
    remedy = f"LPIPS downloads them when it is first used; offline, put {file} (5 MB) into {folder}"
    return row("lpips weights", "warn", "no backbone is there yet", remedy)


def check_mdlib(facts: dict, remedies: Remedies) -> dict:
    if facts["error"] is None:
        return row("mdlib", "ok", f"{facts['version']} imports")
    remedy = "python setup_environment.py repair" if remedies.ours else f"add {setup.ROOT} to PYTHONPATH"
    return row("mdlib", "fail", facts["error"], remedy)


# -- command ---------------------------------------------------------------------------------------


def as_table(rows: list[dict]) -> str:
    width = max(len(r["name"]) for r in rows)
    lines = []
    for r in rows:
        lines.append(f"{r['status']:<4}  {r['name']:<{width}}  {r['detail']}")
        if r["remedy"]:
            lines.append(f"{'':<4}  {'':<{width}}  -> {r['remedy']}")
    bad = [r["name"] for r in rows if r["status"] == "fail"]
    lines.append(f"not ready: {', '.join(bad)}" if bad else "ready")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--python", help="the interpreter to look at (default: that of .venv, else this one)")
    args = parser.parse_args(argv)
    python = args.python or (setup.venv_python() if setup.venv_python().exists() else sys.executable)
    rows = check(python)
    ok = not any(r["status"] == "fail" for r in rows)
    print(json.dumps({"ok": ok, "python": str(python), "checks": rows}, indent=1) if args.json else as_table(rows))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
