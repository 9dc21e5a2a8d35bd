"""The codec's teacher: it weighs what tells users apart, and stays out of the codec."""

import torch

from mdlib.experiments.steps import train_teacher
from mdlib.models.classifier import SmallCNN
from mdlib.models.teacher import FeatureDistance
from mdlib.models.vqvae import VQVAE


def test_distance_is_zero_for_the_same_and_pulls_outputs_only():
    torch.manual_seed(0)
    distance = FeatureDistance(SmallCNN(3))
    images = torch.rand(4, 1, 32, 32) * 2 - 1
    outputs = (images + 0.2 * torch.randn_like(images)).requires_grad_()
    assert float(distance(images, images)) == 0
    distance(outputs, images).backward()
    assert outputs.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_speckle_costs_less_than_a_moved_ridge():
    torch.manual_seed(0)
    distance = FeatureDistance(SmallCNN(3))
    rows = torch.arange(32.0).view(1, 1, 32, 1)
    ridge = lambda row: (2 * torch.exp(-((rows - row) ** 2) / 8) - 1).expand(4, 1, 32, 32)
    moved = ridge(19.0) - ridge(16.0)
    speckle = torch.randn(4, 1, 32, 32)
    speckle = speckle * moved.square().mean().sqrt() / speckle.square().mean().sqrt()
    assert distance(ridge(16.0) + speckle, ridge(16.0)) < 0.7 * distance(ridge(16.0) + moved, ridge(16.0))


def test_a_teacher_that_was_kept_is_not_trained_again(tmp_path, monkeypatch):
    images, labels = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
    told = (images, labels, 2, 3, 0, tmp_path / "codec" / "teacher.safetensors")
    first = train_teacher(*told)
    monkeypatch.setattr("mdlib.experiments.steps.train_classifier", lambda *arguments: 1 / 0)
    state = torch.get_rng_state()
    again = train_teacher(*told)
    assert torch.equal(torch.get_rng_state(), state)
    one, other = torch.rand(2, 4, 1, 32, 32) * 2 - 1
    assert torch.equal(first(one, other), again(one, other))


def test_the_teacher_is_no_part_of_the_codec():
    codec = VQVAE(image_size=32, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4)
    names = set(codec.state_dict())
    plain, _ = codec.eval().loss(torch.zeros(2, 1, 32, 32))
    codec.add_teacher("teacher", FeatureDistance(SmallCNN(3)), 0.5)
    taught, logs = codec.loss(torch.zeros(2, 1, 32, 32))
    torch.testing.assert_close(taught, plain + 0.5 * logs["teacher"])
    assert set(codec.state_dict()) == names
