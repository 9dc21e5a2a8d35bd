"""The training window nearest to a window: how far it is, and whether it was copied."""

import torch

from mdlib import metrics
from mdlib.augment import stride_shift
from mdlib.data import WindowSet


def nearest_train(queries: WindowSet, train: WindowSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance (N,) of each window to the nearest training one of its user, and that one's row (N,).

    Distance: root mean square over 32×32 pixels in [−1, 1], over shifts by whole strides; inf where the user has no
    training window.
    """
    small = lambda images: torch.nn.functional.interpolate(images, size=(32, 32), mode="area")
    references = small(train.float())
    shifted = torch.cat([references, stride_shift(references, 2)]).flatten(1)
    labels = train.labels.repeat(2)
    same_user = queries.labels[:, None] == labels[None]
    distance, row = metrics.nearest(small(queries.float()).flatten(1), shifted, same_user)
    return distance, row % len(train)
