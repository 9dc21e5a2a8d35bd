"""What a perfect prior would be worth: further real windows through the codec, in the place of generated ones.

python -m mdlib run --data REAL_WINDOWS --out runs/codec --system vae-diffusion --preset demo --to 02 \\
    -p windows_per_user=-1 -p codec_steps=2500 \\
    -p 'codec_options={"block_out_channels": [32, 64], "batch_size": 16, "evaluate_every": 500}'
python benchmarks/codec_ceiling.py --data REAL_WINDOWS --codec runs/codec/codec --windows 10

The codec has learned from all training windows. Beside WINDOWS of them a user stand MORE others, as they are and after
the codec's round trip: what lies between the two is the codec's part in what generated windows lack, the rest the
prior's.
"""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from mdlib.arms import augmentation, train_arms
from mdlib.data import WindowSet, find_windows, load_windows, to_uint8
from mdlib.evidence import Protocol
from mdlib.report import gather, load_rival
from mdlib.split import make_split, spare_windows
from mdlib.validate import through_codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of real windows")
    parser.add_argument("--codec", required=True, help="RUN/codec, trained on all training windows")
    parser.add_argument("--windows", type=int, default=10, help="real training windows a user")
    parser.add_argument("--more", type=int, default=50, help="further ones a user")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a classifier")
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    split = make_split(find_windows(args.data), windows_per_user=args.windows)
    network = load_rival(args.codec, split).eval()
    real = load_windows(args.data, size=network.config.image_size, channels=network.config.in_channels)
    others = spread(spare_windows(real, split), args.more)
    decoded = replace(others, images=to_uint8(through_codec(network, others.images, others.labels)))
    protocol = Protocol(judge_steps=args.steps, seeds=args.seeds, shares=(0.5, 0.75), counts=(), reference="none")
    print(f"{args.windows} real windows a user, beside them {len(others) / others.num_users:.1f} others")
    for name, made in (("as they are", others), ("after the codec", decoded)):
        evidence = gather(real, split, made)
        found = augmentation(evidence, protocol, train_arms(evidence, protocol, SimpleNamespace(update=lambda: None)))
        told = [f"{arm} {100 * found[arm]['value']:.1f}" for arm in ("real_only", "real_plus_generated", "real_x2")]
        low, high = found["gain_ci95"]
        print(f"{name}: {', '.join(told)}, alone {100 * found['generated_only']['value']:.1f}", end="")
        print(f", gain {100 * found['gain']['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", flush=True)


def spread(windows: WindowSet, most: int) -> WindowSet:
    """`most` windows of each user, or all there are, evenly spaced in time."""
    chosen = []
    for label in range(windows.num_users):
        rows = torch.nonzero(windows.labels == label).flatten().tolist()
        rows.sort(key=lambda row: (windows.files[row].recording, windows.files[row].number))
        places = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
        chosen += [rows[place] for place in places]
    return windows.select(chosen)


if __name__ == "__main__":
    main()
