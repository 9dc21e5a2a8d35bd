"""Download published weights to where mdlib reads them, and verify them: from the Hugging Face hub by the size and
SHA-256 that it states, from torchvision by the SHA-256 whose first digits are in the file's name."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mdlib.utils import DataError, amount

FOUNDATION = ("config.json", "preprocessor_config.json", "model.safetensors")


@dataclass(frozen=True)
class Published:
    """Weights on the Hugging Face hub (`files` of the repository `source`), or torchvision's (`source` is their name in
    torchvision). use: what they are for, with the place of the weights as {}."""

    source: str
    use: str
    files: tuple[str, ...] = ()


PUBLISHED = {
    "vavae": Published(
        "hustvl/vavae-imagenet256-f16d32-dinov2",
        "run --system vavae-dit --preset f16d32 -p codec_start={}",
        ("vavae-imagenet256-f16d32-dinov2.pt",),
    ),
    "lightningdit": Published(
        "hustvl/lightningdit-xl-imagenet256-800ep",
        "run --system vavae-dit --preset f16d32 -p 'prior_options="
        '{{"hidden_size": 1152, "depth": 28, "num_heads": 16}}\' -p prior_start={}',
        ("lightningdit-xl-imagenet256-800ep.pt",),
    ),
    "dinov2": Published("facebook/dinov2-large", "run --system vavae-dit -p foundation={}", FOUNDATION),
    "dinov2-small": Published("facebook/dinov2-small", "run --system vavae-dit -p foundation={}", FOUNDATION),
    "inception": Published("Inception_V3_Weights.IMAGENET1K_V1", "the Fréchet distance by Inception of a report"),
    "lpips": Published("SqueezeNet1_1_Weights.IMAGENET1K_V1", "LPIPS of reports and of codecs"),
    "lpips-alex": Published("AlexNet_Weights.IMAGENET1K_V1", "codecs with perceptual_net=alex"),
    "lpips-vgg": Published("VGG16_Weights.IMAGENET1K_V1", "codecs with perceptual_net=vgg (preset high-quality)"),
}


def fetch_weights(name: str) -> Path:
    """Download published weights, unless they are there already, and verify them; returns the (first) file.

    Args:
        name: of PUBLISHED.

    Raises:
        DataError: an unknown name; a file that cannot be downloaded, with what to do offline, or of wrong content.
    """
    if name not in PUBLISHED:
        raise DataError(f"unknown weights {name!r}: choose one of {', '.join(PUBLISHED)}")
    known = PUBLISHED[name]
    path = _from_hub(known) if known.files else _from_torchvision(known.source)
    print(f"{path}\nfor {known.use.format(known.source if len(known.files) > 1 else path)}", flush=True)
    return path


def _from_hub(known: Published) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    try:
        found = HfApi().model_info(known.source, files_metadata=True)
        every = {one.rfilename: one for one in found.siblings}
        stated = {file: every[file] for file in known.files}
        licence = (found.card_data or {}).get("license", "not stated")
        print(f"{known.source} on the Hugging Face hub; as the hub states, its licence is {licence}", flush=True)
        for file, one in stated.items():
            print(f"{file}: {amount(one.size)}{f', sha256 {one.lfs.sha256}' if one.lfs else ''}", flush=True)
        # Without a revision: what is loaded by the repository's name is found in the cache under its main branch.
        paths = {Path(hf_hub_download(known.source, file)): one for file, one in stated.items()}
    except Exception as error:  # those of requests or httpx, by the hub's release
        raise DataError(
            f"{known.source} cannot be downloaded ({_line(error)}): fetch {', '.join(known.files)} from "
            f"{constants.ENDPOINT}/{known.source} on another machine, copy it here (on Kaggle: attach it as a data set)"
            f" and give its place: {known.use.format('FOLDER' if len(known.files) > 1 else 'FILE')}"
        ) from error
    for path, one in paths.items():
        if path.stat().st_size != one.size or (one.lfs and sha256(path) != one.lfs.sha256):
            path.resolve().unlink()
            raise DataError(f"{path} differed from what the hub states and was removed: give the command again")
    return next(iter(paths))


def _from_torchvision(source: str) -> Path:
    from torch.hub import download_url_to_file
    from torchvision.models import get_weight

    from mdlib.models.pretrained import checkpoint

    weights = get_weight(source)
    path = checkpoint(weights.url.rpartition("/")[2])
    start = path.stem.rpartition("-")[2]
    size = amount(1e6 * weights.meta["_file_size"])
    print(f"{weights.url}: {size}, sha256 {start}…, licence BSD-3-Clause (torchvision's)", flush=True)
    if path.exists() and sha256(path).startswith(start):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_url_to_file(weights.url, str(path), hash_prefix=start)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{path.name} cannot be downloaded ({_line(error)}): fetch {weights.url} on another machine and put it "
            f"into {path.parent} (on Kaggle: attach it as a data set, where it is found)"
        ) from error
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
