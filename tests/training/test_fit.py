"""One loop for every model: exact resume, schedules in optimizer steps, checkpoints whole or not at all."""

import csv
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mdlib.training.fit import Batches, TrainConfig, batch_order, fit, fit_stages
from mdlib.utils import Interrupted, read_history


class Line(nn.Module):
    """y = w·x with dropout, so that noise matters; logs what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def loss(self, x, y):
        if self.training:
            self.seen += len(x)
        error = (self.dropout(self.weight(x)) - y).square().mean()
        return error, {"error": error.detach()}


def line() -> Line:
    torch.manual_seed(3)
    return Line()


def points(n: int = 37) -> Batches:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return Batches((x, x.sum(1, keepdim=True)), lambda x, y, g: (x + 0.1 * torch.randn(x.shape, generator=g), y))


CONFIG = TrainConfig(
    steps=12, batch_size=8, learning_rate=0.05, warmup_steps=3, ema_decay=0.9, evaluate_every=3, save_every=4,
)  # fmt: skip


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_every_epoch_shows_every_sample_once_whatever_the_batch():
    order = torch.cat([batch_order(step, 8, 37, seed=1) for step in range(37)])
    for epoch in order.view(8, 37):
        assert epoch.sort().values.tolist() == list(range(37))
    assert order[:37].tolist() != order[37:74].tolist()
    assert not torch.equal(batch_order(0, 8, 37, seed=2), order[:8])


def codec() -> tuple[nn.Module, Batches]:
    """One whose codebook follows its own averages, which are buffers."""
    from mdlib.models.vqvae import VQVAE  # slow to import, and one process of the tests does without

    torch.manual_seed(0)
    model = VQVAE(image_size=16, block_out_channels=(8, 8), norm_num_groups=4, num_codes=8, code_dim=4)
    return model, Batches((torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,))


@pytest.mark.parametrize("make", [lambda: (line(), points()), codec], ids=["line", "codec"])
def test_a_stopped_and_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(make, tmp_path):
    def train(folder, **options):
        model, data = make()
        return model, fit(model, data, CONFIG, tmp_path / folder, held_out=data, progress=False, **options)

    class Stop(Exception):
        pass

    def stop(model, step):
        if step == 9:
            raise Stop

    whole, history = train("whole")
    with pytest.raises(Stop):
        train("broken", preview=stop)
    resumed, again = train("broken")
    assert same(whole, resumed)
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip(again) == strip(history)
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "broken")]
    for key in ("model", "optimizer", "ema", "best", "stale"):
        assert str(states[0][key]) == str(states[1][key]), key


SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
import torch
from dataclasses import replace
from test_fit import CONFIG, fit, line, points
torch.set_num_threads(1)
def slow(model, step):
    print("step", step, flush=True)
    time.sleep({pause} if step == 20 else 0)
config = replace(CONFIG, steps=40, evaluate_every=5, save_every=5)
model = line()
fit(model, points(), config, {run!r}, held_out=points(20), preview=slow, progress=False)
torch.save(model.state_dict(), {run!r} + "/final.pt")
"""


def test_a_run_killed_with_sigkill_resumes_bit_for_bit(tmp_path):
    def start(name: str, pause: float) -> subprocess.Popen:
        here = Path(__file__).parent
        script = SCRIPT.format(path=[str(here), str(here.parents[1])], run=str(tmp_path / name), pause=pause)
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    whole = start("whole", 0)
    killed = start("killed", 600)  # at step 20, before it is saved
    for text in killed.stdout:
        if text.strip() == "step 20":
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final.pt").exists()
    assert whole.wait() == 0
    again = start("killed", 0)
    steps = [int(text.split()[1]) for text in again.stdout]
    assert again.wait() == 0
    assert steps[0] == 20 and steps[-1] == 40, "it must resume at step 15, not start again"
    final = [torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "killed")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path):
    first, second = line(), line()
    fit(first, points(), CONFIG, tmp_path, held_out=points(20), progress=False)
    stamp = (tmp_path / "state.pt").stat().st_mtime_ns
    fit(second, points(), CONFIG, tmp_path, held_out=points(20), progress=False)
    assert same(first, second) and (tmp_path / "state.pt").stat().st_mtime_ns == stamp


def test_a_finished_run_trains_further_to_more_steps(tmp_path):
    """With the learning rate of a training of so many steps, and its patience again."""
    model, far = line(), points()
    impatient = replace(CONFIG, steps=100, evaluate_every=1, patience=2, learning_rate=0.5)
    first = fit(model, points(), impatient, tmp_path, held_out=far, progress=False)
    assert (before := first[-1]["step"]) < 100
    longer = fit(model, points(), replace(impatient, steps=200), tmp_path, held_out=far, progress=False)
    assert longer[: len(first)] == first and longer[-1]["step"] >= before + 2
    whole = fit(line(), points(), replace(impatient, steps=200, patience=0), progress=False)
    assert longer[before]["learning_rate"] == whole[before]["learning_rate"]


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    fit(line(), points(), CONFIG, tmp_path, progress=False)
    with pytest.raises(ValueError, match="other settings .learning_rate.: choose another folder"):
        fit(line(), points(), replace(CONFIG, learning_rate=0.1), tmp_path, progress=False)


def test_a_broken_off_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    save, calls = torch.save, []

    def second_fails(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError("disk full")
        save(state, path)

    monkeypatch.setattr(torch, "save", second_fails)
    with pytest.raises(OSError, match="disk full"):
        fit(line(), points(), CONFIG, tmp_path, progress=False)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4
    assert not list(tmp_path.glob(".state*"))


def test_the_schedule_counts_optimizer_steps(tmp_path):
    config = replace(CONFIG, steps=10, warmup_steps=4, accumulation=3, evaluate_every=1, ema_decay=0.0)
    rates = [row["learning_rate"] for row in fit(line(), points(), config, tmp_path, progress=False)]
    assert rates[:4] == pytest.approx([0.0125, 0.025, 0.0375, 0.05])
    assert rates[-1] == pytest.approx(0.0, abs=1e-9) and sorted(rates[3:], reverse=True) == rates[3:]


def test_accumulated_batches_make_the_same_step_as_one_large_batch():
    plain = Batches(points().tensors)
    config = replace(CONFIG, steps=5, ema_decay=0.0)
    models = []
    for batch, accumulation in ((12, 1), (4, 3)):
        model = line()
        model.dropout = nn.Identity()
        fit(model, plain, replace(config, batch_size=batch, accumulation=accumulation), progress=False)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_best_weights_are_kept_and_patience_stops(tmp_path):
    """Held-out points with another rule: training makes them worse, so the first evaluation stays the best."""
    held = Batches((torch.randn(16, 4), torch.full((16, 1), 50.0)))
    model = line()
    history = fit(
        model, points(), replace(CONFIG, steps=300, patience=3, learning_rate=0.5), tmp_path, held_out=held,
        progress=False,
    )  # fmt: skip
    best = min(history, key=lambda row: row["held_out_loss"])
    assert len(history) < 100 and history[-1]["step"] < 300
    with torch.no_grad():
        assert float(model.loss(*held.tensors)[0]) == pytest.approx(best["held_out_loss"], rel=1e-5)


def test_the_average_is_what_is_evaluated_and_returned():
    config = replace(CONFIG, steps=2, batch_size=37, ema_decay=0.5, warmup_steps=0)
    model = line()
    fit(model, points(), config, progress=False)
    raw = line()
    fit(raw, points(), replace(config, ema_decay=0.0), progress=False)
    assert not torch.allclose(model.weight.weight, raw.weight.weight)


@pytest.fixture
def clock(monkeypatch):
    """The clock of `fit`. It stands still but for what `takes` adds: no test waits, and no machine is too slow."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("mdlib.training.fit.time", clock)
    return clock


def takes(seconds: float, clock):
    """A preview that takes so long, at every evaluation."""

    def preview(model, step):
        clock.now += seconds

    return preview


def test_a_budget_stops_the_run_and_a_larger_one_lets_it_go_on(tmp_path, clock):
    budget = replace(CONFIG, steps=12, evaluate_every=1, max_minutes=0.3 / 60)
    history = fit(line(), points(), budget, tmp_path, preview=takes(0.15, clock), progress=False)
    assert 1 <= history[-1]["step"] < 12
    finished = fit(line(), points(), replace(budget, max_minutes=0), tmp_path, progress=False)
    assert finished[-1]["step"] == 12


def test_under_a_budget_the_learning_rate_falls_with_the_time(tmp_path, clock):
    budget = replace(CONFIG, steps=1000, warmup_steps=2, evaluate_every=1, save_every=1000, max_minutes=0.6 / 60)
    rows = fit(line(), points(), budget, tmp_path, preview=takes(0.05, clock), progress=False)
    assert 3 < len(rows) < 50, "time ends it"
    rates = [row["learning_rate"] / budget.learning_rate for row in rows]
    assert rates[0] == 0.5, "it warms up with the steps"
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] == pytest.approx(0, abs=1e-6)
    middle = min(rows, key=lambda row: abs(row["seconds"] - 0.3))
    expected = (1 + math.cos(math.pi * middle["seconds"] / 0.6)) / 2
    assert middle["learning_rate"] / budget.learning_rate == pytest.approx(expected, abs=0.03)


def test_a_budget_spent_before_the_first_evaluation_still_ends_with_weights(tmp_path):
    config = replace(CONFIG, steps=500, evaluate_every=500, save_every=500, max_minutes=1e-6)
    history = fit(line(), points(), config, tmp_path, held_out=points(9), progress=False)
    assert len(history) == 1 and history[0]["step"] == 1 and (tmp_path / "best.safetensors").exists()


class Explodes(Line):
    """Its loss is infinite from the seventh step on."""

    def loss(self, x, y):
        error, logs = super().loss(x, y)
        return (error if self.seen <= 6 * len(x) else error * torch.inf), logs


@pytest.mark.parametrize("save_every", [4, 100])
def test_a_loss_that_is_not_finite_is_one_line_and_reaches_no_file(tmp_path, save_every):
    config = replace(CONFIG, steps=100, evaluate_every=3 if save_every == 4 else 50, save_every=save_every)
    with pytest.raises(FloatingPointError, match="Line: the loss became inf at step 6: lower learning_rate"):
        fit(Explodes(), points(), config, tmp_path, name="Line", progress=False)
    if save_every == 4:
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())
        assert [row["step"] for row in read_history(tmp_path)] == [3, 6]
    else:
        assert not list(tmp_path.iterdir())


def test_history_and_tensorboard_are_written(tmp_path):
    history = fit(line(), points(), CONFIG, tmp_path, held_out=points(9), progress=False)
    rows = list(csv.DictReader(open(tmp_path / "history.csv")))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert float(rows[-1]["held_out_loss"]) == pytest.approx(history[-1]["held_out_loss"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((tmp_path / "tensorboard").glob("**/events*"))
    log = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in log.Scalars("held_out_loss")] == [3, 6, 9, 12]


@pytest.mark.parametrize("broken", ["", "raise RuntimeError('protobuf is too new')", "import tensorflow_of_old"])
def test_training_does_without_tensorboard(broken, tmp_path, monkeypatch):
    """Where it is missing, and where an import within it fails in whatever way."""
    if broken:
        (tmp_path / "tensorboard.py").write_text(broken)
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
            monkeypatch.delitem(sys.modules, name)
    else:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tmp_path = tmp_path / "run"
    assert fit(line(), points(), CONFIG, tmp_path, progress=False) and (tmp_path / "history.csv").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_the_callers_random_numbers_are_left_alone():
    model = line()  # seeds
    before = torch.get_rng_state()
    fit(model, points(), replace(CONFIG, steps=2), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps must be 1 or more, got 0"),
        (dict(mixed_precision="int8"), "mixed_precision must be one of no, fp16, bf16, auto, got"),
        (dict(ema_decay=1.0), "ema_decay"),
        (dict(clip=0), "clip must be above 0, got 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_an_empty_or_uneven_training_set_is_refused():
    with pytest.raises(ValueError, match="one length above 0"):
        Batches((torch.zeros(3), torch.zeros(4)))
    with pytest.raises(ValueError, match="one length above 0"):
        Batches((torch.zeros(0),))


class Opponents(nn.Module):
    """Two weights of their own parameter groups, the second with a gradient a billion times larger."""

    def __init__(self):
        super().__init__()
        self.quiet, self.loud, self.frozen = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        self.frozen.requires_grad_(False)

    def parameter_groups(self):
        return [{"params": [self.quiet, self.frozen]}, {"params": [self.loud], "betas": (0.5, 0.9)}]

    def loss(self, x):
        return (1e-3 * self.quiet + 1e6 * self.loud).sum(), {}


def test_a_models_own_parameter_groups_keep_their_moments_and_are_clipped_apart(tmp_path):
    config = replace(CONFIG, steps=1, batch_size=1, warmup_steps=0, ema_decay=0.0)
    fit(Opponents(), Batches((torch.zeros(4, 1),)), config, tmp_path, progress=False)
    quiet, loud = torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"]["state"].values()
    assert float(quiet["exp_avg"]) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 − β₁) times its whole gradient
    assert float(loud["exp_avg"]) == pytest.approx(0.5 * 1.0, rel=1e-3)  # the gradient is clipped to norm 1


class WithUsers(nn.Module):
    """A weight and user embeddings with equal gradients."""

    def __init__(self):
        super().__init__()
        self.weight, self.users = nn.Parameter(torch.zeros(1)), nn.Embedding(1, 1)
        nn.init.zeros_(self.users.weight)

    def loss(self, x):
        return self.weight.sum() + self.users.weight.sum(), {}


def test_user_embeddings_learn_at_a_rate_of_their_own():
    config = replace(CONFIG, steps=1, batch_size=1, warmup_steps=0, weight_decay=0.0, ema_decay=0.0, user_rate=20)
    model = WithUsers()
    fit(model, Batches((torch.zeros(4, 1),)), config, progress=False)
    assert model.users.weight.item() == pytest.approx(20 * model.weight.item()), "AdamW's first step is its rate"
    with pytest.raises(ValueError, match="user_rate is for priors with `users`; Line needs 1"):
        fit(line(), points(), config, progress=False)


def test_one_step_of_a_warm_up_leaves_the_weights_as_they_are():
    model, before = line(), line()
    fit(model, points(), replace(CONFIG, steps=1, weight_decay=0.1, ema_decay=0.0), progress=False)
    assert torch.equal(model.weight.weight, before.weight.weight)


class Staged(Line):
    """Each stage sets the factor of its loss."""

    def configure(self, factor):
        self.factor = factor

    def loss(self, x, y):
        error, logs = super().loss(x, y)
        return self.factor * error, {**logs, "factor": torch.tensor(self.factor)}


STAGES = ((2 / 3, dict(factor=1.0)), (1 / 3, dict(factor=2.0)))


def test_stages_follow_one_another_and_are_resumed_where_they_stopped(tmp_path):
    def train(folder, **options):
        torch.manual_seed(3)
        model = Staged()
        return model, fit_stages(model, points(), CONFIG, tmp_path / folder, STAGES, progress=False, **options)

    class Stop(Exception):
        pass

    def stop(model, step):
        if model.factor == 2 and step == 11:
            raise Stop

    whole, history = train("whole")
    assert [(row["step"], row["factor"]) for row in history] == [(3, 1), (6, 1), (8, 1), (11, 2), (12, 2)]
    rows = list(csv.DictReader((tmp_path / "whole" / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == [3, 6, 8, 11, 12]
    with pytest.raises(Stop):
        train("broken", preview=stop)
    assert same(train("broken")[0], whole)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal; a process that was started in the background ignores it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def interrupt(at: int, times: int = 1):
    def preview(model, step):
        for _ in range(times if step == at else 0):
            signal.raise_signal(signal.SIGINT)

    return preview


def test_an_interrupt_saves_the_step_that_it_comes_in(tmp_path, ctrl_c):
    config, whole, model = replace(CONFIG, evaluate_every=1, save_every=100), line(), line()
    fit(whole, points(), config, progress=False)
    with pytest.raises(Interrupted, match="^stopped at step 8 of 12$") as stopped:
        fit(model, points(), config, tmp_path, preview=interrupt(at=7), progress=False)
    shown = stopped.value._render_traceback_()
    assert shown == ["stopped at step 8 of 12: run this cell again to resume"], "what a notebook shows"
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 8
    fit(model, points(), config, tmp_path, progress=False)
    assert same(model, whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_stops_at_once(tmp_path, ctrl_c):
    config = replace(CONFIG, evaluate_every=1, save_every=100)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(line(), points(), config, tmp_path, preview=interrupt(at=7, times=2), progress=False)
    assert not isinstance(stopped.value, Interrupted) and not (tmp_path / "state.pt").exists()


def test_no_stage_begins_on_a_spent_budget(tmp_path):
    torch.manual_seed(3)
    model = Staged()
    history = fit_stages(model, points(), replace(CONFIG, max_minutes=1e-9), tmp_path, STAGES, progress=False)
    assert len(history) == 1 and model.factor == 1 and not (tmp_path / "stage-2").exists()
    again = fit_stages(model, points(), CONFIG, tmp_path, STAGES, progress=False)
    assert again[-1]["step"] == 12 and again[-1]["factor"] == 2


def test_stages_share_the_time_and_what_is_left_of_it(tmp_path, clock):
    torch.manual_seed(3)
    endless = replace(CONFIG, steps=10**6, evaluate_every=1, save_every=10**6, max_minutes=0.9 / 60)
    history = fit_stages(Staged(), points(), endless, tmp_path, STAGES, preview=takes(0.02, clock), progress=False)
    first = max(row["seconds"] for row in history if row["factor"] == 1)
    assert first == pytest.approx(0.6, abs=0.05) and history[-1]["seconds"] == pytest.approx(0.9, abs=0.05)
    assert history[-1]["factor"] == 2


def test_a_stage_that_has_ended_does_not_train_on_without_a_budget(tmp_path, clock):
    torch.manual_seed(3)
    long = replace(CONFIG, steps=300, evaluate_every=5, save_every=300)
    short = replace(long, max_minutes=3 / 60)
    fit_stages(Staged(), points(), short, tmp_path, STAGES, preview=takes(0.1, clock), progress=False)
    before = read_history(tmp_path / "stage-1")[-1]["step"]
    fit_stages(Staged(), points(), long, tmp_path, STAGES, progress=False)
    assert read_history(tmp_path / "stage-1")[-1]["step"] == before < 200
    assert read_history(tmp_path / "stage-2")[-1]["step"] == 100
