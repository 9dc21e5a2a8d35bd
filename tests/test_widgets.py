"""Views are thin: choosing draws the chosen; a batch run gets a picture."""

import ipywidgets
import pytest
import torch
from matplotlib.figure import Figure

from mdlib import widgets


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    things: list = []
    monkeypatch.setattr(widgets, "display", things.append)
    return things


def test_choosing_a_user_draws_that_users_codes(shown, monkeypatch):
    drawn = []
    monkeypatch.setattr(widgets.plot, "code_usage", lambda counts: drawn.append(counts.tolist()))
    widgets.browse_codes(torch.tensor([[1, 0], [2, 5]]), users=(4, 9))
    box = next(thing for thing in shown if isinstance(thing, ipywidgets.VBox))
    chooser = box.children[0]
    assert [name for name, _ in chooser.options] == ["all users", "ID_4", "ID_9"]
    chooser.value = 1
    assert drawn == [[3, 5], [2, 5]]


def test_a_batch_run_shows_a_picture_instead(shown, monkeypatch):
    monkeypatch.setenv("MDLIB_BATCH", "1")
    widgets.browse_codes(torch.tensor([[1, 0], [2, 5]]), users=(4, 9))
    assert len(shown) == 1 and isinstance(shown[0], Figure)
