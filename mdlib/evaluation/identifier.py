"""The identifier: the best classifiers of a run, which name the user of new windows or answer "unknown"."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from scipy.special import expit, logit, stdtrit
from sklearn.metrics import roc_curve
from torch import nn

from mdlib.data.files import UNKNOWN
from mdlib.data.image_files import Reader
from mdlib.data.reading import hashes
from mdlib.data.windows import WindowSet, load_windows, to_uint8
from mdlib.evaluation.augmentation_study import Arms, chosen_arm, mixed
from mdlib.evaluation.evidence import FOLDS, Evidence, Protocol, train_each
from mdlib.evaluation.metrics import bootstrapped, equal_error_rate, metric, unmeasured
from mdlib.models.classifier import SmallCNN
from mdlib.utils import DataError, atomic_file, best_device, count, read_json, readable

FALSE_REJECTION = 0.05  # of correctly classified windows, or recordings, of known users
NO_THRESHOLD = "a threshold needs three users or more, each with correctly classified validation windows"
REMEDY = "restore it, or write the identifier again (run --from 06)"


class Identifier(ModelMixin, ConfigMixin):
    """An ensemble of classifiers with different seeds, averaged to P(user).

    Args:
        users: the label map: users[label] is the k of folder ID_k.
        ensemble: number of classifiers, `SmallCNN(len(users), channels, **network)`.
        image_size: side in pixels to which windows are reduced.
        colormap: of the images that it was trained on; "none" with 3 channels.
        reading: colormap, crop, order and scale for new folders, options of `load_windows`.
        threshold: P(user) below which a window is "unknown"; 0 names every window.
        recording_threshold: P(user) below which a recording is "unknown".
        trained_on: contents (`mdlib.data.reading.hashes`) of the windows that it was trained on or chosen by, or that
            overlap those: accuracies leave them out.
    """

    @register_to_config
    def __init__(
        self,
        users: list[int],
        ensemble: int = 1,
        image_size: int = 64,
        channels: int = 1,
        network: dict = {},  # noqa: B006
        colormap: str = "jet",
        reading: dict = {},  # noqa: B006
        threshold: float = 0.0,
        recording_threshold: float = 0.0,
        trained_on: list[str] = [],  # noqa: B006
    ):
        super().__init__()
        if not 0 <= threshold <= 1:
            raise DataError(f"threshold must be between 0 and 1, got {threshold}")
        self.users, self.threshold, self.recording_threshold = list(users), threshold, recording_threshold
        self.networks = nn.ModuleList(SmallCNN(len(users), channels, **network) for _ in range(ensemble))

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> "Identifier":
        """The identifier in a folder; DataError if it holds none, or a damaged one."""
        config = Path(path) / "config.json"
        if not config.exists() or read_json(config, REMEDY).get("_class_name") != cls.__name__:
            raise DataError(f"{path} holds no identifier: give the identifier/ folder of a run")
        try:
            with readable(path, REMEDY):
                return super().from_pretrained(path, **options)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: config.json and weights do not fit, or one is missing: {REMEDY}") from error

    def forward(self, images: torch.Tensor | list[Image.Image]) -> torch.Tensor:
        """P(user) (N, users) of windows of any size: uint8, or floating point in [−1, 1], (N, channels, H, W); or a
        list of images, coloured as the training windows."""
        channels, colormap = self.config.channels, self.config.colormap
        if isinstance(images, torch.Tensor):
            if images.ndim != 4 or images.shape[1] != channels:
                raise DataError(f"images must have the shape (N, {channels}, H, W), got {tuple(images.shape)}")
            images = (to_uint8(images) if images.is_floating_point() else images).cpu().numpy()
            pixels, colormap = (images[:, 0], "grey") if channels == 1 else (np.moveaxis(images, 1, 3), "none")
        else:
            if deep := {one.mode for one in images} & {"I;16", "I;16B", "I", "F"}:
                raise DataError(f"images of mode {min(deep)} have no fixed value range: identify their folder")
            pixels = [np.asarray(one.convert("L" if one.mode in ("1", "L") else "RGB")) for one in images]
        reader = Reader(self.config.image_size, colormap)
        windows = [torch.tensor(reader.reduced(one)) for one in pixels]
        if not windows:
            return torch.empty(0, len(self.users))
        return torch.stack([network.probabilities(torch.stack(windows)) for network in self.networks]).mean(0)

    def predict(self, probabilities: torch.Tensor) -> list[str]:
        """The answer to each row of probabilities (N, users): "ID_k", or "unknown" below the threshold."""
        sure, labels = probabilities.max(1)
        return [f"ID_{self.users[i]}" if p >= self.threshold else "unknown" for p, i in zip(sure, labels, strict=True)]


def best_identifier(
    evidence: Evidence, arms: Arms, protocol: Protocol, folder: str | Path | None = None
) -> tuple[Identifier, dict]:
    """The classifiers of the arm that is most accurate on validation windows (mean over seeds; the first of equals),
    and the section `identifier` of the report. `folder` saves the threshold's classifiers of real windows."""
    train, val, test, split = evidence.train, evidence.val, evidence.test, evidence.split
    arm = chosen_arm(arms.networks, evidence)
    networks, reading, contents = arms.networks[arm], split.get("reading", {}), split.get("hashes", {})
    scale = {"scale": train.about.scale} if train.about and train.about.scale else {}
    identifier = Identifier(
        list(train.users),
        len(networks),
        image_size=train.images.shape[-1],
        channels=networks[0].config.channels,
        network={name: networks[0].config[name] for name in ("widths", "image_size")},
        colormap=train.colormap,
        reading={key: value for key, value in reading.items() if key != "channels"} | scale,
        trained_on=sorted(contents[path] for path in contents.keys() - set(test.paths)),
    ).to(networks[0].device)
    for own, given in zip(identifier.networks, networks, strict=True):
        own.load_state_dict(given.state_dict())
    table, recordings = tables(identifier, val)
    of_test, of_recordings = (_right(one).to_numpy(float) for one in tables(identifier, test))
    windows = mixed(train, evidence.added, arms.fraction) if arm.endswith("generated") else train
    folder, backbone = None if arm.endswith("generated") else folder, arms.backbone * arm.startswith("pretrained")
    limit = open_set_rates(windows, val, protocol, folder, backbone)
    for name, every in (("threshold", table), ("recording_threshold", recordings)):
        sure = every["probability"][_right(every)]
        limit[name] = unmeasured(NO_THRESHOLD) | {"value": 0.0}
        if len(sure) and limit["equal_error_rate"]["value"] is not None:
            limit[name] = metric(lower_limit(sure.to_numpy()), len(sure))
        setattr(identifier, name, limit[name]["value"])
        identifier.register_to_config(**{name: limit[name]["value"]})
    return identifier, {
        "arm": arm,
        "validation_accuracy": metric(float(_right(table).mean()), len(table)),
        "accuracy": bootstrapped(of_test, evidence.blocks),
        "recording_accuracy": metric(float(of_recordings.mean()), len(of_recordings)),
        **limit,
    }


def lower_limit(probabilities: np.ndarray) -> float:
    """The probability below which 5 % of further correct predictions are expected, given some (N,): the 5 % quantile;
    with fewer than twenty, Student's prediction limit of the logits; with one, 0."""
    count = len(probabilities)
    if count >= 1 / FALSE_REJECTION:
        return float(np.quantile(probabilities, FALSE_REJECTION, method="lower"))
    if count < 2:
        return 0.0
    logits = logit(probabilities.clip(1e-6, 1 - 1e-6))
    reach = stdtrit(count - 1, 1 - FALSE_REJECTION) * logits.std(ddof=1) * (1 + 1 / count) ** 0.5
    return float(expit(logits.mean() - reach))


def _right(table: pd.DataFrame) -> pd.Series:
    return table["user"] == table["true_user"]


def open_set_rates(
    train: WindowSet, val: WindowSet, protocol: Protocol, folder: str | Path | None = None, backbone: str = ""
) -> dict:
    """false_acceptance, false_rejection and equal_error_rate, as metrics, by people whom classifiers do not know.

    Each user is held out in one of three folds. A classifier of the other users' training windows gives each validation
    window its largest P(user): those of held-out users are impostors, and those of the other users that are
    classified correctly are genuine. The threshold rejects the least confident 5 % of the genuine windows; few windows
    are too little evidence for a stricter one.
    """
    groups, jobs, known = np.array_split(np.random.default_rng(0).permutation(train.num_users), FOLDS), [], []
    for held in groups if train.num_users >= 3 else ():
        others = train.select(~torch.isin(train.labels, torch.from_numpy(held)))
        users, labels = others.labels.unique(return_inverse=True)
        how = (protocol.evaluation_steps, 0, backbone, protocol.evaluation_compile)
        jobs.append((SmallCNN, folder, others.images, labels, len(users), *how))
        known.append(users)
    trained, scores, genuine = train_each(jobs, "classifiers with users left out"), [], []
    for users, network in zip(known, trained, strict=True):
        sure, place = network.probabilities(val.images).max(1)
        unknown, right = ~torch.isin(val.labels, users), users[place] == val.labels
        scores += sure[unknown | right].tolist()
        genuine += right[unknown | right].tolist()
    if len(set(genuine)) < 2:
        return dict.fromkeys(("false_acceptance", "false_rejection", "equal_error_rate"), unmeasured(NO_THRESHOLD))
    false, true, _ = roc_curve(genuine, scores, drop_intermediate=False)
    place, of_genuine = (true >= 1 - FALSE_REJECTION).argmax(), sum(genuine)
    return {
        "equal_error_rate": metric(equal_error_rate(false, true), len(scores)),
        "false_acceptance": metric(float(false[place]), len(scores) - of_genuine),
        "false_rejection": metric(float(1 - true[place]), of_genuine),
    }


def tables(identifier: Identifier, windows: WindowSet) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table of windows and one of recordings. Columns: path (or number of windows), recording, true_user ("" in plain
    folders), user (the answer), probability (the largest), and P of each user, ID_k.

    Probabilities of a recording are the means of its windows'.
    """
    every = pd.DataFrame(identifier(windows.images), columns=[f"ID_{user}" for user in identifier.users])
    users = ["" if file.user == UNKNOWN else f"ID_{file.user}" for file in windows.files]
    above = [(file.condition, user, file.recording) for file, user in zip(windows.files, users, strict=True)]
    names = ["/".join(filter(None, folders)) or "." for folders in above]
    facts = pd.DataFrame({"path": windows.paths, "recording": names, "true_user": users})
    groups = facts.groupby("recording", sort=False)
    of_recordings = groups.agg(windows=("path", "size"), true_user=("true_user", "first")).reset_index()
    means = every.groupby(facts["recording"], sort=False).mean().reset_index(drop=True)
    found = ((facts, every, identifier.threshold), (of_recordings, means, identifier.recording_threshold))
    answer = lambda rows, limit: rows.idxmax(axis=1).where(rows.max(axis=1) >= limit, "unknown")
    return tuple(
        about.assign(user=answer(rows, limit), probability=rows.max(axis=1)).join(rows) for about, rows, limit in found
    )


def identify_folder(
    identifier: str | Path,
    data: str | Path,
    out: str | Path = "predictions.csv",
    threshold: float | None = None,
    **reading: str,
) -> str:
    """Name the users of a folder's windows: writes `tables` to `out` (.csv) and NAME-recordings.csv, returns a summary.

    Args:
        identifier: RUN/identifier.
        data: folders of users, or a plain folder (see `mdlib.data.files.scan`).
        threshold: P(user) below which a window or a recording is "unknown"; None: the identifier's two thresholds.
        reading: colormap, crop, order (see `load_windows`); "": as the identifier's own windows were read.

    Raises:
        DataError: see `load_windows`; also an identifier or a threshold that cannot be used.
    """
    limits = {} if threshold is None else dict(threshold=threshold, recording_threshold=threshold)
    known, out = Identifier.from_pretrained(identifier, **limits).to(best_device()), Path(out)
    config, given = known.config, {key: value for key, value in reading.items() if value}
    how = dict(size=config.image_size, channels=config.channels, plain=True)
    windows = load_windows(data, **how | config.reading | given)
    found = tables(known, windows)
    for path, table in zip((out, out.with_name(f"{out.stem}-recordings{out.suffix}")), found, strict=True):
        with atomic_file(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
    sizes = " in ".join(count(len(table), what) for table, what in zip(found, ("window", "recording"), strict=True))
    unknown = " and ".join(str((table["user"] == "unknown").sum()) for table in found)
    line = f"{out}: {sizes}, unknown: {unknown}"
    mine = torch.tensor([file.user in known.users for file in windows.files])
    contents, seen = hashes(windows.root, windows.paths), set(config.trained_on)
    new = mine & torch.tensor([contents[path] not in seen for path in windows.paths])
    if new.any():
        right = [100 * (table["user"] == table["true_user"]).mean() for table in tables(known, windows.select(new))]
        line += f"; accuracy {right[0]:.1f} % by window, {right[1]:.1f} % by recording"
    if left := int((mine & ~new).sum()):
        line += f"; not counted: {count(left, 'window')} outside the test part of the identifier's data"
    return line
