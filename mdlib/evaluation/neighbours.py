"""The training window nearest to a window: how far it is, and whether it was copied."""

import torch

from mdlib.data.windows import WindowSet

SIDE = 32  # pixels a side at which windows are compared: speckle is finer
CHUNK = 64  # windows compared at once, for memory


def nearest_train(queries: WindowSet, train: WindowSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance (N,) of each window to the nearest training one of its user, and that one's row (N,).

    Distance: root mean square over 32×32 pixels in [−1, 1], the least over all circular shifts in time; inf (and row 0)
    where the user has no training window.
    """
    distance, row = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.long)
    windows, references = _small(queries), _small(train)
    for user in queries.labels.unique():
        asked, known = (torch.nonzero(labels == user).flatten() for labels in (queries.labels, train.labels))
        if len(known):
            parts = [_apart(part, references[known]).min(1) for part in windows[asked].split(CHUNK)]
            distance[asked] = torch.cat([part.values for part in parts]).float()
            row[asked] = known[torch.cat([part.indices for part in parts])]
    return distance, row


def _small(windows: WindowSet) -> torch.Tensor:
    """(N, C·SIDE, SIDE): float64, because distances are differences of large sums."""
    small = torch.nn.functional.interpolate(windows.float(), size=(SIDE, SIDE), mode="area")
    return small.double().flatten(1, 2)


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(N, M) root mean squares of the differences of (N, rows, SIDE) and (M, rows, SIDE) at the best shift, by the
    correlation theorem."""
    products = torch.einsum("nrf,mrf->nmf", torch.fft.rfft(one), torch.fft.rfft(other).conj())
    correlation = torch.fft.irfft(products, SIDE).amax(2)
    energy = one.square().sum((1, 2))[:, None] + other.square().sum((1, 2))
    return ((energy - 2 * correlation).clamp_min(0) / one[0].numel()).sqrt()
