"""Interactive views: thin layers over functions of `codec_quality`, `pipeline` and `plots`.

A view is shown together with an image of it, which replaces it where widgets are not live (HTML, GitHub); a batch run
shows the image alone. Only what ipywidgets 7 and 8 share is used.
"""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from IPython.display import display

from mdlib.data.files import WindowFile
from mdlib.data.windows import WindowSet, to_uint8
from mdlib.evaluation.codec_quality import Codebook, survey
from mdlib.evaluation.metrics import nearest_train
from mdlib.pipeline import MicroDopplerPipeline, copy_windows
from mdlib.reports import plots
from mdlib.utils import DataError, batch_run, count

try:
    import ipywidgets
except ImportError:  # images will do
    ipywidgets = None

TILES = 32  # codes on a page of the codebook explorer
ON_DISK, LIVE = "on disk", "live"
# Sampling options that get a slider where the prior has them, with the slider's ends.
SLIDERS = {"guidance_scale": (0.0, 8.0), "temperature": (0.1, 2.0)}


def browse_codes(codec, windows: WindowSet, tokens: torch.Tensor) -> None:
    """Codebook explorer: how often all users or one use each code in windows and their tokens (N, h, w), every code as
    an image, and for one code what it decodes to, who uses it and where it occurs."""
    book = survey(codec, windows, tokens)
    card = plots.code_card(book, book.most_distinctive())
    figures = [plots.code_usage(book.times.numpy()), plots.code_tiles(book, book.times, TILES), card]
    _display(figures, lambda: code_explorer(book))


def browse_users(
    real: WindowSet,
    generated: WindowSet,
    train: WindowSet,
    pipeline: MicroDopplerPipeline | None = None,
    folder: str | Path = "selected",
    each: int = 4,
    seed: int = 0,
    **sampling,
) -> None:
    """User browser: real windows, generated ones, and the training windows nearest to those; selected ones are saved.

    Args:
        real: unseen windows, those of the test.
        generated: windows on disk, see `mdlib.reports.report.load_generated`.
        train: the generator's training windows.
        pipeline: generates further windows live, by the sliders that its prior has; None: only those on disk.
        folder: where selected windows are saved, as ID_k/*.png with a manifest.
        each: windows shown of a user.
        seed, sampling: the first settings of live windows.
    """
    browser = UserBrowser(real, generated, train, pipeline, each)
    first = generated.few(generated.files[0].user, generated.files[0].condition, each)
    _display([browser.figure(first)], lambda: browser.controls(folder, seed, sampling))


def _display(figures: list, view: Callable[[], ipywidgets.VBox]) -> None:
    """The view with the figures as its image; the figures alone in a batch run or without ipywidgets."""
    if batch_run() or ipywidgets is None:
        for figure in figures:
            display(figure)
        return
    live = {"version_major": 2, "version_minor": 0, "model_id": view().model_id}
    shown = {"application/vnd.jupyter.widget-view+json": live, "text/plain": "an interactive view"}
    display(shown | {"image/png": b64encode(plots.to_png(*figures)).decode()}, raw=True)


def live_preview() -> Callable[[Path], None] | None:
    """Show an image that changes in place; returns the function that takes its next file. None in a batch run, whose
    page would grow, and without ipywidgets."""
    if batch_run() or ipywidgets is None:
        return None
    image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
    display(image)
    return lambda file: setattr(image, "value", file.read_bytes())


def _attempt(line: ipywidgets.HTML, action: Callable[[], str | None]) -> bool:
    """Run `action` and show its result or error in `line`; returns whether it succeeded."""
    try:
        line.value = html.escape(action() or "")
    except Exception as error:  # in a callback it would be lost in a log
        kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        message = html.escape(kind + " ".join(str(error).split()))
        line.value = f'<span style="color:{plots.SECOND}">{message}</span>'
        return False
    return True


def _image(line: ipywidgets.HTML, draw: Callable[[], plots.Figure], *controls) -> ipywidgets.Image:
    """An image of what `draw` returns, drawn again when a control changes; an error hides it and is on the line."""
    image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))
    drawn = []

    def show(_=None):
        values = [control.value for control in controls]
        if values == drawn:  # by the change of another control, which this one has changed
            return
        drawn[:] = values
        done = _attempt(line, lambda: setattr(image, "value", plots.to_png(draw())))
        image.layout.visibility = "visible" if done else "hidden"

    for control in controls:
        control.observe(show, names="value")
    show()
    return image


def code_explorer(book: Codebook) -> ipywidgets.VBox:
    """An image for each of three questions, and the controls that it follows: whose codes, which page, which code."""
    users = [("all users", -1)] + [(f"ID_{user}", label) for label, user in enumerate(book.windows.users)]
    whose = ipywidgets.Dropdown(options=users, description="codes of")
    pages = -(-len(book.times) // TILES)
    page = ipywidgets.IntSlider(min=1, max=pages, description="page", continuous_update=False)
    code = ipywidgets.BoundedIntText(value=book.most_distinctive(), max=len(book.times) - 1, description="code")
    line = ipywidgets.HTML()
    times = lambda: book.times if whose.value < 0 else book.counts[whose.value]
    usage = _image(line, lambda: plots.code_usage(times().numpy()), whose)
    whose.observe(lambda _: setattr(page, "value", 1), names="value")
    tiles = _image(line, lambda: plots.code_tiles(book, times(), TILES, page.value), whose, page)
    card = _image(line, lambda: plots.code_card(book, code.value), code)
    return ipywidgets.VBox([ipywidgets.HBox([whose, page, code]), usage, tiles, line, card])


class UserBrowser:
    """Windows of a user next to real ones and the nearest training windows. What is shown follows from the user, the
    condition and the source, for live windows from seed and sampling too."""

    def __init__(self, real: WindowSet, generated: WindowSet, train: WindowSet, pipeline, each: int):
        self.real, self.generated, self.train, self.pipeline, self.each = real, generated, train, pipeline, each
        self.conditions = pipeline.config.conditions if pipeline else generated.conditions
        self.usual = float(nearest_train(real, train)[0].median().clamp_min(1e-9))

    def figure(self, generated: WindowSet) -> plots.Figure:
        """Real windows, the generated ones, and the training windows nearest to those."""
        user, condition = generated.files[0].user, generated.files[0].condition
        stand_in = f"condition {list(self.conditions).index(condition) + 1}"
        return plots.user_view(self.real.few(user, condition, self.each), generated, self.train, self.usual, stand_in)

    def controls(self, folder: str | Path, seed: int, sampling: dict) -> ipywidgets.VBox:
        """The controls around their image."""
        known = self.pipeline.config.users if self.pipeline else {file.user for file in self.generated.files}
        users = [(f"ID_{user}", user) for user in self.real.users if user in known]
        self.user = ipywidgets.SelectionSlider(options=users, description="user", continuous_update=False)
        self.condition = ipywidgets.Dropdown(options=self.conditions, description="condition")
        self.source = ipywidgets.ToggleButtons(options=[ON_DISK, LIVE])
        self.seed = ipywidgets.BoundedIntText(value=seed, max=2**31 - 1, description="seed")
        self.sampling = sampling
        self.options = {**self.pipeline.sampling_options(), **sampling} if self.pipeline else {}
        numbers = [name for name in SLIDERS if isinstance(self.options.get(name), int | float)]  # no series
        self.sliders = {name: _slider(name, self.options[name]) for name in numbers}
        self.selected = [ipywidgets.ToggleButton(description=f"select {k + 1}") for k in range(self.each)]
        self.folder = ipywidgets.Text(value=str(folder), description="folder", layout=ipywidgets.Layout(width="450px"))
        self.button, self.line = ipywidgets.Button(description="save selected"), ipywidgets.HTML()
        self.button.on_click(lambda _: _attempt(self.line, self.save))
        who = [self.user, self.condition] if len(self.conditions) > 1 else [self.user]
        live = [self.seed, *self.sliders.values()]
        for control in live:  # before the image follows it
            control.observe(lambda _: setattr(self.source, "value", LIVE), names="value")
        self.view = _image(self.line, self.draw, *who, self.source, *live)
        rows = [who, [self.source], live, self.selected, [self.folder, self.button]]
        rows = [ipywidgets.HBox(row) for row in (rows if self.pipeline else [who, *rows[3:]])]
        return ipywidgets.VBox([*rows[:-2], self.view, *rows[-2:], self.line])

    def draw(self) -> plots.Figure:
        """The image of what the controls say, with nothing selected."""
        for button in self.selected:
            button.value, button.disabled = False, True
        user, condition = self.user.value, self.condition.value
        if self.source.value == LIVE:
            moved = {name: slider.value for name, slider in self.sliders.items() if slider.value != self.options[name]}
            self.line.value = f"generating {count(self.each, 'window')}"
            self.shown, self.copy = self.generate(user, condition, self.seed.value, {**self.sampling, **moved})
        else:
            self.shown = shown = self.generated.few(user, condition, self.each)
            if not len(shown):
                name = f"ID_{user}" + (f" with {condition}" if condition else "")
                raise DataError(f"{shown.root} holds no window of {name}: generate some, or switch to {LIVE}")
            self.copy = lambda out, places: copy_windows(shown.root, [shown.paths[k] for k in places], out)
        figure = self.figure(self.shown)
        for button in self.selected[: len(self.shown)]:
            button.disabled = False
        return figure

    def generate(self, user: int, condition: str, seed: int, sampling: dict) -> tuple[WindowSet, Callable]:
        """Live windows, and a function (folder, places) that saves those at some places."""
        made = self.pipeline([user], self.each, seed, conditions=[condition], output_type="pt", **sampling)
        rows, images, save = made.manifest, made.images, self.pipeline.save_windows
        files = tuple(WindowFile(row["path"], user, condition, "", row["number"]) for row in rows)
        labels = torch.full((len(rows),), self.real.users.index(user))
        shown = replace(self.real, images=to_uint8(images), labels=labels, files=files)
        return shown, lambda out, places: save(out, [rows[k] for k in places], images[places], **sampling)

    def save(self) -> str:
        """Save the selected windows; returns how many and where."""
        places = [place for place, button in enumerate(self.selected) if button.value]
        if not places:
            raise DataError("no window is selected: use the buttons below the image")
        self.copy(self.folder.value, places)
        return f"{count(len(places), 'window')} of ID_{self.user.value} saved in {self.folder.value}"


def _slider(name: str, value: float) -> ipywidgets.FloatSlider:
    low, high = min(SLIDERS[name][0], value), max(SLIDERS[name][1], value)
    slider = ipywidgets.FloatSlider(value=value, min=low, max=high, step=0.05, continuous_update=False)
    slider.description, slider.style.description_width = name.split("_")[0], "initial"
    return slider
