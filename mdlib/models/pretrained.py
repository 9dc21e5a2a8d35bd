"""Weights pretrained on simulated people, and published ones: VA-VAE's, foundations, LPIPS and Inception. Files are
read without unpickling anything but tensors, and fit a model completely or not at all.

Legend: B batch, N windows, C image channels, H W pixels, h w grid, D latent channels, F width of features.
"""

import inspect
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from mdlib.models.classifier import SmallCNN
from mdlib.utils import DataError, atomic_file, read_json, readable, to_float

INSIDE = ("ema", "model", "state_dict")  # entries of a training's checkpoint that hold weights, best first
PROJECTION = "losses.alignment.projection.weight"
RENAMES = (  # of latent diffusion's weights, in this order; an empty name is no part of the codec
    (r"^(loss|foundation_model)\..*", ""),
    (r"^(linear|reverse)_proj\.weight$", PROJECTION),
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"  # that come with mdlib, see its README.md
INPUTS = Path("/kaggle/input")


def pretrained_weights(name: str) -> dict[str, Path]:
    """Folders that `mdlib pretrain` wrote for a system, or for "identifier": "attached" to this Kaggle notebook, and
    "shipped" with mdlib, in this order and where they are."""
    found = {}
    for place, cards in dict(attached=attached("weights.json"), shipped=[WEIGHTS / name / "weights.json"]).items():
        for card in cards:
            with suppress(DataError):  # a file of that name that is something else
                if place not in found and read_json(card, "").get("name") == name:
                    found[place] = card.parent
    return found


def attached(file: str) -> list[Path]:
    """The files of that name in the inputs of this Kaggle notebook."""
    # Depths one by one: "**" would list every image of the attached data.
    return [path for depth in range(6) for path in sorted(INPUTS.glob("*/" * depth + file))]


def pretrained_backbone(channels: int = 1) -> Path | None:
    """The folder of a `SmallCNN` pretrained to identify simulated people, for images of `channels`; None where there is
    none. All of its weights but those of `head` serve other users."""
    folders = pretrained_weights("identifier").values()
    return next((folder for folder in folders if fits_windows(folder, channels)), None)


def fits_windows(folder: str | Path, channels: int) -> bool:
    """Whether a folder holds a `SmallCNN` for images of `channels`."""
    config = Path(folder) / "config.json"
    found = read_json(config, "copy it again") if config.is_file() else {}
    return (found.get("_class_name"), found.get("channels")) == (SmallCNN.__name__, channels)


def fits(model, folder: Path) -> bool:
    """Whether the weights that `save_pretrained` wrote to `folder` have the class, names and shapes of `model`'s."""
    with readable(folder, "copy it again"), safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes == own and read_json(folder / "config.json", "copy it again")["_class_name"] == type(model).__name__


def load_weights(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .ckpt file by name; FileNotFoundError, or ValueError for a file that
    holds something else."""
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"no weights at {source}: download the published file, or attach it, and give its path")
    if source.suffix == ".safetensors":
        try:
            return load_file(source)
        except SafetensorError as error:
            raise ValueError(f"{source} is a damaged or incomplete .safetensors file: {error}") from error
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle can raise anything
        raise ValueError(
            f"{source} cannot be loaded safely, it is not a file of tensors only: convert it to .safetensors if you "
            "trust its source"
        ) from error
    if isinstance(found, dict):
        found = next((found[name] for name in INSIDE if isinstance(found.get(name), dict)), found)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{source} holds no weights by name")
    return found


def load_completely(model, found: dict[str, Tensor], source: str | Path, optional: tuple[str, ...] = ()) -> None:
    """Load weights that fit `model` name by name and shape by shape; else ValueError, and the model is unchanged.
    Names that begin with one of `optional` may be missing on either side or differ; they are loaded if they fit."""
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in found.items() if name in own and own[name].shape == tensor.shape}
    problems = {
        "unexpected keys": found.keys() - own.keys(),
        "missing keys": own.keys() - found.keys(),
        "shape mismatch in": (found.keys() & own.keys()) - fitting.keys(),
    }
    lines = []
    for problem, names in problems.items():
        if names := sorted(name for name in names if not name.startswith(optional)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{problem} {', '.join(names[:3])}{more}")
    if lines:
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {'; '.join(lines)}")
    model.load_state_dict(own | fitting)


def load_ldm(codec, weights: str | Path) -> None:
    """Load published VA-VAE weights into a `VAVAE` of the same sizes (preset f16d32), and their projection into an
    attached `Alignment` of the same width. Call `codec.calibrate` afterwards."""
    load_completely(codec, convert_ldm(load_weights(weights), codec), weights, (*codec.optional, "stats."))


def renamed(found: dict[str, Tensor], renames: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Tensors under other names, by regular expressions and their replacements; without those whose name gets empty."""
    result = {}
    for name, tensor in found.items():
        for old, new in renames:
            name = re.sub(old, new, name)
        result |= {name: tensor} if name else {}
    return result


def convert_ldm(state: dict[str, Tensor], codec) -> dict[str, Tensor]:
    """Weights in latent diffusion's layout under the names and in the shapes of `codec`. For a codec of one channel the
    first convolution's weights are summed over RGB, and the last one's averaged: grey images give the same latents, and
    the decoded intensity is the mean of the colours."""
    levels, grey, found = len(codec.config.block_out_channels), codec.config.in_channels == 1, {}
    # Latent diffusion counts the decoder's levels from the finest, diffusers from the coarsest.
    up = tuple((rf"^decoder\.up\.{level}\.", f"decoder.up_blocks.{levels - 1 - level}.") for level in range(levels))
    for name, tensor in renamed(state, up + RENAMES).items():
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # a 1×1 convolution (C, C, 1, 1) is a linear layer (C, C)
        elif grey and name == "encoder.conv_in.weight":
            tensor = tensor.sum(1, keepdim=True)
        elif grey and name.startswith("decoder.conv_out."):
            tensor = tensor.mean(0, keepdim=True)
        found[name if name == PROJECTION else f"vae.{name}"] = tensor
    return found


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionFeatures(nn.Module):
    """Patch tokens of a vision transformer of the package transformers. Pixels are normalised by `mean` and `std` of
    RGB in [0, 1], as when the model was trained; the authors of VA-VAE leave that out."""

    def __init__(self, model: nn.Module, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        if not isinstance(getattr(model.config, "patch_size", None), int):
            raise ValueError(f"{type(model).__name__} has no patch_size: a foundation is a vision transformer (DINOv2)")
        self.model = model.eval().requires_grad_(False)
        self.width: int = model.config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        # DINOv2 always interpolates its position encodings; ViT and DeiT do on request.
        optional = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if optional else {}

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, F, h, w) of images (B, 1 or 3, H, W) in [−1, 1], resized to one patch a cell of `grid`."""
        size = [cells * self.model.config.patch_size for cells in grid]
        resized = F.interpolate(images.expand(-1, 3, -1, -1), size, mode="bicubic", antialias=True)  # (B, 3, h·p, w·p)
        pixels = ((resized + 1) / 2 - self.mean) / self.std
        tokens = self.model(pixel_values=pixels, **self.options).last_hidden_state  # (B, class and registers + h·w, F)
        cells = grid[0] * grid[1]
        if tokens.shape[1] < cells:
            raise ValueError(f"{type(self.model).__name__} merges patches: {tokens.shape[1]} tokens for {cells} cells")
        return tokens[:, -cells:].transpose(1, 2).unflatten(2, tuple(grid))


class ClassifierFeatures(nn.Module):
    """Features of all stages of a user classifier, concatenated, and standardised on (at most 512 of) uint8 images
    (N, C, S, S)."""

    def __init__(self, classifier: SmallCNN, images: Tensor):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        some = images[torch.linspace(0, len(images) - 1, min(len(images), 512)).long()]
        with torch.no_grad():
            stages = classifier.stages(to_float(some.to(classifier.device)))
        self.register_buffer("mean", torch.cat([stage.mean((0, 2, 3)) for stage in stages]).view(-1, 1, 1))
        std = torch.cat([stage.std((0, 2, 3)) for stage in stages]).view(-1, 1, 1)
        # A feature that is constant in these windows must not dominate where it is not.
        self.register_buffer("std", torch.where(std > 1e-6, std, 1.0))
        self.width: int = len(self.mean)

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, F, h, w) of images (B, C, H, W) in [−1, 1], each stage averaged or interpolated to `grid`."""
        stages = self.classifier.stages(images)
        same = [F.interpolate(stage.float(), grid, mode="bilinear", antialias=True) for stage in stages]
        return (torch.cat(same, 1) - self.mean) / self.std


def load_foundation(name_or_path: str | Path) -> VisionFeatures:
    """The vision transformer of a folder, or of a name on the Hugging Face hub; safetensors only. FileNotFoundError if
    it is not on disk and cannot be downloaded, ValueError if it is no vision transformer."""
    name = str(name_or_path)
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    try:
        with torch.random.fork_rng():  # its initial weights are random; the caller's random numbers stay as they are
            model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the foundation model {name} is not here as a folder of config.json and model.safetensors, and could not "
            "be downloaded: attach it (on Kaggle: as an input) and give its folder, or train without alignment by "
            "foundation=none"
        ) from error
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=offline)
    except OSError:  # a folder without preprocessor_config.json
        found = {}
    return VisionFeatures(model, found.get("image_mean", IMAGENET_MEAN), found.get("image_std", IMAGENET_STD))


LPIPS_BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
INCEPTION = "inception_v3_google-0cc3c7bd.pth"


def checkpoint(file: str) -> Path:
    """Path of a file of torchvision's weights in torch's cache, whether it is there or not. One that is attached to
    this Kaggle notebook is copied there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists() and (found := attached(file)):
        with atomic_file(path) as temporary:
            shutil.copyfile(found[0], temporary)
    return path


def load_lpips(net: str = "squeeze") -> nn.Module:
    """LPIPS distance (Zhang et al. 2018) of the `lpips` package, frozen; inputs (B, 1 or 3, H, W) in [−1, 1].
    FileNotFoundError if the package is missing, or the backbone is not on disk and cannot be downloaded."""
    if net not in LPIPS_BACKBONES:
        raise ValueError(f"unknown LPIPS net {net!r}: choose one of {', '.join(LPIPS_BACKBONES)}")
    weights = checkpoint(LPIPS_BACKBONES[net])
    try:
        import lpips

        if not weights.exists() and os.environ.get("HF_HUB_OFFLINE") == "1":
            raise OSError("offline mode is on")
        with torch.random.fork_rng():  # its initial weights are random; the caller's random numbers stay as they are
            model = lpips.LPIPS(net=net, verbose=False)
    except ImportError as error:
        raise FileNotFoundError(
            "LPIPS needs the package lpips: install it or set perceptual_weight=0 (codec_options)"
        ) from error
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"LPIPS needs {weights.name}, which is not in {weights.parent} and could not be downloaded ({error}): "
            "put the file there (on Kaggle: attach it as a data set) or set perceptual_weight=0 (codec_options)"
        ) from error
    return model.eval().requires_grad_(False)


def load_inception() -> nn.Module:
    """torchvision's Inception v3 (Szegedy et al. 2016) without its last layer, frozen: images (B, 1 or 3, H, W) in
    [−1, 1] → features (B, 2048). It is not the network of published FIDs: compare its metrics with its own only.
    FileNotFoundError if its weights are not on this machine; they are not downloaded."""
    from torchvision.models import inception_v3

    weights = checkpoint(INCEPTION)
    if not weights.exists():
        raise FileNotFoundError(f"{weights.name} is not on this machine: run python -m mdlib fetch inception")
    network = inception_v3(weights=None, init_weights=False, transform_input=False)
    try:
        network.load_state_dict(load_weights(weights))
    except (ValueError, RuntimeError) as error:
        raise FileNotFoundError(f"{weights} is incomplete, or of another network: {error}") from error
    network.fc = nn.Identity()
    resize = lambda images: F.interpolate(images, size=(299, 299), mode="bilinear", antialias=True)
    network.register_forward_pre_hook(lambda _, inputs: resize(*inputs).expand(-1, 3, -1, -1))
    return network.eval().requires_grad_(False)
