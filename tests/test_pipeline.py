"""The product: user ids as they stand on disk in, coloured windows out, saved and loaded without a pickle."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import ROOT, write_set
from PIL import Image

from mdlib.cli import pair
from mdlib.data.speckle import fit_speckle
from mdlib.data.windows import load_windows, to_uint8
from mdlib.models.classifier import SmallCNN
from mdlib.models.kl import KLVAE
from mdlib.models.transformer import TokenPrior
from mdlib.models.unet import LatentDiffusion
from mdlib.models.vqdiffusion import VQDiffusion
from mdlib.models.vqvae import VQVAE
from mdlib.pipeline import MicroDopplerPipeline, copy_windows, load_pipeline
from mdlib.utils import DataError


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    codec = VQVAE(image_size=16, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4).eval()
    prior = TokenPrior(8, codec.token_shape, num_users=3, hidden_size=16, num_layers=1, num_heads=2).eval()
    return MicroDopplerPipeline(codec, prior, users=(3, 7, 12), colormap="jet", output_size=64)


@pytest.fixture(params=["kl", "vq"])
def diffusion(request):
    """A pipeline whose prior denoises latents, with a classifier, over either kind of codec."""
    torch.manual_seed(0)
    sizes = dict(image_size=16, block_out_channels=(8, 8), norm_num_groups=4)
    codec = KLVAE(**sizes, latent_channels=2) if request.param == "kl" else VQVAE(**sizes, num_codes=8, code_dim=4)
    codec.calibrate(torch.rand(8, 1, 16, 16) * 2 - 1)
    small = dict(block_out_channels=(8, 16), norm_num_groups=4, head_dim=8, attention="window_axial")
    prior = LatentDiffusion(codec.latent_shape, num_users=3, **small)
    options = dict(users=(3, 7, 12), output_size=32, sampling=dict(num_inference_steps=4))
    return MicroDopplerPipeline(codec.eval(), prior.eval(), SmallCNN(3, widths=(4, 8)).eval(), **options)


@pytest.fixture(params=["ancestral", "mask_predict"])
def discrete(request, pipeline):
    """A pipeline whose prior denoises tokens."""
    torch.manual_seed(1)
    prior = VQDiffusion(8, pipeline.codec.token_shape, num_users=3, hidden_size=16, depth=1, num_heads=2).eval()
    torch.nn.init.normal_(prior.final_layer.linear.weight)  # a new prior knows no users yet
    torch.nn.init.normal_(prior.final_layer.modulation.weight)
    sampling = dict(sampler=request.param, num_inference_steps=4)
    return MicroDopplerPipeline(pipeline.codec, prior, users=(3, 7, 12), output_size=32, sampling=sampling)


def test_users_are_named_as_on_disk(pipeline):
    made = pipeline(users=[12, 3], images_per_user=2, seed=1)
    assert made.users == [12, 12, 3, 3]
    assert [image.size for image in made.images] == [(64, 64)] * 4 and made.images[0].mode == "RGB"
    path = "ID_12/ID12_generated_seed1_2.png"
    assert made.manifest[1] == {"path": path, "user": 12, "condition": "", "number": 2, "seed": 1, "place": 1.0}


def test_a_window_depends_on_seed_user_and_number_alone(pipeline):
    many = pipeline(users=[3, 7, 12], images_per_user=3, seed=4, batch_size=5, output_type="pt").images
    one = pipeline(users=[7], images_per_user=2, seed=4, output_type="pt").images
    torch.testing.assert_close(many[3:5], one)
    other = pipeline(users=[7], images_per_user=2, seed=5, output_type="pt").images
    assert not torch.equal(one, other)


def test_an_unknown_user_is_one_line(pipeline):
    with pytest.raises(DataError, match="knows users 3, 7, 12; it was not trained on 4, 5"):
        pipeline(users=[3, 4, 5])


def test_saved_and_loaded_it_makes_the_same_windows(pipeline, tmp_path):
    expected = pipeline(users=[7], images_per_user=3, output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.config.users == [3, 7, 12] and again.config.colormap == "jet"
    for loaded in (again, DiffusionPipeline.from_pretrained(tmp_path).to(again.device)):
        torch.testing.assert_close(loaded([7], images_per_user=3, output_type="pt").images, expected)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["codec"] == ["mdlib.models.vqvae", "VQVAE"] and index["prior"] == [
        "mdlib.models.transformer",
        "TokenPrior",
    ]
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {".json", ".safetensors", ".py"}, "nothing that must be unpickled"


@pytest.mark.parametrize(
    "lines, options",
    [
        ("import mdlib; importlib.util.find_spec('diffusers'); from diffusers import DiffusionPipeline", ""),
        ("from diffusers import DiffusionPipeline; import mdlib", ""),
        ("from diffusers import DiffusionPipeline", ", custom_pipeline='pipeline', trust_remote_code=True"),
    ],
)
def test_diffusers_loads_it_in_a_process_of_its_own(lines, options, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    lines = f"import importlib.util; {lines}; pipeline = DiffusionPipeline.from_pretrained('pipeline'{options})"
    lines += "; print(type(pipeline).__module__, len(pipeline([3]).images))"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", lines]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.stdout.split() == ["mdlib.pipeline", "1"], answer.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_encodes_tokens_and_writes_folders(dtype, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    half = MicroDopplerPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=dtype)
    half.generate_folder(tmp_path / "made", per_user=1)
    assert half.codec.encode_tokens(torch.zeros(1, 1, 32, 32, dtype=dtype)).dtype == torch.long
    assert pipeline(users=[]).images == []


def test_a_generator_gives_the_seed_and_moves_on(pipeline):
    draw = lambda generator: pipeline([3], images_per_user=2, output_type="pt", generator=generator).images
    ours = torch.Generator().manual_seed(5)
    first, second = draw(ours), draw(ours)
    assert not torch.equal(first, second) and torch.equal(first, draw(torch.Generator().manual_seed(5)))


@pytest.fixture
def speckled(pipeline):
    """`pipeline` with the speckle of windows that are noise around its own."""
    smooth = to_uint8(pipeline([3, 7, 12], images_per_user=10, output_type="pt").images)
    noise = 40 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    fitted = fit_speckle((smooth + noise).clamp(0, 255).to(torch.uint8), smooth)
    return MicroDopplerPipeline(
        pipeline.codec, pipeline.prior, users=(3, 7, 12), output_size=16, speckle=asdict(fitted)
    )


def test_speckle_is_added_to_each_window_by_its_seed_and_can_be_left_out(pipeline, speckled):
    smooth = pipeline([3, 7], images_per_user=3, output_type="pt").images
    added = speckled([3, 7], images_per_user=3, output_type="pt").images
    assert 20 < 127.5 * (added - smooth).std() < 60
    torch.testing.assert_close(speckled([7], images_per_user=1, output_type="pt").images, added[3:4])
    torch.testing.assert_close(speckled([3, 7], images_per_user=3, output_type="pt", speckle=False).images, smooth)


def test_speckle_is_saved_with_the_pipeline_and_older_pipelines_have_none(pipeline, speckled, tmp_path):
    expected = speckled([7], output_type="pt").images
    speckled.save_pretrained(tmp_path)
    torch.testing.assert_close(load_pipeline(tmp_path)([7], output_type="pt").images, expected)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["speckle"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    old = load_pipeline(tmp_path)
    torch.testing.assert_close(old([7], output_type="pt").images, pipeline([7], output_type="pt").images)
    with pytest.raises(DataError, match="has no speckle to add"):
        old([7], speckle=True)


def test_windows_with_and_without_speckle_are_not_mixed_in_one_folder(speckled, tmp_path):
    speckled.generate_folder(tmp_path, per_user=1)
    assert len(speckled.generate_folder(tmp_path, per_user=2, speckle=True)) == 6, "the default by its name"
    with pytest.raises(DataError, match="windows generated with other settings .speckle."):
        speckled.generate_folder(tmp_path, per_user=2, speckle=False)


def test_options_of_other_pipelines_are_refused_in_one_line(pipeline):
    with pytest.raises(DataError, match="no sampling option scheduler; there are guidance_scale, speckle, temperature"):
        pipeline([7], scheduler="ddim")


def test_temperature_rises_over_a_users_windows(discrete):
    rises(discrete)


def rises(pipeline):
    """A series of windows is as they are at its temperatures one by one."""
    draw = lambda temperature: pipeline([3, 7], images_per_user=3, output_type="pt", temperature=temperature).images
    series, low, middle, high = map(draw, ([0.5, 2.5], 0.5, 1.5, 2.5))
    for place, one in enumerate((low, middle, high)):
        torch.testing.assert_close(series[place::3], one[place::3])
    assert not torch.equal(series, low) and not torch.equal(series, high)


def test_generated_windows_do_not_join_real_ones(pipeline, tmp_path):
    data = write_set(tmp_path / "people", numbers=range(3))
    with pytest.raises(DataError, match="holds windows of another source"):
        pipeline.generate_folder(data, per_user=1)
    assert not list(data.rglob("*generated*")) and not (data / "generation.json").exists()
    with pytest.raises(DataError, match="speckle must be true or false, got 'False'"):
        pipeline([3], speckle="False")
    assert dict(map(pair, ("speckle=False", "top_k=3", "a={'b': True}", "c=1,2"))) == {
        **{"speckle": False, "top_k": 3, "a": {"b": True}, "c": "1,2"}
    }


def test_a_folder_holds_one_series_of_temperatures(pipeline, tmp_path):
    rises(pipeline)
    pipeline.generate_folder(tmp_path, [3], per_user=2, temperature=[0.5, 2.5])
    with pytest.raises(DataError, match=r"other settings \(per_user\)"):
        pipeline.generate_folder(tmp_path, [3], per_user=3, temperature=[0.5, 2.5])
    for wrong in ([1.0], [0.0, 1.0], ["low", "high"]):
        with pytest.raises(ValueError, match="temperature must be"):
            pipeline.generate_folder(tmp_path / "wrong", [3], temperature=wrong)
    assert not (tmp_path / "wrong").exists()


def test_no_pipeline_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no pipeline"):
        load_pipeline(tmp_path)


def test_what_comes_out_reads_back_as_it_was(pipeline, tmp_path):
    rows = pipeline.generate_folder(tmp_path, per_user=2, seed=0)
    assert [row.pop("place") for row in rows] == [0, 1] * 3, "not in manifest.csv"
    assert rows == list(csv_rows(tmp_path / "manifest.csv"))
    windows = load_windows(tmp_path, size=16, colormap="jet")
    assert windows.users == (3, 7, 12)
    expected = pipeline(users=[3, 7, 12], images_per_user=2, seed=0, output_type="pt").images
    assert (windows.float() - expected).abs().max() < 0.02


def test_an_interrupted_generation_goes_on(pipeline, tmp_path):
    pipeline.generate_folder(tmp_path, per_user=3)
    kept = sorted(tmp_path.glob("ID_*/*.png"))
    whole = {path: path.read_bytes() for path in kept}
    for path in kept[4:]:
        path.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in kept[:4]}
    pipeline.generate_folder(tmp_path, per_user=3, batch_size=2)
    assert {path: path.read_bytes() for path in kept} == whole
    assert {path: path.stat().st_mtime_ns for path in kept[:4]} == stamps


def test_generation_stops_when_the_sessions_time_is_up(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MDLIB_DEADLINE", "1")
    with pytest.raises(SystemExit) as end:
        pipeline.generate_folder(tmp_path, per_user=3, batch_size=2)
    assert end.value.code == 0 and f"2 of 9 windows are in {tmp_path}" in capsys.readouterr().out
    monkeypatch.delenv("MDLIB_DEADLINE")
    assert len(pipeline.generate_folder(tmp_path, per_user=3)) == len(list(tmp_path.glob("ID_*/*.png"))) == 9


def test_windows_of_another_pipeline_or_of_other_options_are_not_mixed_in(pipeline, tmp_path):
    pipeline.generate_folder(tmp_path, per_user=2)
    with pytest.raises(DataError, match="windows generated with other settings .*temperature.*choose another folder"):
        pipeline.generate_folder(tmp_path, per_user=2, temperature=0.5)
    with torch.no_grad():
        pipeline.prior.head.weight.add_(1)
    with pytest.raises(DataError, match="windows generated with other settings .*weights"):
        pipeline.generate_folder(tmp_path, per_user=2)


def test_a_corrected_option_is_accepted_and_an_unknown_one_named(pipeline, tmp_path):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        pipeline.generate_folder(tmp_path, per_user=1, temperature=-1.0)
    with pytest.raises(DataError, match="no sampling option top_kk; there are .*top_k"):
        pipeline.generate_folder(tmp_path, per_user=1, top_kk=3)
    assert len(pipeline.generate_folder(tmp_path, per_user=1, temperature=0.9)) == 3


def test_chosen_windows_keep_to_a_folder_of_their_own(pipeline, tmp_path):
    pipeline.generate_folder(tmp_path / "all", per_user=2)
    drawn = pipeline([7], seed=3, output_type="pt")
    with pytest.raises(DataError, match="windows generated with other settings .seed."):
        pipeline.save_windows(tmp_path / "all", drawn.manifest, drawn.images)
    (row,) = copy_windows(tmp_path / "all", ["ID_3/ID3_generated_seed0_2.png"], tmp_path / "chosen")
    assert (row["user"], row["number"], row["seed"]) == ("3", "2", "0")
    with pytest.raises(DataError, match="chosen has no record of how its windows were generated .*nothing.png"):
        copy_windows(tmp_path / "chosen", ["ID_3/nothing.png"], tmp_path / "more")
    with pytest.raises(DataError, match="has no record of how its windows were generated"):
        copy_windows(tmp_path, ["ID_3/window.png"], tmp_path / "more")
    (tmp_path / "generation.json").write_text("{cut off")
    with pytest.raises(DataError, match=f"^{tmp_path} has no record of how"):
        copy_windows(tmp_path, ["ID_3/window.png"], tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_the_manifest_keeps_the_rows_of_earlier_calls(pipeline, tmp_path):
    pipeline.generate_folder(tmp_path, users=[3, 7], per_user=2)
    pipeline.generate_folder(tmp_path, users=[12], per_user=1)
    assert [row["user"] for row in csv_rows(tmp_path / "manifest.csv")] == [3, 3, 7, 7, 12]


def test_other_sizes_stay_on_the_colour_map(pipeline, tmp_path):
    pipeline.register_to_config(output_size=50)
    pipeline.generate_folder(tmp_path, per_user=1)
    assert load_windows(tmp_path, size=16).colormap == "jet"


def test_sizes_that_are_not_square_come_out_as_they_are(pipeline, tmp_path):
    pipeline.register_to_config(output_size=[40, 52])
    pipeline.save_pretrained(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    assert list(again.config.output_size) == [40, 52]
    again.generate_folder(tmp_path / "made", per_user=1)
    windows = load_windows(tmp_path / "made", size=16)
    assert windows.about.shape == (40, 52) and windows.colormap == "jet"


def test_generated_windows_are_not_read_as_real_ones(pipeline, tmp_path):
    for user in (3, 7):
        (tmp_path / f"ID_{user}").mkdir()
        Image.new("RGB", (16, 16), (0, 0, 143)).save(tmp_path / f"ID_{user}" / "w_1.png")
    pipeline.generate_folder(tmp_path / "generated", per_user=1)
    with pytest.raises(DataError, match="generated windows inside a folder of real ones; move them out"):
        load_windows(tmp_path, size=16)


def test_rgb_codecs_need_no_colour_map(tmp_path):
    codec = VQVAE(image_size=16, in_channels=3, block_out_channels=(8,), norm_num_groups=4, num_codes=4, code_dim=4)
    prior = TokenPrior(4, codec.token_shape, num_users=2, hidden_size=8, num_layers=1, num_heads=1)
    made = MicroDopplerPipeline(codec.eval(), prior.eval(), users=(1, 2), colormap="none", output_size=16)([1])
    assert np.asarray(made.images[0]).shape == (16, 16, 3) and isinstance(made.images[0], Image.Image)


def test_a_diffusion_pipeline_is_saved_and_loaded_whole(diffusion, tmp_path):
    options = dict(images_per_user=2, classifier_scale=2.0, output_type="pt")
    expected = diffusion([7], **options).images
    diffusion.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    torch.testing.assert_close(again([7], **options).images, expected)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["prior"] == ["mdlib.models.unet", "LatentDiffusion"] and index["classifier"] == [
        "mdlib.models.classifier",
        "SmallCNN",
    ]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".py", ".safetensors"}


def test_a_denoised_window_does_not_depend_on_its_batch(diffusion):
    many = diffusion([3, 7, 12], images_per_user=2, batch_size=4, output_type="pt", scheduler="ddpm").images
    one = diffusion([7], images_per_user=1, output_type="pt", scheduler="ddpm").images
    torch.testing.assert_close(many[2:3], one, rtol=1e-3, atol=1e-3)


def test_between_two_users_the_ends_are_theirs(diffusion):
    between = diffusion.interpolate(3, 12, images=3, seed=5)
    alone = diffusion([3], seed=5, output_type="pt").images
    torch.testing.assert_close(between[:1], alone)
    assert between.shape == (3, 1, 16, 16)
    with pytest.raises(DataError, match="not trained on 4"):
        diffusion.interpolate(3, 4)
    with pytest.raises(DataError, match="images must be at least 1, got 0"):
        diffusion.interpolate(3, 12, images=0)


def test_the_picture_of_the_denoising_ends_with_the_window(diffusion):
    frames = diffusion.denoising(7, frames=3, seed=2)
    assert len(frames) == 3 and len(diffusion.denoising(7, frames=9)) == 4, "no more than there are steps"
    torch.testing.assert_close(frames[-1:], diffusion([7], seed=2, output_type="pt").images)


@pytest.mark.parametrize("diffusion", ["kl"], indirect=True)  # eight random codes would jump, not follow
def test_the_classifier_raises_its_users_probability(diffusion):
    torch.nn.init.normal_(diffusion.classifier.head.weight, std=2.0)
    labels = torch.tensor([0, 1, 2]).repeat_interleave(8)
    probability = []
    for scale in (0.0, 20.0):
        images = diffusion([3, 7, 12], images_per_user=8, classifier_scale=scale, output_type="pt").images
        chances = diffusion.classifier(images).softmax(1)
        probability.append(chances.gather(1, labels.unsqueeze(1)).mean())
    assert probability[1] > probability[0]


def test_a_gradient_passes_through_the_codebook():
    codec = VQVAE(image_size=16, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4).eval()
    latents = torch.randn(2, *codec.latent_shape, requires_grad=True)
    codec.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0


def test_a_pair_of_numbers_may_be_given_as_a_tuple_twice(diffusion, tmp_path):
    for _ in range(2):
        assert len(diffusion.generate_folder(tmp_path, per_user=1, guidance_interval=(0.1, 0.8))) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scheduler="lms"), "scheduler must be one of"),
        (dict(guidance_scale="much"), "guidance_scale must be 0 or more"),
        (dict(num_inference_steps=2.5), "num_inference_steps must be a whole number in 1…1000, got 2.5"),
        (dict(guidance_interval=["a", "b"]), "guidance_interval must be two numbers"),
    ],
)
def test_an_option_that_cannot_be_used_leaves_nothing_behind(diffusion, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        diffusion.generate_folder(tmp_path / "made", per_user=1, **options)
    assert not (tmp_path / "made").exists()


def test_one_frame_is_the_window_itself_and_a_classifier_has_no_say_between_users(diffusion):
    torch.testing.assert_close(diffusion.denoising(7, frames=1), diffusion([7], output_type="pt").images)
    with pytest.raises(DataError, match="frames must be at least 1, got 0"):
        diffusion.denoising(7, frames=0)
    with pytest.raises(DataError, match="classifier guidance needs one user, not two"):
        diffusion.interpolate(3, 7, classifier_scale=1.0)


def test_denoising_and_interpolation_of_tokens_end_at_windows(discrete):
    alone = discrete([7], output_type="pt").images
    frames = discrete.denoising(7, frames=3)
    assert frames.shape == (3, 1, 16, 16)
    torch.testing.assert_close(frames[-1:], alone)
    between = discrete.interpolate(7, 12, images=3)
    torch.testing.assert_close(between[:1], alone)
    assert not torch.equal(between[0], between[2])


def test_what_only_a_prior_that_denoises_can_is_refused_in_one_line(pipeline, diffusion):
    with pytest.raises(DataError, match="interpolation and .* need a diffusion or flow prior, not TokenPrior"):
        pipeline.interpolate(3, 7)
    with pytest.raises(DataError, match="denoising frames need a diffusion or flow prior"):
        pipeline.denoising(3)
    diffusion.classifier = None
    with pytest.raises(DataError, match="classifier_scale needs a classifier, and this pipeline has none"):
        diffusion([3], classifier_scale=1.0)


def test_a_prior_of_another_codec_is_refused(pipeline, diffusion):
    other = KLVAE(image_size=32, block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    with pytest.raises(DataError, match=r"do not match: prior latents .*, codec latents \(2, 32, 32\)"):
        MicroDopplerPipeline(other, diffusion.prior)
    with pytest.raises(DataError, match="needs a codec with a codebook, not KLVAE"):
        MicroDopplerPipeline(other, pipeline.prior)


def csv_rows(path):
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield {**row, **{key: int(row[key]) for key in ("user", "number", "seed")}}
