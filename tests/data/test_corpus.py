"""Sixty folders as people have them, made by chance: each is read and split right, or refused in one line."""

import hashlib
import shutil
import warnings

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from mdlib.data.checks import check_split
from mdlib.data.splits import make_split
from mdlib.data.windows import load_windows
from mdlib.simulation.dataset import simulate_dataset
from mdlib.utils import DataError

WINDOWS = 32
NAMES = (
    lambda user, k: f"ID{user}_case1_1_Doppler{k}",
    lambda user, k: f"win{k:04d}_24GHz_v3",
    lambda user, k: f"p{user}_frame_{k}_512x512",
    lambda user, k: f"walk_{k}_png.rf.{hashlib.md5(f'{user} {k}'.encode()).hexdigest()}",
    lambda user, k: hashlib.sha1(f"{user} {k}".encode()).hexdigest(),
    lambda user, k: f"2025-03-14_10-{k // 60:02d}-{k % 60:02d}",
    lambda user, k: f"rec{1 + (k > 16)}_{k}",
    lambda user, k: f"sample_{k * 2048}",
)
FOLDERS = (
    lambda user, k: f"ID_{user}",
    lambda user, k: f"user {user}",
    lambda user, k: f"ID_{user}" if user < 3 else f"ID_{user} (old)",
    lambda user, k: f"ID_{user}/day{1 + (k > 16)}",
    lambda user, k: f"{'training' if k < 17 else 'valid' if k < 27 else 'Test'}/P{user}",
    lambda user, k: f"背包/subject_{user}",
)


def coloured(name):
    return lambda x, rng: Image.fromarray((colormaps[name](x)[..., :3] * 255).astype(np.uint8))


def bordered(x, rng):
    picture = np.full((96, 96, 3), 255, np.uint8)
    picture[20:84, 10:74] = coloured("jet")(x, rng)
    return Image.fromarray(picture)


def altered(x, rng):
    """A copy of the window before it, brighter."""
    return coloured("jet")(np.clip(x * 1.1, 0, 255).astype(np.uint8), rng)


PICTURES = (
    coloured("jet"),
    coloured("jet_r"),
    coloured("hot"),
    coloured("hsv"),
    coloured("plasma"),
    coloured("gray_r"),
    lambda x, rng: Image.fromarray(x.astype(np.uint16) * 4),  # 10 bits
    lambda x, rng: Image.fromarray(x.astype(np.uint16) * 257),
    lambda x, rng: Image.fromarray(np.dstack([np.zeros_like(x), x])),  # in the transparency
    lambda x, rng: coloured("jet")(x, rng).resize((100, 80)),
    lambda x, rng: coloured("jet")(x, rng).convert("P"),
    bordered,
)
SPOILED = (*[""] * 8, "empty", "cut", "copied", "altered", "twin", "larger")


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Intensities (64, 64) by user and place in time."""
    root = tmp_path_factory.mktemp("corpus") / "people"
    windows = load_windows(simulate_dataset(root, users=3, windows=WINDOWS, size=64, progress=False), size=64)
    return {(f.user, f.number): image[0].numpy() for f, image in zip(windows.files, windows.images, strict=True)}


def write(root, truth, seed):
    """A folder made by chance; returns (user, place) by path."""
    rng, written = np.random.default_rng(seed), {}
    name, folder, draw = (some[rng.integers(len(some))] for some in (NAMES, FOLDERS, PICTURES))
    for (user, k), intensity in truth.items():
        path = root / folder(user, k) / f"{name(user, k)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(intensity, rng).save(path)
        written[path.relative_to(root).as_posix()] = user, k
    spoiled, paths = SPOILED[rng.integers(len(SPOILED))], list(written)
    first, last = root / paths[0], root / paths[-1]
    if spoiled == "empty":
        first.write_bytes(b"")
    elif spoiled == "cut":
        first.write_bytes(first.read_bytes()[:200])
    elif spoiled == "twin":
        shutil.copyfile(first, last)
        written[paths[-1]] = written[paths[0]]
    elif spoiled == "larger":
        Image.open(first).resize((200, 200)).save(first)
    elif spoiled:
        for path in paths:
            copy = (root / path).with_stem(f"{(root / path).stem} (2)")
            shutil.copyfile(root / path, copy) if spoiled == "copied" else altered(truth[written[path]], rng).save(copy)
            written[copy.relative_to(root).as_posix()] = written[path]
    return written


@pytest.mark.parametrize("seed", range(60))
def test_a_folder_is_read_right_or_refused(seed, truth, tmp_path):
    written = write(tmp_path, truth, seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            windows = load_windows(tmp_path, size=64)
            split = check_split(windows, make_split(windows))
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) > 20
            return
    said = " ".join(str(warning.message) for warning in caught)
    assert len(windows) == len(written) or f"{len(written)} images found, {len(windows)} used" in said
    for file, image in zip(windows.files, windows.images, strict=True):
        user, k = written[file.path]
        assert file.user == user
        assert np.corrcoef(image[0].flatten(), truth[user, k].flatten())[0, 1] > 0.95
    for test in split["test"]:
        user, k = written[test]
        assert min(abs(k - written[path][1]) for path in split["train"] if written[path][0] == user) >= 4
