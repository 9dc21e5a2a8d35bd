"""The data set in memory, with one label map."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mdlib.data.colormaps import colormap_table
from mdlib.data.files import WindowFile, find_windows
from mdlib.data.reading import Reading, read_images
from mdlib.utils import DataError, to_float


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floating point [−1, 1] to uint8 0…255, rounded; values beyond the range are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class WindowSet:
    """Windows in memory, with the label map. A selection has the label map of the whole."""

    images: torch.Tensor  # uint8 (N, C, size, size): C = 1 intensity, C = 3 RGB
    labels: torch.Tensor  # long (N,), index into `users`
    users: tuple[int, ...]  # users[label] = the k of ID_k; the null label is len(users)
    files: tuple[WindowFile, ...]
    colormap: str  # of the files on disk; "none" for C = 3
    root: str
    about: Reading | None = None  # how the image files were read; None where none were

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The folders above ID_k, by name; ("",) where there are none."""
        return tuple(sorted({f.condition for f in self.files}))

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(f.path for f in self.files)

    def condition_labels(self, conditions: Sequence[str]) -> torch.Tensor:
        """The condition of each window as its place in `conditions`, long (N,)."""
        if unknown := sorted(set(self.conditions) - set(conditions)):
            raise DataError(f"no training window shows condition {', '.join(unknown)}: add some, or leave it out")
        return torch.tensor([conditions.index(f.condition) for f in self.files])

    def float(self, index=None) -> torch.Tensor:
        """Images, or those of `index` (slice, list, tensor), as float32 (B, C, H, W) in [−1, 1]."""
        return to_float(self.images if index is None else self.images[index])

    def select(self, index) -> "WindowSet":
        """The windows of `index`: a slice, positions (list or tensor), or a boolean tensor (N,)."""
        positions = torch.arange(len(self))[index]
        files = tuple(self.files[i] for i in positions.tolist())
        return replace(self, images=self.images[positions], labels=self.labels[positions], files=files)

    def of_user(self, user: int) -> "WindowSet":
        """The windows of ID_`user`."""
        if user not in self.users:
            raise DataError(f"{self.root}: no user ID_{user}; there are {', '.join(map(str, self.users))}")
        return self.select(self.labels == self.users.index(user))

    def few(self, user: int, condition: str, most: int) -> "WindowSet":
        """At most `most` windows of a user in a condition, evenly spaced."""
        rows = [row for row, file in enumerate(self.files) if (file.user, file.condition) == (user, condition)]
        places = torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long().tolist()
        return self.select([rows[place] for place in places])


def concatenate(*sets: WindowSet) -> WindowSet:
    """The sets as one, with the first one's label map."""
    images, labels = (torch.cat([getattr(one, name) for one in sets]) for name in ("images", "labels"))
    return replace(sets[0], images=images, labels=labels, files=sum((one.files for one in sets), ()))


def load_windows(
    root: str | Path,
    *,
    size: int = 64,
    channels: int = 1,
    colormap: str = "auto",
    crop: str = "none",
    users: Sequence[int] | None = None,
    order: str = "number",
    plain: bool = False,
    scale: tuple[float, float] | None = None,
) -> WindowSet:
    """Read a data folder (layout: see `mdlib.data.files.scan`) into one uint8 tensor.

    Coloured images are converted back to intensity, then reduced to `size` × `size` by averaging; grey images are
    intensity already. The result is cached in `$MDLIB_CACHE` (default `~/.cache/mdlib`), keyed by the files' contents
    and these options.

    Args:
        size: side of the windows, pixels.
        channels: 1 for intensity, 3 for RGB as it is.
        colormap: jet (MATLAB's), parula, viridis, grey, a name of matplotlib, or one of them with _r for the reversed
            map; auto detects it. Unused with 3 channels.
        crop: what to read of figures with a border, axes or a title: auto finds the plot, "left,top,right,bottom" is
            its box in pixels, "none" reads it all and raises where there is a border.
        users: label map to use, e.g. the real set's for generated images; default: the users found.
        order: what numbers the windows, see `mdlib.data.files.scan`.
        scale: grey values of more than 8 bits that become 0 and 255; None: the range of the set.
        plain: take one user, and folders without users too; the only user is then `mdlib.data.files.UNKNOWN`.

    Raises:
        DataError: see `find_windows`; also images that are unreadable, differ in size or colour map, or have a border.
    """
    if channels not in (1, 3):
        raise DataError(f"channels={channels}: choose 1 (intensity) or 3 (RGB)")
    if channels == 1 and colormap != "auto":
        colormap_table(colormap)  # DataError if there is no such map
    root = Path(root)
    files = find_windows(root, min_users=0 if plain else 2 if users is None else 1, order=order)
    users = tuple(sorted({f.user for f in files}) if users is None else users)
    if unknown := {f.user for f in files} - set(users):
        raise DataError(f"{root}: ID_{min(unknown)} is not among the users {', '.join(map(str, users))}")
    colormap = colormap if channels == 1 else "none"

    images, about = read_images(root, files, size, colormap, crop, scale)
    for note in about.notes:
        warnings.warn(f"{root}: {note}", stacklevel=2)
    labels = torch.tensor([users.index(f.user) for f in files])
    return WindowSet(images, labels, users, tuple(files), about.colormap, str(root), about)
