"""Gait read off images against what was simulated: correlation over users, as the tests read windows (native grid, true
time) and as a report does (64 pixels, every window taken for four steps of 0.58 s). A minute on one core.

OMP_NUM_THREADS=1 python benchmarks/physics.py [--users 31] [--windows 20]
"""

import argparse

import numpy as np
from PIL import Image

from mdlib.evaluation import gait_metrics
from mdlib.simulation import dataset
from mdlib.simulation.radar import velocity_axis

READ = {  # the metric and the truth it stands for
    "torso speed": ("v_torso", "v_torso"),
    "cadence": ("f_step", "step_hz"),
    "step length": ("step_len", "step_len"),
    "foot speed": ("v_foot", "v_foot"),
    "foot speed, by the upper envelope": ("u97", "v_foot"),
}
SIZE = 64


def as_loaded(image):
    """An image of the native grid as it is after it was written at 256 pixels and read at SIZE."""
    rows, columns = (np.arange(256) * side // 256 for side in image.shape)
    return np.asarray(Image.fromarray(image[rows][:, columns]).resize((SIZE, SIZE), Image.Resampling.BOX))


def correlations(measured, truth, users):
    for name, (metric, known) in READ.items():
        read, true = measured[metric], truth[known]
        means = [np.nanmean(values.reshape(users, -1), axis=1) for values in (read, true)]
        yield name, np.corrcoef(means)[0, 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=31)
    parser.add_argument("--windows", type=int, default=20)
    args = parser.parse_args()
    for kind, clock in (("3 s", True), ("four steps", False)):
        number = 2 * args.windows
        recordings = [
            dataset.simulate_recording(user, n_windows=number, clock=clock) for user in range(1, args.users + 1)
        ]
        images = np.concatenate([one[0][::2] for one in recordings])
        truth = {name: np.concatenate([one[1][name][::2] for one in recordings]) for name in recordings[0][1]}
        small = np.stack([as_loaded(image) for image in images])
        native = gait_metrics.read(images / 255, velocity_axis(), truth["dt"])
        nominal = gait_metrics.read(small / 255, gait_metrics.image_axis(SIZE), gait_metrics.WINDOW_S / SIZE)
        found = [dict(correlations(measured, truth, args.users)) for measured in (native, nominal)]
        for name in READ:
            print(
                f"{kind:<10}  {name:<36} native {found[0][name]:.3f}  as a report reads it {found[1][name]:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
