"""`MicroDopplerPipeline`: a codec and a prior that turn user ids into spectrograms, a pipeline of diffusers."""

import itertools
import json
import pkgutil
import shutil
import zlib
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

from mdlib import models
from mdlib.data.colormaps import colorize
from mdlib.data.speckle import Speckle
from mdlib.data.windows import to_uint8
from mdlib.models.layers import check_choice, fingerprint
from mdlib.utils import DataError, atomic_file, bar, best_device, end_session, read_json, readable, time_is_up, to_float

LAST = "last"  # diffusers variant of a prior's weights: those of the last step, stored next to the best ones
WEIGHTS = ("", "best", LAST)  # "": those that the run uses
# Where a module or class named in an older pipeline is now.
MOVED = {
    "mdlib.vqvae": "mdlib.models.vqvae",
    "mdlib.vae": "mdlib.models.kl",
    "mdlib.vavae": "mdlib.models.kl",
    "mdlib.models.vavae": "mdlib.models.kl",
    "mdlib.transformer": "mdlib.models.transformer",
    "mdlib.unet": "mdlib.models.unet",
    "mdlib.dit": "mdlib.models.dit",
    "mdlib.vqdiffusion": "mdlib.models.vqdiffusion",
    "mdlib.judge": "mdlib.models.classifier",
    "Judge": "SmallCNN",
}


@dataclass
class Windows(BaseOutput):
    """Generated windows: PIL images or a tensor (N, C, H, W) in [−1, 1], the user id of each, and the manifest."""

    images: list[Image.Image] | torch.Tensor
    users: list[int]
    manifest: list[dict]


class MicroDopplerPipeline(DiffusionPipeline):
    """Generate windows of given users.

    A manifest has a row (dict) per window: user, condition, number, seed, its path in a folder, and its place (0 to 1)
    among the user's windows, which manifest.csv leaves out. A window depends on its row alone, not on its batch.

    Args:
        codec, prior: a codec and a prior over its tokens or latents.
        classifier: a user classifier of images for classifier guidance, or None.
        users: the label map: users[label] is the k of folder ID_k.
        conditions: names of the carrying conditions the prior was trained on, [""] without.
        colormap: of the images that go out, a name of `colormap_table`, or none for RGB.
        output_size: side of the images that go out, in pixels, or [height, width].
        sampling: defaults for keyword arguments of `prior.sample`.
        weights: "best" or "last" of the prior's training; "" in pipelines of earlier versions.
        speckle: fields of the `mdlib.data.speckle.Speckle` that is added to decoded windows; None or empty: none is.
        trained_on: contents (`mdlib.data.checks.hashes`) of the windows that codec and prior were trained on.
    """

    _optional_components = ["classifier"]

    def __init__(
        self,
        codec: ModelMixin,
        prior: ModelMixin,
        classifier: ModelMixin | None = None,
        users: list[int] | None = None,
        colormap: str = "jet",
        output_size: int | list[int] = 256,
        sampling: dict | None = None,
        conditions: list[str] | None = None,
        trained_on: list[str] | None = None,
        speckle: dict | None = None,
        weights: str = "",
    ):
        super().__init__()
        shape = "token_shape" if prior.consumes == "tokens" else "latent_shape"
        if not hasattr(codec, shape):
            raise DataError(f"a prior over tokens needs a codec with a codebook, not {type(codec).__name__}")
        here, wanted = tuple(getattr(codec, shape)), tuple(getattr(prior, shape))
        if here != wanted:
            raise DataError(
                f"prior and codec do not match: prior {prior.consumes} {wanted}, codec {prior.consumes} {here}"
            )
        self.register_modules(codec=codec, prior=prior, classifier=classifier)
        self.register_to_config(
            users=list(users or []),
            colormap=colormap,
            output_size=output_size,
            sampling=dict(sampling or {}),
            conditions=list(conditions or [""]),
            trained_on=list(trained_on or []),
            speckle=dict(speckle or {}),
            weights=weights,
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> "MicroDopplerPipeline":
        """As `DiffusionPipeline.from_pretrained`; DataError if the folder `path` holds none, or a damaged one."""
        if not (Path(path) / "model_index.json").exists():
            raise DataError(f"{path} holds no pipeline (no model_index.json): give the pipeline/ folder of a run")
        with readable(path, "restore it, or write the pipeline again (run --from, with the prior's notebook)"):
            return super().from_pretrained(path, **options)

    @wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, folder: str | Path, *arguments, **options) -> None:
        super().save_pretrained(folder, *arguments, **options)
        with atomic_file(Path(folder) / "pipeline.py") as path:  # diffusers loads it for custom_pipeline="pipeline"
            path.write_text("from mdlib.pipeline import MicroDopplerPipeline  # noqa: F401\n")

    @classmethod
    def load_config(cls, path: str | Path, **options) -> dict:
        """model_index.json, with modules and classes of earlier versions replaced by today's (MOVED)."""
        found = super().load_config(path, **options)
        config = found[0] if isinstance(found, tuple) else found
        parts = {name: part for name, part in config.items() if isinstance(part, list)}
        config.update({name: [MOVED.get(word, word) for word in part] for name, part in parts.items()})
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
        generator: torch.Generator | None = None,
        **sampling,
    ) -> Windows:
        """Generate `images_per_user` windows of each user id (the k of ID_k) in each of `conditions` (None: all).

        Args:
            generator: draws the seed, as with other pipelines of diffusers: its next call gives other windows.
            output_type: "pil" (coloured, `output_size`) or "pt" (tensor (N, C, H, W) in [−1, 1], the codec's size).
            sampling: options of `prior.sample` (guidance_scale, temperature, num_inference_steps, …); speckle=False
                leaves out the speckle; temperature=[0.8, 1.2] rises evenly from a user's first window to the last.
        """
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        manifest = self.plan(users, images_per_user, seed, conditions)
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be 'pil' or 'pt', got {output_type!r}")
        parts = [images for _, images in self.stream(manifest, batch_size, **sampling)]
        images = torch.cat(parts) if parts else torch.empty(0)
        images = images if output_type == "pt" else self.to_pil(images) if parts else []
        return Windows(images=images, users=[row["user"] for row in manifest], manifest=manifest)

    def plan(self, users: list[int], images_per_user: int, seed: int, conditions: list[str] | None = None):
        """The manifest of a request, a list; DataError on an unknown user or condition, or a number below 1."""
        conditions = self.config.conditions if conditions is None else conditions
        for kind, wanted in (("users", users), ("conditions", conditions)):
            known = self.config[kind]
            if unknown := sorted(set(wanted) - set(known)):
                known, unknown = (", ".join(map(str, names)) for names in (known, unknown))
                raise DataError(f"this pipeline knows {kind} {known or 'none'}; it was not trained on {unknown}")
        if images_per_user < 1:
            raise DataError(f"images_per_user must be at least 1, got {images_per_user}")
        manifest = []
        for where, user, number in itertools.product(conditions, users, range(1, images_per_user + 1)):
            path = Path(where, f"ID_{user}", f"ID{user}_generated_seed{seed}_{number}.png").as_posix()
            row = dict(path=path, user=user, condition=where, number=number, seed=seed)
            manifest.append(row | {"place": (number - 1) / max(1, images_per_user - 1)})
        return manifest

    def stream(self, manifest: list[dict], batch_size: int = 64, **sampling):
        """Yield a manifest's windows batch after batch: (rows, images (B, C, H, W) in [−1, 1])."""
        for start in range(0, len(manifest), batch_size):
            rows = manifest[start : start + batch_size]
            yield rows, self._decode(self._sample(rows, sampling), rows, sampling)

    def _sample(self, rows: list[dict], sampling: dict, **views) -> torch.Tensor:
        """Tokens or latents of the manifest's rows. views: arguments of `prior.sample` that only a prior that denoises
        has (towards, share, on_step)."""
        options, known = {**self.config.sampling, **sampling}, self.sampling_options()
        if unknown := ", ".join(sorted(options.keys() - known.keys())):
            raise DataError(f"this prior has no sampling option {unknown}; there are {', '.join(sorted(known))}")
        if options.get("classifier_scale"):
            if self.classifier is None:
                raise DataError("classifier_scale needs a classifier, and this pipeline has none (classifier_steps)")
            options["classifier"] = self._log_probability
        if not isinstance(speckle := options.pop("speckle", False), bool):
            raise DataError(f"speckle must be true or false, got {speckle!r}")
        if speckle and not self.config.speckle:
            raise DataError("this pipeline has no speckle to add: its training fitted none")
        if len(self.config.conditions) > 1:
            options["conditions"] = self._labels(rows, "condition")
        if isinstance(ends := options.get("temperature"), list | tuple):
            if len(ends) != 2:
                raise ValueError(f"temperature must be a number, or [first, last] of a series, got {ends}")
            options["temperature"] = [ends[0] + row["place"] * (ends[1] - ends[0]) for row in rows] or list(ends)
        generators = [torch.Generator().manual_seed(_window_seed(row)) for row in rows]
        return self.prior.sample(self._labels(rows), generator=generators, **options, **views)

    def _labels(self, rows: list[dict], kind: str = "user") -> torch.Tensor:
        """The labels (B,) of a manifest's users or conditions."""
        known = self.config[f"{kind}s"]
        return torch.tensor([known.index(row[kind]) for row in rows], dtype=torch.long, device=self.device)

    def _decode(self, sampled: torch.Tensor, rows: list[dict], sampling: dict) -> torch.Tensor:
        decode = self.codec.decode_tokens if self.prior.consumes == "tokens" else self.codec.decode
        images = decode(sampled, self._labels(rows)).float().cpu()
        if not {**self.sampling_options(), **sampling}["speckle"]:
            return images
        # Other noise than the prior's: a window's speckle must not depend on its latents.
        return to_float(Speckle(**self.config.speckle).add(to_uint8(images), [_window_seed(row) + 1 for row in rows]))

    def _log_probability(self, latents: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """log p(user | decoded latents) (B,) by the classifier."""
        logits = self.classifier(self.codec.decode(latents, users))
        return logits.log_softmax(1).gather(1, users.unsqueeze(1)).squeeze(1)

    def sampling_options(self) -> dict:
        """The options of `prior.sample` that a caller may give, and speckle, with this pipeline's values."""
        return self.prior.sampling_options() | {"speckle": bool(self.config.speckle)} | self.config.sampling

    def check_options(self, options: dict) -> None:
        """Raise DataError on options this pipeline does not have, ValueError on values it cannot use."""
        self._sample([], options)

    @torch.no_grad()
    def interpolate(self, first: int, second: int, images: int = 5, seed: int = 0, **sampling) -> torch.Tensor:
        """Windows (images, C, H, W) in [−1, 1] from user `first` to user `second`, all from the same noise."""
        if images < 1:
            raise DataError(f"images must be at least 1, got {images}")
        rows, others = (self.plan([user], 1, seed)[:1] * images for user in (first, second))
        if {**self.config.sampling, **sampling}.get("classifier_scale"):
            raise DataError("classifier guidance needs one user, not two: leave classifier_scale out")
        way = torch.linspace(0, 1, images)
        nearer = [row if at < 0.5 else other for row, other, at in zip(rows, others, way.tolist(), strict=True)]
        return self._decode(self._sample(rows, sampling, towards=self._labels(others), share=way), nearer, sampling)

    @torch.no_grad()
    def denoising(self, user: int, frames: int = 8, seed: int = 0, **sampling) -> torch.Tensor:
        """The prior's estimates of one window during sampling: images (≤ frames, C, H, W) in [−1, 1]; the last is the
        window itself."""
        if frames < 1:
            raise DataError(f"frames must be at least 1, got {frames}")
        rows, seen = self.plan([user], 1, seed)[:1], []
        seen[-1] = self._sample(rows, sampling, on_step=lambda _, estimate: seen.append(estimate))
        chosen = torch.linspace(len(seen) - 1, 0, min(frames, len(seen))).round().long().flip(0).tolist()
        return self._decode(torch.cat([seen[number] for number in chosen]), rows * len(chosen), sampling)

    def to_pil(self, images: torch.Tensor) -> list[Image.Image]:
        """Images (B, C, H, W) in [−1, 1] as coloured PIL images of `output_size`, like the windows on disk.

        Whole multiples repeat every pixel, as in the recorded files. Other sizes are interpolated before colouring:
        a mean of two colours is no colour of the map.
        """
        size, found = self.config.output_size, []
        height, width = (size, size) if isinstance(size, int) else size
        whole = height % images.shape[-2] == 0 and width % images.shape[-1] == 0
        for image in to_uint8(images):
            plain = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
            plain = plain.resize((width, height), Image.NEAREST if whole else Image.BICUBIC)
            if len(image) == 1:
                plain = Image.fromarray(colorize(np.asarray(plain), self.config.colormap))
            found.append(plain)
        return found

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
        """Write `out/ID_k/*.png` (or `out/CONDITION/ID_k/*.png`) and `out/manifest.csv`; returns the manifest. users,
        conditions: None for all.

        Existing windows stay: an interrupted call resumes, and a later one adds users or numbers. `out/generation.json`
        records weights, options and what they were trained on; DataError if `out` holds windows of other ones.
        """
        out, manifest = Path(out), self.plan(self.config.users if users is None else users, per_user, seed, conditions)
        series = {"per_user": per_user} if isinstance(sampling.get("temperature"), list | tuple) else {}
        _claim(out, {"seed": seed, **series, **self._made_by(sampling)})
        missing = [row for row in manifest if not (out / row["path"]).exists()]
        with bar(len(manifest), "generate", initial=len(manifest) - len(missing), unit="window") as progress:
            for rows, images in self.stream(missing, batch_size, **sampling):
                self._write(out, rows, images)
                progress.update(len(rows))
                if time_is_up() and progress.n < len(manifest):
                    end_session(f"{progress.n} of {len(manifest)} windows are in {out}")
        return _write_manifest(manifest, out)

    def save_windows(self, out: str | Path, rows: list[dict], images: torch.Tensor, **sampling) -> list[dict]:
        """Write windows as `generate_folder` does: `rows` of a plan, `images` as `stream` gave them for `rows` and
        `sampling`. Seeds may differ, so a folder of `generate_folder` is refused. Returns the rows."""
        _claim(Path(out), self._made_by(sampling))
        self._write(Path(out), rows, images)
        return _write_manifest(rows, Path(out))

    def _write(self, out: Path, rows: list[dict], images: torch.Tensor) -> None:
        for row, image in zip(rows, self.to_pil(images), strict=True):
            with atomic_file(out / row["path"]) as temporary:
                image.save(temporary, format="PNG")

    def _made_by(self, sampling: dict) -> dict:
        """What a window depends on other than its row of the manifest: weights and sampling options, checked."""
        self.check_options(sampling)
        options = {**self.config.sampling, **sampling}
        if options.pop("speckle", bool(self.config.speckle)):
            options["speckle"] = zlib.crc32(json.dumps(self.config.speckle).encode())
        models = [self.codec, self.prior] + ([self.classifier] if options.get("classifier_scale") else [])
        source = {"trained_on": self.config.trained_on} if self.config.trained_on else {}
        return {"weights": "".join(map(fingerprint, models)), **source, **options}


# DiffusionPipeline.from_pretrained looks for the parts of a pipeline in imported modules.
for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
    import_module(module.name)


def load_pipeline(path: str | Path, weights: str = "") -> MicroDopplerPipeline:
    """The pipeline of a folder, on the GPU if there is one. weights: "best" or "last" of the prior's training, "" for
    those that the run uses; DataError if the folder does not hold them."""
    check_choice("weights", weights, WEIGHTS)
    disable_progress_bar()  # of two components
    both = weights == LAST and any(Path(path, "prior").glob(f"*.{LAST}.safetensors"))
    pipeline = MicroDopplerPipeline.from_pretrained(path, variant=LAST if both else None).to(best_device())
    if both:
        pipeline.register_to_config(weights=LAST)
    if weights not in ("", pipeline.config.weights):
        raise DataError(
            f"{path} does not hold the {weights} weights of its prior: leave weights out, or train the prior with "
            'prior_options={"keep_best": true}, which retains the best and the last ones'
        )
    for part in filter(None, (pipeline.codec, pipeline.classifier)):
        part.requires_grad_(False)  # classifier guidance needs gradients of latents, not of weights
    return pipeline


def copy_windows(folder: str | Path, paths: list[str], out: str | Path) -> list[dict]:
    """Copy windows (paths in `folder`) to `out` as `save_windows` writes them; returns their rows of the manifest."""
    folder, out = Path(folder), Path(out)
    try:
        made_by = json.loads((folder / "generation.json").read_text())
        rows = _read_manifest(folder).set_index("path", drop=False).loc[paths].to_dict("records")
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{folder} has no record of how its windows were generated ({error}): give a folder that `generate` wrote"
        ) from error
    _claim(out, {key: value for key, value in made_by.items() if key != "seed"})
    for path in paths:
        with atomic_file(out / path) as temporary:
            shutil.copyfile(folder / path, temporary)
    return _write_manifest(rows, out)


def _claim(out: Path, made_by: dict) -> None:
    """Record how the windows of `out` are generated; DataError if those in it are of another source."""
    note, made_by = out / "generation.json", json.loads(json.dumps(made_by))  # as it reads back: a tuple is a list
    if any(out.glob("**/ID_*/*.*")):
        if not note.exists():
            raise DataError(f"{out} holds windows of another source (no generation.json): choose another folder")
        before = read_json(note, f"delete {out} and generate again")
        if changed := sorted(key for key in before.keys() | made_by.keys() if before.get(key) != made_by.get(key)):
            raise DataError(
                f"{out} holds windows generated with other settings ({', '.join(changed)}): choose another folder or "
                "delete it"
            )
        return
    with atomic_file(note) as temporary:
        temporary.write_text(json.dumps(made_by, indent=1) + "\n")


def _window_seed(row: dict) -> int:
    key = [row["seed"], row["user"], row["number"]]
    key += [zlib.crc32(row["condition"].encode())] if row["condition"] else []
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _read_manifest(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)


def _write_manifest(rows: list[dict], out: Path) -> list[dict]:
    """Add rows to the manifest of `out`, take out those of windows that are gone; returns `rows`."""
    before = _read_manifest(out).to_dict("records") if (out / "manifest.csv").exists() else []
    table = pd.DataFrame(before + rows, columns=["path", "user", "condition", "number", "seed"]).drop_duplicates("path")
    with atomic_file(out / "manifest.csv") as temporary:
        table[[(out / path).exists() for path in table["path"]]].to_csv(temporary, index=False)
    return rows
