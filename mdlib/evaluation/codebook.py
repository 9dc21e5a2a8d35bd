"""What the codes of a codebook look like, and where they occur.

Legend: N windows, h w token grid, r c pixels a cell of it covers (H/h, W/w), K codes.
"""

from dataclasses import dataclass

import torch

from mdlib.data.windows import WindowSet
from mdlib.evaluation.metrics import code_counts
from mdlib.models.layers import parts


@dataclass(frozen=True, eq=False)
class Codebook:
    """The codes of a codec, as a set of windows uses them; see `survey`."""

    windows: WindowSet
    tokens: torch.Tensor  # (N, h, w)
    counts: torch.Tensor  # (num_users, K): how often each user uses each code
    decoded: torch.Tensor  # (K, C, r, c) in [−1, 1]: what each code decodes to
    real: torch.Tensor  # (K, C, r, c) in [−1, 1]: what the windows show where it stands, nan where it is not used

    @property
    def times(self) -> torch.Tensor:
        """How often each code is used (K,)."""
        return self.counts.sum(0)

    @property
    def rates(self) -> torch.Tensor:
        """Times in a window of each user, on average (num_users, K); nan for a user without windows."""
        return self.counts / self.windows.labels.bincount(minlength=self.windows.num_users).unsqueeze(1)

    def most_telling(self) -> int:
        """The code that one user uses more often than the average user does, by the most times in a window."""
        known = self.rates[~self.rates.isnan().any(1)]
        return int((known.amax(0) - known.mean(0)).argmax())

    def places(self, code: int) -> torch.Tensor:
        """Share of the windows that hold `code` in each cell (h, w)."""
        return (self.tokens == code).double().mean(0)

    def windows_with(self, code: int, most: int = 6) -> list[int]:
        """Rows of the windows, at most one a user and `most` in all, that hold `code` most often, that one first. One a
        user: neighbouring windows share three of their four steps and look alike."""
        times = (self.tokens == code).sum((1, 2))
        rows: dict[int, int] = {}
        for row in times.argsort(descending=True, stable=True).tolist():
            if len(rows) == most or not times[row]:
                break
            rows.setdefault(int(self.windows.labels[row]), row)
        return list(rows.values())


@torch.no_grad()
def survey(codec, windows: WindowSet, tokens: torch.Tensor) -> Codebook:
    """The codebook of `codec` as windows and their tokens (N, h, w) use it.

    A cell's neighbours have a say in what its code decodes to, so a code is shown by the mean over the cells that hold
    it; one that is not used, by the middle of a window that holds nothing else.
    """
    codec.eval()
    decoded = code_patches(_decode(codec, tokens), tokens, codec.num_codes)
    unused = decoded.isnan().flatten(1).any(1).nonzero().flatten()
    if len(unused):
        h, w = codec.token_shape
        alone = _decode(codec, unused.view(-1, 1, 1).expand(-1, h, w))
        decoded[unused] = cells(alone, (h, w))[:, h // 2, w // 2]
    return Codebook(
        windows=windows,
        tokens=tokens,
        counts=code_counts(tokens, windows.labels, codec.num_codes, windows.num_users),
        decoded=decoded,
        real=code_patches(windows.float(), tokens, codec.num_codes),
    )


def code_patches(images: torch.Tensor, tokens: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Mean (K, C, r, c) of what images (N, C, H, W) show in the cells of each code by tokens (N, h, w); nan where there
    is none."""
    pieces = cells(images, tokens.shape[1:]).flatten(0, 2)  # (N·h·w, C, r, c)
    flat = tokens.flatten()
    sums = pieces.new_zeros(num_codes, *pieces.shape[1:]).index_add_(0, flat, pieces)
    return sums / flat.bincount(minlength=num_codes).view(-1, 1, 1, 1)


def cells(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Images (N, C, H, W) cut into the cells of a grid: (N, h, w, C, r, c)."""
    h, w = grid
    return images.unflatten(3, (w, -1)).unflatten(2, (h, -1)).permute(0, 2, 4, 1, 3, 5)


def _decode(codec, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([codec.decode_tokens(part).float().cpu() for (part,) in parts(codec.device, 64, tokens)])
