"""What window, axial and full attention cost as the latent grid grows: one layer, forward and backward.

Runs side by side, A B C D A B C D, medians. FLOPs are counted by torch, those of the attention products (queries by
keys, weights by values) apart from those of the projections; exponents are slopes on log-log axes over all grids.

python benchmarks/attention.py [--sides 8 16 32 64 --channels 64 --batch 2 --rounds 5]
"""

import argparse
import math
import statistics
import time

import torch
from diffusers.models.attention_processor import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdlib.models.unet import AxialAttention, TiledAttnProcessor

HEAD = 16  # channels of a head


def layers(channels: int) -> dict[str, torch.nn.Module]:
    def layer() -> Attention:
        return Attention(
            channels,
            heads=channels // HEAD,
            dim_head=HEAD,
            norm_num_groups=16,
            bias=True,
            residual_connection=True,
            _from_deprecated_attn_block=True,
        )

    kinds = {"window 4": layer(), "window 8": layer(), "axial": AxialAttention(layer()), "full": layer()}
    for window in (4, 8):
        kinds[f"window {window}"].set_processor(TiledAttnProcessor(window, window))
    return kinds


def seconds(layer: torch.nn.Module, grid: torch.Tensor) -> float:
    started = time.perf_counter()
    layer(grid).sum().backward()
    return time.perf_counter() - started


def flops(layer: torch.nn.Module, grid: torch.Tensor) -> tuple[int, int]:
    """Of forward and backward, for one sample: attention products, projections."""
    # The counter knows no fused attention on a CPU; written out, attention is two products a head.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(grid[:1]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts.pop(torch.ops.aten.bmm)
    return products, sum(counts.values())


def slope(positions: list[int], values: list[float]) -> float:
    """Least-squares exponent p of values ∝ positionsᵖ."""
    return statistics.linear_regression([math.log(n) for n in positions], [math.log(v) for v in values]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32, 64], help="of square grids, two at least")
    parser.add_argument("--channels", type=int, default=64, help=f"a multiple of {HEAD}")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if len(options.sides) < 2 or options.channels % HEAD:
        parser.error(f"--sides needs two numbers or more, --channels a multiple of {HEAD}")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch}, "
        f"{options.channels} channels, heads of {HEAD}; FLOPs a sample, forward + backward"
    )
    kinds = layers(options.channels)
    times = {kind: [] for kind in kinds}
    products = {kind: [] for kind in kinds}
    head = f"{'grid':>7} {'n':>5}  {'kind':<9} {'ms':>8} {'min–max':>17} {'of full':>8}"
    print(f"{head} {'product MFLOP':>14} {'projection':>11}")
    for side in options.sides:
        grid = torch.randn(options.batch, options.channels, side, side)
        runs = {kind: [] for kind in kinds}
        for layer in kinds.values():
            seconds(layer, grid)  # warm up
        for _ in range(options.rounds):
            for kind, layer in kinds.items():
                runs[kind].append(1000 * seconds(layer, grid))
        full = statistics.median(runs["full"])
        for kind, layer in kinds.items():
            median, spread = statistics.median(runs[kind]), f"{min(runs[kind]):.1f}–{max(runs[kind]):.1f}"
            product, projection = flops(layer, grid)
            times[kind].append(median)
            products[kind].append(product)
            print(
                f"{f'{side}×{side}':>7} {side**2:>5}  {kind:<9} {median:>8.1f} {spread:>17} {median / full:>8.2f} "
                f"{product / 1e6:>14.1f} {projection / 1e6:>11.1f}",
                flush=True,
            )
    print(f"{'exponent of n':<15} {'product FLOPs':>14} {'time':>6} {'time, last two':>15}   expected of the products")
    positions = [side**2 for side in options.sides]
    for kind, expected in zip(kinds, ("1: O(n·w²)", "1: O(n·w²)", "1.5: O(n·√n)", "2: O(n²)"), strict=True):
        print(
            f"{kind:<15} {slope(positions, products[kind]):>14.2f} {slope(positions, times[kind]):>6.2f} "
            f"{slope(positions[-2:], times[kind][-2:]):>15.2f}   {expected}"
        )


if __name__ == "__main__":
    main()
