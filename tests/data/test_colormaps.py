import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mdlib.data.colormaps import (
    COLORMAP_TOLERANCE,
    COLORMAPS,
    colorize,
    colormap_table,
    invert_colormap,
    nearest_colormap,
    orient_colormap,
    recognise_colormap,
)
from mdlib.utils import DataError


def spectrogram(seed=0, size=256):
    """Intensity like a walker's: speckled blocks around a bright ridge, most of the picture at the floor."""
    rng = np.random.default_rng(seed)
    phase, row = np.linspace(0, 8 * np.pi, 58), np.arange(195)[:, None]
    ridge = np.exp(-(((row - 125 - 8 * np.sin(phase)) / 4) ** 2)) * 1e5
    legs = 30 * ((row > 125 - 60 * np.abs(np.sin(phase / 2)) ** 3) & (row < 160))
    level = 10 * np.log10((ridge + legs + 0.01) * rng.gamma(4, 0.25, (195, 58)))
    blocks = np.round(np.clip((level + 5) / 57, 0, 1) * 255).astype(np.uint8)
    return blocks[np.arange(size) * 195 // size][:, np.arange(size) * 58 // size]


def jpeg(rgb, mode, quality=75):
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    image = Image.open(file)
    image.draft(mode, image.size)
    return np.asarray(image)


def rms(a, b):
    return np.sqrt(np.mean((a.astype(float) - b) ** 2))


def test_jet_is_matlabs():
    table = colormap_table("jet").astype(int)
    assert np.allclose(table[[0, 31, 95, 159, 223, 255]] / 255, [
        [0, 0, 33 / 64], [0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0], [0.5, 0, 0],
    ], atol=1 / 255)  # fmt: skip
    assert np.abs(np.diff(table, axis=0)).max() <= 4  # one channel moves by 1/64 a step


@pytest.mark.parametrize("name, levels", [("jet", 9), ("viridis", 1), ("gray", 0)])
def test_matplotlibs_pictures_are_read(name, levels):
    intensity = np.arange(256)
    rgb = np.round(matplotlib.colormaps[name](intensity)[:, :3] * 255).astype(np.uint8)
    found = invert_colormap(rgb, "grey" if name == "gray" else name)
    assert np.abs(found.astype(int) - intensity).max() <= levels


def test_viridis_colours_are_matplotlibs():
    expected = matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255
    assert np.abs(colormap_table("viridis") - expected).max() < 1.6


def test_parula_keeps_to_the_published_colours():
    table = colormap_table("parula")
    published = {0: [0.2422, 0.1504, 0.6603], 84: [0.1540, 0.5902, 0.9218], 255: [0.9769, 0.9839, 0.0805]}
    for row, colour in published.items():
        assert np.abs(table[row] / 255 - colour).max() < 0.01
    assert len(np.unique(table, axis=0)) == 256


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_round_trip(colormap):
    intensity = spectrogram(size=64)
    found = invert_colormap(colorize(intensity, colormap), colormap)
    assert found.shape == intensity.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - intensity).max() <= (1 if colormap == "viridis" else 0)


def test_inverse_is_the_nearest_colour_by_brute_force():
    pixels = np.random.default_rng(1).integers(0, 256, (500, 3), np.uint8)

    def weighted(r, g, b):
        luma = 0.299 * r + 0.587 * g + 0.114 * b
        return np.stack([4 * luma, (b - luma) / 1.772, (r - luma) / 1.402], axis=-1)

    curve = weighted(*colormap_table("jet").T.astype(float))
    distance = np.linalg.norm(weighted(*pixels.T.astype(float))[:, None] - curve, axis=-1)
    chosen = distance[np.arange(500), invert_colormap(pixels, "jet")]
    assert np.allclose(chosen, distance.min(1), atol=0.02)


def test_jpeg_chroma_costs_less_than_with_the_nearest_rgb():
    intensity = spectrogram()
    rgb = colorize(intensity, "jet")
    blurred = jpeg(rgb, "RGB").reshape(-1, 3).astype(np.int32)
    squared = ((blurred[:, None] - colormap_table("jet").astype(np.int32)) ** 2).sum(-1)
    plain = squared.argmin(1).reshape(intensity.shape)
    from_rgb = invert_colormap(jpeg(rgb, "RGB"), "jet")
    from_ycbcr = invert_colormap(jpeg(rgb, "YCbCr"), "jet", mode="YCbCr")
    assert rms(from_ycbcr, intensity) < rms(from_rgb, intensity) < rms(plain, intensity)
    assert rms(from_ycbcr, intensity) < 0.75 * rms(plain, intensity)


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_map_is_recognised(colormap):
    rgb = colorize(spectrogram(), colormap)
    assert nearest_colormap(rgb)[0] == colormap
    name, distance = nearest_colormap(jpeg(rgb, "YCbCr"), mode="YCbCr")
    assert name == colormap and distance < COLORMAP_TOLERANCE[name]


@pytest.mark.parametrize("name", ["magma", "inferno", "plasma", "turbo", "hot", "hsv", "cividis"])
def test_other_maps_are_not_taken_for_ours(name):
    rgb = np.round(matplotlib.colormaps[name](spectrogram())[..., :3] * 255).astype(np.uint8)
    nearest, distance = nearest_colormap(rgb)
    assert distance > COLORMAP_TOLERANCE[nearest]


def test_names_of_matplotlib_and_reversed_maps():
    assert np.array_equal(colormap_table("jet_r"), colormap_table("jet")[::-1])
    magma = np.round(matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255)
    assert np.array_equal(colormap_table("magma"), magma) and np.array_equal(colormap_table("magma_r"), magma[::-1])


@pytest.mark.parametrize("name", ["magma", "inferno", "plasma", "turbo", "cividis", "bone", "gist_ncar"])
def test_jpegs_are_recognised_too(name):
    rgb = colormap_table(name)[np.stack([spectrogram(seed) for seed in range(3)])]
    assert recognise_colormap(np.stack([jpeg(one, "YCbCr") for one in rgb]), mode="YCbCr") == name


@pytest.mark.parametrize("name", ["hsv", "twilight"])
def test_maps_that_jpeg_makes_ambiguous_are_refused(name):
    rgb = colormap_table(name)[np.stack([spectrogram(seed) for seed in range(3)])]
    with pytest.raises(DataError, match=f"drawn with .*{name}"):
        recognise_colormap(np.stack([jpeg(one, "YCbCr") for one in rgb]), mode="YCbCr")


@pytest.mark.parametrize("floor", [0, 80, 160])
def test_the_background_is_the_low_end_whatever_the_noise_floor(floor):
    images = (floor + np.stack([spectrogram(seed) for seed in range(3)]) * (1 - floor / 255)).astype(np.uint8)
    assert orient_colormap(images, "jet") == "jet" and orient_colormap(255 - images, "jet") == "jet_r"


def test_wrong_arguments():
    with pytest.raises(ValueError, match="magmatic.*jet, parula, viridis, grey"):
        colorize(np.zeros((4, 4), np.uint8), "magmatic")
