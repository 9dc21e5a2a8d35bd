import torch

from mdlib.data.augment import cutmix, enlarge, stride_recombine, stride_shift


def test_shift_by_a_stride_moves_two_steps():
    images = torch.arange(16).expand(3, 1, 2, 16)
    assert torch.equal(stride_shift(images), images.roll(8, -1))


def test_shift_keeps_time_running_forward():
    ramp = torch.arange(16.0).expand(1, 1, 1, 16)
    assert (stride_shift(ramp)[0, 0, 0].diff() == 1).sum() == 14  # one seam


def test_recombination_takes_each_step_from_the_same_user_and_place():
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 2])
    window, column = torch.arange(7).reshape(7, 1, 1, 1) * 100, torch.arange(18)
    images = (window + column).expand(7, 2, 3, 18)
    mixed = stride_recombine(images, labels, torch.Generator().manual_seed(0))
    assert mixed.shape == images.shape and mixed.dtype == images.dtype
    assert torch.equal(mixed % 100, images % 100)
    sources = mixed[:, 0, 0] // 100
    assert torch.equal(labels[sources], labels[:, None].expand(7, 18))
    assert torch.equal(sources[6], torch.full((18,), 6))  # a user's only window stays itself
    steps = sources.tensor_split([4, 9, 13], dim=1)
    assert all((step == step[:, :1]).all() for step in steps)
    assert any((sources[i] != sources[i, 0]).any() for i in range(6))


def test_recombination_is_seeded_and_draws_evenly():
    images, labels = (
        torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 1, 4),
        torch.zeros(4, dtype=torch.long),
    )
    draw = [stride_recombine(images, labels, torch.Generator().manual_seed(s)) for s in (0, 0, *range(1, 200))]
    assert torch.equal(draw[0], draw[1])
    share = torch.cat(draw).long().flatten().bincount() / (len(draw) * 16)
    assert torch.allclose(share, torch.tensor(0.25), atol=0.03)


def test_a_training_set_holds_windows_strides_and_recombinations():
    images = torch.randint(0, 256, (6, 1, 4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    many, rows = enlarge(images, labels, 3, seed=0)
    assert many.shape == (30, 1, 4, 8) and torch.equal(labels[rows], labels.repeat(5))
    assert torch.equal(many[:6], images) and torch.equal(many[6:12], stride_shift(images))
    assert len(enlarge(images, labels, 0, seed=0)[0]) == 12


def test_cutmix_labels_a_window_by_the_time_of_each_user():
    labels = torch.tensor([0, 1, 2, 3]).repeat(64)
    images = labels.view(-1, 1, 1, 1).expand(-1, 1, 4, 32).float()  # each pixel holds its user
    mixed, users = cutmix(images, labels, 4, torch.Generator().manual_seed(0))
    counted = torch.stack([(mixed[:, 0, 0] == user).float().mean(1) for user in range(4)], dim=1)
    assert torch.allclose(users, counted) and torch.equal(mixed[:, :, :1].expand_as(mixed), mixed)
    own = users[range(256), labels]
    assert 0.5 < own.mean() < 0.75, "half a window on the average, and a quarter of that is of the same user"
    assert own.std() > 0.2, "stretches of all lengths"
    assert torch.equal(cutmix(images, labels, 4, torch.Generator().manual_seed(0))[1], users)
