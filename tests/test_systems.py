"""Systems and presets: every one can be built, and overrides mean what they say."""

import pytest
import torch

from mdlib.data import DataError
from mdlib.systems import SYSTEMS, get_preset, get_system, make_codec, make_prior, seeded


@pytest.mark.parametrize("system, preset", [(s, p) for s in SYSTEMS for p in SYSTEMS[s].presets])
def test_every_preset_builds_a_codec_and_a_prior_that_fits(system, preset):
    sizes = get_preset(system, preset)
    with torch.device("meta"):
        codec = make_codec(system, sizes)
        prior = make_prior(system, sizes, codec, num_users=31)
    assert codec.config.image_size == sizes.image_size
    assert prior.token_shape == codec.token_shape and prior.null_label == 31
    assert codec.num_codes * 8 <= 31 * 10 * codec.token_shape[0] * codec.token_shape[1], "codes must be fillable"


def test_overrides_change_what_they_name_and_zero_keeps():
    plain = get_preset("vqvae-transformer", "demo")
    changed = get_preset("vqvae-transformer", "demo", codec_steps=7, prior_steps=0, windows_per_user=20)
    assert changed.codec_training.steps == 7 and changed.prior_training == plain.prior_training
    assert changed.windows_per_user == 20 and plain.windows_per_user == 10


def test_pascal_trains_in_float32_and_turing_in_half():
    assert get_preset("vqvae-transformer", "p100").codec_training.mixed_precision == "no"
    assert get_preset("vqvae-transformer", "t4x2").codec_training.mixed_precision == "fp16"


def test_unknown_names_are_one_line():
    with pytest.raises(DataError, match="unknown system 'gan': choose one of vqvae-transformer"):
        get_system("gan")
    with pytest.raises(DataError, match="unknown preset 'a100': choose one of demo"):
        get_preset("vqvae-transformer", "a100")


def test_weights_come_from_the_seed_alone():
    preset = get_preset("vqvae-transformer", "smoke")
    torch.manual_seed(1)
    first = seeded(5, make_codec, "vqvae-transformer", preset)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = seeded(5, make_codec, "vqvae-transformer", preset)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
