"""Published weights: the same latents and images as the network they were published for, every name accounted for."""

import torch
import torch.nn.functional as F
from helpers import message
from safetensors.torch import save_file
from torch import nn

from mdlib.models.ldm import F16D32, convert_ldm, load_ldm
from mdlib.models.vavae import VAVAE

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
    statistics = {"mean": torch.randn(1, 4, 1, 1), "std": torch.rand(1, 4, 1, 1) + 0.5}
    torch.save(statistics, tmp_path / "latents_stats.pt")
    load_ldm(codec, tmp_path / "vavae.ckpt", tmp_path / "latents_stats.pt")
    latents = model.encode(images)
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.raw_latents(images), latents, **close)
    torch.testing.assert_close(codec.encode(images), (latents - statistics["mean"]) / statistics["std"], **close)
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
        codec = VAVAE(**F16D32, foundation_width=1024)
    assert codec.latent_shape == (32, 16, 16)
    found, own = convert_ldm(state, codec), codec.state_dict()
    assert own.keys() - found.keys() == {"stats.mean", "stats.std"}
    assert all(found[name].shape == own[name].shape for name in found)
    assert len(found) == len([name for name in state if not name.startswith(("loss.", "foundation_model."))])


def test_the_projection_is_taken_where_its_width_is_the_codecs():
    state = published().state_dict()
    assert "projection.weight" not in convert_ldm(state, small_codec(foundation_width=5))
    wanted = state["linear_proj.weight"]
    assert torch.equal(convert_ldm(state, small_codec(foundation_width=6))["projection.weight"], wanted)
    state["reverse_proj.weight"] = state.pop("linear_proj.weight")
    assert torch.equal(convert_ldm(state, small_codec(foundation_width=6))["projection.weight"], wanted)


def test_weights_that_do_not_fit_are_refused_by_name():
    state = published().state_dict()
    lost = state.pop("decoder.up.0.block.1.conv1.weight")
    assert "missing: vae.decoder.up_blocks.2.resnets.1.conv1.weight" in message(convert_ldm, state, small_codec())
    state["decoder.up.0.block.1.conv1.weight"] = lost
    state["encoder.down.0.attn.0.q.bias"] = lost
    assert "not of this codec: encoder.down.0.attn.0.q.bias" in message(convert_ldm, state, small_codec())
    del state["encoder.down.0.attn.0.q.bias"]
    assert "of another shape: vae.decoder.conv_in.weight, " in message(
        convert_ldm, state, small_codec(latent_channels=3)
    )
    assert "not of this codec: decoder.up.2.attn.0.k.bias, " in message(
        convert_ldm, state, small_codec(level_attention=False)
    )


def test_statistics_of_another_codec_are_refused_and_nothing_is_loaded(tmp_path):
    codec, file = small_codec(), tmp_path / "vavae.pt"
    torch.save(published().state_dict(), file)
    torch.save({"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}, tmp_path / "stats.pt")
    before = codec.vae.quant_conv.weight.clone()
    assert "mean and std of shape (1, 4, 1, 1)" in message(load_ldm, codec, file, tmp_path / "stats.pt")
    assert torch.equal(codec.vae.quant_conv.weight, before)
