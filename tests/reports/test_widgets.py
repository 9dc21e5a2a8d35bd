"""Views are thin: every control draws what a pure function draws, errors are shown, and a batch run gets pictures."""

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from IPython.core.formatters import DisplayFormatter
from matplotlib import get_data_path
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from mdlib.data.files import WindowFile
from mdlib.data.windows import WindowSet, to_uint8
from mdlib.evaluation.codec_quality import survey
from mdlib.evaluation.metrics import nearest_train
from mdlib.models.transformer import TokenPrior
from mdlib.models.unet import LatentDiffusion
from mdlib.models.vqvae import VQVAE
from mdlib.pipeline import MicroDopplerPipeline
from mdlib.reports import plots, widgets

VIEW = "application/vnd.jupyter.widget-view+json"
USERS = (3, 7, 12)


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    things: list = []
    monkeypatch.setattr(widgets, "display", lambda thing, **_: things.append(thing))
    return things


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return VQVAE(image_size=16, block_out_channels=(8, 8), norm_num_groups=4, num_codes=40, code_dim=4).eval()


@pytest.fixture(scope="module")
def pipeline(codec):
    prior = TokenPrior(40, codec.token_shape, num_users=3, hidden_size=16, num_layers=1, num_heads=2).eval()
    return MicroDopplerPipeline(codec, prior, users=USERS, output_size=16, sampling=dict(temperature=0.9))


@pytest.fixture(scope="module")
def real():
    """Three windows of each user."""
    images = torch.randint(0, 256, (9, 1, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    files = tuple(WindowFile(f"ID_{user}/w{n}.png", user, "", "w", n) for user in USERS for n in (1, 2, 3))
    return WindowSet(images, torch.arange(3).repeat_interleave(3), USERS, files, "jet", "data")


@pytest.fixture(scope="module")
def train(real):
    return replace(real, images=real.images.flip(0))


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """Two generated windows of users 3 and 7 on disk."""
    out = tmp_path_factory.mktemp("generated")
    pipeline.generate_folder(out, users=[3, 7], per_user=2)
    return out


@pytest.fixture
def generated(pipeline, folder, real):
    rows = [f"ID_{user}/ID{user}_generated_seed0_{n}.png" for user in (3, 7) for n in (1, 2)]
    images = to_uint8(pipeline([3, 7], images_per_user=2, output_type="pt").images)
    files = tuple(WindowFile(path, int(path[3]), "", "", n) for n, path in enumerate(rows))
    return replace(real, images=images, labels=torch.tensor([0, 0, 1, 1]), files=files, root=str(folder))


@pytest.fixture
def users(real, generated, train, pipeline, tmp_path):
    return browser(real, generated, train, pipeline, 2, tmp_path / "selected")


def browser(real, generated, train, pipeline, each, folder="selected"):
    """A user browser with its controls."""
    browser = widgets.UserBrowser(real, generated, train, pipeline, each)
    browser.box = browser.controls(folder, seed=0, sampling={})
    return browser


@pytest.fixture
def codes(codec, real):
    """The codebook, and the controls and pictures of its explorer."""
    book = survey(codec, real, codec.encode_tokens(real.float()))
    controls, usage, tiles, line, card = widgets.code_explorer(book).children
    whose, page, code = controls.children
    return SimpleNamespace(
        **dict(book=book, whose=whose, page=page, code=code, usage=usage, tiles=tiles, card=card, line=line)
    )


def labels(figure):
    """Index and times of the codes on a picture of tiles."""
    titles = [axis.get_title().split("\n×") for axis in figure.axes if axis.get_title()]
    return [(int(code), int(times)) for code, times in titles]


def test_a_codes_number_shows_that_code(codes):
    code = codes.book.most_distinctive()
    assert codes.code.value == code and codes.card.value == plots.to_png(plots.code_card(codes.book, code))
    codes.code.value = other = (code + 5) % 40
    assert codes.card.value == plots.to_png(plots.code_card(codes.book, other))


def test_choosing_a_user_draws_that_users_codes_most_used_first(codes):
    assert [name for name, _ in codes.whose.options] == ["all users", "ID_3", "ID_7", "ID_12"]
    codes.page.value = 2
    last = plots.code_tiles(codes.book, codes.book.times, widgets.TILES, 2)
    assert codes.tiles.value == plots.to_png(last) and len(labels(last)) == 8
    codes.whose.value = 1
    counts = codes.book.counts[1]
    first = plots.code_tiles(codes.book, counts, widgets.TILES)
    assert codes.page.value == 1 and codes.tiles.value == plots.to_png(first)
    assert codes.usage.value == plots.to_png(plots.code_usage(counts.numpy()))
    assert [times for _, times in labels(first)] == sorted(counts.tolist(), reverse=True)[:32]
    assert all(counts[code] == times for code, times in labels(first))


def test_moving_the_slider_shows_that_user_with_the_nearest_training_windows(users, real, generated, train):
    users.user.value = 7
    made = generated.select([2, 3])
    assert {file.user for file in train.select(nearest_train(made, train)[1]).files} == {7}
    usual = float(nearest_train(real, train)[0].median())
    expected = plots.user_view(real.select([3, 5]), made, train, usual, "")
    assert users.view.value == plots.to_png(expected) and users.view.layout.visibility == "visible"


def test_seed_and_temperature_draw_live(users, pipeline):
    assert list(users.sliders) == ["guidance_scale", "temperature"] and users.sliders["temperature"].value == 0.9
    users.seed.value = 5
    assert users.source.value == widgets.LIVE, "who moves a control wants to see what it does"
    expected = lambda **options: to_uint8(pipeline([3], 2, seed=5, output_type="pt", **options).images)
    assert torch.equal(users.shown.images, expected())
    users.sliders["temperature"].value = 2.0
    assert torch.equal(users.shown.images, expected(temperature=2.0))
    assert not torch.equal(expected(), expected(temperature=2.0))


def test_only_what_the_prior_knows_can_be_turned(real, generated, codec):
    prior = LatentDiffusion(codec.latent_shape, num_users=3, block_out_channels=(8,), norm_num_groups=4, head_dim=8)
    diffusion = MicroDopplerPipeline(codec, prior, users=USERS, sampling=dict(guidance_scale=12.0))
    live = browser(real, generated, real, diffusion, each=1)
    assert list(live.sliders) == ["guidance_scale"]
    assert live.sliders["guidance_scale"].value == 12.0, "beyond the slider's usual end"
    alone = browser(real, generated, real, None, each=2)
    assert not alone.sliders and [value for _, value in alone.user.options] == [3, 7], "no pipeline: what is on disk"


def test_selected_live_windows_are_saved_as_generate_writes_them(users, pipeline, tmp_path):
    users.user.value, users.seed.value = 7, 4
    users.selected[1].value = True
    users.button.click()
    assert "1 window of ID_7 saved in" in users.line.value
    pipeline.generate_folder(tmp_path / "all", users=[7], per_user=2, seed=4)
    name = "ID_7/ID7_generated_seed4_2.png"
    assert [path.relative_to(tmp_path / "selected").as_posix() for path in tmp_path.glob("selected/*/*")] == [name]
    assert (tmp_path / "selected" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    header, row = (tmp_path / "selected" / "manifest.csv").read_text().splitlines()
    assert row == (tmp_path / "all" / "manifest.csv").read_text().splitlines()[2]


def test_selected_windows_on_disk_are_copied_next_to_live_ones_of_the_same_options(users, folder, tmp_path):
    users.selected[0].value = True
    users.button.click()
    users.seed.value = 9
    assert not users.selected[0].value, "other windows: none of them is selected yet"
    users.selected[0].value = True
    users.button.click()
    names = ["ID3_generated_seed0_1.png", "ID3_generated_seed9_1.png"]
    assert sorted(path.name for path in tmp_path.glob("selected/ID_3/*")) == names
    assert (tmp_path / "selected/ID_3" / names[0]).read_bytes() == (folder / "ID_3" / names[0]).read_bytes()
    assert len((tmp_path / "selected" / "manifest.csv").read_text().splitlines()) == 3


def test_what_cannot_be_done_is_reported_in_one_line(users, monkeypatch, tmp_path):
    users.button.click()
    assert "no window is selected: use the buttons" in users.line.value
    users.user.value = 12
    assert "holds no window of ID_12: generate some" in users.line.value
    assert users.view.layout.visibility == "hidden", "no picture of somebody else stays"
    assert all(button.disabled for button in users.selected)
    monkeypatch.setattr(users.pipeline, "plan", lambda *_: 1 / 0)
    users.source.value = widgets.LIVE
    assert "ZeroDivisionError: division by zero" in users.line.value
    monkeypatch.undo()
    users.seed.value = 1
    assert users.view.layout.visibility == "visible" and users.line.value == ""
    users.selected[0].value = True
    users.button.click()
    users.sliders["temperature"].value = 0.5
    users.selected[0].value = True
    users.button.click()
    assert "windows generated with other settings (temperature)" in users.line.value


def test_an_error_within_a_redrawn_page_is_not_lost(codes, monkeypatch):
    codes.page.value = 2
    monkeypatch.setattr(widgets.plots, "code_tiles", lambda *_: 1 / 0)
    codes.whose.value = 0
    assert "ZeroDivisionError" in codes.line.value


def test_people_with_conditions_are_shown_by_condition(real, generated):
    half = lambda part: replace(
        part, files=tuple(replace(file, condition=("bag", "normal")[n % 2]) for n, file in enumerate(part.files))
    )
    users = browser(half(real), half(generated), real, None, each=4)
    assert list(users.condition.options) == ["bag", "normal"] and users.condition in users.box.children[0].children
    users.condition.value = "normal"
    assert torch.equal(users.shown.images, generated.images[1:2]) and users.selected[1].disabled


def test_moving_to_live_windows_generates_them_once(users, monkeypatch):
    calls, plan = [], users.pipeline.plan
    monkeypatch.setattr(users.pipeline, "plan", lambda *request: calls.append(request) or plan(*request))
    users.seed.value = 3
    assert len(calls) == 1


def font_with(characters, path):
    """A font file in which each character is a box."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    box, names = pen.glyph(), [f"box{n}" for n in range(len(characters))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", *names])
    font.setupCharacterMap({ord(character): name for character, name in zip(characters, names, strict=True)})
    font.setupGlyf(dict.fromkeys([".notdef", *names], box))
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (900, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_condition_in_chinese_is_drawn_without_warnings(real, installed, monkeypatch, tmp_path):
    """With an installed font that has the characters by its name, without one by its number."""
    own = [font for font in fontManager.ttflist if get_data_path() in font.fname]  # those that matplotlib brings
    monkeypatch.setattr(fontManager, "ttflist", own)
    plots.fonts.cache_clear()
    if installed:
        font_with("正常", tmp_path / "boxes.ttf")
        fontManager.addfont(tmp_path / "boxes.ttf")
    part = replace(
        real, files=tuple(replace(file, condition=("bag", "正常")[n % 2]) for n, file in enumerate(real.files))
    )
    users = browser(part, part, part, None, each=2)
    users.condition.value = "正常"
    assert users.line.value == "" and bytes(users.view.value).startswith(b"\x89PNG")
    title = users.figure(users.shown).get_suptitle()
    assert title == ("ID_3 正常" if installed else "ID_3 condition 2")
    plots.fonts.cache_clear()


def test_a_batch_run_shows_pictures_instead(shown, codec, real, generated, monkeypatch):
    monkeypatch.setenv("MDLIB_BATCH", "1")
    widgets.browse_codes(codec, real, codec.encode_tokens(real.float()))
    widgets.browse_users(real, generated, real)
    assert len(shown) == 4 and all(isinstance(figure, Figure) for figure in shown)


def test_a_view_carries_its_picture_for_where_nothing_is_live(shown, real, generated, pipeline):
    widgets.browse_users(real, generated, real, pipeline)
    assert shown[0][VIEW]["model_id"] and shown[0]["image/png"].startswith("iVBOR")


def test_notebooks_show_figures_as_pictures():
    data, _ = DisplayFormatter().format(plots.code_usage([1, 0, 2]))
    assert data["image/png"].startswith(b"\x89PNG") if isinstance(data["image/png"], bytes) else data["image/png"]


def test_only_what_ipywidgets_7_and_8_share_is_used():
    # From the traits of 7.7.1 and 8.1.9. `tooltip` is a button's in both.
    one_of_them_only = {"description_tooltip", "description_allow_html", "tabbable", "behavior", "titles"}
    one_of_them_only |= {"overflow_x", "overflow_y", "border_top", "border_right", "border_bottom", "border_left"}
    both = "Box BoundedIntText Button Dropdown FloatSlider HBox HTML Image IntSlider Layout SelectionSlider Text"
    both = {*both.split(), "ToggleButton", "ToggleButtons", "VBox"}
    tree = ast.parse(Path(widgets.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    calls = [node for node in calls if isinstance(node.func.value, ast.Name) and node.func.value.id == "ipywidgets"]
    assert calls and {node.func.attr for node in calls} <= both
    for node in calls:
        names = {keyword.arg for keyword in node.keywords}
        assert not names & one_of_them_only and ("tooltip" not in names or "Button" in node.func.attr)
        assert names <= set(getattr(ipywidgets, node.func.attr).class_trait_names()), "a trait of the one installed"
