"""Systems and presets: every one can be built, and overrides mean what they say."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, write_set

from mdlib.evaluation.evidence import Protocol
from mdlib.systems import (
    SYSTEMS,
    attach_losses,
    get_preset,
    get_system,
    load_codec,
    make_codec,
    make_prior,
    seeded,
    start,
)
from mdlib.systems.system import gpus, preset_for
from mdlib.utils import DataError


@pytest.mark.parametrize("system, preset", [(s, p) for s in SYSTEMS for p in SYSTEMS[s].presets])
def test_every_preset_builds_a_codec_and_a_prior_that_fits(system, preset):
    sizes = get_preset(system, preset)
    with torch.device("meta"):
        codec = make_codec(sizes)
        prior = make_prior(system, sizes, codec, num_users=31)
    assert codec.config.image_size == sizes.image_size and prior.null_label == 31
    assert Protocol(**sizes.validation).seeds >= 2
    if prior.consumes == "tokens":
        assert prior.token_shape == codec.token_shape
    else:
        assert prior.latent_shape == codec.latent_shape
    if hasattr(codec, "num_codes"):
        assert codec.num_codes * 8 <= 31 * 10 * codec.token_shape[0] * codec.token_shape[1], "codes must be fillable"


def test_every_system_has_the_same_presets_for_the_same_machines():
    common = set.intersection(*(set(system.presets) for system in SYSTEMS.values()))
    assert {"smoke", "demo", "demo-long", "gpu-6gb", "gpu-8gb", "gpu-16gb", "p100", "t4", "t4x2"} <= common
    demos = [get_preset(system, "demo") for system in SYSTEMS]
    for effort in ("codec_training", "windows_per_user", "variants", "validation"):
        assert all(getattr(demo, effort) == getattr(demos[0], effort) for demo in demos), "equal terms"


def test_the_latent_diffusion_system_keeps_its_promises():
    for name in SYSTEMS["vqvae-ldm"].presets:
        preset = chosen = get_preset("vqvae-ldm", name)
        with torch.device("meta"):
            codec = make_codec(chosen)
        assert codec.config.num_codes <= 256 and preset.prior["attention"] == "window_axial"
        assert codec.token_shape == (preset.image_size // 8, preset.image_size // 8), "three halvings"
    large = get_preset("vqvae-ldm", "large")
    with torch.device("meta"):
        unet = make_prior("vqvae-ldm", large, make_codec(large), num_users=31).unet
    assert large.image_size == 256 and unet.config.block_out_channels == (256, 512, 768, 1024)
    assert unet.mid_block.attentions[0].time.heads == 16


def test_a_system_takes_the_other_kind_of_codec_at_the_same_grid():
    own, other = (make_codec(get_preset("vae-diffusion", "smoke", codec=kind)) for kind in ("", "vq"))
    assert type(own).__name__ == "KLVAE" and type(other).__name__ == "VQVAE"
    assert own.latent_shape[1:] == other.latent_shape[1:]
    with pytest.raises(DataError, match="needs tokens, which a kl codec lacks"):
        get_preset("vqvae-transformer", "smoke", codec="kl")
    with pytest.raises(DataError, match="unknown codec 'vqgan': choose one of vq, kl"):
        get_preset("vae-diffusion", "smoke", codec="vqgan")


def test_a_codec_is_loaded_whichever_kind_it_is(tmp_path):
    for system in SYSTEMS:
        codec = make_codec(get_preset(system, "smoke"))
        codec.save_pretrained(tmp_path / system)
        assert type(load_codec(tmp_path / system)) is type(codec)
    with pytest.raises(DataError, match="holds no codec: give the codec/ folder of a run"):
        load_codec(tmp_path)


def test_training_starts_from_the_weights_of_another(tmp_path):
    preset = get_preset("vavae-dit", "smoke")
    first, second = (seeded(seed, make_codec, preset) for seed in (1, 2))
    first.save_pretrained(tmp_path / "codec")
    start(second, tmp_path / "codec")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    priors = [seeded(seed, make_prior, "vavae-dit", preset, first, 3) for seed in (1, 2)]
    priors[0].save_pretrained(tmp_path / "prior")
    start(priors[1], tmp_path / "prior")
    assert torch.equal(priors[0].x_embedder.weight, priors[1].x_embedder.weight)
    with pytest.raises(DataError, match="cannot start from .*prior: .* shape mismatch in users.weight"):
        start(make_prior("vavae-dit", preset, first, 4), tmp_path / "prior")
    told = make_codec(get_preset("vavae-dit", "smoke", user_codec=True), num_users=3)
    users = told.users.weight.clone()
    start(told, tmp_path / "codec")  # what only one of the two has stays as it was
    assert torch.equal(told.users.weight, users) and torch.equal(
        told.vae.encoder.conv_in.weight, first.vae.encoder.conv_in.weight
    )
    with pytest.raises(DataError, match="cannot start from .*codec: .* does not fit this VQVAE"):
        start(make_codec(get_preset("vqvae-ldm", "smoke")), tmp_path / "codec")
    with pytest.raises(DataError, match="no published weights of a TokenPrior: give a folder"):
        plain = get_preset("vqvae-transformer", "smoke")
        start(make_prior("vqvae-transformer", plain, make_codec(plain), 3), tmp_path / "weights.pt")
    with pytest.raises(DataError, match="cannot start from .*weights.pt: "):
        start(priors[0], tmp_path / "weights.pt")


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_a_prior_knows_of_walking_is_kept_for_other_users(system, tmp_path):
    preset = get_preset(system, "smoke")
    codec = make_codec(preset)
    known, prior = (seeded(seed, make_prior, system, preset, codec, users) for seed, users in ((1, 3), (2, 5)))
    known.save_pretrained(tmp_path)
    start(prior, tmp_path, other_users=True)
    old, new = known.state_dict(), prior.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old if name != "users.weight")
    table, fresh = old["users.weight"], new["users.weight"]
    assert fresh.shape[0] == 6 and torch.equal(fresh[5], table[3]), "nobody in particular stays nobody in particular"
    torch.testing.assert_close(fresh[:5], table[:3].mean(0).expand(5, -1))
    with pytest.raises(DataError, match="shape mismatch in users.weight"):
        start(prior, tmp_path)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_start_from_other_people_takes_fewer_and_smaller_steps_of_the_same_models(system):
    plain, known = get_preset(system, "demo"), get_preset(system, "demo", init="runs/simulated/pipeline")
    assert (known.codec, known.prior) == (plain.codec, plain.prior), "the weights must fit"
    for part in ("codec_training", "prior_training"):
        before, after = getattr(plain, part), getattr(known, part)
        assert after.steps < before.steps and after.learning_rate < before.learning_rate
    assert known.prior_training.user_rate > 1, "users are all that is new"
    asked = get_preset(system, "demo", init="runs/simulated/pipeline", codec_steps=7, variants=3)
    assert (asked.codec_training.steps, asked.variants) == (7, 3)


def test_a_codec_that_is_told_users_meets_new_ones(tmp_path):
    preset = get_preset("vavae-dit", "smoke", user_codec=True)
    known, codec = (make_codec(preset, num_users=users) for users in (3, 3))
    known.save_pretrained(tmp_path)
    start(codec, tmp_path, other_users=True)
    table = known.users.weight
    torch.testing.assert_close(codec.users.weight[:3], table[:3].mean(0).expand(3, -1))
    assert torch.equal(codec.users.weight[3], table[3])


def test_the_aligned_system_trains_by_the_published_recipe_on_a_gpu():
    for name in SYSTEMS["vavae-dit"].presets:
        preset = chosen = get_preset("vavae-dit", name)
        assert chosen.foundation == (
            "classifier" if name in ("smoke", "demo", "demo-long") else "facebook/dinov2-large"
        )
        if chosen.stages:
            assert [options["alignment_weight"] for _, options in chosen.stages] == [0.5, 0.1, 0.1]
            assert sum(share for share, _ in chosen.stages) == pytest.approx(1) and preset.losses["adversarial_weight"]
            codec = make_codec(get_preset("vavae-dit", "smoke"))
            for _, options in chosen.stages:
                codec.configure(**options)


def test_options_of_losses_are_given_by_name_and_hold_in_every_stage():
    options = {"alignment_weight": 0.2, "adversarial_weight": 0.7, "perceptual_weight": 0.1, "batch_size": 4}
    preset = get_preset("vavae-dit", "smoke", codec_options=options)
    assert all("alignment_weight" not in changes for _, changes in preset.stages) and len(preset.stages) == 3
    codec, foundation, lpips = make_codec(preset), torch.nn.Identity(), torch.nn.Identity()
    foundation.width = 7
    attach_losses(codec, preset, lpips=lpips, foundation=foundation)
    assert set(codec.losses) == {"lpips", "alignment", "adversary"}
    assert codec.losses["lpips"].weight == 0.1 and codec.losses["alignment"].alignment_weight == 0.2
    adversary = codec.losses["adversary"]
    assert adversary.adversarial_weight == 0.7 and adversary.discriminator[0].out_channels == 8
    attach_losses(plain := make_codec(get_preset("vae-diffusion", "smoke")), get_preset("vae-diffusion", "smoke"))
    assert not plain.losses
    with pytest.raises(DataError, match="codec_options has no 'adversarial_weight'; there are .*perceptual_weight"):
        get_preset("vae-diffusion", "smoke", codec_options={"adversarial_weight": 0.5})


def test_only_a_va_vae_is_aligned_or_told_users():
    assert get_preset("vae-diffusion", "smoke", codec="va", foundation="classifier").foundation == "classifier"
    assert get_preset("vavae-dit", "smoke", codec="kl").foundation == "none"
    assert get_preset("vqvae-ldm", "smoke", codec="va").foundation == "classifier", "else it would be a plain KL codec"
    assert get_preset("vavae-dit", "smoke", foundation="none").foundation == "none"
    assert make_codec(get_preset("vavae-dit", "smoke", user_codec=True), num_users=3).conditional
    assert not make_codec(get_preset("vavae-dit", "smoke"), num_users=3).conditional
    for options in ({"foundation": "classifier"}, {"user_codec": True}):
        with pytest.raises(DataError, match="foundation and user_codec need a VA-VAE: use system vavae-dit"):
            get_preset("vqvae-ldm", "smoke", **options)


def test_options_reach_the_model_or_its_training():
    options = {"prediction": "epsilon", "schedule": "linear", "ema_decay": 0.9, "batch_size": 4}
    changed = get_preset("vae-diffusion", "smoke", prior_options=options, codec_options={"reconstruction": "l1"})
    assert changed.prior["prediction"] == "epsilon" and changed.prior["schedule"] == "linear"
    assert changed.prior_training.ema_decay == 0.9 and changed.prior_training.batch_size == 4
    assert changed.codec_training.batch_size == 8 and changed.codec["reconstruction"] == "l1"
    for part in ("codec", "prior"):
        with pytest.raises(DataError, match=f"{part}_options has no 'colour'; there are .*learning_rate"):
            get_preset("vae-diffusion", "smoke", **{f"{part}_options": {"colour": 1}})
    with pytest.raises(DataError, match="a VQ codec trains without ema_decay"):
        get_preset("vqvae-ldm", "smoke", codec_options={"ema_decay": 0.9})
    with pytest.raises(DataError, match="has no 'num_users'"):
        get_preset("vae-diffusion", "smoke", prior_options={"num_users": 3})


def test_overrides_change_what_they_name_and_zero_keeps():
    plain = get_preset("vqvae-transformer", "demo")
    changed = get_preset("vqvae-transformer", "demo", codec_steps=7, prior_steps=0, windows_per_user=20)
    assert changed.codec_training.steps == 7 and changed.prior_training == plain.prior_training
    assert changed.windows_per_user == 20 and plain.windows_per_user == 10
    assert changed.variants == plain.variants > 0 == get_preset("vqvae-transformer", "demo", variants=0).variants


def test_a_short_training_is_not_all_warm_up():
    base = get_preset("vae-diffusion", "base").prior_training
    short = get_preset("vae-diffusion", "base", prior_steps=300).prior_training
    given = get_preset("vae-diffusion", "base", prior_steps=300, prior_options={"warmup_steps": 60}).prior_training
    assert (base.warmup_steps, short.warmup_steps, given.warmup_steps) == (500, 30, 60)


def test_pascal_trains_in_float32_and_turing_in_half():
    assert get_preset("vqvae-transformer", "p100").codec_training.mixed_precision == "no"
    assert get_preset("vqvae-transformer", "t4x2").codec_training.mixed_precision == "fp16"


def test_unknown_names_are_one_line():
    with pytest.raises(DataError, match="unknown system 'gan': choose one of vqvae-transformer"):
        get_system("gan")
    for name in ("a100", "demo@a100", "tiny@p100"):
        with pytest.raises(
            DataError, match=f"unknown preset '{name}' of system vqvae-transformer: choose one of auto, "
        ):
            get_preset("vqvae-transformer", name)


def test_a_preset_is_a_size_on_a_machine():
    assert get_preset("vavae-dit", "p100") == get_preset("vavae-dit", "base@p100")
    assert all(get_preset(system, "t4") == get_preset(system, "gpu-16gb") for system in SYSTEMS)
    small = get_preset("vae-diffusion", "demo@t4x2")
    assert small.prior == get_preset("vae-diffusion", "demo").prior and small.prior_training.mixed_precision == "fp16"
    assert (small.codec_training.batch_size, small.prior_training.batch_size) == (8, 32), "smaller batches stay"
    assert get_preset("vae-diffusion", "base").codec_training.mixed_precision == "auto"
    assert get_preset("vae-diffusion", "base@gpu-6gb").codec_training.batch_size == 16
    assert get_preset("vqvae-ldm", "auto") == get_preset("vqvae-ldm", preset_for(gpus()))


SIXTH = """
from mdlib.systems.system import System

SYSTEM = System(
    name="sixth",
    codec_class="mdlib.models.vqvae:VQVAE",
    prior_class="mdlib.models.transformer:TokenPrior",
    notebooks=("01_env_check", "02_train_vqvae", "03_train_prior", "05_generate", "06_validate"),
    sizes={
        "smoke": dict(
            codec=dict(patch_size=(4, 4), block_out_channels=(8,), norm_num_groups=4, num_codes=8, code_dim=4),
            prior=dict(hidden_size=16, num_layers=1, num_heads=2),
            teacher_steps=0,
            images_per_user=2,
        )
    },
)
"""


def test_a_system_is_one_file_and_one_line(tmp_path):
    """In a copy of the sources a sixth system is added and another one removed; the sixth then runs to its report."""
    for name in ("mdlib", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("check_environment.py", "setup_environment.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    systems = tmp_path / "mdlib" / "systems"
    (systems / "sixth.py").write_text(SIXTH)
    (systems / "vavae_dit.py").unlink()
    listed = (systems / "__init__.py").read_text()
    (systems / "__init__.py").write_text(listed.replace('    "vavae_dit",\n', '    "sixth",\n'))
    data = write_set(tmp_path / "people", users=(1, 2, 3), numbers=range(1, 33))

    def python(*words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, *map(str, words)]
        answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
        return answer.stdout

    program = "from mdlib.systems import SYSTEMS; print(*SYSTEMS, [len(one.presets) for one in SYSTEMS.values()][-2:])"
    assert python("-c", program).split()[:5] == [
        "vqvae-transformer",
        "vae-diffusion",
        "vqvae-ldm",
        "sixth",
        "vq-diffusion",
    ]
    python(
        "-m", "mdlib", "run", "--data", data, "--out", "run", "--system", "sixth", "--preset", "smoke", "--from", "02"
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["about"]["system"] == "sixth" and report["verdict"]["sentence"]


def test_weights_come_from_the_seed_alone():
    preset = get_preset("vqvae-transformer", "smoke")
    torch.manual_seed(1)
    first = seeded(5, make_codec, preset)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = seeded(5, make_codec, preset)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
