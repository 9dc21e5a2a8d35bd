"""The check of a trained codec on a folder of windows."""

from pathlib import Path

from mdlib.data.splits import apply_split, read_split
from mdlib.data.windows import load_windows
from mdlib.evaluation.codec_quality import check_codec
from mdlib.evaluation.evidence import through_codec
from mdlib.reports import plots
from mdlib.systems import load_codec
from mdlib.utils import DataError, best_device, readable, to_float

SHOWN = 8  # windows in the image


def check_codec_folder(
    folder: str | Path, data: str | Path, out: str | Path | None = None, split: str | Path | None = None, **reading: str
) -> dict:
    """`check_codec` of the codec/ folder of a run on the windows of a data folder; returns its metrics.

    Args:
        out: file for an image of windows, their reconstructions and the differences; None draws none.
        split: a split file, whose validation windows are checked; None checks all windows.
        reading: colormap and crop of `load_windows`, else the split's.

    Raises:
        DataError: no codec, or one conditioned on another number of users.
    """
    with readable(folder, "restore it, or train it again"):
        codec = load_codec(folder).to(best_device()).eval()
    sizes = dict(size=codec.config.image_size, channels=codec.config.in_channels)
    parts = read_split(split) if split else {}
    windows = load_windows(data, **{**parts.get("reading", {}), **{k: v for k, v in reading.items() if v}, **sizes})
    if (users := getattr(codec.config, "num_users", 0)) not in (0, windows.num_users):
        raise DataError(f"{folder} is conditioned on {users} users, {data} has {windows.num_users}: give its own data")
    windows = apply_split(windows, parts)["val"] if split else windows
    if out:
        some = windows.select(slice(None, None, -(-len(windows) // SHOWN)))
        decoded = through_codec(codec, some.images, some.labels)
        plots.reconstructions(to_float(some.images), decoded, windows.colormap).savefig(out)
    return check_codec(codec, windows.images, windows.labels)
