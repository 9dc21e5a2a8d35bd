"""Pictures while a model trains: they come when they should, and change nothing of the training."""

import numpy as np
import pytest
import torch
from helpers import write_set
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdlib.experiments import steps
from mdlib.experiments.run import PRODUCTS, open_run
from mdlib.experiments.steps import codec_stage, prior_stage, save_codec, train_stage
from mdlib.reports import widgets


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("people"), numbers=range(1, 33))


def trained(people, out, system, every, show=None):
    """A run's folder and the weights of its codec and prior."""
    options = dict.fromkeys(("codec_options", "prior_options"), {"preview_every": every})
    run = open_run(out, data=str(people), preset="smoke", system=system, **options)
    weights = []
    for make in (codec_stage, prior_stage):
        stage = make(run)
        train_stage(stage, show)
        weights.append({name: tensor.clone() for name, tensor in stage.model.state_dict().items()})
        if stage.name == "codec":
            save_codec(stage)
    return run.path, weights


@pytest.mark.parametrize("system", ["vqvae-transformer", "vae-diffusion", "vavae-dit"])
def test_previews_leave_the_weights_bit_for_bit_as_they_are(system, people, tmp_path):
    shown = []
    with_pictures, weights = trained(people, tmp_path / "with", system, 3, shown.append)
    without, others = trained(people, tmp_path / "without", system, 0)
    for some, same in zip(weights, others, strict=True):
        assert all(torch.equal(tensor, same[name]) for name, tensor in some.items())
    files = sorted((with_pictures / "samples").iterdir())
    expected = ["codec-000003.png", "codec-000006.png", "prior-000003.png", "prior-000006.png"]
    if system == "vavae-dit":  # its codec trains in stages, each shown at its end
        expected[:2] = [f"codec-{step:06}.png" for step in (2, 4, 6)]
    assert [file.name for file in files] == expected and shown == files
    assert not (without / "samples").exists()
    sizes = {file.name: Image.open(file).size for file in files}
    assert sizes[expected[0]] == (8 * 32, 2 * 32), "eight windows above their reconstructions"
    assert sizes[expected[-1]] == (2 * 32, 3 * 32), "two users, a real window of each above two samples"
    assert np.asarray(Image.open(files[-1])).std() > 0


def test_previews_are_in_tensorboard_too(people, tmp_path):
    out, _ = trained(people, tmp_path / "run", "vae-diffusion", 500)
    for part in ("codec", "prior"):
        logged = EventAccumulator(str(out / part / "tensorboard"), size_guidance={"images": 0}).Reload()
        assert [image.step for image in logged.Images("preview")] == [6], "at the end, whatever preview_every"


def test_with_several_gpus_the_newest_picture_of_the_other_processes_is_shown(people, tmp_path, monkeypatch):
    run, shown = open_run(tmp_path / "run", data=str(people), preset="smoke"), []
    stage = codec_stage(run)

    def launched(*_, on_line):
        on_line()  # before the first picture
        (run.path / "samples").mkdir()
        for step in (3, 6):
            (run.path / "samples" / f"codec-{step:06}.png").touch()
            on_line()
        raise RuntimeError("no training here")

    monkeypatch.setattr(steps, "processes", lambda: 2)
    monkeypatch.setattr(steps, "launch", launched)
    with pytest.raises(RuntimeError, match="no training here"):
        train_stage(stage, lambda file: shown.append(file.name))
    assert shown == ["codec-000003.png", "codec-000006.png"]


def test_a_notebook_that_runs_again_removes_its_pictures(people, tmp_path):
    patterns = [pattern for products in PRODUCTS.values() for pattern in products]
    for name in ("codec-000003.png", "prior-000006.png"):
        (tmp_path / name).touch()
        assert any((tmp_path / name).match(pattern.removeprefix("samples/")) for pattern in patterns)
    with pytest.raises(ValueError, match="preview_every must be 0 or more, got -1"):
        open_run(tmp_path / "run", data=str(people), preset="smoke", prior_options={"preview_every": -1})


def test_one_picture_changes_in_place_and_a_batch_run_shows_none(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    show = widgets.live_preview()
    for content in (b"first", b"second"):
        (tmp_path / "preview.png").write_bytes(content)
        show(tmp_path / "preview.png")
    (image,) = shown
    assert image.value == b"second"
    monkeypatch.setenv("MDLIB_BATCH", "1")
    assert widgets.live_preview() is None and len(shown) == 1
