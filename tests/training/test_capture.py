"""Captured and compiled steps: the same weights as eager ones, and eager ones where neither works. Without a GPU a
function that is called again stands for a CUDA graph, and another for torch.compile."""

from dataclasses import replace

import pytest
import torch
from test_fit import CONFIG, codec, line, points, same

from mdlib.training import capture
from mdlib.training.fit import TrainConfig, fit


def trained(make, mode: str, folder=None, **options):
    model, data = make()
    config = replace(CONFIG, compile=mode, accumulation=2)
    fit(model, data, config, folder, held_out=data, progress=False, **options)
    return model


@pytest.fixture(params=[lambda: (line(), points()), codec], ids=["line", "codec"])
def make(request):
    return request.param


def called_again(function):
    """In place of a CUDA graph: its replay overwrites the result of the capture, as that of a graph does."""
    function()
    losses, logs = function()

    def replay() -> None:
        again, values = function()
        for old, new in zip([*losses, *logs.values()], [*again, *values.values()], strict=True):
            old.copy_(new)

    return replay, (losses, logs)


@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_where_it_is_not_possible_one_line_prints_why_and_training_goes_on(mode, make, monkeypatch, capsys):
    def broken(loss):
        def call(*batch):
            loss(*batch)  # a codebook follows what it sees, also when the first call fails
            raise RuntimeError("no compiler\nwas found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = trained(make, mode)
    why = {"graph": "a CUDA graph needs a GPU with CUDA", "compile": "no compiler was found"}[mode]
    expected = f"compile={mode!r} is not possible here, training continues in eager mode: {why}\n"
    assert capsys.readouterr().out == expected
    assert same(model, trained(make, "no"))


@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_a_captured_step_changes_weights_and_buffers_like_an_eager_one(mode, make, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(capture, "record", called_again)
    monkeypatch.setattr(torch, "compile", lambda loss: loss)
    eager = trained(make, "no")
    assert same(trained(make, mode), eager)

    def stop(_, step):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(make, mode, tmp_path, preview=stop)
    assert same(trained(make, mode, tmp_path), trained(make, "no", tmp_path / "eager"))
    assert not capsys.readouterr().out


def test_auto_is_eager(monkeypatch):
    monkeypatch.setattr(capture, "record", lambda function: pytest.fail("it captured"))
    monkeypatch.setattr(torch, "compile", lambda loss: pytest.fail("it compiled"))
    trained(lambda: (line(), points()), "auto")
    with pytest.raises(ValueError, match="TrainConfig.compile must be one of auto, graph, compile, no"):
        TrainConfig(compile="yes")
