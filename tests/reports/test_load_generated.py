"""Generated windows are read with the map they show, whatever the real ones show."""

import itertools

import numpy as np
from helpers import picture, write_image, write_set

from mdlib.data.windows import load_windows
from mdlib.reports.report import load_generated


def test_another_tools_colour_map_and_names(tmp_path):
    real = load_windows(write_set(tmp_path / "real"), size=32)
    for colormap in ("viridis", "jet_r"):
        generated = load_generated(write_set(tmp_path / colormap, colormap=colormap), real)
        assert generated.colormap == colormap and real.colormap == "jet"
        difference = generated.images[0, 0].numpy().astype(int) - picture(1, 1)
        assert np.abs(difference).max() <= 1  # two colours of viridis repeat
    named = write_set(tmp_path / "named", numbers=[1], name="only.png")
    assert len(load_generated(named, real)) == 2
    for user, seed in itertools.product((1, 2), (3, 7)):  # saved from two seeds: their numbers repeat
        write_image(tmp_path / f"saved/ID_{user}/ID{user}_generated_seed{seed}_1.png", picture(user, seed))
    (tmp_path / "saved" / "generation.json").write_text("{}")
    assert len(load_generated(tmp_path / "saved", real)) == 4
