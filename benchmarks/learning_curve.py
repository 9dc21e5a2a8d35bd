"""Accuracy on test windows against the number of real windows per user, without any generator, twice.

Each point is a small CNN trained from scratch, the mean over seeds with its 95 % interval over stretches of
time; the second line takes other seeds and shows how well the first is reproduced.

python benchmarks/learning_curve.py --data DIR [--counts 5,10,20,40 --seeds 3 --steps 400]
"""

import argparse

from mdlib.data.splits import apply_split, make_split
from mdlib.data.windows import load_windows
from mdlib.evaluation.augmentation_study import correctness
from mdlib.evaluation.evidence import bootstrap_blocks, train_each
from mdlib.evaluation.metrics import scored
from mdlib.models.classifier import SmallCNN


def point(windows, count: int, seeds: range, steps: int) -> dict:
    """The metric (value, ci95, n) of classifiers trained on `count` windows a user."""
    split = make_split(windows, windows_per_user=count)
    parts = apply_split(windows, split)
    train, test = parts["train"], parts["test"]
    jobs = [(SmallCNN, None, train.images, train.labels, train.num_users, steps, seed) for seed in seeds]
    correct = correctness(list(train_each(jobs, f"{count} windows")), test.images, test.labels)
    return scored(correct, bootstrap_blocks(test, split["gap"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--counts", default="5,10,20,40")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    windows = load_windows(args.data, size=args.size)
    for run in range(2):
        seeds = range(run * args.seeds, (run + 1) * args.seeds)
        for count in map(int, args.counts.split(",")):
            found = point(windows, count, seeds, args.steps)
            low, high = found["ci95"]
            shown = f"{100 * found['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {found['n']} test windows"
            print(f"seeds {seeds[0]} to {seeds[-1]}, {count} windows a user: {shown}", flush=True)


if __name__ == "__main__":
    main()
