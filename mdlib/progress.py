"""One progress bar for terminals, notebooks and batch logs: rate and time left, throttled where nobody watches."""

import os
import sys

from tqdm.auto import tqdm as notebook_or_terminal
from tqdm.std import tqdm as text_bar


def bar(total: int, description: str, initial: int = 0, unit: str = "step", show: bool = True):
    """A tqdm bar over `total` units. Batch runs (papermill, Kaggle's Save & Run All) get plain text on stdout:
    a widget bar would be a dead picture there."""
    common = dict(total=total, desc=description, initial=initial, unit=unit, disable=not show)
    if batch_run():
        line = "{desc}: {n_fmt}/{total_fmt} {percentage:3.0f}% [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        return text_bar(**common, file=sys.stdout, mininterval=5, bar_format=line)
    return notebook_or_terminal(**common)


def batch_run() -> bool:
    """True when nobody can see widgets: under papermill through `mdlib.run`, or a Kaggle batch kernel."""
    return os.environ.get("MDLIB_BATCH") == "1" or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"
