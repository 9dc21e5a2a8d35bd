"""Build the folder of wheels from which notebooks install mdlib on Kaggle, with or without Internet.

    python kaggle/wheelhouse.py            writes wheelhouse/

It holds mdlib, the packages that Kaggle's image lacks, the script that installs them and check_environment.py. All
wheels are pure Python and fit every Python version; torch is not among them, because the image has the one for its
GPUs. Needs setuptools and pip, as in .venv.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from metadata import ROOT, Stop, pins

LACKING = ("lpips", "pytorch-metric-learning")  # in Kaggle's image, which has everything else
SCRIPTS = ("check_environment.py", "setup_environment.py", "pyproject.toml", "kaggle/install_mdlib.py")


def build(out: Path) -> list[Path]:
    """Write the wheels and scripts to `out`, replacing earlier wheels; returns all files.

    Raises:
        Stop: pip failed, or a wheel is not pure Python.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Path(scratch) / "wheels"
        wanted = [f"{name}=={pins()[name]}" for name in LACKING]
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", wheels, *wanted)
        for wheel in wheels.glob("*.whl"):
            if not wheel.name.endswith("py3-none-any.whl"):
                raise Stop(f"{wheel.name} is built for one Python version or machine: leave it out of the wheelhouse")
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, _sources(Path(scratch) / "mdlib"))
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("*.whl"):
            old.unlink()
        files = sorted([*wheels.glob("*.whl"), *(ROOT / name for name in SCRIPTS)])
        for file in files:
            shutil.copy(file, out)
    return sorted(path for path in out.iterdir() if path.name != "dataset-metadata.json")


def _sources(folder: Path) -> Path:
    """Copy the sources of the wheel: setuptools leaves files among the sources and packages them the next time."""
    shutil.copytree(ROOT / "mdlib", folder / "mdlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if "ERROR" in line] or answer.stderr.splitlines() or [""]
        raise Stop(f"pip {arguments[0]} failed: {lines[-1].strip()}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "wheelhouse")
    try:
        files = build(parser.parse_args(argv).out)
    except Stop as stop:
        print(f"wheelhouse: {stop}", file=sys.stderr)
        return 1
    print(*files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
