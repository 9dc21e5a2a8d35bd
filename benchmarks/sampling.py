"""How much the key-value cache saves when the token prior samples: runs side by side, A B A B, ratios of medians.

python benchmarks/sampling.py [--batch 16 --rounds 5]
"""

import argparse
import statistics
import time

import torch

from mdlib.models.transformer import TokenPrior


def seconds(prior: TokenPrior, batch: int, use_cache: bool) -> float:
    labels = torch.zeros(batch, dtype=torch.long)
    started = time.perf_counter()
    prior.sample(labels, generator=torch.Generator().manual_seed(0), use_cache=use_cache)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch}")
    for shape in ((16, 8), (16, 16)):
        prior = TokenPrior(256, shape, num_users=31, hidden_size=128, num_layers=4, num_heads=4).eval()
        seconds(prior, 1, True), seconds(prior, 1, False)  # warm up
        times = {True: [], False: []}
        for _ in range(options.rounds):
            for use_cache in times:
                times[use_cache].append(seconds(prior, options.batch, use_cache))
        cached, plain = (statistics.median(times[key]) for key in (True, False))
        spread = [f"{min(times[key]):.2f}–{max(times[key]):.2f}" for key in (True, False)]
        print(
            f"{prior.num_tokens} tokens: cache {cached:.2f} s ({spread[0]}), without {plain:.2f} s ({spread[1]}), "
            f"ratio {plain / cached:.2f}"
        )


if __name__ == "__main__":
    main()
