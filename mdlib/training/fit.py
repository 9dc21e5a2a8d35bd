"""One training loop for every model: `fit(model, data, config, run_dir)`.

A step depends only on the state and the step number, so a killed run resumes bit for bit on the same CPU. The exception
is a time budget, under which the learning rate follows the clock. Training calls `model.loss`, not a wrapped `forward`.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from mdlib.models.layers import all_mean, rank, world
from mdlib.training.capture import choose, passes
from mdlib.training.distributed import mean_gradients, on_first
from mdlib.training.state import State, TrainConfig
from mdlib.utils import Interrupted, bar, end_session, has_deadline, interrupts, time_is_up, write_history

# On several GPUs: fork_rng saves the random state of all, as it should.
warnings.filterwarnings("ignore", "CUDA reports that you have .* fork_rng")


@dataclass(frozen=True)
class Batches:
    """A training set in memory: tensors of equal length.

    transform: called as transform(*batch, generator) → the arguments of `model.loss`; conversion and augmentation. The
        generator is on the device of the batch.
    """

    tensors: tuple[torch.Tensor, ...]
    transform: Callable | None = None

    def __post_init__(self):
        lengths = {len(tensor) for tensor in self.tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a training set needs tensors of one length above 0, got lengths {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.tensors[0])

    def to(self, device) -> "Batches":
        return Batches(tuple(tensor.to(device) for tensor in self.tensors), self.transform)

    def take(self, index: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        batch = tuple(tensor[index] for tensor in self.tensors)
        return tuple(self.transform(*batch, generator)) if self.transform else batch


def fit(
    model: torch.nn.Module,
    data: Batches,
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    held_out: Batches | None = None,
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    preview: Callable[[torch.nn.Module, int], np.ndarray | None] | None = None,
    name: str = "model",
    progress: bool = True,
    launch: Callable[[], None] | None = None,
) -> list[dict]:
    """Train `model` in place by its `loss(*batch) → (loss, logs)`. Returns the history, one dict per evaluation.

    The model ends in eval mode with the weights of the best held-out loss (with `run_dir` and `held_out`), or else
    with the last ones, averaged where `ema_decay` is set.

    Several processes (`accelerate launch --multi_gpu`, `torchrun`) each call it with the same arguments and take their
    part of every batch of batch_size × processes. The weights change as with one process and that batch, except for
    noise, dropout and batch norms. The first process evaluates and writes files; all return the same.

    Args:
        run_dir: receives state.pt (checkpoint), best.safetensors, history.csv and tensorboard/. Called again
            with the same folder and batch_size × processes, `fit` resumes, also to more steps; a finished run returns
            at once.
        held_out: its mean loss decides which weights are best and when to stop early.
        evaluate: returns further metrics of the model (in eval mode, averaged weights) for the history.
        preview: called as preview(model, step), in the precision of training, at the first evaluation at or after each
            multiple of preview_every steps, and at the last one; the image that it returns, uint8 (H, W, 3) or None,
            goes to TensorBoard.
        launch: trains in other processes that call `fit` with this `run_dir` and global batch. Called if anything is
            left to train; this process then loads their checkpoint.

    Raises:
        FloatingPointError: the loss is not finite, in any process; no checkpoint and no history row contains it.
        SystemExit: the session's time is up (`mdlib.utils`); a checkpoint was written to `run_dir`.
        Interrupted: Ctrl-C; a checkpoint was written to `run_dir`.
    """
    with torch.random.fork_rng():  # the caller's random state is left alone
        state = State(model, config, run_dir)
        if state.unfinished and launch:
            _train_elsewhere(launch, state, name)
        elif state.unfinished:
            on_first(lambda: state.check_room(name))
            data, held_out = data.to(state.device), held_out and held_out.to(state.device)
            losses = []  # those not yet known to be finite: looking at one makes the host wait for the GPU
            clock, late = time.monotonic() - state.seconds, False
            model.train()
            steps = bar(config.steps, name, initial=state.step, show=progress and rank() == 0)
            # A first Ctrl-C ends training between two steps, where it can be resumed; a second one at once.
            calmly = interrupts(catch=bool(state.run_dir) and world() == 1)
            with steps as shown, calmly as stops:
                while state.unfinished and not late:
                    _set_learning_rate(state)
                    logs = _step(state, data, losses)
                    shown.update()
                    # Every tenth step: clocks differ, and processes wait for their GPUs to agree on one.
                    if world() == 1 or state.step % 10 == 1 or not state.unfinished:
                        state.seconds = time.monotonic() - clock
                        if config.max_minutes:
                            state.seconds = on_first(lambda: state.seconds)
                        if state.budget_spent:
                            state.stopped = f"the budget of {config.max_minutes:g} minutes is spent"
                        late = bool(state.run_dir and has_deadline() and on_first(time_is_up) or stops)
                        late = late and state.unfinished

                    evaluates = not state.unfinished or state.step % config.evaluate_every == 0
                    saves = not state.unfinished or late or state.step % config.save_every == 0
                    if evaluates or saves or len(losses) >= 20:
                        _require_finite(losses, state, name)
                    if evaluates:
                        # By the step alone, so that a resumed training shows the same previews.
                        every = config.preview_every
                        due = every and (not state.unfinished or state.step % every < config.evaluate_every)
                        row = _evaluate(state, logs, held_out, evaluate, preview if due else None)
                        shown.set_postfix(row, refresh=False)
                        model.train()
                    if state.run_dir and (saves or state.stopped):
                        on_first(state.save)
            if stops:
                raise Interrupted(f"stopped at step {state.step} of {config.steps}")
            if late:
                _end_session(state, name)
        state.load_final_weights()
    return state.history


def _step(state: State, data: Batches, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Update the weights by `accumulation` batches; noise and dropout come from (seed, step, rank). Appends the losses
    and returns the last batch's logs. Nothing here waits for a GPU."""
    config = state.config
    generator, batches = _seed(state, state.step, 2 + 8 * rank()), []
    for part in range(config.accumulation):
        number = state.step * config.accumulation + part
        index = batch_order(number, config.batch_size * world(), len(data), config.seed, state.device)
        batches.append(data.take(index.chunk(world())[rank()], generator))
    if state.step and not state.passes:  # not at the first step, which may initialise a codebook
        state.passes = choose(state, batches)
    found, logs = state.passes(batches) if state.passes else passes(state, batches)
    losses.extend(found)
    mean_gradients(state.parameters)  # before unscaling: an overflow in one process reaches all
    state.scaler.unscale_(state.optimizer)
    # Clip each group by itself (a discriminator's gradient must not shrink others), as clip_grad_norm_, but leaner.
    for group in state.optimizer.param_groups:
        if gradients := [parameter.grad for parameter in group["params"] if parameter.grad is not None]:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (config.clip / (norm + 1e-6)).clamp(max=1.0))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    if state.ema is not None:  # with a decay that rises from 0 to ema_decay
        decay = 0.0 if state.step == 1 else min(state.step / (state.step + 9), config.ema_decay)
        torch._foreach_lerp_(state.ema, state.weights, 1 - decay)
    return logs


def batch_order(step: int, batch_size: int, length: int, seed: int, device="cpu") -> torch.Tensor:
    """Indices of batch number `step`, on `device`: epoch after epoch, each a permutation by (seed, epoch)."""
    first, last, parts = step * batch_size, (step + 1) * batch_size, []
    while first < last:
        epoch, place = divmod(first, length)
        parts.append(_epoch_order(epoch, length, seed, device)[place : place + last - first])
        first += len(parts[-1])
    return torch.cat(parts) if parts[1:] else parts[0]


@lru_cache(maxsize=2)
def _epoch_order(epoch: int, length: int, seed: int, device) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(_mix(seed, epoch, 1))).to(device)


def _set_learning_rate(state: State) -> None:
    """Linear warm-up, then a cosine to 0. Under a time budget it falls with the steps or with the time, whichever is
    further, so that training ends at a low rate; it warms up with the steps."""
    steps, warmup, budget = state.config.steps, state.config.warmup_steps, 60 * state.config.max_minutes

    def shape(step: float) -> float:
        if step < warmup:
            return step / warmup
        return max(0.0, 0.5 * (1 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup)))))

    elapsed = min(steps, steps * state.seconds / budget) if budget else 0
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * min(shape(state.step), shape(max(state.step, elapsed)))


def _require_finite(losses: list[torch.Tensor], state: State, name: str) -> None:
    """FloatingPointError if a loss since the last look is not finite, in any process; empties the list."""
    first = state.step - len(losses) // state.config.accumulation
    for number, value in enumerate(all_mean(torch.stack(losses)).tolist()):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name}: the loss became {value} at step {first + number // state.config.accumulation}: lower "
                "learning_rate, or set mixed_precision='no' when it was fp16"
            )
    losses.clear()


def _evaluate(state: State, logs, held_out, evaluate, preview) -> dict[str, str]:
    """Append a row to the history and return what the bar shows of it. The first process measures; what it decides
    holds in all."""
    _set_learning_rate(state)
    row = {"step": state.step, "seconds": round(state.seconds, 2)}
    row["learning_rate"] = state.optimizer.param_groups[0]["lr"]
    values = [torch.as_tensor(value, device=state.device).double() for value in logs.values()]
    row |= zip(logs, all_mean(torch.stack(values)).tolist(), strict=True) if logs else {}

    def measure() -> tuple:
        image = None
        state.model.eval()
        state.swap_average()
        with torch.no_grad():
            if held_out:
                row.update(_held_out_logs(state, held_out))
                state.keep_best(row["held_out_loss"])
            if evaluate:
                row.update(evaluate(state.model))
            if preview:
                with state.autocast:
                    image = preview(state.model, state.step)
        state.history.append(row)
        state.swap_average()
        if state.run_dir:
            write_history(state.history, state.run_dir / "history.csv")
        if state.tensorboard:
            _log(row, image, state.tensorboard)
        return state.history, state.best, state.stale, state.stopped

    state.history, state.best, state.stale, state.stopped = on_first(measure)
    shown = {key: f"{value:.3g}" for key, value in state.history[-1].items() if key in ("held_out_loss", *logs)}
    if budget := state.config.max_minutes:
        shown["minutes"] = f"{state.seconds / 60:.1f}/{budget:g}"
    return shown


def _held_out_logs(state: State, held_out: Batches) -> dict[str, float]:
    """Mean loss and logs over the held-out set, with the same noise at every evaluation."""
    generator, sums = _seed(state, 0, 4), {}
    for index in torch.arange(len(held_out), device=state.device).split(state.config.batch_size):
        with state.autocast:
            loss, logs = state.model.loss(*held_out.take(index, generator))
        for key, value in {"loss": loss, **logs}.items():
            sums[key] = sums.get(key, 0.0) + float(value) * len(index)
    return {f"held_out_{key}": value / len(held_out) for key, value in sums.items()}


def _log(row: dict, image: np.ndarray | None, writer) -> None:
    """Write a row of the history, and an image where there is one, to TensorBoard."""
    for key in row.keys() - {"step"}:
        writer.add_scalar(key, row[key], row["step"])
    if image is not None:
        writer.add_image("preview", image, row["step"], dataformats="HWC")
    writer.flush()


def _train_elsewhere(launch: Callable[[], None], state: State, name: str) -> None:
    """Train in other processes and load their checkpoint."""
    if time_is_up():
        _end_session(state, name)
    try:
        launch()
    except KeyboardInterrupt:
        state.resume()
        raise Interrupted(f"stopped at step {state.step} of {state.config.steps}") from None
    state.resume()
    if state.unfinished and time_is_up():
        raise SystemExit(0)  # the other processes have printed why
    if state.unfinished:
        raise RuntimeError(
            f"{name}: training in other processes stopped early, at step {state.step} of {state.config.steps}"
        )


def _end_session(state: State, name: str) -> None:
    if rank() > 0:
        raise SystemExit(0)  # the first process prints why
    end_session(f"{name} stopped at step {state.step} of {state.config.steps}, saved in {state.run_dir}")


def fit_stages(
    model: torch.nn.Module,
    data: Batches,
    config: TrainConfig,
    run_dir: str | Path,
    stages: tuple[tuple[float, dict], ...] = (),
    preview: Callable[[torch.nn.Module, int], np.ndarray | None] | None = None,
    **options,
) -> list[dict]:
    """`fit`, stage after stage; without stages one `fit` in `run_dir`. Returns the joined history.

    stages: pairs of a fraction of config.steps and options of `model.configure`, which changes the model's loss. Each
    has a learning rate that warms up and falls again, and the folder stage-N in `run_dir`. It gets its fraction
    of max_minutes and what earlier stages left; once max_minutes is spent, no further stage starts.
    """
    if not stages:
        return fit(model, data, config, run_dir, preview=preview, **options)
    run_dir, history, before = Path(run_dir), [], {"step": 0, "seconds": 0.0}
    for number, (fraction, changes) in enumerate(stages, 1):
        until = sum(part for part, _ in stages[:number])
        left = config.max_minutes and config.max_minutes * until - before["seconds"] / 60
        if history and config.max_minutes and left < 0.01 / 60:  # seconds are rounded to a hundredth
            break
        if (run_dir / f"stage-{number + 1}" / "state.pt").exists():
            left = 1e-9  # the next stage has started from its weights: a larger budget, or none, comes too late for it
        model.configure(**changes)
        steps = max(1, round(fraction * config.steps))
        part = replace(config.with_steps(steps), max_minutes=left)
        shown = preview and (lambda model, step, first=before["step"]: preview(model, first + step))
        rows = fit(model, data, part, run_dir / f"stage-{number}", preview=shown, **options)
        history += [row | {key: row[key] + before[key] for key in before} for row in rows]
        before = {key: history[-1][key] for key in before}
    on_first(lambda: write_history(history, run_dir / "history.csv"))
    return history


def _seed(state: State, number: int, stream: int) -> torch.Generator:
    """Seed torch's random numbers by (seed, number, stream), and return the state's generator, seeded by
    (seed, number, stream + 1)."""
    value = _mix(state.config.seed, number, stream)
    torch.default_generator.manual_seed(value)  # torch.manual_seed formats a stack trace where CUDA is not in use
    if state.device.type == "cuda":
        torch.cuda.manual_seed(value)
    return state.generator.manual_seed(_mix(state.config.seed, number, stream + 1))


def _mix(seed: int, number: int, stream: int) -> int:
    """A well-spread 63-bit seed of (seed, number, stream), by splitmix64's finaliser (Steele et al. 2014)."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) >> 1
