"""Attention in tiles of a latent grid: who sees whom, and that norm and residual stay."""

import itertools

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from mdlib.models.unet import AxialAttention, LatentDiffusion, TiledAttnProcessor, use_window_axial

CHANNELS, HEADS = 8, 2


def attention(**changes) -> Attention:
    """As diffusers' UNet makes it, in double precision and with a norm that is not the identity's."""
    torch.manual_seed(0)
    options = dict(
        heads=HEADS,
        dim_head=CHANNELS // HEADS,
        norm_num_groups=2,
        residual_connection=True,
        rescale_output_factor=1.5,
        bias=True,
    )
    module = Attention(CHANNELS, **{**options, **changes}).double().eval()
    if module.group_norm is not None:
        torch.nn.init.normal_(module.group_norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(module.group_norm.bias, 0.0, 0.3)
    return module


def grid(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, height, width, dtype=torch.double, generator=torch.manual_seed(1))


def tiles(height: int, width: int, rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """Positions of every tile, by going through the grid."""
    found = {}
    for place in itertools.product(range(height), range(width)):
        found.setdefault((place[0] // rows, place[1] // columns), []).append(place)
    return list(found.values())


def by_hand(module: Attention, inputs: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Softmax attention of every head in every tile, one after the other."""
    normed, output = module.group_norm(inputs), torch.empty_like(inputs)
    for tile in tiles(*inputs.shape[2:], rows, columns):
        here = torch.stack([normed[:, :, row, column] for row, column in tile], 1)  # (B, places, C)
        query, key, value = module.to_q(here), module.to_k(here), module.to_v(here)
        heads = []
        for q, k, v in zip(*(part.chunk(HEADS, -1) for part in (query, key, value)), strict=True):
            heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        mixed = module.to_out[0](torch.cat(heads, -1))
        for number, (row, column) in enumerate(tile):
            output[:, :, row, column] = mixed[:, number]
    return (output + inputs) / module.rescale_output_factor


@torch.no_grad()
def moved(module, inputs: torch.Tensor, changed: torch.Tensor) -> set[tuple[int, int]]:
    """Positions of the grid at which the output changes with the input."""
    difference = (module(inputs) - module(changed)).abs().amax((0, 1))
    return {tuple(place) for place in (difference > 1e-9).nonzero().tolist()}


@pytest.mark.parametrize("tile", [(0, 0), (4, 6), (0, 6), (9, 9)])
def test_one_tile_is_diffusers_full_attention(tile):
    module, inputs = attention(), grid(4, 6)
    module.set_processor(AttnProcessor2_0())
    expected = module(inputs)
    module.set_processor(TiledAttnProcessor(*tile))
    torch.testing.assert_close(module(inputs), expected)


@pytest.mark.parametrize("size, tile", [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 8), (4, 5)), ((5, 1), (2, 2))])
def test_every_tile_is_attention_of_its_own(size, tile):
    """The last three grids are no multiple of the tile: what pads them is never attended to."""
    module, inputs = attention(), grid(*size)
    module.set_processor(TiledAttnProcessor(*tile))
    torch.testing.assert_close(module(inputs), by_hand(module, inputs, *tile))


@pytest.mark.parametrize("rows, columns", [(2, 2), (1, 0), (0, 1), (3, 4)])
def test_a_position_reaches_its_tile_and_nothing_else(rows, columns):
    module, inputs = attention(), grid(5, 6)
    module.group_norm = torch.nn.Identity()  # its statistics span the grid
    module.set_processor(TiledAttnProcessor(rows, columns))
    for tile in tiles(5, 6, rows or 5, columns or 6):
        for row, column in tile:
            changed = inputs.clone()
            changed[:, :, row, column] += 1
            assert moved(module, inputs, changed) == set(tile)


def test_with_the_norm_in_place_a_tile_does_not_see_the_others():
    module, inputs = attention(), grid(4, 6)
    module.set_processor(TiledAttnProcessor(2, 3))
    changed = inputs.clone()
    changed[:, :, 0, 0], changed[:, :, 0, 4] = inputs[:, :, 0, 4], inputs[:, :, 0, 0]  # the statistics stay
    assert moved(module, inputs, changed) == {(row, column) for row in (0, 1) for column in range(6)}


def test_axial_attention_mixes_a_doppler_row_then_a_time_column():
    module, inputs = AxialAttention(attention(norm_num_groups=None)).eval(), grid(4, 6)
    module.time.group_norm = module.doppler.group_norm = torch.nn.Identity()
    changed = inputs.clone()
    changed[:, :, 1, 2] += 1
    assert moved(module.time, inputs, changed) == {(1, column) for column in range(6)}
    assert moved(module.doppler, inputs, changed) == {(row, 2) for row in range(4)}
    assert moved(module, inputs, changed) == set(itertools.product(range(4), range(6)))


def test_the_two_axes_have_weights_of_their_own():
    module = AxialAttention(attention())
    module(grid(4, 6)).square().mean().backward()
    for (name, first), second in zip(module.time.named_parameters(), module.doppler.parameters(), strict=True):
        assert first is not second and first.grad is not None and second.grad is not None
        if name.startswith("to_"):
            assert not torch.equal(first, second), f"{name} starts alike along both axes"


@pytest.mark.parametrize("axial", [False, True])
def test_attention_that_adds_nothing_leaves_the_input(axial):
    module, inputs = attention(rescale_output_factor=1.0), grid(4, 6)
    torch.nn.init.zeros_(module.to_out[0].weight)
    torch.nn.init.zeros_(module.to_out[0].bias)
    module.set_processor(TiledAttnProcessor(2, 2))
    if axial:
        module = AxialAttention(module)
        module.doppler.load_state_dict(module.time.state_dict())
    torch.testing.assert_close(module(inputs), inputs)


@pytest.mark.parametrize("levels, windowed", [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_fine_levels_get_windows_and_coarse_ones_and_the_middle_both_axes(levels, windowed):
    widths = (8, 16, 24, 32)[:levels]
    unet = UNet2DModel(
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D",) * levels,
        up_block_types=("AttnUpBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        attn_norm_num_groups=4,
    )
    use_window_axial(unet, 4)
    found = {part: {} for part in ("down_blocks", "mid_block", "up_blocks")}
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            tile = (module.processor.rows, module.processor.columns)
            found[name.split(".")[0]].setdefault(module.to_q.in_features, set()).add(tile)
    window, axes = {(4, 4)}, {(1, 0), (0, 1)}
    expected = {width: window if level < windowed else axes for level, width in enumerate(widths)}
    assert found == {"down_blocks": expected, "mid_block": {widths[-1]: axes}, "up_blocks": expected}


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    prior = LatentDiffusion((2, 8, 4), 3, (8, 16, 16), norm_num_groups=4, attention="window_axial", head_dim=4).eval()
    prior.save_pretrained(tmp_path)
    again = LatentDiffusion.from_pretrained(tmp_path)
    noisy, users = torch.randn(2, 2, 8, 4), prior.users(torch.tensor([0, 3]))
    with torch.no_grad():
        first = prior(noisy, torch.tensor([10, 900]), users)
        assert torch.equal(again(noisy, torch.tensor([10, 900]), users), first)
        assert first.shape == noisy.shape


def test_tiles_without_a_size_are_refused():
    with pytest.raises(ValueError, match=r"^a tile's sides must be 0 \(the whole grid\) or more, got -1 × 2$"):
        TiledAttnProcessor(-1, 2)
    for window in (0, -4):
        with pytest.raises(ValueError, match=f"^window must be at least 1, got {window}$"):
            LatentDiffusion(
                (2, 8, 8), 3, (8, 16), norm_num_groups=4, head_dim=4, attention="window_axial", window=window
            )
