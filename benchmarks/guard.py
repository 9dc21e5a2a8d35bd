"""Does a change of the code change a result? Smoke runs of all systems, as one JSON file to compare.

    python benchmarks/guard.py --out before.json
    python benchmarks/guard.py --out after.json --against before.json

Weights are compared as a set of tensors, whatever their names; windows by their pixels; report.json metric by metric.
Metrics are those of this machine: run both sides on one.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "vqvae-transformer": ("vqvae-transformer", "normal", {}),
    "vae-diffusion": ("vae-diffusion", "normal", {}),
    "vqvae-ldm": ("vqvae-ldm", "normal", {}),
    "vavae-dit": ("vavae-dit", "normal", {}),
    "vq-diffusion": ("vq-diffusion", "normal", {}),
    "conditions": ("vqvae-transformer", "all", {}),
    "joint": ("vae-diffusion", "all", {"joint_steps": 3, "classifier_steps": 3}),
}
IGNORED = {"mdlib", "created", "about"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file to compare with")
    parser.add_argument("--only", default=",".join(RUNS), help="runs, separated by commas")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(Path(folder), name) for name in given.only.split(",")}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    if not given.against:
        return 0
    before = json.loads(given.against.read_text())
    differences = [line for name in found for line in compare(name, before[name], found[name])]
    print("\n".join(differences) or "equal")
    return bool(differences)


def measure(folder: Path, name: str) -> dict:
    system, condition, parameters = RUNS[name]
    data, out = folder / f"data-{condition}", folder / name
    if not data.exists():
        run("simulate", "--out", data, "--users", 4, "--windows", 48, "--size", 64, "--condition", condition)
    options = [word for key, value in parameters.items() for word in ("-p", f"{key}={value}")]
    run("run", "--data", data, "--out", out, "--system", system, "--preset", "smoke", *options)
    report = json.loads((out / "report.json").read_text())
    return {
        "weights": {part: weights(out / part) for part in ("codec", "pipeline/prior", "pipeline/classifier")},
        "windows": {
            path.relative_to(out).as_posix(): digest(np.asarray(Image.open(path)))
            for path in sorted((out / "generated").rglob("*.png"))
        },
        "report": {key: value for key, value in report.items() if key not in IGNORED},
    }


def run(*words) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mdlib", *map(str, words)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def weights(folder: Path) -> list[str]:
    files = list(folder.glob("*.safetensors"))
    tensors = [
        tensor
        for path in files
        if not path.stem.startswith(("tokens-", "latents-", "best"))
        for tensor in load_file(path).values()
    ]
    return sorted(digest(tensor.numpy()) for tensor in tensors)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()[
        :12
    ]


def compare(name: str, before, after) -> list[str]:
    """A line for each value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        shared = [
            line for key in before.keys() & after.keys() for line in compare(f"{name}/{key}", before[key], after[key])
        ]
        return sorted(shared) + [
            f"{name}: only {where}: {sorted(keys)}"
            for where, keys in (("before", before.keys() - after.keys()), ("after", after.keys() - before.keys()))
            if keys
        ]
    return [] if before == after else [f"{name}: {str(before)[:80]} is now {str(after)[:80]}"]


if __name__ == "__main__":
    sys.exit(main())
