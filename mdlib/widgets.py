"""Interactive views: each a thin layer over a function of `mdlib.plot`, with a static figure where nothing is live.

Only what ipywidgets 7 and 8 share is used.
"""

import torch
from IPython.display import display

from mdlib import plot
from mdlib.data import WindowSet
from mdlib.progress import batch_run


def browse_users(real: WindowSet, generated: WindowSet, each: int = 4) -> None:
    """Choose a user: real windows beside generated ones."""
    users = [user for user in real.users if user in {file.user for file in generated.files}]
    _browse(
        "user",
        [(f"ID_{user}", user) for user in users],
        lambda user: plot.real_beside_generated(real, generated, [user], each),
    )


def browse_codes(counts: torch.Tensor, users: tuple[int, ...]) -> None:
    """Choose all users or one: how often each code is used. counts: (num_users, num_codes)."""
    options = [("all users", -1)] + [(f"ID_{user}", label) for label, user in enumerate(users)]
    _browse(
        "codes of",
        options,
        lambda label: plot.code_usage((counts.sum(0) if label < 0 else counts[label]).numpy()),
    )


def _browse(name: str, options: list[tuple[str, int]], draw) -> None:
    """A drop-down whose choice is drawn below it; in a batch run the first choice alone, as a picture."""
    if batch_run():
        display(draw(options[0][1]))
        return
    import ipywidgets

    chooser = ipywidgets.Dropdown(options=options, description=name)
    view = ipywidgets.Output()

    def show(*_):
        view.clear_output(wait=True)
        with view:
            display(draw(chooser.value))

    chooser.observe(show, names="value")
    display(ipywidgets.VBox([chooser, view]))
    show()
