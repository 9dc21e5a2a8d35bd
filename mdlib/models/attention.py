"""Attention within tiles of a latent grid: windows, and the two axes of a spectrogram.

Rows of the grid are Doppler, columns are time. Window attention (Liu et al. 2021, without shifts) costs O(n·w²) for n
positions and windows of w × w; axial attention (Ho et al. 2019), first along time within a Doppler row, then along
Doppler within a time column, costs O(n·√n); full attention costs O(n²).
"""

import copy

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn


class TiledAttnProcessor:
    """Processor of diffusers' Attention: a position attends to those of its own tile of rows × columns positions.

    Norm, projections and residual are the Attention's own. A side of 0 is as long as the grid; a grid that is no
    multiple of the tile has smaller tiles at its lower and right edge.
    """

    def __init__(self, rows: int, columns: int):
        if rows < 0 or columns < 0:
            raise ValueError(f"a tile's sides must be 0 (the whole grid) or more, got {rows} × {columns}")
        self.rows, self.columns = rows, columns

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, C, h, w) → (B, C, h, w)."""
        height, width = hidden_states.shape[2:]
        tile = (min(self.rows or height, height), min(self.columns or width, width))
        flat = _tiles(attn.group_norm(hidden_states).permute(0, 2, 3, 1), tile)  # (B·tiles, r·c, C)
        shape = (*flat.shape[:2], attn.heads, -1)
        query, key, value = (part(flat).view(shape).transpose(1, 2) for part in (attn.to_q, attn.to_k, attn.to_v))
        inside = _inside(height, width, tile, len(hidden_states), flat.device)
        # Tiles stand in the batch: with more than four dimensions torch has no fused attention.
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=inside)  # (B·tiles, heads, r·c, d)
        output = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        output = _grid(output, height, width, tile).permute(0, 3, 1, 2)
        return (output + hidden_states if attn.residual_connection else output) / attn.rescale_output_factor


class AxialAttention(nn.Module):
    """Attention along time, then along Doppler, each with its own norm, projections and residual."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.time, self.doppler = attention, copy.deepcopy(attention)
        for part in self.doppler.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        self.time.set_processor(TiledAttnProcessor(1, 0))
        self.doppler.set_processor(TiledAttnProcessor(0, 1))

    def forward(self, hidden_states: torch.Tensor, **_) -> torch.Tensor:
        """(B, C, h, w) → (B, C, h, w)."""
        return self.doppler(self.time(hidden_states))


def use_window_axial(unet: UNet2DModel, window: int) -> None:
    """Give a UNet window attention in the first half of its levels and axial attention in the second and the middle."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    levels = len(unet.down_blocks)
    for level in range(levels):
        for block in (unet.down_blocks[level], unet.up_blocks[levels - 1 - level]):
            _replace(block, window if 2 * level < levels else 0)
    _replace(unet.mid_block, 0)


def _replace(block: nn.Module, window: int) -> None:
    """Window attention, or axial where `window` is 0, in place of the full attention of one block."""
    for number, attention in enumerate(getattr(block, "attentions", None) or ()):
        if window:
            attention.set_processor(TiledAttnProcessor(window, window))
        else:
            block.attentions[number] = AxialAttention(attention)


def _tiles(grid: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """(B, h, w, C) → (B·tiles, r·c, C), zeros where the grid is no multiple of the tile."""
    rows, columns = tile
    below, right = -grid.shape[1] % rows, -grid.shape[2] % columns
    if below or right:
        grid = F.pad(grid, (0, 0, 0, right, 0, below))
    parts = grid.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # from (B, h/r, r, w/c, c, C)


def _grid(tiles: torch.Tensor, height: int, width: int, tile: tuple[int, int]) -> torch.Tensor:
    """(B·tiles, r·c, C) → (B, h, w, C)."""
    rows, columns = tile
    parts = tiles.unflatten(1, (rows, columns)).unflatten(0, (-1, -(-height // rows), -(-width // columns)))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _inside(height: int, width: int, tile: tuple[int, int], count: int, device) -> torch.Tensor | None:
    """Which keys of a tile lie in the grid, for `count` grids: bool (B·tiles, 1, 1, r·c); None when all do."""
    if height % tile[0] == 0 and width % tile[1] == 0:
        return None
    ones = torch.ones(1, height, width, 1, device=device)
    return _tiles(ones, tile)[:, None, None, :, 0].bool().repeat(count, 1, 1, 1)
