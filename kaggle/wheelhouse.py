"""Build the folder of wheels that Kaggle's notebooks install from, with or without Internet.

    python kaggle/wheelhouse.py            writes wheelhouse/

It holds mdlib and the packages that Kaggle's image lacks, all of them plain Python, so that one folder serves every
Python there; and check_environment.py with what it reads. Never torch: the image brings the one that fits its GPUs.
Run it with a Python that has setuptools and pip, such as that of .venv.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from metadata import ROOT, Stop, pins

LACKING = ("lpips", "pytorch-metric-learning")  # on Kaggle; everything else that mdlib needs is there
CHECKS = ("check_environment.py", "setup_environment.py", "pyproject.toml", "kaggle/install_mdlib.py")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "mdlib")


def build(out: Path) -> list[Path]:
    """Write the wheels and the checks to `out`, in place of those that were there; returns all files.

    Raises:
        Stop: pip failed, or a wheel is not plain Python.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "wheels"
        wanted = [f"{name}=={pins()[name]}" for name in LACKING]
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", made, *wanted)
        for wheel in made.glob("*.whl"):
            if not wheel.name.endswith("py3-none-any.whl"):
                raise Stop(f"{wheel.name} is made for one Python or machine only: leave it out of the wheelhouse")
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", made, _sources(Path(scratch) / "mdlib"))
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("*.whl"):
            old.unlink()
        files = sorted([*made.glob("*.whl"), *(ROOT / name for name in CHECKS)])
        for file in files:
            shutil.copy(file, out)
        # check_environment.py compares them: uploads break off.
        sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
        (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return sorted(path for path in out.iterdir() if path.name != "dataset-metadata.json")


def _sources(folder: Path) -> Path:
    """A copy of what the wheel is made of: setuptools leaves its work beside the sources, and takes up what it left."""
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        said = [line for line in answer.stderr.splitlines() if "ERROR" in line] or answer.stderr.splitlines() or [""]
        raise Stop(f"pip {arguments[0]} failed: {said[-1].strip()}")


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
