"""The nearest training window is found over shifts by whole strides, within the user's own."""

import torch

from mdlib.augment import stride_shift
from mdlib.data import WindowSet
from mdlib.neighbours import nearest_train


def some(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(labels), 1, 32, 32), dtype=torch.uint8, generator=generator)
    return WindowSet(images, torch.tensor(labels), (1, 2, 3), tuple(range(len(labels))), "jet", "data")


def test_a_copy_is_found_also_when_it_is_shifted_but_never_among_another_users():
    train = some([0, 0, 0, 1], seed=0)
    queries = some([0, 0, 1, 2], seed=1)
    queries.images[0] = train.images[2]
    queries.images[1] = stride_shift(train.images[1:2], 2)[0]
    queries.images[2] = train.images[0]
    distance, row = nearest_train(queries, train)
    assert distance[:2].max() < 1e-3 and row[:2].tolist() == [2, 1]
    expected = (queries.float(2) - train.float(3)).square().mean().sqrt()
    shifted = (queries.float(2) - stride_shift(train.float([3]), 2)[0]).square().mean().sqrt()
    torch.testing.assert_close(distance[2], torch.minimum(expected, shifted), rtol=1e-3, atol=1e-3)
    assert row[2] == 3 and distance[3].isinf(), "a user without training windows"
