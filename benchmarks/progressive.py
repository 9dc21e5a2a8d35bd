"""Progressive sampling: does diversity rise over a user's windows, and what does it cost in identity?

A run of a prior over tokens generates a series for each user with a rising temperature. For each third of the series:
the mean distance between two windows of a user (root mean square of intensities in [−1, 1]), and how many windows
classifiers of unseen real windows name rightly.

python benchmarks/progressive.py --run RUN [--per-user 30 --temperature 0.7 1.3]
"""

import argparse

import torch

from mdlib.data.windows import to_uint8
from mdlib.evaluation.augmentation_study import correctness, unseen_classifiers
from mdlib.evaluation.evidence import Protocol
from mdlib.experiments.run import open_run
from mdlib.pipeline import load_pipeline
from mdlib.reports.report import gather


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--per-user", type=int, default=30)
    parser.add_argument("--temperature", type=float, nargs=2, default=(0.7, 1.3))
    options = parser.parse_args()
    run, count = open_run(options.run), options.per_user
    pipeline = load_pipeline(run.path / "pipeline")
    users = list(pipeline.config.users)
    images = pipeline(users, count, 1, output_type="pt", temperature=list(options.temperature)).images
    labels = torch.arange(len(users)).repeat_interleave(count)
    evidence = gather(run.windows, run.split, run.parts["test"])  # generated windows have no part in the classifiers
    right = correctness(unseen_classifiers(evidence, Protocol(**run.preset.validation)), to_uint8(images), labels)
    right = torch.from_numpy(right).float().mean(0).view(len(users), count)
    series = images.float().cpu().view(len(users), count, -1)
    for third in torch.arange(count).tensor_split(3):
        apart = torch.stack([torch.pdist(own[third]).mean() for own in series]) / series.shape[2] ** 0.5
        where = f"windows {third[0] + 1} to {third[-1] + 1}"
        print(f"{where:20} distance {apart.mean():.3f}   identity {100 * right[:, third].mean():.1f} %")


if __name__ == "__main__":
    main()
