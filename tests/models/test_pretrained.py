"""Published weights: the files they come in, what is never unpickled, models they fit completely or not at all, and the
same latents and images as the network they were published for."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Trap
from safetensors.torch import save_file
from torch import nn

from mdlib.models.codec import Alignment
from mdlib.models.kl import VAVAE
from mdlib.models.pretrained import PROJECTION, convert_ldm, load_completely, load_ldm, load_weights
from mdlib.systems import get_preset

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
OLDER = {name: 0 * tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    "name, kept",
    [
        ("bare.pt", WEIGHTS),
        ("bare.pth", WEIGHTS),
        ("averaged.pt", {"model": OLDER, "ema": WEIGHTS, "opt": {"state": {}}, "step": 3}),
        ("model.ckpt", {"model": WEIGHTS, "state_dict": OLDER}),
        ("lightning.ckpt", {"state_dict": WEIGHTS, "epoch": 3}),
        ("bare.safetensors", WEIGHTS),
    ],
)
def test_weights_are_found_in_the_files_people_publish(tmp_path, name, kept):
    file = tmp_path / name
    (save_file if file.suffix == ".safetensors" else torch.save)(kept, file)
    for source in (file, str(file)):
        torch.testing.assert_close(load_weights(source), WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize("inside", [False, True])
def test_objects_are_not_unpickled(tmp_path, inside):
    file, trap = tmp_path / "trap.pt", Trap(tmp_path / "sprung")
    torch.save({"ema": WEIGHTS, "config": trap} if inside else trap, file)
    message = refused(file)
    assert "cannot be loaded safely, it is not a file of tensors only: convert it to .safetensors" in message
    assert not (tmp_path / "sprung").exists()


def refused(file, error=ValueError) -> str:
    with pytest.raises(error) as answer:
        load_weights(file)
    message = str(answer.value)
    assert str(file) in message and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<html>404: Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10300000000\n",
        b'{"weights": "elsewhere"}',
        b"\x80\x02.",
        b"U\xdcb\xb7: \x0e",
        b"PK\x03\x04 cut off",
        bytes(range(256)),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, suffix, content):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    refused(file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_download_that_was_cut_off_is_refused(tmp_path, suffix):
    file = tmp_path / f"file{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:-20])
    refused(file)


@pytest.mark.parametrize("kept", [[torch.ones(2)], torch.ones(2), {"weight": 3}, {"ema": {"decay": 0.9}}, {0: "a"}])
def test_what_holds_no_weights_by_name_is_refused(tmp_path, kept):
    file = tmp_path / "other.pt"
    torch.save(kept, file)
    assert refused(file) == f"{file} holds no weights by name"


def test_a_missing_file_is_reported(tmp_path):
    assert "no weights at" in refused(tmp_path / "absent.safetensors", FileNotFoundError)
    assert "no weights at" in refused(tmp_path, FileNotFoundError)  # a folder


def test_weights_that_fit_are_loaded():
    model = nn.Linear(3, 2)
    load_completely(model, WEIGHTS, "file.pt")
    torch.testing.assert_close(dict(model.state_dict()), WEIGHTS)


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"weight": None}, "missing keys weight"),
        ({"scale": torch.ones(2)}, "unexpected keys scale"),
        ({"bias": torch.ones(1)}, "shape mismatch in bias"),
        ({"bias": torch.ones(2, 1)}, "shape mismatch in bias"),
        ({f"x{n}": torch.ones(1) for n in range(5)}, "unexpected keys x0, x1, x2 and 2 more"),
        (
            {"weight": None, "scale": torch.ones(2), "bias": torch.ones(3)},
            "unexpected keys scale; missing keys weight; shape mismatch in bias",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(changed, problem):
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor for name, tensor in {**WEIGHTS, **changed}.items() if tensor is not None}
    with pytest.raises(ValueError) as answer:
        load_completely(model, weights, "file.pt")
    assert str(answer.value) == f"file.pt does not fit this Linear: {problem}"
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# VA-VAE -----------------------------------------------------------------------------------------------------------

# The oracle: latent diffusion's autoencoder (Rombach et al. 2022), names and arithmetic as published.


class Block(nn.Module):
    def __init__(self, before: int, width: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, before, eps=1e-6), nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        if before != width:
            self.nin_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x):
        changed = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + changed


class Attention(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(self.norm(x)).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, h·w)
        share = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(2)  # (B, h·w of q, h·w of k)
        return x + self.proj_out((v @ share.transpose(1, 2)).view_as(x))


class Resample(nn.Module):
    def __init__(self, width: int, down: bool):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Half(nn.Module):
    """The encoder, or the decoder, of channels `inward` → `outward`."""

    def __init__(self, inward, outward, widths, blocks, groups, down):
        super().__init__()
        coarsest, self.order = widths[-1], range(len(widths)) if down else range(len(widths) - 1, -1, -1)
        self.is_encoder, name = down, "downsample" if down else "upsample"
        current = widths[0] if down else coarsest
        self.conv_in = nn.Conv2d(inward, current, 3, padding=1)
        levels = {}
        for level in self.order:
            part = levels[level] = nn.Module()
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                part.block.append(Block(current, widths[level], groups))
                current = widths[level]
                if level == len(widths) - 1:
                    part.attn.append(Attention(current, groups))
            if level != self.order[-1]:
                part.add_module(name, Resample(current, down))
        self.add_module("down" if down else "up", nn.ModuleList(levels[level] for level in range(len(widths))))
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Block(coarsest, coarsest, groups), Block(coarsest, coarsest, groups)
        self.mid.attn_1 = Attention(coarsest, groups)
        self.norm_out = nn.GroupNorm(groups, current, eps=1e-6)
        self.conv_out = nn.Conv2d(current, outward, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        middle = lambda x: self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        x = x if self.is_encoder else middle(x)
        for level in self.order:
            part = (self.down if self.is_encoder else self.up)[level]
            for number, block in enumerate(part.block):
                x = block(x)
                x = part.attn[number](x) if part.attn else x
            for name in ("downsample", "upsample"):
                x = getattr(part, name)(x) if hasattr(part, name) else x
        x = middle(x) if self.is_encoder else x
        return self.conv_out(F.silu(self.norm_out(x)))


class Published(nn.Module):
    """RGB images ↔ moments and latents, with what else the published file holds."""

    def __init__(self, widths, blocks, groups, latents, features=6):
        super().__init__()
        self.encoder = Half(3, 2 * latents, widths, blocks, groups, down=True)
        self.decoder = Half(latents, 3, widths, blocks + 1, groups, down=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1), nn.Conv2d(latents, latents, 1)
        self.linear_proj = nn.Conv2d(latents, features, 1, bias=False)
        self.loss, self.foundation_model = nn.Conv2d(3, 4, 1), nn.Linear(2, 2)

    def encode(self, images):
        return self.quant_conv(self.encoder(images)).chunk(2, 1)[0]

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))


SMALL = dict(
    image_size=16,
    block_out_channels=(8, 8, 16),
    layers_per_block=2,
    norm_num_groups=4,
    latent_channels=4,
    level_attention=True,
)


def published() -> Published:
    torch.manual_seed(0)
    model = Published((8, 8, 16), blocks=2, groups=4, latents=4)
    for parameter in model.parameters():  # every name carries something of its own: no norm is the identity
        nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


def small_codec(channels: int = 3, **changes) -> VAVAE:
    return VAVAE(**{**SMALL, **changes}, in_channels=channels).eval()


@torch.no_grad()
def test_a_loaded_codec_computes_what_the_published_one_does(tmp_path):
    model, codec, images = published(), small_codec(), torch.rand(2, 3, 16, 16) * 2 - 1
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "vavae.ckpt")
    load_ldm(codec, tmp_path / "vavae.ckpt")
    codec.calibrate(images)
    latents = model.encode(images)
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.raw_latents(images), latents, **close)
    decoded = model.decode(latents)
    assert decoded.abs().max() > 0.01
    torch.testing.assert_close(codec.decode(codec.encode(images)), decoded.clamp(-1, 1), **close)


@torch.no_grad()
def test_a_grey_image_means_the_same_to_one_channel_and_to_three(tmp_path):
    save_file(published().state_dict(), tmp_path / "vavae.safetensors")
    rgb, grey = small_codec(3), small_codec(1)
    for codec in (rgb, grey):
        load_ldm(codec, tmp_path / "vavae.safetensors")
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    latents = grey.encode(images)
    torch.testing.assert_close(latents, rgb.encode(images.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)
    colours = rgb.vae.decode(latents).sample.mean(1, keepdim=True)
    torch.testing.assert_close(grey.decode(latents), colours.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_the_published_size_fits_to_the_last_name():
    with torch.device("meta"):
        state = Published((128, 128, 256, 256, 512), blocks=2, groups=32, latents=32, features=1024).state_dict()
        codec = VAVAE(**get_preset("vavae-dit", "f16d32").codec)
        codec.attach(Alignment(foundation(1024), 32))
    assert codec.latent_shape == (32, 16, 16)
    found, own = convert_ldm(state, codec), codec.state_dict()
    assert own.keys() - found.keys() == {"stats.mean", "stats.std"}
    assert all(found[name].shape == own[name].shape for name in found)
    assert len(found) == len([name for name in state if not name.startswith(("loss.", "foundation_model."))])


def foundation(width: int) -> nn.Module:
    network = nn.Identity()
    network.width = width
    return network


@pytest.mark.parametrize("name", ["linear_proj.weight", "reverse_proj.weight"])
def test_the_projection_is_loaded_into_an_alignment_of_its_width(name, tmp_path):
    state = published().state_dict()
    state[name] = state.pop("linear_proj.weight")
    save_file(state, tmp_path / "vavae.safetensors")
    for width in (5, 6):
        codec = small_codec()
        codec.attach(Alignment(foundation(width), 4))
        before = codec.state_dict()[PROJECTION].clone()
        load_ldm(codec, tmp_path / "vavae.safetensors")
        assert torch.equal(codec.state_dict()[PROJECTION], state[name] if width == 6 else before)


def test_published_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    def refused_by(state, codec):
        torch.save(state, tmp_path / "vavae.pt")
        with pytest.raises(ValueError) as answer:
            load_ldm(codec, tmp_path / "vavae.pt")
        return str(answer.value)

    state = published().state_dict()
    lost = state.pop("decoder.up.0.block.1.conv1.weight")
    assert "missing keys vae.decoder.up_blocks.2.resnets.1.conv1.weight" in refused_by(state, small_codec())
    state["decoder.up.0.block.1.conv1.weight"] = lost
    state["encoder.down.0.attn.0.q.bias"] = lost
    unknown = "unexpected keys vae.encoder.down_blocks.0.attentions.0.to_q.bias"
    assert unknown in refused_by(state, small_codec())
    del state["encoder.down.0.attn.0.q.bias"]
    answer = refused_by(state, small_codec(latent_channels=3))
    assert "shape mismatch in vae.decoder.conv_in.weight, " in answer
    answer = refused_by(state, small_codec(level_attention=False))
    assert "unexpected keys vae.decoder.up_blocks.0.attentions.0.group_norm.bias, " in answer
