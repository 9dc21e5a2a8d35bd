import torch
from helpers import message, small_set

from mdlib.data.windows import to_uint8
from mdlib.utils import to_float


def test_selections_keep_the_label_map():
    windows = small_set()
    mine = windows.of_user(7)
    assert len(mine) == 3 and mine.users == (4, 7) and mine.labels.tolist() == [1, 1, 1]
    for index in ([5, 0], torch.tensor([5, 0])):
        some = windows.select(index)
        assert some.paths == (windows.paths[5], windows.paths[0]) and some.labels.tolist() == [1, 0]
        assert torch.equal(some.images, windows.images[[5, 0]])
    assert windows.select(windows.labels == 0).paths == windows.select(slice(0, 3)).paths == windows.paths[:3]
    assert "no user ID_5; there are 4, 7" in message(windows.of_user, 5)


def test_ranges():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_float(every).min() == -1 and to_float(every).max() == 1
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    windows = small_set()
    assert torch.equal(windows.float([1, 2]), to_float(windows.images[1:3]))
    assert windows.float().shape == (6, 1, 8, 8) and windows.float().dtype == torch.float32
