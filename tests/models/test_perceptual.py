"""LPIPS: what to do where its weights are missing, and that it stays out of the codec."""

import pytest
import torch

from mdlib.models.codec import Distance
from mdlib.models.pretrained import LPIPS_BACKBONES, load_lpips
from mdlib.models.vqvae import VQVAE


def test_lpips_without_weights_says_what_to_attach(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="squeezenet1_1-b8a52dc0.pth.*perceptual_weight=0"):
        load_lpips()
    with pytest.raises(ValueError, match="unknown LPIPS net 'resnet': choose one of alex, vgg, squeeze"):
        load_lpips("resnet")


def test_lpips_from_weights_on_disk_stays_out_of_the_codec(tmp_path, monkeypatch):
    from torchvision.models import squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "hub" / "checkpoints" / LPIPS_BACKBONES["squeeze"]
    weights.parent.mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), weights)
    codec = VQVAE(image_size=64, block_out_channels=(8, 16), norm_num_groups=4, num_codes=8, code_dim=4)
    names = set(codec.state_dict())
    codec.attach(Distance("lpips", load_lpips(), 0.1))
    loss, logs = codec.loss(torch.rand(2, 1, 64, 64))
    assert torch.isfinite(loss) and "lpips" in logs
    assert set(codec.state_dict()) == names and not list(codec.losses.parameters())
