"""What `import mdlib` costs beyond torch: fresh processes side by side, medians.

python benchmarks/imports.py
"""

import statistics
import subprocess
import sys
import time


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main() -> None:
    statements = ["import torch", "import torch, mdlib", "import torch, mdlib.data.windows", "import mdlib.pipeline"]
    times = {statement: [] for statement in statements}
    for _ in range(6):
        for statement in statements:
            times[statement].append(seconds(statement))
    base = statistics.median(times["import torch"][1:])
    for statement in statements:
        median = statistics.median(times[statement][1:])  # the first round fills the disk cache
        print(f"{statement}: {median:.2f} s, {median - base:+.2f} s beyond torch")


if __name__ == "__main__":
    main()
