"""What a report is computed from: real and generated windows, which of them are compared, and the networks that are
trained on them."""

import inspect
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch

from mdlib.data.augment import classical_augmentation, cutmix
from mdlib.data.checks import seen_people
from mdlib.data.windows import WindowSet, concatenate
from mdlib.models.classifier import Embedder, ResNet18, SmallCNN
from mdlib.models.pretrained import fits_windows, pretrained_backbone
from mdlib.training.capture import MODES
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.training.latents import decode_all, encode_all
from mdlib.utils import DataError, bar, best_device

Network = SmallCNN | ResNet18 | Embedder
# Sets that are compared: generated windows with unseen real ones; the halves of the unseen ones with each other; the
# generator's training windows with the unseen ones, which is what a perfect copier would get.
COMPARED = {"value": ("generated", "unseen"), "real_vs_real": ("first", "second"), "train": ("train", "unseen")}

REFERENCES = ("auto", "resnet18", "none")
FOLDS = 3  # of users, each held out in one


@dataclass(frozen=True)
class Protocol:
    """Settings of the evaluation."""

    evaluation_steps: int = 400  # optimizer steps of each classifier
    seeds: int = 3  # classifiers per arm
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5)  # of generated windows in a batch; validation windows choose
    counts: tuple[int, ...] | None = None  # generated windows per user for gain_by_windows; None: TIMES real ones
    multiples: tuple[int, ...] = (2,)  # of the real windows, for the arms real_x2 …, where there are spare ones
    reference: str = "auto"  # ResNet-18 on a GPU; resnet18: always; none: never
    backbone: str = "auto"  # of the pretrained arms: auto (attached or shipped), none, or the folder of a SmallCNN
    evaluation_compile: str = "auto"  # of the classifiers' training, see `TrainConfig.compile`

    def __post_init__(self):
        if self.seeds < 1:
            raise DataError(f"seeds must be 1 or more, got {self.seeds}")
        counts = self.counts or ()
        if any(not isinstance(n, int) or n < 1 for n in counts) or len(set(counts)) < len(counts):
            raise DataError(f"counts must be different whole numbers of 1 or more, got {list(counts)}")
        if any(not isinstance(n, int) or n < 2 for n in self.multiples):
            raise DataError(f"multiples must be whole numbers of 2 or more, got {list(self.multiples)}")
        for name, known in (("reference", REFERENCES), ("evaluation_compile", MODES)):
            if (value := getattr(self, name)) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class Evidence:
    """Windows of one size and one label map."""

    train: WindowSet  # the generator's training windows
    val: WindowSet  # chose its checkpoints
    test: WindowSet  # not used before the evaluation
    generated: WindowSet
    gap: int  # windows whose numbers differ by this much or more share no step
    codec: torch.nn.Module | None = None  # the pipeline's
    speckle: dict = field(default_factory=dict)  # the pipeline's, see `mdlib.data.speckle`
    spare: WindowSet | None = None  # real windows between training windows, for the arms real_x2 … only
    split: dict = field(default_factory=dict)  # the split file: how windows are read, and their contents

    def __post_init__(self):
        codec, users = self.codec, self.train.num_users
        if codec is not None and codec.conditional and codec.config.num_users != users:
            raise DataError(f"the codec was trained with {codec.config.num_users} users, these windows have {users}")

    @property
    def added(self) -> WindowSet:
        """The generated windows that are added to real ones: only those of users in conditions that their training
        windows lack, if there are such windows; otherwise all."""
        return self.generated.select(self._unrecorded) if self.has_unrecorded else self.generated

    @property
    def has_unrecorded(self) -> bool:
        """Whether some generated windows show users in conditions in which training windows show other users only."""
        return bool(self._unrecorded.any())

    @property
    def _unrecorded(self) -> torch.Tensor:
        recorded, known = {(file.user, file.condition) for file in self.train.files}, set(self.train.conditions)
        pairs = [(file.user, file.condition) for file in self.generated.files]
        return torch.tensor([pair not in recorded and pair[1] in known for pair in pairs])

    @property
    def unseen(self) -> WindowSet:
        """Validation and test windows: real ones the generator was not trained on."""
        return concatenate(self.val, self.test)

    @property
    def blocks(self) -> np.ndarray:
        """Block id (N,) of each test window, see `bootstrap_blocks`."""
        return bootstrap_blocks(self.test, self.gap)


def by_recording(windows: WindowSet):
    """Window numbers grouped by recording, in the order of the windows."""
    return pd.DataFrame(list(windows.files)).groupby(["user", "condition", "recording"], sort=False)["number"]


def time_blocks(windows: WindowSet, gap: int) -> np.ndarray:
    """Block id (N,) of each window: `gap` consecutive windows of a recording are one block."""
    recordings = by_recording(windows)
    place = recordings.transform(lambda numbers: (numbers - numbers.min()) // gap)
    return place.groupby([recordings.ngroup(), place]).ngroup().to_numpy()


def bootstrap_blocks(windows: WindowSet, gap: int) -> np.ndarray:
    """Block id (N,) of each window for intervals: three gaps, because a block must be long against the overlap (Künsch
    1989). With windows that overlap by three quarters, 95 % intervals covered the truth in 92 to 96 of 100 trials."""
    return time_blocks(windows, 3 * gap)


def halves(windows: WindowSet, gap: int) -> list[list[int]]:
    """Rows of two halves of real windows that share no step: each stretch of 2·gap windows of a recording goes to the
    half with fewer windows of its user in its condition, without those at its beginning that overlap the other half."""
    stretch, chosen, sizes = time_blocks(windows, 2 * gap), [[], []], Counter()
    for (user, condition, _), numbers in by_recording(windows):
        last, half = [-np.inf, -np.inf], {}  # number of the last window of each half; half of each stretch
        for row, number in numbers.sort_values(kind="stable").items():
            fewest = min((0, 1), key=lambda one: (sizes[one, user, condition], sizes[one, user]))
            one = half.setdefault(stretch[row], fewest)
            if number - last[1 - one] >= gap:
                chosen[one].append(row)
                last[one] = number
                sizes.update([(one, user, condition), (one, user)])
    return chosen


def first_of_each(windows: WindowSet, count: int) -> WindowSet:
    """`count` windows of each user, from the user's conditions in turn."""
    frame = pd.DataFrame(list(windows.files))
    frame["place"] = frame.groupby(["user", "condition"]).cumcount()
    first = frame.sort_values(["user", "place"], kind="stable").groupby("user").head(count)
    return windows.select(sorted(first.index))


def compared_sets(evidence: Evidence) -> dict[str, WindowSet]:
    """The sets of COMPARED by name; of the generated windows those of users in conditions in which unseen windows show
    them, where there are such."""
    unseen, generated = evidence.unseen, evidence.generated
    first, second = (unseen.select(rows) for rows in halves(unseen, evidence.gap))
    known = {(file.user, file.condition) for file in unseen.files}
    same = torch.tensor([(file.user, file.condition) in known for file in generated.files])
    generated = generated.select(same) if same.any() else generated
    return dict(generated=generated, unseen=unseen, train=evidence.train, first=first, second=second)


def balanced_rows(sets: dict[str, WindowSet], seed: int) -> dict[str, torch.Tensor]:
    """Rows sampled from each set: of each user the number that the smallest set has of that user."""
    least = torch.stack([torch.bincount(part.labels, minlength=part.num_users) for part in sets.values()]).min(0).values
    rows = {}
    for place, (name, part) in enumerate(sets.items()):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(1000 * place + seed))
        rows[name] = torch.cat([order[part.labels[order] == user][:k] for user, k in enumerate(least.tolist())])
    return rows


def through_codec(codec: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Reconstructions in [−1, 1] of uint8 images (N, C, H, W); labels (N,) for a conditional codec."""
    return decode_all(codec, encode_all(codec, images, "latents", labels=labels), labels=labels)


def find_backbone(choice: str, windows: WindowSet) -> str:
    """The folder that a protocol's `backbone` stands for; "" if there is none, or if it was trained on the people in
    these windows. DataError if a given folder does not fit."""
    channels = windows.images.shape[1]
    if choice == "auto":
        found = pretrained_backbone(channels)
        return str(found) if found and not seen_people(found, windows.root) else ""
    if choice in ("", "none"):
        return ""
    if not fits_windows(choice, channels):
        raise DataError(f"backbone: {choice} holds no SmallCNN for {channels} channels: give a pretrained identifier/")
    if seen_people(choice, windows.root):
        raise DataError(f"backbone: {choice} was trained on the simulated people in {windows.root}")
    return choice


def train_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    outputs: int,
    steps: int,
    seed=0,
    backbone: str = "",
    compile: str = "auto",
    kind: type[Network] = SmallCNN,
) -> Network:
    """A network of that kind trained on uint8 images (N, C, S, S) and labels (N,) with the classical augmentation of
    `mdlib.data.augment`, a classifier with CutMix as well; the same for the same seed.

    Args:
        outputs: number of users, or size of an `Embedder`.
        backbone: folder of a SmallCNN that all but the last layer is taken from; "": from scratch.
        compile: see `TrainConfig`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = kind.from_backbone(backbone, outputs) if backbone else kind(outputs, images.shape[1])
        network.to(memory_format=torch.channels_last)
    how = dict(batch_size=32, learning_rate=2e-3, warmup_steps=steps // 10, weight_decay=1e-2)
    config = TrainConfig(steps=steps, seed=seed, evaluate_every=steps, compile=compile, **how)

    def augmented(*batch_and_generator):
        batch, generator = classical_augmentation(*batch_and_generator), batch_and_generator[-1]
        return batch if kind is Embedder else cutmix(*batch, outputs, generator)

    fit(network, Batches((images, labels), augmented), config, progress=False)
    return network


def trained_once(
    kind: type[Network], folder: str | Path | None, images: torch.Tensor, labels: torch.Tensor, *arguments
) -> Network:
    """`train_classifier`, or the network in `folder` that was trained with the same arguments."""
    if not folder:
        return train_classifier(images, labels, *arguments, kind=kind)
    backbone = Path(arguments[3]) if arguments[3:] and arguments[3] else None  # other weights in it: trained again
    start = [file.read_bytes() for file in backbone.glob("*.safetensors")] if backbone else []
    key = (kind.__name__, arguments, start, source_code(kind), images.numpy(), labels.numpy())
    path = Path(folder) / joblib.hash(key)
    if path.exists():
        with suppress(Exception):  # damaged: trained again
            return kind.from_pretrained(path).to(best_device())
        shutil.rmtree(path)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    train_classifier(images, labels, *arguments, kind=kind).save_pretrained(unfinished)
    try:
        unfinished.rename(path)
    except OSError:  # another run on the same split was faster
        shutil.rmtree(unfinished)
    return kind.from_pretrained(path).to(best_device())


@cache
def source_code(kind: type) -> list[str]:
    """The code that decides how a network is trained: networks of another version are trained again."""
    return [
        inspect.getsource(inspect.getmodule(part))
        for part in (kind, SmallCNN, classical_augmentation, fit, train_classifier)
    ]


def train_each(jobs: list[tuple], about: str) -> Iterator[Network]:
    """`trained_once` of each job's arguments, in order, with a progress bar about them. On a CPU each takes one core
    and as many train at a time as torch has threads: small networks gain little from a second thread."""
    once, found = joblib.delayed(trained_once), joblib.Parallel(training_at_once(), return_as="generator")
    with bar(len(jobs), about, unit="classifier") as progress:
        for network in found(once(*job) for job in jobs):
            progress.update()
            yield network


def training_at_once() -> int:
    """How many classifiers train at a time: 1 on a GPU, on a CPU as many as torch has threads, at most 4 for memory."""
    return 1 if best_device() == "cuda" else min(torch.get_num_threads(), 4)
