import warnings

import matplotlib
import numpy as np
import pytest
import torch
from helpers import message, picture, small_set, walk, write_image, write_set
from PIL import Image

from mdlib.data import reading
from mdlib.data.colormaps import colorize
from mdlib.data.windows import load_windows, to_float, to_uint8

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
        path = tmp_path / "set" / f"ID_{user}" / "w1.png"
        path.parent.mkdir(parents=True)
        Image.fromarray((matplotlib.colormaps["magma"](picture(user, 1)) * 255).astype(np.uint8)).save(path)
    text = message(load_windows, tmp_path / "set")
    assert "w1.png" in text and "colormap=..." in text and "channels=3" in text
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
    assert "jet, parula, viridis, grey" in message(load_windows, root, colormap="magma")
    assert "choose 1 (intensity) or 3 (RGB)" in message(load_windows, root, channels=2)


def test_nothing_is_warned_about_on_a_good_set(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_windows(write_set(tmp_path / "set", name="w{n}.jpg"))


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


# ---- window sets


def test_selections_keep_the_label_map():
    windows = small_set()
    mine = windows.of_user(7)
    assert len(mine) == 3 and mine.users == (4, 7) and mine.labels.tolist() == [1, 1, 1]
    for index in ([5, 0], torch.tensor([5, 0])):
        some = windows.select(index)
        assert some.paths == (windows.paths[5], windows.paths[0]) and some.labels.tolist() == [1, 0]
        assert torch.equal(some.images, windows.images[[5, 0]])
    assert windows.select(windows.labels == 0).paths == windows.select(slice(0, 3)).paths == windows.paths[:3]
    assert "no user ID_5; there are 4, 7" in message(windows.of_user, 5)


def test_ranges():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_float(every).min() == -1 and to_float(every).max() == 1
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    windows = small_set()
    assert torch.equal(windows.float([1, 2]), to_float(windows.images[1:3]))
    assert windows.float().shape == (6, 1, 8, 8) and windows.float().dtype == torch.float32
