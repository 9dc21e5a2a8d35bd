"""The product: a codec and a prior that turn user ids into spectrograms, saved and loaded as a diffusers pipeline."""

import csv
import inspect
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from PIL import Image

from mdlib.data.colormaps import colorize
from mdlib.data.windows import DataError, to_uint8
from mdlib.training.latents import fingerprint
from mdlib.utils import bar, best_device, end_session, time_is_up, whole_file

MANIFEST_COLUMNS = ("path", "user", "condition", "number", "seed")
# Where a class of a pipeline saved by mdlib 0.1 is now.
MOVED = {
    "mdlib.vqvae": "mdlib.models.vqvae",
    "mdlib.vae": "mdlib.models.kl",
    "mdlib.vavae": "mdlib.models.vavae",
    "mdlib.transformer": "mdlib.models.transformer",
    "mdlib.unet": "mdlib.models.unet",
    "mdlib.dit": "mdlib.models.dit",
    "mdlib.vqdiffusion": "mdlib.models.vqdiffusion",
    "mdlib.judge": "mdlib.models.classifier",
    "Judge": "SmallCNN",
}
# Arguments of prior.sample that are no plain values: this file fills them in.
_NO_OPTIONS = {"users", "conditions", "generator", "classifier", "towards", "share", "on_step"}


@dataclass
class Windows(BaseOutput):
    """Generated windows: `images` (PIL images, or a tensor (N, C, H, W) in [−1, 1]), the user id of each, and a
    manifest (user, condition, number, seed): the same seed gives the same window, whatever else was in its batch."""

    images: list[Image.Image] | torch.Tensor
    users: list[int]
    manifest: list[dict]


class MicroDopplerPipeline(DiffusionPipeline):
    """Generate windows of given users.

    Args:
        codec, prior: a codec and a prior that fits it (see their modules).
        classifier: a user classifier of images for classifier guidance, or None.
        users: the label map: users[label] is the k of folder ID_k.
        conditions: what people carry, by the folders above ID_k that the prior was trained on; [""] where there were
            none.
        colormap: colour map of the windows that go out (and came in): jet, parula, viridis, grey, or none for RGB.
        output_size: height and width of the images that go out, in pixels.
        sampling: keyword arguments of `prior.sample` that this pipeline uses unless the caller gives others.
    """

    _optional_components = ["classifier"]

    def __init__(
        self,
        codec: ModelMixin,
        prior: ModelMixin,
        classifier: ModelMixin | None = None,
        users: list[int] | None = None,
        colormap: str = "jet",
        output_size: int = 256,
        sampling: dict | None = None,
        conditions: list[str] | None = None,
    ):
        super().__init__()
        _check_fit(codec, prior)
        self.register_modules(codec=codec, prior=prior, classifier=classifier)
        self.register_to_config(
            users=list(users or []),
            colormap=colormap,
            output_size=output_size,
            sampling=dict(sampling or {}),
            conditions=list(conditions or [""]),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> "MicroDopplerPipeline":
        """Load a folder written by `save_pretrained`; see `DiffusionPipeline.from_pretrained` for the options.

        Raises:
            DataError: no pipeline at `path`.
        """
        index = Path(path) / "model_index.json"
        if not index.exists():
            raise DataError(f"{path} holds no pipeline (no model_index.json): give the pipeline/ folder of a run")
        for part in cls.load_config(path).values():
            # diffusers imports no module because a file names it; ours are the only ones we vouch for.
            if isinstance(part, list) and len(part) == 2 and str(part[0]).startswith("mdlib."):
                import_module(part[0])
        return super().from_pretrained(path, **options)

    @classmethod
    def load_config(cls, path: str | Path, **options) -> dict:
        """model_index.json with the modules and classes of earlier versions where they are now."""
        found = super().load_config(path, **options)
        config = found[0] if isinstance(found, tuple) else found
        for name, part in config.items():
            if isinstance(part, list) and all(isinstance(word, str) for word in part):
                config[name] = [MOVED.get(word, word) for word in part]
        return found

    @torch.no_grad()
    def __call__(
        self,
        users: list[int],
        images_per_user: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        output_type: str = "pil",
        conditions: list[str] | None = None,
        **sampling,
    ) -> Windows:
        """`images_per_user` windows of each user id (the k of ID_k), in each of `conditions` (all it knows), whether
        that user was recorded in it or not.

        Args:
            seed: window i of user k depends on (seed, k, i) and its condition alone.
            output_type: "pil" (coloured, `output_size`) or "pt" (tensor (N, C, H, W) in [−1, 1], the codec's size).
            sampling: options of `prior.sample` (guidance_scale, temperature, num_inference_steps, …).

        Raises:
            DataError: a user or a condition this pipeline was not trained on.
        """
        manifest = self.plan(users, images_per_user, seed, conditions)
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be 'pil' or 'pt', got {output_type!r}")
        parts = [images for _, images in self.stream(manifest, batch_size, **sampling)]
        images = torch.cat(parts) if parts else torch.empty(0)
        return Windows(
            images=images if output_type == "pt" else self.to_pil(images),
            users=[row["user"] for row in manifest],
            manifest=manifest,
        )

    def plan(
        self, users: list[int], images_per_user: int, seed: int, conditions: list[str] | None = None
    ) -> list[dict]:
        """The manifest of a request, checked: one row a window."""
        conditions = self.config.conditions if conditions is None else conditions
        if strange := sorted(set(conditions) - set(self.config.conditions)):
            known = ", ".join(self.config.conditions) or "none"
            raise DataError(f"this pipeline knows conditions {known}; it was not trained on {', '.join(strange)}")
        unknown = [user for user in users if user not in self.config.users]
        if unknown:
            raise DataError(
                f"this pipeline knows users {_ranges(self.config.users)}; it was not trained on {_ranges(unknown)}"
            )
        if images_per_user < 1:
            raise DataError(f"images_per_user must be at least 1, got {images_per_user}")
        return [
            {"user": user, "condition": condition, "number": number, "seed": seed}
            for condition in conditions
            for user in users
            for number in range(1, images_per_user + 1)
        ]

    def stream(
        self, manifest: list[dict], batch_size: int = 64, **sampling
    ) -> Iterator[tuple[list[dict], torch.Tensor]]:
        """Batches (rows, images (B, C, H, W) in [−1, 1]) of a manifest, as they are made."""
        for start in range(0, len(manifest), batch_size):
            rows = manifest[start : start + batch_size]
            yield rows, self._decode(self._draw(rows, **sampling), self._users(rows))

    def _draw(self, rows: list[dict], **sampling) -> torch.Tensor:
        """Tokens or latents of the manifest's rows."""
        options = {**self.config.sampling, **sampling}
        if options.get("classifier_scale"):
            if self.classifier is None:
                raise DataError("classifier_scale needs a classifier, and this pipeline has none (classifier_steps)")
            options["classifier"] = self._log_probability
        if len(self.config.conditions) > 1:
            options["conditions"] = self._places(self.config.conditions, [row["condition"] for row in rows])
        generators = [torch.Generator().manual_seed(_window_seed(**row)) for row in rows]
        return self.prior.sample(self._users(rows), generator=generators, **options)

    def _users(self, rows: list[dict]) -> torch.Tensor:
        """Labels (B,) of the users of a manifest's rows."""
        return self._places(self.config.users, [row["user"] for row in rows])

    def _places(self, known: list, wanted: list) -> torch.Tensor:
        return torch.tensor([known.index(one) for one in wanted], dtype=torch.long, device=self.device)

    def _decode(self, drawn: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        decode = self.codec.decode_tokens if self.prior.consumes == "tokens" else self.codec.decode
        return decode(drawn, users).float().cpu()

    def _log_probability(self, latents: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """log p(user | decoded latents) (B,) by the classifier."""
        logits = self.classifier(self.codec.decode(latents, users))
        return logits.log_softmax(1).gather(1, users.unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def interpolate(self, first: int, second: int, images: int = 5, seed: int = 0, **sampling) -> torch.Tensor:
        """Windows (images, C, H, W) in [−1, 1] from user `first` to user `second`, all from the same noise: what
        changes is what the model thinks tells the two apart.

        Raises:
            DataError: an unknown user, no images, or a prior that cannot stand between two users.
        """
        if images < 1:
            raise DataError(f"images must be at least 1, got {images}")
        rows = self.plan([first], 1, seed)[:1] * images
        self._needs("towards", "interpolation")
        if {**self.config.sampling, **sampling}.get("classifier_scale"):
            raise DataError("between two users there is no class for a classifier: leave classifier_scale out")
        towards = self._users(self.plan([second], 1, seed)[:1] * images)
        share = torch.linspace(0, 1, images)
        nearer = torch.where(share.to(self.device) < 0.5, self._users(rows), towards)  # for a codec that is told users
        return self._decode(self._draw(rows, towards=towards, share=share, **sampling), nearer)

    @torch.no_grad()
    def denoising(self, user: int, frames: int = 8, seed: int = 0, **sampling) -> torch.Tensor:
        """What the prior takes the window to be, step by step: images (≤ frames, C, H, W) in [−1, 1], the last one
        the window itself.

        Raises:
            DataError: an unknown user, or a prior that does not denoise.
        """
        self._needs("on_step", "a picture of the denoising")
        if frames < 1:
            raise DataError(f"frames must be at least 1, got {frames}")
        seen: list[torch.Tensor] = []
        plan = self.plan([user], 1, seed)[:1]
        last = self._draw(plan, on_step=lambda _, estimate: seen.append(estimate), **sampling)
        seen[-1] = last
        chosen = torch.linspace(len(seen) - 1, 0, min(frames, len(seen))).round().long().flip(0).tolist()
        return self._decode(torch.cat([seen[number] for number in chosen]), self._users([plan[0]] * len(chosen)))

    def _needs(self, option: str, what: str) -> None:
        if option not in inspect.signature(self.prior.sample).parameters:
            raise DataError(f"{what} needs a prior that denoises, not {type(self.prior).__name__}")

    def to_pil(self, images: torch.Tensor) -> list[Image.Image]:
        """Images (B, C, H, W) in [−1, 1] as coloured PIL images of `output_size`, like the windows on disk."""
        return [_picture(image, self.config.colormap, self.config.output_size) for image in to_uint8(images)]

    def generate_folder(
        self,
        out: str | Path,
        users: list[int] | None = None,
        per_user: int = 10,
        seed: int = 0,
        batch_size: int = 64,
        conditions: list[str] | None = None,
        **sampling,
    ) -> list[dict]:
        """Write `out/ID_k/*.png` (or `out/CONDITION/ID_k/*.png`) and `out/manifest.csv`; returns the manifest with
        paths. users, conditions: None for all.

        Windows that are there already are kept, so an interrupted call goes on where it stopped and a later one adds
        users or numbers; `out/generation.json` tells what made them.

        Raises:
            DataError: a user or a condition this pipeline was not trained on; `out` holds windows of other weights or
                options.
        """
        out = Path(out)
        users = list(self.config.users) if users is None else users
        manifest = [{"path": _file_name(row), **row} for row in self.plan(users, per_user, seed, conditions)]
        _claim(out, {"seed": seed, **self._made_by(sampling)})
        missing = [row for row in manifest if not (out / row["path"]).exists()]
        requests = [{key: row[key] for key in row if key != "path"} for row in missing]
        with bar(len(manifest), "generate", initial=len(manifest) - len(missing), unit="window") as progress:
            for rows, images in self.stream(requests, batch_size, **sampling):
                self._write(out, rows, images)
                progress.update(len(rows))
                if time_is_up() and progress.n < len(manifest):
                    end_session(f"{progress.n} of {len(manifest)} windows are in {out}")
        _write_manifest(manifest, out)
        return manifest

    def save_windows(self, out: str | Path, rows: list[dict], images: torch.Tensor, **sampling) -> list[dict]:
        """Write chosen windows as `generate_folder` writes all: `rows` of a plan, `images` as `stream` gave them for
        `rows` and `sampling`. Their seeds may differ, weights and options may not; returns the manifest with paths.

        Raises:
            DataError: `out` holds windows of other weights or options, or those of `generate_folder`.
        """
        out = Path(out)
        _claim(out, self._made_by(sampling))
        self._write(out, rows, images)
        manifest = [{"path": _file_name(row), **row} for row in rows]
        _write_manifest(manifest, out)
        return manifest

    def _write(self, out: Path, rows: list[dict], images: torch.Tensor) -> None:
        for row, picture in zip(rows, self.to_pil(images), strict=True):
            with whole_file(out / _file_name(row)) as temporary:
                picture.save(temporary, format="PNG")

    def _made_by(self, sampling: dict) -> dict:
        """What decides how a window looks beside its row of the manifest, checked: weights and sampling options."""
        options = {**self.config.sampling, **sampling}
        self._check_options(options)
        models = [self.codec, self.prior] + ([self.classifier] if options.get("classifier_scale") else [])
        return {"weights": "".join(map(fingerprint, models)), **options}

    def sampling_options(self) -> dict:
        """What may be given as sampling when this pipeline is called, and what is taken unless it is."""
        return {**self._defaults(), **self.config.sampling}

    def _defaults(self) -> dict:
        """The sampling options that `prior.sample` knows, with its own values."""
        known = inspect.signature(self.prior.sample).parameters
        return {name: one.default for name, one in known.items() if name not in _NO_OPTIONS}

    def _check_options(self, options: dict) -> None:
        """Refuse what `prior.sample` does not know, before anything is written."""
        known = self._defaults().keys()
        if unknown := sorted(options.keys() - known):
            told = ", ".join(sorted(known))
            raise DataError(f"this prior has no sampling option {', '.join(unknown)}; there are {told}")
        self._draw([], **options)  # the prior checks their values


def _check_fit(codec: ModelMixin, prior: ModelMixin) -> None:
    """Refuse a prior that was made for another codec."""
    if prior.consumes == "tokens":
        if not hasattr(codec, "token_shape"):
            raise DataError(f"a prior over tokens needs a codec with a codebook, not {type(codec).__name__}")
        here, wanted = codec.token_shape, prior.token_shape
    else:
        here, wanted = codec.latent_shape, prior.latent_shape
    if tuple(here) != tuple(wanted):
        raise DataError(
            f"prior and codec do not fit: the prior makes {prior.consumes} {tuple(wanted)}, the codec reads {here}"
        )


def _claim(out: Path, made_by: dict) -> None:
    """Note what makes the windows of `out`, or refuse when something else made those that are there."""
    note = out / "generation.json"
    made_by = json.loads(json.dumps(made_by))  # as it reads back: a tuple is a list
    if note.exists() and any(out.glob("**/ID_*/*.png")):
        before = json.loads(note.read_text())
        changed = sorted(key for key in before.keys() | made_by.keys() if before.get(key) != made_by.get(key))
        if changed:
            raise DataError(
                f"{out} holds windows made otherwise ({', '.join(changed)} differ): choose another folder or delete it"
            )
        return
    with whole_file(note) as temporary:
        temporary.write_text(json.dumps(made_by, indent=1) + "\n")


def _window_seed(user: int, condition: str, number: int, seed: int) -> int:
    key = [seed, user, number] + ([zlib.crc32(condition.encode())] if condition else [])
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _file_name(row: dict) -> str:
    name = f"ID_{row['user']}/ID{row['user']}_generated_seed{row['seed']}_{row['number']}.png"
    return f"{row['condition']}/{name}" if row["condition"] else name


def _picture(image: torch.Tensor, colormap: str, size: int) -> Image.Image:
    """uint8 (C, H, W) → RGB image of size × size. Whole multiples keep every cell a block, as in the recorded files;
    anything else is interpolated, before it is coloured: between two colours of a map lies none of the map."""
    plain = Image.fromarray(image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy())
    plain = plain.resize((size, size), Image.NEAREST if size % image.shape[-1] == 0 else Image.BICUBIC)
    return plain if len(image) == 3 else Image.fromarray(colorize(np.asarray(plain), colormap))


def copy_windows(folder: str | Path, paths: list[str], out: str | Path) -> list[dict]:
    """Copy windows of a folder that `generate_folder` wrote; `out` then holds them as `save_windows` would have written
    them. paths: relative to `folder`. Returns their rows of the manifest.

    Raises:
        DataError: `folder` does not tell what made its windows, or `out` holds windows made otherwise.
    """
    folder, out = Path(folder), Path(out)
    try:
        made_by = json.loads((folder / "generation.json").read_text())
        known = _read_manifest(folder)
        rows = [known[path] for path in paths]
    except (OSError, KeyError) as error:
        raise DataError(
            f"{folder} does not tell what made its windows ({error}): save from a folder of generate"
        ) from error
    _claim(out, {key: value for key, value in made_by.items() if key != "seed"})
    for path in paths:
        with whole_file(out / path) as temporary:
            shutil.copyfile(folder / path, temporary)
    _write_manifest(rows, out)
    return rows


def _read_manifest(folder: Path) -> dict[str, dict]:
    """The rows of a folder's manifest by path."""
    with open(folder / "manifest.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def _write_manifest(rows: list[dict], out: Path) -> None:
    """The manifest of all windows in `out`: those of earlier calls stay in it."""
    path = out / "manifest.csv"
    known = _read_manifest(out) if path.exists() else {}
    rows = [*({k: row for k, row in known.items() if (out / k).exists()} | {row["path"]: row for row in rows}).values()]
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, MANIFEST_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _ranges(users: list[int]) -> str:
    """[1, 2, 3, 7] → "1-3, 7"."""
    runs: list[list[int]] = []
    for user in sorted(set(users)):
        if runs and user == runs[-1][1] + 1:
            runs[-1][1] = user
        else:
            runs.append([user, user])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs) or "none"


def load_pipeline(path: str | Path) -> MicroDopplerPipeline:
    """The pipeline of a folder, on the GPU where there is one."""
    pipeline = MicroDopplerPipeline.from_pretrained(path).to(best_device())
    for part in (pipeline.codec, pipeline.classifier):
        if part is not None:
            part.requires_grad_(False)  # classifier guidance needs gradients of latents, not of weights
    return pipeline
