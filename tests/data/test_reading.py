import warnings
from functools import cache

import numpy as np
import pytest
import torch
from helpers import message, picture, walk, write_image, write_set
from PIL import Image

from mdlib.data import reading
from mdlib.data.colormaps import colorize, colormap_table
from mdlib.data.windows import load_windows
from mdlib.simulation.dataset import simulate_recording
from mdlib.utils import DataError

# ---- reading images


@pytest.mark.parametrize("colormap", ["jet", "parula", "grey"])
def test_png_gives_the_intensity_back(tmp_path, colormap):
    root = write_set(tmp_path / "set", colormap=colormap)
    windows = load_windows(root, size=32)
    assert windows.colormap == colormap and windows.images.shape == (6, 1, 32, 32)
    assert windows.users == (1, 2) and windows.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for file, image in zip(windows.files, windows.images, strict=True):
        assert np.array_equal(image[0], picture(file.user, file.number))


def test_jpeg_comes_close(tmp_path):
    root = write_set(tmp_path / "set", name="w{n}.jpg", quality=90, subsampling="4:2:0")
    windows = load_windows(root, size=16)
    assert windows.colormap == "jet"
    for file, image in zip(windows.files, windows.images, strict=True):
        truth = picture(file.user, file.number).reshape(16, 2, 16, 2).mean((1, 3))
        assert np.sqrt(np.mean((image[0].numpy() - truth) ** 2)) < 8


def test_sizes_are_averaged_down_in_intensity(tmp_path):
    root = write_set(tmp_path / "set")
    small = load_windows(root, size=8).images
    full = load_windows(root, size=32).images.float()
    mean = torch.nn.functional.avg_pool2d(full, 4)
    assert (small - mean).abs().max() <= 1
    assert load_windows(root, size=64).images.shape == (6, 1, 64, 64)


def test_rgb_is_kept_with_three_channels(tmp_path):
    root = write_set(tmp_path / "set")
    windows = load_windows(root, size=32, channels=3, colormap="none")
    assert windows.colormap == "none" and windows.images.shape == (6, 3, 32, 32)
    assert np.array_equal(windows.images[0].permute(1, 2, 0), colorize(picture(1, 1), "jet"))


def test_images_wider_than_high(tmp_path):
    for user in (1, 2):
        write_image(tmp_path / "set" / f"ID_{user}" / "w1.png", walk(user, 8))
    assert load_windows(tmp_path / "set", size=32).images.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16"])
def test_picture_modes(tmp_path, mode):
    for user in (1, 2):
        intensity = picture(user, 1)
        image = Image.fromarray(colorize(intensity, "grey" if mode != "RGBA" else "jet"))
        if mode == "I;16":
            image = Image.fromarray(intensity.astype(np.uint16) * 257)
        elif mode == "P":
            image = Image.fromarray(intensity).convert("P")
        else:
            image = image.convert(mode)
        path = tmp_path / "set" / f"ID_{user}" / "w1.png"
        path.parent.mkdir(parents=True)
        image.save(path)
    windows = load_windows(tmp_path / "set", size=32)
    assert windows.colormap == ("jet" if mode == "RGBA" else "grey")
    assert np.array_equal(windows.images[1, 0], picture(2, 1))


def test_jpeg_that_stores_rgb(tmp_path):
    root = write_set(tmp_path / "set", name="w{n}.jpg", quality=95, keep_rgb=True)
    assert load_windows(root, size=32).colormap == "jet"


def test_label_map_of_another_set(tmp_path):
    root = write_set(tmp_path / "set", users=(5,))
    windows = load_windows(root, users=(3, 5, 9))
    assert windows.users == (3, 5, 9) and windows.labels.tolist() == [1, 1, 1]
    assert "ID_5 is not among the users 3, 9" in message(load_windows, root, users=(3, 9))


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_damaged_image(tmp_path, damage):
    root = write_set(tmp_path / "set", name="w{n}.jpg", numbers=range(1, 12))
    path = root / "ID_2" / "w2.jpg"
    path.write_bytes(path.read_bytes()[:300] if damage is None else damage)
    text = message(load_windows, root)
    assert "w2.jpg: cannot be read" in text and "delete it or export it again" in text


def test_several_damaged_images_are_counted(tmp_path):
    root = write_set(tmp_path / "set", colormap="grey", numbers=range(1, 12))
    for n in (2, 3, 5):
        (root / "ID_1" / f"ID1_case1_1_Doppler{n}.png").write_bytes(b"")
    text = message(load_windows, root, colormap="grey")
    assert "Doppler2.png" in text and "2 more files" in text


def test_mixed_sizes(tmp_path):
    root = write_set(tmp_path / "set")
    write_image(root / "ID_2" / "ID2_case1_1_Doppler9.png", walk(2, 8))
    text = message(load_windows, root)
    assert "Doppler1.png has 32x32" in text and "Doppler9.png 64x32" in text


def test_no_known_colour_map(tmp_path):
    for user in (1, 2):
        for n in (1, 2):
            path = tmp_path / "set" / f"ID_{user}" / f"w{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colorize(picture(user, n), "viridis")[..., ::-1]).save(path)  # red and blue exchanged
    text = message(load_windows, tmp_path / "set")
    assert "w1.png" in text and "colormap=..." in text and "channels=3" in text
    with pytest.warns(UserWarning, match="the colours are not those of grey"):
        assert load_windows(tmp_path / "set", colormap="grey").colormap == "grey"


def test_mixed_colour_maps(tmp_path):
    root = write_set(tmp_path / "set", numbers=range(1, 12))
    write_image(root / "ID_1" / "ID1_case1_1_Doppler5.png", picture(1, 5), "viridis")
    text = message(load_windows, root)
    assert "Doppler5.png: drawn with viridis, other images with jet" in text


def test_foreign_objects_in_a_picture_are_pointed_out(tmp_path):
    root = write_set(tmp_path / "set", numbers=range(1, 12))
    path = root / "ID_1" / "ID1_case1_1_Doppler5.png"
    pixels = colorize(picture(1, 5), "jet")
    pixels[:6] = 255
    Image.fromarray(pixels).save(path)
    with pytest.warns(UserWarning, match=r"1 image .*Doppler5\.png"):
        load_windows(root)


def test_wrong_options(tmp_path):
    root = write_set(tmp_path / "set")
    choices = "jet, parula, viridis, grey, a name of matplotlib, or auto"
    assert choices in message(load_windows, root, colormap="magmatic")
    assert "none, auto, or left,top,right,bottom" in message(load_windows, root, crop="1,2")
    assert "32x32 pixels; choose less" in message(load_windows, root, crop="0,0,64,64")
    assert "choose 1 (intensity) or 3 (RGB)" in message(load_windows, root, channels=2)


def test_nothing_is_warned_about_on_a_good_set(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_windows(write_set(tmp_path / "set", name="w{n}.jpg"))


# ---- what files can hold: read right, or refused


@cache
def windows_of(user, n=6):
    """Simulated windows (n, 96, 112): most of the picture is background at 0, some edge rows are in every window."""
    images, _, _ = simulate_recording(user, n_windows=n)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((56, 96), Image.BOX)).repeat(2, axis=1) for image in images]
    )


def with_floor(images, floor, spread=6):
    """The same on a noise floor that is not cut off."""
    noise = np.random.default_rng(0).normal(0, spread, images.shape)
    return np.clip(floor + noise + images * (255.0 - floor) / 255, 0, 255).astype(np.uint8)


def write(root, save, intensity=windows_of, extension="png", users=(1, 2)):
    """save(intensity of one window, path, user, number) for all of `users`."""
    for user in users:
        for n, image in enumerate(intensity(user), 1):
            path = root / f"ID_{user}" / f"w{n}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(image, path, user, n)
    return root


def painted(colormap, **options):
    def save(image, path, user, n):
        Image.fromarray(colormap_table(colormap)[image]).save(path, **options)

    return save


def framed(colormap, colour, margins=(9, 14, 7, 11), title=False):
    """A margin (left, top, right, bottom) of one colour, with ticks and a title that names the user."""
    left, top, right, bottom = margins

    def save(image, path, user, n):
        pixels = np.full((top + image.shape[0] + bottom, left + image.shape[1] + right, 3), colour, np.uint8)
        pixels[top : top + image.shape[0], left : left + image.shape[1]] = colormap_table(colormap)[image]
        if title:
            ink = (0, 0, 0) if sum(np.broadcast_to(colour, 3)) > 300 else (255, 255, 255)
            pixels[4:10, 40 : 44 + 6 * user : 2] = ink
            pixels[top : top + image.shape[0] : 20, left - 4 : left] = ink
            pixels[top : top + image.shape[0], left - 1] = ink
        Image.fromarray(pixels).save(path)

    return save


def right(windows, intensity=windows_of):
    """Least correlation with the true intensities."""
    size, worst = windows.images.shape[-1], 1.0
    for file, image in zip(windows.files, windows.images, strict=True):
        truth = Image.fromarray(intensity(file.user)[file.number - 1]).resize((size, size), Image.BOX)
        worst = min(worst, np.corrcoef(np.asarray(truth).ravel(), image[0].numpy().ravel())[0, 1])
    return worst


MAPS = ["jet", "parula", "viridis", "grey", "hot", "magma", "inferno", "plasma", "cividis", "turbo", "bone", "autumn"]


@pytest.mark.parametrize("colormap", [*MAPS, "hsv", "cool", "Blues_r", "gist_heat"])
def test_maps_are_recognised_both_ways_up(tmp_path, colormap):
    for name in (colormap, colormap[:-2] if colormap.endswith("_r") else f"{colormap}_r"):
        windows = load_windows(write(tmp_path / name, painted(name)), size=32)
        assert windows.colormap == name and right(windows) > 0.98
        named = load_windows(tmp_path / name, size=32, colormap=name)
        assert torch.equal(named.images, windows.images)


@pytest.mark.parametrize("name", ["jet", "magma_r", "grey_r"])
def test_a_bright_noise_floor_is_background(tmp_path, name):
    bright = cache(lambda user: with_floor(windows_of(user), 150))
    windows = load_windows(write(tmp_path / "set", painted(name), bright), size=32)
    assert windows.colormap == name and right(windows, bright) > 0.98


def test_noise_has_no_right_way_up(tmp_path):
    noise = lambda user: np.random.default_rng(user).integers(0, 256, (4, 32, 32), np.uint8)
    root = write(tmp_path / "set", painted("viridis"), noise)
    text = message(load_windows, root, size=32)
    assert "viridis or viridis_r: neither end is clearly the background; give colormap=viridis or" in text
    assert load_windows(root, size=32, colormap="viridis").colormap == "viridis"


def test_one_picture_upside_down(tmp_path):
    root = write(tmp_path / "set", painted("jet"))
    painted("jet_r")(windows_of(2)[3], root / "ID_2" / "w4.png", 2, 4)
    assert "w4.png: drawn with jet_r, other images with jet" in message(load_windows, root, size=32)


@pytest.mark.parametrize("bits", [10, 12, 14, 16, 32, "float", "offset"])
def test_grey_of_more_than_8_bits_has_one_scale(tmp_path, bits):
    def save(image, path, user, n):
        if bits == "float":
            values = image.astype(np.float32) * 0.3 - 80  # dB
        elif bits == "offset":
            values = image.astype(np.uint16) * 7 + 30_000
        elif bits == 32:
            values = image.astype(np.int32) * 70_000
        else:
            values = (image / 255 * (2**bits - 1)).astype(np.uint16)
        Image.fromarray(values).save(path, format="TIFF" if bits in ("float", 32) else "PNG")

    with pytest.warns(UserWarning, match="are read as 0 to 255, in all images"):
        windows = load_windows(write(tmp_path / "set", save), size=32)
    assert windows.colormap == "grey" and right(windows) > 0.999
    assert windows.images.max() > 100 and windows.about.bits in (16, 32)


def test_8_bits_that_use_few_levels_are_reported_and_not_rescaled(tmp_path):
    root = write(tmp_path / "set", lambda image, path, *_: Image.fromarray(image >> 4).save(path))
    with pytest.warns(UserWarning, match="only 16 levels of intensity, 0 to 15|intensities of 0 to"):
        windows = load_windows(root, size=96)
    assert windows.images.max() <= 15 and right(windows) > 0.98


def test_palettes_are_read_by_their_colours(tmp_path):
    def save(image, path, *_):
        order = np.random.default_rng(0).permutation(256)
        indexed = Image.fromarray(np.argsort(order)[image].astype(np.uint8), "L").convert("P")
        indexed.putpalette(colormap_table("viridis")[order].tobytes())
        indexed.save(path)

    windows = load_windows(write(tmp_path / "set", save), size=32)
    assert windows.colormap == "viridis" and right(windows) > 0.98


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_intensity_in_the_transparency(tmp_path, mode):
    def save(image, path, *_):
        plain = np.full((*image.shape, len(mode) - 1), 255, np.uint8)
        Image.fromarray(np.dstack([plain, image]), mode).save(path)

    with pytest.warns(UserWarning, match="alpha channel, which is read as intensity"):
        windows = load_windows(write(tmp_path / "set", save), size=32)
    assert right(windows) > 0.999


def test_colours_that_are_partly_transparent_are_refused(tmp_path):
    def save(image, path, *_):
        Image.fromarray(np.dstack([colormap_table("jet")[image], image // 2 + 100])).save(path)

    assert "colours and transparency both vary" in message(load_windows, write(tmp_path / "set", save))


BORDERS = [("jet", 255), ("jet", 0), ("viridis", 255), ("grey", 255), ("grey", 128), ("magma", 240), ("turbo_r", 255)]


@pytest.mark.parametrize("title", [False, True])
@pytest.mark.parametrize("colormap, colour", BORDERS)
def test_borders_are_found_and_cropped(tmp_path, colormap, colour, title):
    root = write(tmp_path / "set", framed(colormap, colour, title=title))
    text = message(load_windows, root, size=32)
    assert "rows at the top" in text and "give crop=auto" in text
    with pytest.warns(UserWarning, match="cropped to columns"):
        windows = load_windows(root, size=32, crop="auto")
    assert windows.about.crop == (9, 14, 121, 110) and windows.about.shape == (96, 112)
    assert windows.colormap == colormap and right(windows) > 0.98
    with pytest.warns(UserWarning, match="cropped to columns"):
        assert torch.equal(load_windows(root, size=32, crop="9,14,121,110").images, windows.images)


def test_a_border_in_the_colour_of_the_background(tmp_path):
    root = write(tmp_path / "set", framed("grey", 0))
    assert "give crop=auto" in message(load_windows, root, size=32)
    assert "give crop=left,top,right,bottom" in message(load_windows, root, size=32, crop="auto")
    with pytest.warns(UserWarning, match="cropped"):
        assert right(load_windows(root, size=32, crop="9,14,121,110")) > 0.98


def test_a_figure_of_matplotlib(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def save(image, path, user, n):
        figure = Figure(figsize=(4, 3), dpi=80)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        shown = axes.imshow(image, cmap="jet", aspect="auto", extent=(0, 2, -3, 3))
        axes.set(title=f"user {user}, window {n}", xlabel="time in s", ylabel="velocity in m/s")
        figure.colorbar(shown)
        figure.savefig(path)

    root = write(tmp_path / "set", save)
    assert "rows at the bottom" in message(load_windows, root, size=32)
    with pytest.warns(UserWarning, match="cropped"):
        windows = load_windows(root, size=32, crop="auto")
    assert windows.colormap == "jet" and right(windows) > 0.96  # the figure has interpolated


def test_a_border_of_one_user_only(tmp_path):
    framed("jet", 255)
    root = write(tmp_path / "set", painted("jet"), users=(1,))
    whole = framed("jet", 255, margins=(9, 14, 7, 11))
    write(root, lambda image, *rest: whole(image[:-25, :-16], *rest), users=(2,))
    assert "the images of ID_2 have a border" in message(load_windows, root, size=32)


def test_dark_edges_of_a_spectrogram_are_no_border(tmp_path):
    dark = cache(lambda user: np.pad(windows_of(user), ((0, 0), (12, 9), (0, 0))))
    for name in ("jet", "grey"):
        windows = load_windows(write(tmp_path / name, painted(name), dark), size=32)
        assert windows.about.crop is None and windows.about.notes == () and right(windows, dark) > 0.98


@pytest.mark.parametrize("kind", ["CMYK", "animation", "huge"])
def test_other_kinds_of_files_are_one_line(tmp_path, kind):
    root = write(tmp_path / "set", painted("jet"))
    image, path = Image.open(root / "ID_2" / "w3.png"), root / "ID_2" / "w3.png"
    if kind == "CMYK":
        image.convert("CMYK").save(path, format="JPEG")
    elif kind == "animation":
        image.save(path, format="GIF", save_all=True, append_images=[Image.open(root / "ID_1" / "w1.png")])
    else:
        Image.new("1", (5000, 4000)).save(path)
    expected = {
        "CMYK": "colour mode CMYK",
        "animation": "2 images in one file",
        "huge": "more than 16 million pixels",
    }
    text = message(load_windows, root)
    assert "w3.png: " in text and expected[kind] in text and "export" in text


def test_windows_that_are_not_square_keep_their_shape(tmp_path):
    about = load_windows(write(tmp_path / "set", painted("jet")), size=32).about
    assert about.shape == (96, 112) and about.size == "112x96"


def test_right_or_refused(tmp_path):
    """Maps x reversed x format x floor x border, at random: never read as something else."""
    rng, read = np.random.default_rng(3), 0
    known = [*MAPS, "hsv", "copper", "twilight", "seismic", "coolwarm", "RdBu", "rainbow", "nipy_spectral", "Greens"]
    for number in range(24):
        name = str(rng.choice(known)) + "_r" * int(rng.integers(2))
        floor, exchanged = int(rng.choice([0, 0, 60, 140])), rng.random() < 0.15
        jpeg, margin, colour = rng.random() < 0.4, int(rng.choice([0, 0, 3, 12])), int(rng.choice([0, 128, 255]))
        intensity = cache(lambda user, floor=floor: with_floor(windows_of(user), floor) if floor else windows_of(user))

        def save(image, path, *_, name=name, margin=margin, colour=colour, exchanged=exchanged, jpeg=jpeg):
            pixels = colormap_table(name)[image][..., :: -1 if exchanged else 1].copy()
            pixels = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), constant_values=colour)
            Image.fromarray(pixels).resize([2 * side for side in pixels.shape[1::-1]], Image.NEAREST).save(
                path, **(dict(format="JPEG", quality=90) if jpeg else dict(format="PNG"))
            )

        root = write(tmp_path / f"{number}", save, intensity)
        for crop in ("none", "auto"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    windows = load_windows(root, size=32, crop=crop)
                except DataError as error:
                    assert "\n" not in str(error)
                    continue
            found = right(windows, intensity)
            assert found > 0.98, (name, floor, exchanged, jpeg, margin, colour, crop, windows.about, found)
            read += 1
    assert read > 12, "most are read, not refused"


# ---- cache


def test_cache_gives_the_same_without_reading_images(tmp_path, cache_folder, monkeypatch):
    root = write_set(tmp_path / "set")
    first = load_windows(root)
    assert len(list(cache_folder.iterdir())) == 1
    monkeypatch.setattr(reading, "_read_files", lambda *a, **k: pytest.fail("read again"))
    again = load_windows(root)
    assert torch.equal(first.images, again.images) and again.colormap == "jet"


def test_cache_notices_changed_content_and_options(tmp_path, cache_folder):
    root = write_set(tmp_path / "set", compress_level=0)  # every file of the same size
    first = load_windows(root)
    write_image(root / "ID_1" / "ID1_case1_1_Doppler1.png", picture(1, 9), compress_level=0)
    changed = load_windows(root)
    assert not torch.equal(changed.images, first.images)
    assert load_windows(root, size=16).images.shape[-1] == 16
    assert len(list(cache_folder.iterdir())) == 3


@pytest.mark.parametrize("position", [0, -1])
def test_damaged_cache_is_rebuilt(tmp_path, cache_folder, position):
    root = write_set(tmp_path / "set")
    first = load_windows(root)
    (file,) = cache_folder.iterdir()
    content = bytearray(file.read_bytes())
    content[position] ^= 255
    file.unlink()
    file.write_bytes(content)
    assert torch.equal(load_windows(root).images, first.images)
    file.write_bytes(b"")
    assert torch.equal(load_windows(root).images, first.images)


def test_cache_that_cannot_be_written_is_only_a_warning(tmp_path, monkeypatch):
    root = write_set(tmp_path / "set")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MDLIB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="MDLIB_CACHE"):
        assert len(load_windows(root)) == 6
