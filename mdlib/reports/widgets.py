"""Interactive views: thin layers over functions of `codebook`, `pipeline` and `plots`.

A view is shown together with a picture of it: where nothing is live (HTML, GitHub) the picture stands; a batch run
shows the picture alone. Only what ipywidgets 7 and 8 share is used.
"""

import html
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from IPython.display import display

from mdlib.data.windows import DataError, WindowFile, WindowSet, count, to_uint8
from mdlib.evaluation.codec_quality import Codebook, survey
from mdlib.evaluation.metrics import nearest_train
from mdlib.pipeline import MicroDopplerPipeline, copy_windows
from mdlib.reports import plots
from mdlib.utils import batch_run

try:
    import ipywidgets
except ImportError:  # pictures will do
    ipywidgets = None

TILES = 32  # codes on a page of the codebook explorer
ON_DISK, LIVE = "on disk", "live"
# Sampling options that get a slider where the prior knows them, with the slider's ends.
DIALS = {"guidance_scale": (0.0, 8.0), "temperature": (0.1, 2.0)}


def browse_codes(codec, windows: WindowSet, tokens: torch.Tensor) -> None:
    """Codebook explorer: how often all users or one use each code, and every code as a picture; click one to see what
    it decodes to, who uses it and where it occurs.

    Args:
        codec: with a codebook.
        windows, tokens: windows and their tokens (N, h, w), in which use is counted.
    """
    book = survey(codec, windows, tokens)
    figures = [
        plots.code_usage(book.times.numpy()),
        plots.code_tiles(book, _by_use(book.times)[: 2 * TILES]),
        plots.code_card(book, book.most_telling()),
    ]
    _show(figures, lambda: _Codes(book))


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
    """User browser: real windows, generated ones, and the training windows nearest to those; chosen ones are saved.

    Args:
        real: unseen windows, those of the test.
        generated: windows on disk, see `mdlib.reports.report.load_generated`.
        train: the generator's training windows.
        pipeline: draws further windows live, by the controls that its prior knows; None: only those on disk.
        folder: where chosen windows are saved, as ID_k/*.png with a manifest.
        each: windows shown of a user.
        seed, sampling: what live windows are drawn with at first.
    """
    people = _People(real, generated, train, pipeline, each)
    first = people.on_disk(generated.files[0].user, generated.files[0].condition)
    _show([people.picture(first)], lambda: _Users(people, folder, seed, sampling))


def _show(figures: list, view: Callable) -> None:
    """The view's box with the figures as its picture; the figures alone where nobody can click."""
    if batch_run() or ipywidgets is None:
        for figure in figures:
            display(figure)
        return
    live = {"version_major": 2, "version_minor": 0, "model_id": view().box.model_id}
    picture = b64encode(plots.to_png(*figures)).decode()
    display(
        {"application/vnd.jupyter.widget-view+json": live, "image/png": picture, "text/plain": "an interactive view"},
        raw=True,
    )


def _image():
    """Room for a picture, in the picture's own size where there is room for it."""
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))


class _Message:
    """A line of text: what is being done, what came of it, or why it could not be."""

    def __init__(self):
        self.line = ipywidgets.HTML()

    def say(self, text: str, colour: str = plots.INK) -> None:
        self.line.value = f'<span style="color:{colour}">{html.escape(text)}</span>'

    def guard(self, action: Callable[[], str | None], doing: str = "") -> None:
        """Do something and say what it returns; an error is told, and the view stays usable."""
        self.say(doing)
        before = self.line.value
        try:
            said = action() or ""
        except Exception as error:  # in a callback it would be lost in a log that nobody reads
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            self.say(kind + " ".join(str(error).split()), plots.SECOND)
        else:
            if self.line.value == before:  # an action within this one may have told an error
                self.say(said)


# ---- codebook explorer


class _Codes:
    """What it shows follows from three values: whose codes, which page of them, which code."""

    def __init__(self, book: Codebook):
        self.book, codes = book, len(book.times)
        users = [("all users", -1)] + [(f"ID_{user}", label) for label, user in enumerate(book.windows.users)]
        self.whose = ipywidgets.Dropdown(options=users, description="codes of")
        self.page = ipywidgets.IntSlider(min=1, max=-(-codes // TILES), description="page", continuous_update=False)
        self.code = ipywidgets.BoundedIntText(value=book.most_telling(), max=codes - 1, description="code")
        self.usage, self.card = _image(), _image()
        self.tiles = [self._tile(place) for place in range(min(TILES, codes))]
        self.style, self.message = ipywidgets.HTML(), _Message()
        self.shown: list[int] = []
        tiles = ipywidgets.Box(self.tiles, layout=ipywidgets.Layout(flex_flow="row wrap", max_width="940px"))
        controls = ipywidgets.HBox([self.whose, self.page, self.code])
        self.box = ipywidgets.VBox([controls, self.usage, self.style, tiles, self.message.line, self.card])
        for chooser, draw in ((self.whose, self.draw_usage), (self.page, self.draw_tiles), (self.code, self.draw_card)):
            chooser.observe(lambda _, draw=draw: self.message.guard(draw), names="value")
        self.message.guard(self.draw_usage)
        self.message.guard(self.draw_card)

    def draw_usage(self) -> None:
        """Histograms of the chosen users, then their most used codes."""
        self.usage.value = plots.to_png(plots.code_usage(self._times().numpy()))
        if self.page.value == 1:
            self.draw_tiles()
        else:
            self.page.value = 1

    def draw_tiles(self) -> None:
        """A page of codes as buttons that show what each decodes to, most used first."""
        times = self._times()
        first = TILES * (self.page.value - 1)
        self.shown = _by_use(times)[first : first + TILES]
        pictures = [plots.tile(self.book.decoded[code], self.book.windows.colormap) for code in self.shown]
        self.style.value = _tile_style([self._class(place) for place in range(len(self.tiles))], pictures)
        for tile in self.tiles[len(self.shown) :]:
            tile.layout.visibility = "hidden"
        for code, tile in zip(self.shown, self.tiles, strict=False):
            tile.layout.visibility = "visible"
            tile.description, tile.tooltip = str(code), f"code {code}, used {count(int(times[code]), 'time')}"
        self._mark()

    def draw_card(self) -> None:
        """The chosen code."""
        self.card.value = plots.to_png(plots.code_card(self.book, self.code.value))
        self._mark()

    def _times(self) -> torch.Tensor:
        return self.book.times if self.whose.value < 0 else self.book.counts[self.whose.value]

    def _mark(self) -> None:
        for code, tile in zip(self.shown, self.tiles, strict=False):
            tile.button_style = "info" if code == self.code.value else ""

    def _tile(self, place: int):
        """The button of one place on the page."""
        layout = ipywidgets.Layout(width="54px", height="60px", margin="1px")
        tile = ipywidgets.Button(layout=layout)
        tile.add_class("mdlib-tile")
        tile.add_class(self._class(place))
        tile.on_click(lambda _: setattr(self.code, "value", self.shown[place]))
        return tile

    def _class(self, place: int) -> str:
        """A style class that no other button of the notebook has."""
        return f"mdlib-{self.code.model_id}-{place}"


def _by_use(times: torch.Tensor) -> list[int]:
    """Codes, most used first."""
    return times.argsort(descending=True, stable=True).tolist()


def _tile_style(classes: list[str], pictures: list[bytes]) -> str:
    """Buttons can show no picture of their own: a style sheet puts one above each one's text."""
    rules = ["button.mdlib-tile { background: no-repeat center 4px; padding: 42px 0 2px; line-height: 16px }"]
    for name, picture in zip(classes, pictures, strict=False):
        source = f"data:image/png;base64,{b64encode(picture).decode()}"
        rules.append(f"button.{name} {{ background-image: url({source}) }}")
    return f"<style>{' '.join(rules)}</style>"


# ---- user browser


@dataclass(frozen=True)
class _Made:
    """Generated windows of one user in one condition, and what saves those at some places into a folder."""

    windows: WindowSet
    save: Callable[[str, list[int]], list[dict]]


class _People:
    """What the user browser browses."""

    def __init__(self, real: WindowSet, generated: WindowSet, train: WindowSet, pipeline, each: int):
        self.real, self.generated, self.train, self.pipeline, self.each = real, generated, train, pipeline, each
        known = set(pipeline.config.users) if pipeline else {file.user for file in generated.files}
        self.users = [user for user in real.users if user in known]
        self.conditions = tuple(pipeline.config.conditions) if pipeline else generated.conditions
        distance, _ = nearest_train(real, train)
        self.usual = float(distance[distance.isfinite()].median().clamp_min(1e-9))

    def on_disk(self, user: int, condition: str) -> _Made:
        found = self._some(self.generated, user, condition)
        if not len(found):
            name = f"ID_{user}" + (f" with {condition}" if condition else "")
            raise DataError(f"{found.root} holds no window of {name}: generate some, or draw them live")
        return _Made(found, lambda out, places: copy_windows(found.root, [found.paths[k] for k in places], out))

    def live(self, user: int, condition: str, seed: int, sampling: dict) -> _Made:
        options = dict(conditions=[condition], output_type="pt")
        drawn = self.pipeline([user], self.each, seed, **options, **sampling)
        images, rows = drawn.images, drawn.manifest
        files = tuple(WindowFile(str(row["number"]), user, condition, "", row["number"]) for row in rows)
        labels = torch.full((len(rows),), self.real.users.index(user))
        return _Made(
            replace(self.real, images=to_uint8(images), labels=labels, files=files),
            lambda out, places: self.pipeline.save_windows(out, [rows[k] for k in places], images[places], **sampling),
        )

    def picture(self, made: _Made):
        """Real windows, the generated ones, and the training windows nearest to those."""
        who = made.windows.files[0]
        real = self._some(self.real, who.user, who.condition)
        distance, rows = nearest_train(made.windows, self.train)
        if not distance.isfinite().all():  # no training window shows this user
            return plots.user_view(real, made.windows)
        return plots.user_view(real, made.windows, self.train.select(rows), (distance / self.usual).tolist())

    def _some(self, windows: WindowSet, user: int, condition: str) -> WindowSet:
        """A few windows of a user, spread over all of them."""
        rows = [row for row, file in enumerate(windows.files) if (file.user, file.condition) == (user, condition)]
        places = torch.linspace(0, len(rows) - 1, min(self.each, len(rows))).round().long().tolist()
        return windows.select([rows[place] for place in places])


class _Users:
    """What it shows follows from the user, where windows come from, and for live ones from seed and sampling."""

    def __init__(self, people: _People, folder: str | Path, seed: int, sampling: dict):
        self.people, self.sampling, self.made = people, sampling, None
        users = [(f"ID_{user}", user) for user in people.users]
        self.user = ipywidgets.SelectionSlider(options=users, description="user", continuous_update=False)
        self.condition = ipywidgets.Dropdown(options=people.conditions, description="condition")
        self.source = ipywidgets.ToggleButtons(options=[ON_DISK, LIVE])
        self.seed = ipywidgets.BoundedIntText(value=seed, max=2**31 - 1, description="seed")
        self.options = {**people.pipeline.sampling_options(), **sampling} if people.pipeline else {}
        self.dials = _dials(self.options)
        self.keep = [ipywidgets.ToggleButton(description=f"keep {k + 1}") for k in range(people.each)]
        self.folder = ipywidgets.Text(value=str(folder), description="folder", layout=ipywidgets.Layout(width="450px"))
        self.button = ipywidgets.Button(description="save those kept")
        self.view, self.message = _image(), _Message()
        self.box = ipywidgets.VBox(self._rows())
        for chooser in (self.user, self.condition, self.source):
            chooser.observe(self.draw, names="value")
        for control in (self.seed, *self.dials.values()):
            control.observe(self.draw_live, names="value")
        self.button.on_click(lambda _: self.message.guard(self.save))
        self.draw()

    def _rows(self) -> list:
        who = [self.user] + ([self.condition] if len(self.people.conditions) > 1 else [])
        live = [[self.source], [self.seed, *self.dials.values()]] if self.people.pipeline else []
        above, below = [who, *live], [self.keep, [self.folder, self.button]]
        above, below = ([ipywidgets.HBox(row) for row in rows] for rows in (above, below))
        return [*above, self.view, *below, self.message.line]

    def draw(self, *_) -> None:
        live = self.source.value == LIVE
        self.made = None
        self.message.guard(self._draw, f"drawing {count(self.people.each, 'window')}" if live else "")
        self.view.layout.visibility = "visible" if self.made else "hidden"

    def draw_live(self, *_) -> None:
        """Who moves a control of the sampling wants to see what it does."""
        if self.source.value == LIVE:
            self.draw()
        else:
            self.source.value = LIVE

    def _draw(self) -> None:
        who = self.user.value, self.condition.value
        if self.source.value == LIVE:
            turned = {name: dial.value for name, dial in self.dials.items() if dial.value != self.options[name]}
            made = self.people.live(*who, self.seed.value, {**self.sampling, **turned})
        else:
            made = self.people.on_disk(*who)
        self.view.value = plots.to_png(self.people.picture(made))
        for place, keep in enumerate(self.keep):
            keep.value, keep.disabled = False, place >= len(made.windows)
        self.made = made

    def save(self) -> str:
        places = [place for place, keep in enumerate(self.keep) if keep.value]
        if not self.made or not places:
            raise DataError("nothing is kept: choose windows by the buttons below the picture")
        self.made.save(self.folder.value, places)
        return f"{count(len(places), 'window')} of ID_{self.user.value} saved in {self.folder.value}"


def _dials(options: dict) -> dict:
    """A slider by name for each of `DIALS` among the sampling options and their values."""
    return {
        name: ipywidgets.FloatSlider(
            value=options[name],
            min=min(least, options[name]),
            max=max(most, options[name]),
            step=0.05,
            description=name.split("_")[0],
            style={"description_width": "initial"},
            continuous_update=False,
        )
        for name, (least, most) in DIALS.items()
        if name in options
    }
