"""Toy windows of four users, and the evidence that they make."""

from dataclasses import replace

import numpy as np
import torch

from mdlib.data.files import WindowFile
from mdlib.data.windows import WindowSet
from mdlib.evaluation.augmentation_study import _jobs
from mdlib.evaluation.evidence import Evidence, Protocol, train_each

USERS = (2, 5, 9, 11)
QUICK = Protocol(evaluation_steps=60, seeds=2, counts=(), reference="none", backbone="")
ONCE = replace(QUICK, seeds=1, fractions=(0.25,))


def gait(label: int, n: int, seed: int, spread: float = 0.8) -> torch.Tensor:
    """Toy windows uint8 (n, 1, 32, 32): a bright ridge that swings four times; height and swing tell the user."""
    rng = np.random.default_rng([seed, label])
    time = np.arange(32) / 8
    height = 10 + 3.0 * label + spread * rng.normal(size=(n, 1))
    ridge = height + (1 + label % 2 + 0.3 * rng.normal(size=(n, 1))) * np.sin(2 * np.pi * time)
    image = np.exp(-((np.arange(32)[None, :, None] - ridge[:, None, :]) ** 2) / 4) + 0.08 * rng.random((n, 32, 32))
    return torch.from_numpy((255 * image.clip(0, 1)).astype(np.uint8)).unsqueeze(1)


def windows(n: int, seed: int, start: int = 0, of=gait) -> WindowSet:
    images = torch.cat([of(label, n, seed) for label in range(len(USERS))])
    files = tuple(
        WindowFile(f"ID_{user}/w{start + i}.png", user, "", "w", start + i) for user in USERS for i in range(n)
    )
    labels = torch.arange(len(USERS)).repeat_interleave(n)
    return WindowSet(images=images, labels=labels, users=USERS, files=files, colormap="jet", root="toy")


def evidence(generated: WindowSet, **changes) -> Evidence:
    parts = dict(train=windows(3, 1), val=windows(12, 2, 40), test=windows(25, 3, 80), generated=generated, gap=4)
    parts["spare"] = windows(9, 5, 20)
    return Evidence(**{**parts, **changes})


def real_only_classifiers(case: Evidence, protocol: Protocol, folder=None) -> list:
    """The classifiers of the arm real_only."""
    return list(train_each(_jobs(case.train, protocol, folder), "classifiers"))
