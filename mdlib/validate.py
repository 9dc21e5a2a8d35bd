"""The evaluation protocol: real and generated windows in, report.json and report.html out.

Every figure is measured here on windows the generator was not trained on, carries its n and, where it is an estimate,
a 95 % interval; Fréchet distances have none, because redrawing windows would bias them. What was not measured is null
with its reason.
"""

import hashlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from mdlib import __version__, kinematics, metrics
from mdlib.augment import enlarge, stride_shift
from mdlib.data import DataError, WindowSet, to_float, to_uint8
from mdlib.judge import Judge, train_judge
from mdlib.latents import encode_all
from mdlib.nn import parts as batches
from mdlib.pipeline import best_device
from mdlib.progress import bar
from mdlib.quality import choose_codec

NOT_YET = "not yet measured by this version"
OTHER_LABEL = ("psnr_db_other_label", "taken_for_other_label")
COMPARED = {"fd": ("generated", "unseen"), "fd_real_vs_real": ("first", "second"), "fd_train": ("train", "unseen")}


@dataclass(frozen=True)
class Protocol:
    """How much work the evaluation does; what it does is fixed."""

    judge_steps: int = 400  # optimizer steps of each judge and each classifier
    seeds: int = 3  # judges, and classifiers an arm
    shares: tuple[float, ...] = (0.125, 0.25, 0.5)  # of generated windows in a batch; validation windows choose
    counts: tuple[int, ...] = ()  # generated windows a user with which the gain is measured too, besides all
    variants: int = 8  # stride-recombined copies of each window in every arm's training set
    batch_size: int = 64

    def __post_init__(self):
        if any(not isinstance(n, int) or n < 1 for n in self.counts) or len(set(self.counts)) < len(self.counts):
            raise DataError(f"counts must be different whole numbers of 1 or more, got {list(self.counts)}")


@dataclass(frozen=True)
class Evidence:
    """What a report is made from: one image size, one label map.

    train: what the generator was trained on; val chose its checkpoints; test was kept for the end.
    generated: windows of the same users; codec: the pipeline's, or None when only folders are at hand.
    rival: a codec of the other kind (KL beside VQ), trained on the same windows at the same latent grid.

    Raises:
        DataError: a rival of another size or latent grid.
    """

    train: WindowSet
    val: WindowSet
    test: WindowSet
    generated: WindowSet
    gap: int
    codec: torch.nn.Module | None = None
    rival: torch.nn.Module | None = None

    def __post_init__(self):
        for codec in (self.codec, self.rival):
            if codec is not None and codec.conditional and codec.config.num_users != self.train.num_users:
                raise DataError(
                    f"the codec was told {codec.config.num_users} users, these windows are of {self.train.num_users}"
                )
        if self.codec is None or self.rival is None:
            return
        codec, rival = (_sizes(one) for one in (self.codec, self.rival))
        if codec != rival:
            raise DataError(f"codec ({codec}) and rival ({rival}) differ: train both at one size and one latent grid")


def evaluate(
    evidence: Evidence,
    protocol: Protocol = Protocol(),
    about: dict | None = None,
    judges_folder: str | Path | None = None,
) -> dict:
    """The report as a dictionary with the protocol's stable keys.

    Args:
        about: what the reader should know of the run (system, preset, data …), copied into the report.
        judges_folder: keeps the judges of real windows: runs on the same split are then measured by the very same ones.
    """
    arms_and_judges = 4 + len(_counts(evidence, protocol))
    with bar(arms_and_judges * protocol.seeds + len(protocol.shares), "judges", unit="judge") as progress:
        judges = unseen_judges(evidence, protocol, progress, judges_folder)
        arms = train_arms(evidence, protocol, progress, judges_folder)
    report = {
        "mdlib": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "about": about or {},
        "windows": {name: len(getattr(evidence, name)) for name in ("train", "val", "test", "generated")},
        "users": list(evidence.train.users),
        "reconstruction": reconstruction(evidence, arms),
        "codebook": codebook(evidence),
        "identity": identity(evidence, judges),
        "augmentation": augmentation(evidence, protocol, arms),
        "fidelity": fidelity(evidence, arms),
        "memorisation": memorisation(evidence),
        "physics": physics(evidence),
    }
    report["verdict"] = verdict(report["augmentation"])
    return report


# Judges ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arms:
    """The classifiers of the augmentation study, one a seed in each arm, and their correctness on the test windows."""

    judges: dict[str, list[Judge]]
    correct: dict[str, np.ndarray]  # arm → (seeds, N) bool
    share: float  # of generated windows in real_plus_generated
    by_count: dict[int, np.ndarray] = field(
        default_factory=dict
    )  # real_plus_generated with so many generated windows a user → (seeds, N) bool


def unseen_judges(evidence: Evidence, protocol: Protocol, progress, folder: str | Path | None = None) -> list[Judge]:
    """Judges trained on validation and test windows: real ones the generator was not trained on. Their own accuracy is
    read on the generator's training windows, which they have not seen and which generated windows imitate."""
    unseen = concatenate(evidence.val, evidence.test)
    judges = []
    for seed in range(protocol.seeds):
        images, labels = enlarge(unseen.images, unseen.labels, protocol.variants, seed)
        judges.append(_train(images, labels, unseen.num_users, seed, protocol, folder))
        progress.update()
    return judges


def train_arms(evidence: Evidence, protocol: Protocol, progress, folder: str | Path | None = None) -> Arms:
    """Classifiers from scratch on the generator's own training windows, with and without generated ones: equal steps,
    the same classical augmentation in every arm, the test windows untouched."""
    train, test = evidence.train, evidence.test
    share = _chosen_share(evidence, protocol, progress)
    counts = _counts(evidence, protocol)
    few = {count: replace(evidence, generated=first(evidence.generated, count)) for count in counts}
    judges: dict[str | int, list[Judge]] = {}
    for seed in range(protocol.seeds):
        real, made = _enlarged(evidence, protocol, seed)
        sets = {"real_only": real, "real_plus_generated": _mixed(real, made, share), "generated_only": made}
        sets |= {count: _mixed(real, _enlarged(some, protocol, seed)[1], share) for count, some in few.items()}
        for name, (images, labels) in sets.items():
            keep = folder if name == "real_only" else None
            judges.setdefault(name, []).append(_train(images, labels, train.num_users, seed, protocol, keep))
            progress.update()
    correct = {name: correctness(some, test.images, test.labels) for name, some in judges.items()}
    by_count = {count: correct.pop(count) for count in counts}
    return Arms(judges, correct, share, by_count)


def _counts(evidence: Evidence, protocol: Protocol) -> list[int]:
    """The protocol's counts below the number of generated windows of any user."""
    fewest = int(torch.bincount(evidence.generated.labels, minlength=evidence.train.num_users).min())
    return [count for count in protocol.counts if count < fewest]


def first(windows: WindowSet, count: int) -> WindowSet:
    """The first `count` windows of each user."""
    place = torch.zeros_like(windows.labels)
    for user in range(windows.num_users):
        place[windows.labels == user] = torch.arange(int((windows.labels == user).sum()))
    return windows.select(place < count)


def real_only_judges(evidence: Evidence, protocol: Protocol, folder: str | Path | None = None) -> list[Judge]:
    """The arm real_only alone."""
    sets = [_enlarged(evidence, protocol, seed)[0] for seed in range(protocol.seeds)]
    return [_train(*real, evidence.train.num_users, seed, protocol, folder) for seed, real in enumerate(sets)]


def _chosen_share(evidence: Evidence, protocol: Protocol, progress) -> float:
    """The share of generated windows whose classifier does best on validation windows; the test plays no part."""
    val, scores = evidence.val, {}
    real, made = _enlarged(evidence, protocol, seed=protocol.seeds)
    for share in protocol.shares:
        judge = _train(*_mixed(real, made, share), val.num_users, protocol.seeds, protocol)
        scores[share] = correctness([judge], val.images, val.labels).mean()
        progress.update()
    return max(scores, key=scores.get)


def _enlarged(evidence: Evidence, protocol: Protocol, seed: int):
    """(images, labels) of the real training windows and of the generated ones, each with its recombined copies."""
    sets = (evidence.train, evidence.generated)
    return [enlarge(part.images, part.labels, protocol.variants, seed + 1000 * k) for k, part in enumerate(sets)]


def _mixed(real, made, share: float):
    """Both sets, repeated as needed, so that `share` of a batch is generated and all windows of a set count alike."""
    total = max(len(real[0]) / (1 - share), len(made[0]) / share)
    rows = [torch.arange(round(total * part)) % len(some[0]) for part, some in ((1 - share, real), (share, made))]
    images = torch.cat([real[0][rows[0]], made[0][rows[1]]])
    return images, torch.cat([real[1][rows[0]], made[1][rows[1]]])


def correctness(judges: list[Judge], images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Whether each judge names the right user: bool (judges, N)."""
    return torch.stack([judge.probabilities(images).argmax(1) == labels for judge in judges]).numpy()


def _train(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_users: int,
    seed: int,
    protocol: Protocol,
    folder: str | Path | None = None,
) -> Judge:
    """A judge, or that of `folder` which was trained on the same windows in the same way."""
    arguments = (num_users, protocol.judge_steps, seed, protocol.batch_size)
    if not folder:
        return train_judge(images, labels, *arguments)
    name = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes() + repr(arguments).encode()).hexdigest()
    path = Path(folder) / name[:16]
    if not (path / "config.json").exists():
        train_judge(images, labels, *arguments).save_pretrained(path)
    return Judge.from_pretrained(path).to(best_device())


def time_blocks(windows: WindowSet, gap: int) -> np.ndarray:
    """Block id (N,) of each window: `gap` consecutive windows of a recording overlap and count as one."""
    block, used = np.zeros(len(windows), dtype=int), 0
    for rows in by_recording(windows):
        times = np.array([windows.files[row].number for row in rows])
        _, place = np.unique((times - times.min()) // gap, return_inverse=True)
        block[rows] = used + place
        used += place.max() + 1
    return block


def halves(windows: WindowSet, gap: int) -> list[list[int]]:
    """Rows of two halves of real windows that share no step: every other stretch of 2·gap windows of each recording,
    without the windows at a stretch's beginning that reach into the other half."""
    stretch, chosen = time_blocks(windows, 2 * gap), [[], []]
    for rows in by_recording(windows):
        last = [-np.inf, -np.inf]  # time of the last window each half took
        for row in rows:
            half, time = stretch[row] % 2, windows.files[row].number
            if time - last[1 - half] >= gap:
                chosen[half].append(int(row))
                last[half] = time
    return chosen


def by_recording(windows: WindowSet) -> list[np.ndarray]:
    """Rows of each recording, in time order."""
    groups: dict[tuple, list[int]] = {}
    for row, file in enumerate(windows.files):
        groups.setdefault((file.user, file.condition, file.recording), []).append(row)
    return [np.array(sorted(rows, key=lambda row: windows.files[row].number)) for rows in groups.values()]


def concatenate(first: WindowSet, second: WindowSet) -> WindowSet:
    return WindowSet(
        images=torch.cat([first.images, second.images]),
        labels=torch.cat([first.labels, second.labels]),
        users=first.users,
        files=first.files + second.files,
        colormap=first.colormap,
        root=first.root,
    )


# Figures ---------------------------------------------------------------------------------------------------------


def figure(value: float, n: int, ci95: list[float] | None = None) -> dict:
    return {"value": value, "n": n} | ({"ci95": ci95} if ci95 else {})


def missing(*names: str, reason: str = NOT_YET) -> dict:
    return {name: {"value": None, "reason": reason} for name in names}


def bootstrapped(values: np.ndarray, blocks: np.ndarray) -> dict:
    """Mean of correctness or of any per-window value, with its block-bootstrap interval."""
    return figure(float(values.mean()), len(values), metrics.interval(metrics.block_bootstrap(values, blocks)))


@torch.no_grad()
def through_codec(
    codec: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None, batch_size: int = 64
) -> torch.Tensor:
    """uint8 images → the codec's reconstructions, float in [−1, 1]; labels (N,) are told to a conditional codec."""
    encode, decode = (codec.encode_tokens, codec.decode_tokens) if _has_tokens(codec) else (codec.encode, codec.decode)
    outputs = []
    for part, *users in batches(codec.device, batch_size, images, labels):
        outputs.append(decode(encode(to_float(part), *users), *users).cpu())
    return torch.cat(outputs)


def reconstruction(evidence: Evidence, arms: Arms) -> dict:
    """PSNR, SSIM and identity on test windows. Identity: accuracy of the real-only classifiers, which saw the windows
    the codec was trained on and no others, before and after the codec's round trip."""
    names = ("psnr_db", "ssim", "identity_accuracy", "identity_accuracy_before")
    if evidence.codec is None:
        return missing(*names, "rival_psnr_db", "codec_choice", *OTHER_LABEL, reason="no codec was given")
    test, blocks = evidence.test, time_blocks(evidence.test, evidence.gap)
    outputs = through_codec(evidence.codec, test.images, test.labels)
    after = correctness(arms.judges["real_only"], to_uint8(outputs), test.labels)
    psnr = bootstrapped(metrics.psnr(outputs, test.float()).numpy(), blocks)
    return {
        "psnr_db": psnr,
        "ssim": bootstrapped(metrics.ssim(outputs, test.float()).numpy(), blocks),
        "identity_accuracy": bootstrapped(after.mean(0), blocks),
        "identity_accuracy_before": bootstrapped(arms.correct["real_only"].mean(0), blocks),
        **codec_choice(evidence, psnr["value"]),
        **other_label(evidence, arms),
    }


def other_label(evidence: Evidence, arms: Arms) -> dict:
    """A codec that is told users, told a wrong one: what it then makes of test windows. Where the label alone decides
    whom a window looks like, the codec puts the user in itself, and its round trip says nothing of the window."""
    codec, test = evidence.codec, evidence.test
    if not codec.conditional:
        return missing(*OTHER_LABEL, reason="this codec is told no users")
    blocks, other = time_blocks(test, evidence.gap), (test.labels + 1) % test.num_users
    outputs = through_codec(codec, test.images, other)
    taken = correctness(arms.judges["real_only"], to_uint8(outputs), other).mean(0)
    found = (metrics.psnr(outputs, test.float()).numpy(), taken)
    return {name: bootstrapped(values, blocks) for name, values in zip(OTHER_LABEL, found, strict=True)}


def codec_choice(evidence: Evidence, psnr_db: float) -> dict:
    """The rival's PSNR on test windows, and VQ or KL by the rule of `quality.choose_codec`; psnr_db: of
    evidence.codec on the same windows."""
    codec, rival, test = evidence.codec, evidence.rival, evidence.test
    if rival is None:
        return missing("rival_psnr_db", "codec_choice", reason="no rival codec was given")
    made = through_codec(rival, test.images, test.labels)
    found = bootstrapped(metrics.psnr(made, test.float()).numpy(), time_blocks(test, evidence.gap))
    if _has_tokens(codec) == _has_tokens(rival):
        return {"rival_psnr_db": found, **missing("codec_choice", reason="both codecs are of one kind")}
    vq, vq_psnr, kl_psnr = (codec, psnr_db, found["value"]) if _has_tokens(codec) else (rival, found["value"], psnr_db)
    usage = codebook(replace(evidence, codec=vq))["usage"]
    choice = choose_codec({"psnr_db": vq_psnr, "usage": usage["value"]}, {"psnr_db": kl_psnr})
    counted = {"n": len(test), "usage_n": usage["n"], "rival_psnr_db": found}
    return {"rival_psnr_db": found, "codec_choice": {"value": choice["choice"], **choice, **counted}}


@torch.no_grad()
def codebook(evidence: Evidence) -> dict:
    """Codebook use on unseen windows (val and test), counted from real indices."""
    names = ("usage", "perplexity", "codes_per_user", "distinctive_codes_per_user", "distinctive_codes_least")
    codec = evidence.codec
    if codec is None or not _has_tokens(codec):
        return missing(*names, reason="this codec has no codebook" if codec is not None else "no codec was given")
    unseen = concatenate(evidence.val, evidence.test)
    tokens = encode_all(codec, unseen.images, "tokens")
    counts = metrics.code_counts(tokens, unseen.labels, codec.num_codes, unseen.num_users)
    per_user = torch.bincount(unseen.labels, minlength=unseen.num_users)
    figures = metrics.codebook_figures(counts, per_user)
    return {name: figure(figures[name], len(unseen)) for name in names} | {"counts": counts.sum(0).tolist()}


def identity(evidence: Evidence, judges: list[Judge]) -> dict:
    """How often the judges name the user a window was generated for, beside how often they name that of a real one."""
    generated, train = evidence.generated, evidence.train
    probabilities = torch.stack([judge.probabilities(generated.images) for judge in judges])  # (judges, N, n)
    named = probabilities.argmax(2)
    correct = (named == generated.labels).double().mean(0).numpy()  # (N,)
    own = correctness(judges, train.images, train.labels).mean(0)
    table = sum(metrics.confusion(row, generated.labels, generated.num_users) for row in named)
    share = table / table.sum(1, keepdim=True).clamp_min(1)
    each = np.arange(len(generated))  # generated windows are drawn one by one: each is its own block
    ratio = metrics.control_ratio(probabilities.mean(0), generated.labels)
    return {
        "accuracy": bootstrapped(correct, each),
        "judge_accuracy": bootstrapped(own, time_blocks(train, evidence.gap)),
        "control_ratio": figure(ratio, len(generated)),
        "confusion": share.tolist(),
        **missing("verification_eer"),
    }


def augmentation(evidence: Evidence, protocol: Protocol, arms: Arms) -> dict:
    """Real + generated against real alone, on test windows."""
    train, test, correct = evidence.train, evidence.test, arms.correct
    blocks = time_blocks(test, evidence.gap)
    gain = metrics.paired_gain(correct["real_only"], correct["real_plus_generated"], blocks)
    figures = {name: bootstrapped(rows.mean(0), blocks) for name, rows in correct.items()}
    for name, rows in correct.items():
        figures[name]["per_seed"] = rows.mean(1).tolist()
    return {
        **figures,
        **missing("real_x2", "equivalent_real_windows"),
        "gain": figure(gain["gain"], len(test), gain["ci95"]),
        "gain_by_windows": gain_by_windows(evidence, arms, blocks),
        "gain_ci95": gain["ci95"],
        "p_value": gain["p_value"],
        "generated_share": arms.share,
        "real_windows_per_user": len(train) / train.num_users,
        "generated_windows_per_user": len(evidence.generated) / train.num_users,
        "seeds": protocol.seeds,
        "steps": protocol.judge_steps,
    }


def gain_by_windows(evidence: Evidence, arms: Arms, blocks: np.ndarray) -> list[dict]:
    """The gain with ever more generated windows a user, all of them at the end; their share of a batch is one and the
    same."""
    every = len(evidence.generated) / evidence.train.num_users
    found = {**arms.by_count, every: arms.correct["real_plus_generated"]}
    rows = []
    for count, correct in sorted(found.items()):
        gain = metrics.paired_gain(arms.correct["real_only"], correct, blocks)
        rows.append({"windows_per_user": count, **figure(gain["gain"], len(evidence.test), gain["ci95"])})
    return rows


def fidelity(evidence: Evidence, arms: Arms, draws: int = 4) -> dict:
    """Fréchet distances in the features of the real-only classifiers, mean over them and over draws of windows. These
    classifiers saw the generator's training windows and neither generated nor unseen ones.

    fd: generated windows against unseen real ones (val and test); fd_real_vs_real: one half of the unseen against the
    other; fd_train: the generator's training windows against the unseen, what a perfect copier would get; fd_ratio: fd
    over fd_real_vs_real. The distance is biased by the number of windows, so all sets give as many of each user.
    """
    rest = missing("kid", "precision", "recall", "density", "coverage")
    unseen = concatenate(evidence.val, evidence.test)
    sets = {"generated": evidence.generated, "unseen": unseen, "train": evidence.train}
    sets |= dict(zip(("first", "second"), (unseen.select(rows) for rows in halves(unseen, evidence.gap)), strict=True))
    n = len(alike(sets, seed=0)["unseen"])
    if n < 2:
        why = "no user has generated windows, training windows and windows in both halves of the unseen"
        return missing(*COMPARED, "fd_ratio", reason=why) | rest
    judges = arms.judges["real_only"]
    each = [_distances(judge, sets, seed) for judge in judges for seed in range(draws)]
    found = {name: float(np.mean([one[name] for one in each])) for name in COMPARED}
    found["fd_ratio"] = found["fd"] / max(found["fd_real_vs_real"], 1e-9)
    return {name: figure(value, n) for name, value in found.items()} | rest


def _distances(judge: Judge, sets: dict[str, WindowSet], seed: int) -> dict[str, float]:
    """The Fréchet distances of one draw of windows."""
    rows = alike(sets, seed)
    parts = {name: features(judge, part.images[rows[name]]) for name, part in sets.items()}
    return {name: metrics.frechet_distance(parts[one], parts[other]) for name, (one, other) in COMPARED.items()}


def alike(sets: dict[str, WindowSet], seed: int) -> dict[str, torch.Tensor]:
    """Rows drawn from each set: of each user as many as the set that has fewest of that user."""
    least = torch.stack([torch.bincount(part.labels, minlength=part.num_users) for part in sets.values()]).min(0).values
    rows = {}
    for place, (name, part) in enumerate(sets.items()):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(1000 * place + seed))
        rows[name] = torch.cat([order[part.labels[order] == user][:k] for user, k in enumerate(least.tolist())])
    return rows


@torch.no_grad()
def features(judge: Judge, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """A judge's features (N, D) of uint8 images (N, C, S, S)."""
    judge.eval()
    return torch.cat([judge.features(to_float(part.to(judge.device))).cpu() for part in images.split(batch_size)])


def memorisation(evidence: Evidence, copy_quantile: float = 0.01) -> dict:
    """Is a generated window nearer to the training windows than a real unseen one is?

    Distance: root mean square over 32×32 pixels in [−1, 1], to the nearest training window of the same user, over
    shifts by whole strides. nearest_train_ratio: median over generated windows by median over test windows; well below
    1 smells of copying. copies: share of generated windows nearer than all but 1 % of the test windows are.
    """
    generated, test = (_nearest_train(part, evidence.train) for part in (evidence.generated, evidence.test))
    threshold = torch.quantile(test, copy_quantile)
    ratio = float(generated.median() / test.median().clamp_min(1e-9))
    return {
        "nearest_train_ratio": figure(ratio, len(generated)),
        "copies": figure(float((generated < threshold).double().mean()), len(generated)),
        "copies_expected": copy_quantile,
    }


def _nearest_train(queries: WindowSet, train: WindowSet) -> torch.Tensor:
    small = lambda images: torch.nn.functional.interpolate(images, size=(32, 32), mode="area")
    references = small(train.float())
    shifted = torch.cat([references, stride_shift(references, 2)]).flatten(1)
    labels = train.labels.repeat(2)
    return metrics.nearest_distance(small(queries.float()).flatten(1), shifted, queries.labels[:, None] == labels[None])


def physics(evidence: Evidence) -> dict:
    """Do generated windows move like their user? See `kinematics.compare`."""
    if evidence.train.images.shape[1] != 1:
        return missing(*kinematics.NAMES, reason="not read off RGB windows: take channels=1")
    unseen = concatenate(evidence.val, evidence.test)
    parts = {"generated": evidence.generated, "unseen": unseen, "train": evidence.train}
    gaits = {name: kinematics.measure(part) for name, part in parts.items()}
    for name, rows in zip(("first", "second"), halves(unseen, evidence.gap), strict=True):
        gaits[name] = gaits["unseen"].select(rows)
    return kinematics.compare(gaits, unseen.num_users)


def verdict(augmentation: dict) -> dict:
    """helps / no evidence / hurts, from the interval of the gain, and one sentence a person can read."""
    low, high = augmentation["gain_ci95"]
    word = "helps" if low > 0 else "hurts" if high < 0 else "no evidence"
    meaning = {
        "helps": "Generated windows help",
        "hurts": "Generated windows hurt",
        "no evidence": "No evidence that generated windows help or hurt",
    }[word]
    real, both = augmentation["real_only"], augmentation["real_plus_generated"]
    gain = augmentation["gain"]["value"]
    sentence = (
        f"{meaning}: with {augmentation['real_windows_per_user']:.3g} real windows a user, accuracy on unseen windows "
        f"goes from {100 * real['value']:.1f} % to {100 * both['value']:.1f} % when generated windows are added "
        f"(gain {100 * gain:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"{augmentation['seeds']} seeds, {real['n']} test windows)."
    )
    return {"word": word, "sentence": sentence}


def _sizes(codec: torch.nn.Module) -> str:
    size, (rows, columns) = codec.config.image_size, codec.latent_shape[1:]
    return f"{size}×{size} pixels, channels {codec.config.in_channels}, latent grid {rows}×{columns}"


def _has_tokens(codec: torch.nn.Module) -> bool:
    return hasattr(codec, "encode_tokens")
