"""Frozen networks: features of a vision transformer that stands in for DINOv2, and of a user classifier; LPIPS."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from mdlib.models.classifier import SmallCNN
from mdlib.models.codec import Distance
from mdlib.models.pretrained import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LPIPS_BACKBONES,
    ClassifierFeatures,
    VisionFeatures,
    load_foundation,
    load_lpips,
)
from mdlib.models.vqvae import VQVAE

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)


def dinov2(**changes) -> Dinov2Model:
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**{**TINY, **changes})).eval()


def normalised(images: torch.Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return ((images.expand(-1, 3, -1, -1) + 1) / 2 - mean) / std


@torch.no_grad()
def test_patch_tokens_stand_where_their_patches_do():
    model, images = dinov2(), torch.rand(3, 1, 14, 28) * 2 - 1
    features = VisionFeatures(model).features(images, (2, 4))
    assert features.shape == (3, 16, 2, 4)
    tokens = model(pixel_values=normalised(images)).last_hidden_state[:, 1:]  # without the class token
    torch.testing.assert_close(features[:, :, 1, 2], tokens[:, 4 + 2])


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (8, 2), (3, 5)])
def test_the_image_is_resized_to_one_patch_a_cell(grid):
    foundation = VisionFeatures(dinov2())
    flat = torch.full((2, 3, 20, 30), 0.3)
    assert foundation.features(flat, grid).shape == (2, foundation.width, *grid)
    bright_corner = flat.clone()
    bright_corner[:, :, :5, :5] = 1  # what a foundation sees there moves that corner's feature most
    change = (foundation.features(bright_corner, grid) - foundation.features(flat, grid)).square().sum(1)
    assert all(int(window.argmax()) == 0 for window in change.flatten(1))


@torch.no_grad()
def test_register_tokens_are_no_patches():
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, num_register_tokens=3)).eval()
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    tokens = model(pixel_values=normalised(images)).last_hidden_state
    assert tokens.shape[1] == 1 + 3 + 16
    features = VisionFeatures(model).features(images, (4, 4))
    torch.testing.assert_close(features.flatten(2), tokens[:, 4:].transpose(1, 2))


@torch.no_grad()
def test_a_transformer_of_fixed_size_interpolates_its_position_encodings():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**TINY, intermediate_size=16), add_pooling_layer=False)
    assert VisionFeatures(model).features(torch.zeros(1, 1, 64, 64), (16, 8)).shape == (1, 16, 16, 8)


@torch.no_grad()
def test_a_saved_model_is_loaded_with_its_own_normalisation(tmp_path, monkeypatch):
    model, images = dinov2(), torch.rand(2, 3, 28, 28) * 2 - 1
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokens = lambda **own: model(pixel_values=normalised(images, **own)).last_hidden_state[:, 1:].transpose(1, 2)
    torch.testing.assert_close(load_foundation(tmp_path).features(images, (4, 4)).flatten(2), tokens())
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor", "image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}'
    )
    own = load_foundation(str(tmp_path))
    torch.testing.assert_close(own.features(images, (4, 4)).flatten(2), tokens(mean=(0.5,) * 3, std=(0.2,) * 3))
    assert not any(parameter.requires_grad for parameter in own.parameters()) and not own.model.training


def test_loading_leaves_the_callers_noise_alone(tmp_path):
    ViTModel(ViTConfig(**TINY, intermediate_size=16), add_pooling_layer=False).save_pretrained(tmp_path)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_foundation(tmp_path)  # draws the pooling layer that the file lacks
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("name", ["somebody/some-model", "attached/some-model/1/base", "/no/such/folder"])
def test_an_absent_model_is_reported_in_one_line(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=f"^the foundation model {name} .*attach it.*foundation=none$"):
        load_foundation(name)


def test_a_model_without_patches_is_refused():
    tiny = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ValueError, match="^BertModel has no patch_size: a foundation is a vision transformer"):
        VisionFeatures(BertModel(BertConfig(**tiny)))
    merging = VisionFeatures(SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)))
    with pytest.raises(ValueError, match="^SwinModel merges patches: 16 tokens for 64 cells$"):
        merging.features(torch.zeros(1, 3, 32, 32), (8, 8))


# A user classifier -------------------------------------------------------------------------------------------------


def windows(count: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def classifier() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN(3, widths=(4, 8)).eval()


@pytest.mark.parametrize("grid", [(8, 4), (16, 16), (32, 8)])
def test_a_classifiers_stages_stand_side_by_side_on_the_grid(grid):
    foundation = ClassifierFeatures(classifier(), windows())
    features = foundation.features(windows(5) / 127.5 - 1, grid)
    assert features.shape == (5, foundation.width, *grid) and foundation.width == 4 + 8
    assert not features.requires_grad


def test_a_classifiers_features_are_standardised_and_keep_their_place():
    network = SmallCNN(3, widths=(12,)).eval()
    foundation = ClassifierFeatures(network, windows())
    (raw,) = network.stages(windows() / 127.5 - 1)
    features = foundation.features(windows() / 127.5 - 1, raw.shape[2:])  # its own grid: nothing is averaged
    alive = raw.std((0, 2, 3)) > 1e-6
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std((0, 2, 3))[alive], torch.ones(int(alive.sum())), atol=1e-4, rtol=0)
    first = features[0, alive].flatten(1).argmax(1)
    assert torch.equal(first, raw[0, alive].flatten(1).argmax(1))


def test_a_feature_no_window_excites_stays_small():
    network = classifier()
    with torch.no_grad():
        network.blocks[0][2].bias[0] = -100.0  # after it a ReLU that nothing passes
    foundation = ClassifierFeatures(network, windows())
    with torch.no_grad():
        network.blocks[0][2].bias[0] = 0.5
    assert foundation.features(windows(5) / 127.5 - 1, (8, 8))[:, 0].abs().max() < 100


# LPIPS --------------------------------------------------------------------------------------------------------------


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
