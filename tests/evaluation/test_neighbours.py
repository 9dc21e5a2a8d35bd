"""The nearest training window is found over shifts in time, within the user's own."""

import torch

from mdlib.data.windows import WindowSet
from mdlib.evaluation.neighbours import nearest_train


def some(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(labels), 1, 32, 32), dtype=torch.uint8, generator=generator)
    return WindowSet(images, torch.tensor(labels), (1, 2, 3), tuple(range(len(labels))), "jet", "data")


def test_a_copy_is_found_also_when_it_is_shifted_but_never_among_another_users():
    train = some([0, 0, 0, 1], seed=0)
    queries = some([0, 0, 1, 2], seed=1)
    queries.images[0] = train.images[2]
    queries.images[1] = train.images[1].roll(5, dims=-1)
    queries.images[2] = train.images[0]
    distance, row = nearest_train(queries, train)
    assert distance[:2].max() < 1e-3 and row[:2].tolist() == [2, 1]
    shifted = torch.stack([train.float(3).roll(shift, dims=-1) for shift in range(32)])
    expected = (queries.float(2) - shifted).square().mean((1, 2, 3)).sqrt().min()
    torch.testing.assert_close(distance[2], expected)
    assert row[2] == 3 and distance[3].isinf(), "a user without training windows"
