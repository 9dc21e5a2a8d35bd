"""The product: user ids as they stand on disk in, coloured windows out, saved and loaded without a pickle."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mdlib.data import DataError, load_windows
from mdlib.pipeline import MicroDopplerPipeline, load_pipeline
from mdlib.transformer import TokenPrior
from mdlib.vqvae import VQVAE


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    codec = VQVAE(image_size=16, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4).eval()
    prior = TokenPrior(8, codec.token_shape, num_users=3, hidden_size=16, num_layers=1, num_heads=2).eval()
    return MicroDopplerPipeline(codec, prior, users=(3, 7, 12), colormap="jet", output_size=64)


def test_users_are_named_as_on_disk(pipeline):
    made = pipeline(users=[12, 3], images_per_user=2, seed=1)
    assert made.users == [12, 12, 3, 3]
    assert [image.size for image in made.images] == [(64, 64)] * 4 and made.images[0].mode == "RGB"
    assert made.manifest[1] == {"user": 12, "number": 2, "seed": 1}


def test_a_window_depends_on_seed_user_and_number_alone(pipeline):
    many = pipeline(users=[3, 7, 12], images_per_user=3, seed=4, batch_size=5, output_type="pt").images
    one = pipeline(users=[7], images_per_user=2, seed=4, output_type="pt").images
    torch.testing.assert_close(many[3:5], one)
    other = pipeline(users=[7], images_per_user=2, seed=5, output_type="pt").images
    assert not torch.equal(one, other)


def test_an_unknown_user_is_one_line(pipeline):
    with pytest.raises(DataError, match="knows users 3, 7, 12; it was not trained on 4-5"):
        pipeline(users=[3, 4, 5])


def test_saved_and_loaded_it_makes_the_same_windows(pipeline, tmp_path):
    expected = pipeline(users=[7], images_per_user=3, output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.config.users == [3, 7, 12] and again.config.colormap == "jet"
    torch.testing.assert_close(again(users=[7], images_per_user=3, output_type="pt").images, expected)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["codec"] == ["mdlib.vqvae", "VQVAE"] and index["prior"] == ["mdlib.transformer", "TokenPrior"]
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {".json", ".safetensors"}, "nothing that must be unpickled"


def test_no_pipeline_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no pipeline"):
        load_pipeline(tmp_path)


def test_what_comes_out_reads_back_as_it_was(pipeline, tmp_path):
    rows = pipeline.generate_folder(tmp_path, per_user=2, seed=0)
    assert len(rows) == 6 and rows == list(csv_rows(tmp_path / "manifest.csv"))
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


def test_windows_of_another_pipeline_or_of_other_options_are_not_mixed_in(pipeline, tmp_path):
    pipeline.generate_folder(tmp_path, per_user=2)
    with pytest.raises(DataError, match="windows made otherwise .*temperature.*choose another folder"):
        pipeline.generate_folder(tmp_path, per_user=2, temperature=0.5)
    with torch.no_grad():
        pipeline.prior.head.weight.add_(1)
    with pytest.raises(DataError, match="windows made otherwise .*weights"):
        pipeline.generate_folder(tmp_path, per_user=2)


def test_a_corrected_option_is_accepted_and_an_unknown_one_named(pipeline, tmp_path):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        pipeline.generate_folder(tmp_path, per_user=1, temperature=-1.0)
    with pytest.raises(DataError, match="no sampling option top_kk; there are .*top_k"):
        pipeline.generate_folder(tmp_path, per_user=1, top_kk=3)
    assert len(pipeline.generate_folder(tmp_path, per_user=1, temperature=0.9)) == 3


def test_the_manifest_keeps_the_rows_of_earlier_calls(pipeline, tmp_path):
    pipeline.generate_folder(tmp_path, users=[3, 7], per_user=2)
    pipeline.generate_folder(tmp_path, users=[12], per_user=1)
    assert [row["user"] for row in csv_rows(tmp_path / "manifest.csv")] == [3, 3, 7, 7, 12]


def test_other_sizes_stay_on_the_colour_map(pipeline, tmp_path):
    pipeline.register_to_config(output_size=50)
    pipeline.generate_folder(tmp_path, per_user=1)
    assert load_windows(tmp_path, size=16).colormap == "jet"


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


def csv_rows(path):
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield {**row, **{key: int(row[key]) for key in ("user", "number", "seed")}}
