"""Small data sets, in memory and on disk, generators, a trap for unpickling, and the check of an error's one line."""

import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdlib.data.colormaps import colorize
from mdlib.data.files import WindowFile
from mdlib.data.windows import WindowSet
from mdlib.utils import DataError

ROOT = Path(__file__).parents[1]


@cache
def walk(seed, steps=200, side=32):
    """Intensity (side, steps * side / 4): a ridge that oscillates once a step, with speckle in blocks."""
    rng = np.random.default_rng(seed)
    x, row = np.arange(steps * side // 4), np.arange(side)[:, None]
    ridge = np.exp(-(((row - side / 2 - 4 * np.sin(2 * np.pi * x / (side / 4))) / 3) ** 2))
    level = np.kron(ridge[::2, ::2] * rng.gamma(4, 0.25, (side // 2, len(x) // 2)), np.ones((2, 2)))
    return np.round(np.clip(level, 0, 1) * 255).astype(np.uint8)


def picture(seed, number):
    """Window `number` of a walk: four steps, starting one step after the window before."""
    return walk(seed)[:, 8 * number : 8 * number + 32]


def write_image(path, intensity, colormap="jet", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colorize(intensity, colormap)).save(path, **options)


def write_set(root, users=(1, 2), numbers=range(1, 4), name="ID{user}_case1_1_Doppler{n}.png", **options):
    for user in users:
        for n in numbers:
            write_image(root / f"ID_{user}" / name.format(user=user, n=n), picture(user, n), **options)
    return root


def random_split(windows, seed=0):
    """Each user's windows split at random: overlapping windows leak."""
    rng, parts = np.random.default_rng(seed), {"train": [], "val": [], "test": []}
    for user in sorted({file.user for file in windows.files}):
        paths = [file.path for file in windows.files if file.user == user]
        order = [paths[place] for place in rng.permutation(len(paths))]
        n_val, n_test = round(0.15 * len(order)), round(0.25 * len(order))
        for part, some in zip(
            parts, (order[n_val + n_test :], order[:n_val], order[n_val : n_val + n_test]), strict=True
        ):
            parts[part] += some
    return parts


def listed(numbers, user=1, recording="walk", condition=""):
    return [WindowFile(f"ID_{user}/{recording}{n}.png", user, condition, recording, n) for n in numbers]


def small_set(users=(4, 7), n=3):
    files = tuple(f for user in users for f in listed(range(n), user))
    labels = torch.arange(len(users)).repeat_interleave(n)
    images = torch.randint(0, 256, (len(files), 1, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(0))
    return WindowSet(images, labels, users, files, "jet", "data")


def message(function, *args, **kwargs):
    with pytest.raises(DataError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def readme_blocks(language: str) -> list[str]:
    """The README's code blocks in `language`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def told_commands(file: str) -> list[list[str]]:
    """The words of every `python …` command that a page tells, in its code blocks and in its lines."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "".join(text.split("```")[1::2])
    found = re.findall(r"^ *python (.*)", blocks, re.MULTILINE) + re.findall(r"`python ([^`]*)`", text)
    return [shlex.split(words, comments=True) for words in found]


def readme_commands() -> list[str]:
    """The README's `python -m mdlib` commands, in order."""
    lines = [line.split("  #")[0].strip() for block in readme_blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m mdlib")]
