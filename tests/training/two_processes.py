"""What test_distributed.py starts in two processes: `torchrun --nproc_per_node=2 two_processes.py FOLDER`.

Each process writes what it saw to FOLDER/<rank>.pt; then a loss fails in one of them.
"""

import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from test_fit import CONFIG, Line, line, points
from torch import nn

import mdlib.training.fit
from mdlib.models.vqvae import VQVAE
from mdlib.training.fit import Batches, fit

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
HALF = replace(CONFIG, batch_size=CONFIG.batch_size // 2)
QUIET = Batches(points().tensors)  # without noise


@contextmanager
def alone():
    """As a process that trains alone."""
    kept = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    yield
    os.environ.update(kept)
    PartialState._reset_state()


def without_noise() -> Line:
    model = line()
    model.dropout = nn.Identity()
    if RANK == 1:  # to no effect: all begin with the first one's weights
        nn.init.zeros_(model.weight.weight)
    return model


def small_codec() -> VQVAE:
    torch.manual_seed(0)
    sizes = dict(image_size=16, block_out_channels=(8, 8), norm_num_groups=4)
    codec = VQVAE(**sizes, num_codes=64, code_dim=4)
    codec.quantizer.decay, codec.quantizer.revive_below = 0.7, 0.5
    return codec


class Uneven(nn.Module):
    """A batch norm, and a weight that the loss does not reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.never = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Parameter(torch.ones(3))

    def loss(self, x, y):
        return (self.norm(self.first(x)) - y).square().mean(), {}


class FailsInOne(Line):
    def loss(self, x, y):
        if RANK == 1:
            raise ValueError("label 9 is out of range")
        return super().loss(x, y)


def train(model, data, config, *where, **others) -> tuple[dict, list]:
    """Weights and history."""
    history = fit(model, data, config, *where, progress=False, **others)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history]
    return {key: value.clone() for key, value in model.state_dict().items()}, rows


def error(*arguments, **others) -> str:
    try:
        train(*arguments, **others)
    except (Exception, SystemExit) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "none"


def comparable(config) -> dict:
    """Runs whose end depends on the samples a step sees, not on how many processes share them."""
    images = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gentle = replace(config, steps=4, accumulation=2, learning_rate=0.005)
    return {
        "line": train(without_noise(), QUIET, config, held_out=Batches(points(9).tensors)),
        "accumulated": train(without_noise(), QUIET, replace(config, accumulation=3)),
        "codec": train(small_codec(), Batches((images,)), gentle, held_out=Batches((images[:8],))),
    }


def shown() -> list:
    """(samples, a draw from the transform's generator, one from torch's own) of each forward pass."""
    passes = []

    def transform(number, generator):
        passes.append((number.tolist(), float(torch.rand((), generator=generator)), float(torch.rand(()))))
        return torch.ones(len(number), 4), number[:, None].float()

    fit(line(), Batches((torch.arange(37),), transform), replace(HALF, accumulation=2), name="Shown")
    return passes


def written(folder: Path) -> list[str]:
    """Names of the files that this process opens for writing in `folder` from now on; the list grows."""
    names = []

    def watch(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and folder in Path(str(arguments[0])).parents:
            names.append(Path(arguments[0]).name)

    sys.addaudithook(watch)
    return names


def broken(*arguments, **others) -> str:
    """How training ends when the first process finds the session's time up at step 9."""

    def end(model, step):
        os.environ["MDLIB_DEADLINE"] = "1" if step == 9 else "9e12"

    os.environ["MDLIB_DEADLINE"] = "9e12"
    ended = error(*arguments, **others, preview=end)
    os.environ["MDLIB_DEADLINE"] = ""
    return ended


def together() -> dict:
    """Everything that two processes do."""
    held = dict(held_out=points(20))
    infinite_in_one = Batches(QUIET.tensors, lambda x, y, g: (x * (torch.inf if RANK == 1 else 1), y))
    seen = dict(
        together=comparable(HALF),
        # One process of the whole batch began it.
        continued=train(without_noise(), QUIET, HALF, FOLDER / "continued"),
        refused=error(without_noise(), QUIET, CONFIG, FOLDER / "continued"),
        shown=shown(),
        written=written(FOLDER / "whole"),
        whole=train(
            line(), points(), HALF, FOLDER / "whole", **held,
            evaluate=lambda model: {"rank": RANK},
        ),
        unbroken=train(line(), points(), HALF, FOLDER / "unbroken", **held),
        broken=broken(line(), points(), HALF, FOLDER / "broken", **held),
        resumed=train(line(), points(), HALF, FOLDER / "broken", **held),
        infinite=error(line(), infinite_in_one, HALF, name="Line"),
        uneven=train(Uneven(), points(), replace(HALF, weight_decay=0.1, ema_decay=0.0)),
    )  # fmt: skip
    if RANK == 1:  # a clock that stands: this process by itself never finds its budget spent
        mdlib.training.fit.time = SimpleNamespace(monotonic=lambda: 0.0)
    seen["budget"] = train(line(), points(), replace(HALF, max_minutes=1e-6))
    mdlib.training.fit.time = time
    return seen


seen = {}
with alone():
    if RANK == 0:
        seen["alone"] = comparable(CONFIG)
        train(without_noise(), QUIET, replace(CONFIG, max_minutes=1e-6), FOLDER / "continued")
seen |= together()
torch.save(seen, FOLDER / f"{RANK}.pt")
fit(FailsInOne(), points(), HALF, progress=False)
