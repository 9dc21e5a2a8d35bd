"""What a perfect prior would be worth: further real windows through the codec, in the place of generated ones.

python -m mdlib run --data REAL_WINDOWS --out runs/ten --system vae-diffusion --preset demo --to 02 \\
    -p windows_per_user=10
python benchmarks/codec_ceiling.py --data REAL_WINDOWS --codec runs/ten/codec --windows 10

The codec has learned from WINDOWS training windows a user. MORE others, which it has not seen, are added to these
as they are and after its round trip; the difference is the codec's part in what generated windows lack.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch

from mdlib.data.checks import seen_beyond, seen_of_test
from mdlib.data.files import find_windows
from mdlib.data.splits import make_split, spare_windows
from mdlib.data.windows import WindowSet, load_windows, to_uint8
from mdlib.evaluation.augmentation_study import augmentation, train_arms
from mdlib.evaluation.evidence import Protocol, through_codec
from mdlib.reports.report import gather
from mdlib.systems import load_codec
from mdlib.utils import DataError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of real windows")
    parser.add_argument("--codec", required=True, help="RUN/codec of a run with as many windows")
    parser.add_argument("--windows", type=int, default=10, help="real training windows a user")
    parser.add_argument("--more", type=int, default=50, help="further ones a user")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a classifier")
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    split = make_split(find_windows(args.data), windows_per_user=args.windows)
    network = load_codec(args.codec).eval()
    if seen := seen_of_test(args.codec, split, args.data):
        raise DataError(f"{args.codec} was trained on {seen} of the test windows: train it on the same split")
    if seen := seen_beyond(args.codec, split, args.data):
        raise DataError(
            f"{args.codec} has seen {seen} of the further windows: take that of windows_per_user={args.windows}"
        )
    real = load_windows(args.data, size=network.config.image_size, channels=network.config.in_channels)
    others = spread(spare_windows(real, split), args.more)
    decoded = replace(others, images=to_uint8(through_codec(network, others.images, others.labels)))
    protocol = Protocol(evaluation_steps=args.steps, seeds=args.seeds, counts=(), reference="none")
    print(f"{args.windows} real windows a user and {len(others) / others.num_users:.1f} others")
    for name, made in (("as they are", others), ("after the codec", decoded)):
        evidence = gather(real, split, made)
        found = augmentation(evidence, protocol, train_arms(evidence, protocol))
        told = [f"{arm} {100 * found[arm]['value']:.1f}" for arm in ("real_only", "real_plus_generated", "real_x2")]
        low, high = found["gain"]["ci95"]
        print(f"{name}: {', '.join(told)}, alone {100 * found['generated_only']['value']:.1f}", end="")
        print(f", gain {100 * found['gain']['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", flush=True)


def spread(windows: WindowSet, most: int) -> WindowSet:
    """`most` windows of each user, or all there are, evenly spaced in time."""
    chosen = []
    for label in range(windows.num_users):
        rows = torch.nonzero(windows.labels == label).flatten().tolist()
        chosen += [rows[place] for place in np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]
    return windows.select(chosen)


if __name__ == "__main__":
    main()
