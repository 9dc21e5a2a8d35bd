"""Interactive views: thin layers over functions of `codec_quality`, `pipeline` and `plots`.

A view is shown together with a picture of it: where nothing is live (HTML, GitHub) the picture stands; a batch run
shows the picture alone. Only what ipywidgets 7 and 8 share is used.
"""

import html
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
except ImportError:  # pictures will do
    ipywidgets = None

TILES = 32  # codes on a page of the codebook explorer
ON_DISK, LIVE = "on disk", "live"
# Sampling options that get a slider where the prior has them, with the slider's ends.
SLIDERS = {"guidance_scale": (0.0, 8.0), "temperature": (0.1, 2.0)}


def browse_codes(codec, windows: WindowSet, tokens: torch.Tensor) -> None:
    """Codebook explorer: how often all users or one use each code in windows and their tokens (N, h, w), and every code
    as a picture; click one to see what it decodes to, who uses it and where it occurs."""
    book = survey(codec, windows, tokens)
    card = plots.code_card(book, book.most_telling())
    tiles = plots.code_tiles(book, _most_used(book.times)[: 2 * TILES])
    _display([plots.code_usage(book.times.numpy()), tiles, card], lambda: _Codes(book))


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
    people = _People(real, generated, train, pipeline, each)
    first, _ = people.on_disk(generated.files[0].user, generated.files[0].condition)
    _display([people.picture(first)], lambda: _Users(people, folder, seed, sampling))


def _display(figures: list, view: Callable) -> None:
    """The view's box with the figures as its picture; the figures alone in a batch run or without ipywidgets."""
    if batch_run() or ipywidgets is None:
        for figure in figures:
            display(figure)
        return
    live = {"version_major": 2, "version_minor": 0, "model_id": view().box.model_id}
    shown = {"application/vnd.jupyter.widget-view+json": live, "text/plain": "an interactive view"}
    display(shown | {"image/png": b64encode(plots.to_png(*figures)).decode()}, raw=True)


def _most_used(times: torch.Tensor) -> list[int]:
    return times.argsort(descending=True, stable=True).tolist()


class _View:
    """A box of controls and pictures with a line for messages."""

    def __init__(self):
        self.line = ipywidgets.HTML()

    def image(self):
        """Room for a picture, in the picture's own size where there is room for it."""
        return ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))

    def say(self, text: str, colour: str = plots.INK) -> None:
        self.line.value = f'<span style="color:{colour}">{html.escape(text)}</span>'

    def attempt(self, action: Callable[[], str | None], doing: str = "") -> None:
        """Run an action and show what it returns; its error becomes a message, and the view stays usable."""
        self.say(doing)
        before = self.line.value
        try:
            done = action() or ""
        except Exception as error:  # in a callback it would be lost in a log
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            self.say(kind + " ".join(str(error).split()), plots.SECOND)
        else:
            if self.line.value == before:  # else an action within this one has shown its error
                self.say(done)


class _Codes(_View):
    """The codebook explorer. What it shows follows from three values: whose codes, which page of them, which code."""

    def __init__(self, book: Codebook):
        super().__init__()
        self.book, codes = book, len(book.times)
        users = [("all users", -1)] + [(f"ID_{user}", label) for label, user in enumerate(book.windows.users)]
        self.whose = ipywidgets.Dropdown(options=users, description="codes of")
        self.page = ipywidgets.IntSlider(min=1, max=-(-codes // TILES), description="page", continuous_update=False)
        self.code = ipywidgets.BoundedIntText(value=book.most_telling(), max=codes - 1, description="code")
        self.usage, self.card, self.style = self.image(), self.image(), ipywidgets.HTML()
        self.shown: list[int] = []
        self.tiles = [ipywidgets.Button() for _ in range(min(TILES, codes))]
        for place, tile in enumerate(self.tiles):
            tile.layout = ipywidgets.Layout(width="54px", height="60px", margin="1px")
            tile.add_class("mdlib-tile")
            tile.add_class(f"mdlib-{self.code.model_id}-{place}")  # its own in the whole notebook
            tile.on_click(lambda _, place=place: setattr(self.code, "value", self.shown[place]))
        tiles = ipywidgets.Box(self.tiles, layout=ipywidgets.Layout(flex_flow="row wrap", max_width="940px"))
        controls = ipywidgets.HBox([self.whose, self.page, self.code])
        self.box = ipywidgets.VBox([controls, self.usage, self.style, tiles, self.line, self.card])
        for control, draw in ((self.whose, self.draw_usage), (self.page, self.draw_tiles), (self.code, self.draw_card)):
            control.observe(lambda _, draw=draw: self.attempt(draw), names="value")
        self.attempt(self.draw_usage)
        self.attempt(self.draw_card)

    @property
    def times(self) -> torch.Tensor:
        """How often the chosen users use each code (K,)."""
        return self.book.times if self.whose.value < 0 else self.book.counts[self.whose.value]

    def draw_usage(self) -> None:
        """Histograms of the chosen users, then their most used codes."""
        self.usage.value = plots.to_png(plots.code_usage(self.times.numpy()))
        if self.page.value == 1:
            self.draw_tiles()
        else:
            self.page.value = 1

    def draw_tiles(self) -> None:
        """A page of codes as buttons that show what each decodes to, most used first."""
        first, times = TILES * (self.page.value - 1), self.times
        self.shown = _most_used(times)[first : first + TILES]
        # Buttons can show no picture of their own: a style sheet puts one above each one's text.
        rules = ["button.mdlib-tile { background: no-repeat center 4px; padding: 42px 0 2px; line-height: 16px }"]
        for place, tile in enumerate(self.tiles):
            tile.layout.visibility = "visible" if place < len(self.shown) else "hidden"
            if place < len(self.shown):
                code = self.shown[place]
                tile.description, tile.tooltip = str(code), f"code {code}, used {count(int(times[code]), 'time')}"
                png = b64encode(plots.tile(self.book.decoded[code], self.book.windows.colormap)).decode()
                name = f"button.mdlib-{self.code.model_id}-{place}"
                rules.append(f"{name} {{ background-image: url(data:image/png;base64,{png}) }}")
        self.style.value = f"<style>{' '.join(rules)}</style>"
        self._mark()

    def draw_card(self) -> None:
        """The chosen code."""
        self.card.value = plots.to_png(plots.code_card(self.book, self.code.value))
        self._mark()

    def _mark(self) -> None:
        for code, tile in zip(self.shown, self.tiles, strict=False):
            tile.button_style = "info" if code == self.code.value else ""


class _People:
    """What the user browser shows, without its controls: windows, each time with a function (folder, places) that saves
    those at some places."""

    def __init__(self, real: WindowSet, generated: WindowSet, train: WindowSet, pipeline, each: int):
        self.real, self.generated, self.train, self.pipeline, self.each = real, generated, train, pipeline, each
        known = set(pipeline.config.users) if pipeline else {file.user for file in generated.files}
        self.users = [user for user in real.users if user in known]
        self.conditions = tuple(pipeline.config.conditions) if pipeline else generated.conditions
        distance, _ = nearest_train(real, train)
        self.usual = float(distance[distance.isfinite()].median().clamp_min(1e-9))

    def on_disk(self, user: int, condition: str) -> tuple[WindowSet, Callable]:
        found = self._some(self.generated, user, condition)
        if not len(found):
            name = f"ID_{user}" + (f" with {condition}" if condition else "")
            raise DataError(f"{found.root} holds no window of {name}: generate some, or switch to {LIVE}")
        return found, lambda out, places: copy_windows(found.root, [found.paths[k] for k in places], out)

    def live(self, user: int, condition: str, seed: int, sampling: dict) -> tuple[WindowSet, Callable]:
        found = self.pipeline([user], self.each, seed, conditions=[condition], output_type="pt", **sampling)
        images, rows = found.images, found.manifest
        files = tuple(WindowFile(str(row["number"]), user, condition, "", row["number"]) for row in rows)
        labels = torch.full((len(rows),), self.real.users.index(user))
        save = lambda out, places: self.pipeline.save_windows(
            out, [rows[k] for k in places], images[places], **sampling
        )
        return replace(self.real, images=to_uint8(images), labels=labels, files=files), save

    def picture(self, generated: WindowSet):
        """Real windows, the generated ones, and the training windows nearest to those."""
        real = self._some(self.real, generated.files[0].user, generated.files[0].condition)
        distance, rows = nearest_train(generated, self.train)
        if not distance.isfinite().all():  # no training window shows this user
            return plots.user_view(real, generated)
        return plots.user_view(real, generated, self.train.select(rows), (distance / self.usual).tolist())

    def _some(self, windows: WindowSet, user: int, condition: str) -> WindowSet:
        """A few windows of a user, spread over all of them."""
        rows = [row for row, file in enumerate(windows.files) if (file.user, file.condition) == (user, condition)]
        places = torch.linspace(0, len(rows) - 1, min(self.each, len(rows))).round().long().tolist()
        return windows.select([rows[place] for place in places])


class _Users(_View):
    """The user browser. What it shows follows from the user, the source, and for live windows seed and sampling."""

    def __init__(self, people: _People, folder: str | Path, seed: int, sampling: dict):
        super().__init__()
        self.people, self.sampling, self.shown, self.copy = people, sampling, None, None
        users = [(f"ID_{user}", user) for user in people.users]
        self.user = ipywidgets.SelectionSlider(options=users, description="user", continuous_update=False)
        self.condition = ipywidgets.Dropdown(options=people.conditions, description="condition")
        self.source = ipywidgets.ToggleButtons(options=[ON_DISK, LIVE])
        self.seed = ipywidgets.BoundedIntText(value=seed, max=2**31 - 1, description="seed")
        self.options = {**people.pipeline.sampling_options(), **sampling} if people.pipeline else {}
        self.sliders = {name: _slider(name, self.options[name]) for name in SLIDERS if name in self.options}
        self.selected = [ipywidgets.ToggleButton(description=f"select {k + 1}") for k in range(people.each)]
        self.folder = ipywidgets.Text(value=str(folder), description="folder", layout=ipywidgets.Layout(width="450px"))
        self.button, self.view = ipywidgets.Button(description="save selected"), self.image()
        who = [self.user] + ([self.condition] if len(people.conditions) > 1 else [])
        live = [[self.source], [self.seed, *self.sliders.values()]] if people.pipeline else []
        rows = [ipywidgets.HBox(row) for row in (who, *live, self.selected, [self.folder, self.button])]
        self.box = ipywidgets.VBox([*rows[:-2], self.view, *rows[-2:], self.line])
        for control in (self.user, self.condition, self.source):
            control.observe(self.draw, names="value")
        for control in (self.seed, *self.sliders.values()):
            control.observe(self.draw_live, names="value")
        self.button.on_click(lambda _: self.attempt(self.save))
        self.draw()

    def draw(self, *_) -> None:
        live, self.shown = self.source.value == LIVE, None
        self.attempt(self._draw, f"generating {count(self.people.each, 'window')}" if live else "")
        self.view.layout.visibility = "visible" if self.shown else "hidden"

    def draw_live(self, *_) -> None:
        """A control of the sampling switches to live windows."""
        if self.source.value == LIVE:
            self.draw()
        else:
            self.source.value = LIVE

    def _draw(self) -> None:
        find = self.people.on_disk
        if self.source.value == LIVE:
            moved = {name: slider.value for name, slider in self.sliders.items() if slider.value != self.options[name]}
            find = partial(self.people.live, seed=self.seed.value, sampling={**self.sampling, **moved})
        found, copy = find(self.user.value, self.condition.value)
        self.view.value = plots.to_png(self.people.picture(found))
        for place, button in enumerate(self.selected):
            button.value, button.disabled = False, place >= len(found)
        self.shown, self.copy = found, copy

    def save(self) -> str:
        places = [place for place, button in enumerate(self.selected) if button.value]
        if not self.shown or not places:
            raise DataError("no window is selected: use the buttons below the picture")
        self.copy(self.folder.value, places)
        return f"{count(len(places), 'window')} of ID_{self.user.value} saved in {self.folder.value}"


def _slider(name: str, value: float):
    low, high = min(SLIDERS[name][0], value), max(SLIDERS[name][1], value)
    slider = ipywidgets.FloatSlider(value=value, min=low, max=high, step=0.05, continuous_update=False)
    slider.description, slider.style.description_width = name.split("_")[0], "initial"
    return slider
