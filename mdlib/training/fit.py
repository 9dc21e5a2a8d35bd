"""One training loop for every model: `fit(model, data, config, run_dir)`.

A step is a pure function of (state, step number): data order depends on (seed, epoch), noise on (seed, step). So a
run that was killed and resumed on the same CPU ends bit for bit like one that was not, but for a budget of time, under
which the learning rate follows the clock. Nothing else about randomness is saved.

Started by `accelerate launch --multi_gpu` or `torchrun`, `fit` trains one model in all processes: a step's batch is cut
into as many parts as there are processes, and the gradients are averaged before the step. Models are trained by `loss`,
not by `forward`, so there is no wrapper around them.
"""

import csv
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_wandb_available
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from mdlib.models.layers import all_mean, broadcast_from_first, rank, world
from mdlib.training.distributed import mean_gradients, on_first
from mdlib.utils import bar, end_session, has_deadline, require_room, time_is_up, whole_file

# On several GPUs: fork_rng keeps the random numbers of all, as it is meant to.
warnings.filterwarnings("ignore", "CUDA reports that you have .* fork_rng")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what is trained is the model's own configuration."""

    steps: int = 1000  # optimizer steps, not batches and not epochs
    batch_size: int = 32  # samples a forward pass of a process; in a preset of all together (mdlib.experiments.steps)
    accumulation: int = 1  # forward passes an optimizer step
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 50  # optimizer steps, linear
    weight_decay: float = 1e-4
    beta2: float = 0.99  # AdamW's second moment; 0.99 suits runs of a few thousand steps
    clip: float = 1.0  # gradient norm
    user_rate: float = 1.0  # learning rate of a prior's user embeddings over that of all else
    ema_decay: float = 0.0  # 0 keeps no average
    mixed_precision: str = "no"  # no | fp16 | bf16 | auto (fp16 where the GPU gains from it, else no)
    seed: int = 0
    evaluate_every: int = 100  # optimizer steps between held-out losses
    save_every: int = 200  # optimizer steps between checkpoints
    patience: int = 0  # held-out evaluations without a better loss before stopping; 0 never stops early
    keep_best: bool = True  # end with the weights of the lowest held-out loss
    max_minutes: float = 0.0  # wall-clock budget over all resumes, the learning rate falls within it; 0 is none
    snapshots: bool = False  # keep the weights on the way, each time training has taken twice as long
    tracker: str = "tensorboard"  # tensorboard | wandb | none

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.user_rate <= 0:
            raise ValueError(f"TrainConfig.user_rate must be above 0, got {self.user_rate}")
        if self.learning_rate <= 0 or not 0 <= self.ema_decay < 1:
            raise ValueError("TrainConfig needs learning_rate > 0 and ema_decay in [0, 1)")
        if self.mixed_precision not in ("no", "fp16", "bf16", "auto"):
            raise ValueError(f"TrainConfig.mixed_precision is no, fp16, bf16 or auto, not {self.mixed_precision!r}")
        if self.tracker not in ("tensorboard", "wandb", "none"):
            raise ValueError(f"TrainConfig.tracker must be tensorboard, wandb or none, got {self.tracker!r}")


@dataclass(frozen=True)
class Batches:
    """A training set in memory: tensors of equal length, and what to do with a drawn batch.

    transform: called as transform(*batch, generator) → the arguments of `model.loss`; conversion and augmentation.
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
        batch = tuple(tensor[index.to(tensor.device)] for tensor in self.tensors)
        return tuple(self.transform(*batch, generator)) if self.transform else batch


def batch_order(step: int, batch_size: int, length: int, seed: int) -> torch.Tensor:
    """Indices of batch number `step`: a window on the endless row of epochs, each a permutation by (seed, epoch)."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // length
    index = torch.empty(batch_size, dtype=torch.long)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(length, generator=torch.Generator().manual_seed(_mix(seed, epoch, 1)))
        here = epochs == epoch
        index[here] = order[positions[here] % length]
    return index


def fit(
    model: torch.nn.Module,
    data: Batches,
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    held_out: Batches | None = None,
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    preview: Callable[[torch.nn.Module, int], None] | None = None,
    name: str = "model",
    progress: bool = True,
    launch: Callable[[], None] | None = None,
) -> list[dict]:
    """Train `model` in place by its `loss(*batch) → (loss, logs)`; returns the history, one dict an evaluation.

    At the end the model, in eval mode, holds the weights of the best held-out loss (with `run_dir` and `held_out`),
    or else the last ones, averaged where `ema_decay` is set.

    Under several processes of one machine each calls it with the same arguments. A step then sees batch_size ×
    accumulation × processes samples and moves the weights as one process of that batch would; only noise and dropout
    are drawn anew in each process, and batch norms see their own process's part. The first process alone evaluates,
    previews and writes files; all return the same history and end with the same weights. A run goes on under another
    number of processes only where batch_size × processes stays what it was.

    Args:
        run_dir: receives state.pt (resume), best.safetensors, history.csv, tensorboard/ and, where asked for,
            snapshots/STEP.safetensors (averaged weights at evaluations). Called again with the
            same folder, `fit` goes on where it stopped; a finished run returns at once. None keeps nothing on disk.
        held_out: its mean loss decides what is best and when to stop early.
        evaluate: further held-out figures of the model (in eval mode, averaged weights).
        preview: called as preview(model, step) at each evaluation, to draw samples.
        name: what the progress bar is called.
        progress: show the bar.
        launch: trains in other processes that call `fit` with this `run_dir` and global batch, and returns when they
            end. Called where anything is left to train; this process then takes the weights from their checkpoint.

    Raises:
        FloatingPointError: the loss is not finite, in any process (with the step and the remedy).
        ModuleNotFoundError: the tracker is wandb, whose package is not there.
        OSError: the disk has no room for the checkpoints.
        RuntimeError: in the other processes, where the first could not evaluate, preview or write; or what was launched
            left something to train.
        SystemExit: the session's time is up (`mdlib.utils`); the checkpoint in `run_dir` was written.
        ValueError: `run_dir` holds a run of another configuration.
    """
    if run_dir is not None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():  # the caller's random numbers stay the caller's
        return _Fit(model, data, config, run_dir, held_out, evaluate, preview, name, progress, launch).run()


def fit_stages(
    model: torch.nn.Module,
    data: Batches,
    config: TrainConfig,
    run_dir: str | Path,
    stages: tuple[tuple[float, dict], ...] = (),
    **options,
) -> list[dict]:
    """`fit`, stage after stage; without stages one `fit` in `run_dir`.

    Before each stage `model.configure(**its options)` changes the model's loss. A stage has its share of the steps, a
    learning rate that warms up and falls anew, and a folder stage-N of its own in `run_dir`. max_minutes is of all: a
    stage has its share of it and what earlier ones left, and when that is spent it does not begin.

    Args:
        stages: pairs of a share of config.steps and options.
        options: as for `fit`.
    """
    if not stages:
        return fit(model, data, config, run_dir, **options)
    history, done, seconds = [], 0, 0.0
    whole = sum(share for share, _ in stages)
    for number, (share, changes) in enumerate(stages, 1):
        until = sum(share for share, _ in stages[:number]) / whole
        left = config.max_minutes and config.max_minutes * until - seconds / 60
        if history and config.max_minutes and left < 0.01 / 60:  # seconds are kept to a hundredth
            break
        if config.max_minutes and (Path(run_dir) / f"stage-{number + 1}" / "state.pt").exists():
            left = 1e-9  # its weights went on in the next stage: a larger budget comes too late for it
        model.configure(**changes)
        steps = max(1, round(share * config.steps))
        warmup = min(config.warmup_steps, max(1, steps // 10))
        part = replace(config, steps=steps, warmup_steps=warmup, max_minutes=left)
        rows = fit(model, data, part, Path(run_dir) / f"stage-{number}", **options)
        history += [{**row, "step": row["step"] + done, "seconds": row["seconds"] + seconds} for row in rows]
        done, seconds = history[-1]["step"], history[-1]["seconds"]
    on_first(lambda: write_history(history, Path(run_dir) / "history.csv"))
    return history


class _Fit:
    """The state of one `fit` call, and its phases in reading order."""

    def __init__(self, model, data, config, run_dir, held_out, evaluate, preview, name, progress, launch):
        self.config, self.run_dir, self.name, self.data, self.held_out = config, run_dir, name, data, held_out
        self.evaluate, self.preview, self.progress, self.launch = evaluate, preview, progress, launch
        self.tracker = config.tracker if run_dir and config.tracker != "none" else None
        if self.tracker == "wandb" and not is_wandb_available():  # Accelerate would go on without a word
            raise ModuleNotFoundError("tracker wandb needs the package wandb: pip install wandb, or take tensorboard")
        # Accelerate keeps one precision a process; a notebook trains models of several, one after the other.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=precision(config.mixed_precision),
            log_with=self.tracker,
            project_dir=run_dir,
            cpu=not torch.cuda.is_available(),
        )
        device = self.accelerator.device
        # Several processes on a CPU are given the device "cpu:0", to which torch.load cannot load.
        self.device = torch.device("cpu") if device.type == "cpu" else device
        on_cpu = self.device.type == "cpu"  # there channels last is the faster layout of a convolution
        self.model = model.to(self.device, memory_format=torch.channels_last if on_cpu else torch.preserve_format)
        broadcast_from_first(self.model.state_dict().values())
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),  # one call instead of a dozen for each tensor
        )
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # half precision, but no wrapper
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
        self.ema = EMAModel(self.model.parameters(), decay=config.ema_decay) if config.ema_decay else None
        self.step, self.history, self.seconds = 0, [], 0.0
        self.best, self.stale, self.stopped = float("inf"), 0, ""

    def run(self) -> list[dict]:
        self._resume()
        if self._unfinished() and self.launch:
            self._follow()
        elif self._unfinished():
            self._train()
        self._load_final_weights()
        return self.history

    def _unfinished(self) -> bool:
        return self.step < self.config.steps and not self.stopped

    def _follow(self) -> None:
        """Let other processes train, and take over what they reached."""
        if time_is_up():
            self._end_session()
        self.launch()
        self._resume()
        if self._unfinished() and time_is_up():
            raise SystemExit(0)  # they have told it
        if self._unfinished():
            raise RuntimeError(
                f"{self.name}: the processes that train it ended at step {self.step} of {self.config.steps}"
            )

    def _train(self) -> None:
        on_first(self._require_room)
        self.data = self.data.to(self.device)  # not before: where others train, the GPU's memory is theirs
        self.held_out = self.held_out.to(self.device) if self.held_out else None
        if self.tracker:
            self._begin_logs()
        started, before, late = time.monotonic(), self.seconds, False
        show = self.progress and rank() == 0
        with bar(self.config.steps, self.name, initial=self.step, show=show) as progress:
            while self.step < self.config.steps and not self.stopped and not late:
                logs = self._optimizer_step()
                progress.update()
                self.seconds = before + time.monotonic() - started
                if self.config.max_minutes:
                    self.seconds = on_first(lambda: self.seconds)  # clocks differ, and all must do alike
                    self._hurry()
                if self._budget_spent():
                    self.stopped = f"the budget of {self.config.max_minutes:g} minutes is spent"
                last = self.step == self.config.steps
                if last or self.stopped or self.step % self.config.evaluate_every == 0:
                    progress.set_postfix(self._evaluate(logs), refresh=False)
                if self.run_dir and has_deadline():
                    late = on_first(time_is_up) and not (last or self.stopped)
                if last or late or self.stopped or self.step % self.config.save_every == 0:
                    on_first(self._save)
        for tracker in self.accelerator.trackers:  # end_training() would end the process group too
            tracker.finish()
        if late:
            self._end_session()

    def _end_session(self) -> None:
        if rank() > 0:
            raise SystemExit(0)  # the first process tells it
        end_session(f"{self.name} stopped at step {self.step} of {self.config.steps}, kept in {self.run_dir}")

    def _begin_logs(self) -> None:
        options = {"wandb": {"dir": str(self.run_dir), "name": " ".join(self.run_dir.parts[-2:])}}
        project = "tensorboard" if self.tracker == "tensorboard" else "mdlib"  # of TensorBoard it is a folder
        self.accelerator.init_trackers(project, asdict(self.config), options)

    def _require_room(self) -> None:
        """Room for a checkpoint and the best weights, each twice: a new file is whole before the old one goes."""
        if not self.run_dir:
            return
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        trained = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        state = weights + 2 * trained + (weights if self.ema else 0)
        files = (1 if (self.run_dir / "state.pt").exists() else 2) * (state + weights)
        require_room(self.run_dir, files, f"training the {self.name}")

    def _optimizer_step(self) -> dict[str, torch.Tensor]:
        """One update of the weights from `accumulation` batches; noise and dropout come from (seed, step, rank)."""
        torch.manual_seed(_mix(self.config.seed, self.step, 2 + 8 * rank()))
        generator = torch.Generator().manual_seed(_mix(self.config.seed, self.step, 3 + 8 * rank()))
        self.model.train()
        self.optimizer.zero_grad()
        for part in range(self.config.accumulation):
            number = self.step * self.config.accumulation + part
            index = batch_order(number, self.config.batch_size * world(), len(self.data), self.config.seed)
            index = index.chunk(world())[rank()]
            with self.accelerator.autocast():
                loss, logs = self.model.loss(*self.data.take(index, generator))
            self.accelerator.backward(loss / self.config.accumulation)
        loss = all_mean(loss.detach())  # not finite in one process is not finite in all: they stop together
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{self.name}: the loss became {loss.item()} at step {self.step}: lower learning_rate, "
                "or set mixed_precision='no' when it was fp16"
            )
        mean_gradients(self.model.parameters())  # before fp16's scale is taken out: all see one process's overflow
        self.accelerator.unscale_gradients()
        for group in self.optimizer.param_groups:  # each by itself: a discriminator's gradient must not shrink others
            torch.nn.utils.clip_grad_norm_(group["params"], self.config.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.ema:
            self.ema.step(self.model.parameters())
        self.step += 1
        return logs

    def _hurry(self) -> None:
        """Under a budget of time the learning rate falls with the steps or with the time, whichever is further: weights
        of a high rate would be the noisier ones. It warms up with the steps."""
        position = min(self.config.steps, self.config.steps * self.seconds / (60 * self.config.max_minutes))
        lists = (self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas)
        for group, peak, shape in zip(*lists, strict=True):
            group["lr"] = peak * min(shape(self.step), shape(max(self.step, position)))

    def _evaluate(self, logs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Append one row to the history; the first process measures, and what it decides all do."""
        values = torch.tensor([float(value) for value in logs.values()], dtype=torch.float64, device=self.device)
        logs = dict(zip(logs, all_mean(values).tolist(), strict=True))
        self.history, self.best, self.stale, self.stopped = on_first(lambda: self._measure(logs))
        row = self.history[-1]
        shown = {key: f"{row[key]:.3g}" for key in ("held_out_loss", *logs) if key in row}
        if self.config.max_minutes:
            shown["minutes"] = f"{self.seconds / 60:.1f}/{self.config.max_minutes:g}"
        return shown

    def _measure(self, logs: dict[str, float]) -> tuple[list[dict], float, int, str]:
        """The history with its new row, and best, stale and stopped; keeps the weights of the lowest held-out loss."""
        row = {
            "step": self.step,
            "seconds": round(self.seconds, 2),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **logs,
        }
        with _averaged(self.ema, self.model), torch.no_grad():
            self.model.eval()
            if self.held_out:
                row |= self._held_out_logs()
            if self.evaluate:
                row |= self.evaluate(self.model)
            self._keep_if_best(row.get("held_out_loss"))
            if self.preview:
                self.preview(self.model, self.step)
            self.history.append(row)
            if self.config.snapshots and self.run_dir:
                self._keep_snapshot()
        if self.run_dir:
            write_history(self.history, self.run_dir / "history.csv")
        self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=self.step)
        return self.history, self.best, self.stale, self.stopped

    def _held_out_logs(self) -> dict[str, float]:
        """Mean loss and logs over the whole held-out set, with the same noise at every evaluation."""
        torch.manual_seed(_mix(self.config.seed, 0, 4))
        generator = torch.Generator().manual_seed(_mix(self.config.seed, 0, 5))
        totals: dict[str, float] = {}
        for index in torch.arange(len(self.held_out)).split(self.config.batch_size):
            loss, logs = self.model.loss(*self.held_out.take(index, generator))
            for key, value in {"loss": loss, **logs}.items():
                totals[f"held_out_{key}"] = totals.get(f"held_out_{key}", 0.0) + float(value) * len(index)
        return {key: value / len(self.held_out) for key, value in totals.items()}

    def _keep_if_best(self, loss: float | None) -> None:
        if loss is None:
            return
        if loss < self.best:
            self.best, self.stale = loss, 0
            if self.config.keep_best and self.run_dir:
                self._save_weights(self.run_dir / "best.safetensors")
            return
        self.stale += 1
        if self.config.patience and self.stale >= self.config.patience:
            self.stopped = f"no better held-out loss for {self.stale} evaluations"

    def _keep_snapshot(self) -> None:
        folder = self.run_dir / "snapshots"
        folder.mkdir(exist_ok=True)
        kept = {int(path.stem) for path in folder.glob("*.safetensors")}
        if self.seconds >= 2 * max((row["seconds"] for row in self.history if row["step"] in kept), default=0):
            self._save_weights(folder / f"{self.step}.safetensors")

    def _save_weights(self, file: Path) -> None:
        tensors = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        with whole_file(file) as path:
            save_file(tensors, path)

    def _load_final_weights(self) -> None:
        best = self.run_dir / "best.safetensors" if self.run_dir and self.config.keep_best else None
        if best and self.held_out and best.exists():
            self.model.load_state_dict(load_file(best, device=str(self.device)))
        elif self.ema:
            self.ema.copy_to(self.model.parameters())
        broadcast_from_first(self.model.state_dict().values())  # a batch norm's averages are each process's own
        self.model.eval()

    # Checkpoints -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if not self.run_dir:
            return
        scaler = self.accelerator.scaler
        state = {
            "config": _identity(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "best": self.best,
            "stale": self.stale,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
        }
        with whole_file(self.run_dir / "state.pt") as path:
            torch.save(state, path)

    def _resume(self) -> None:
        if not self.run_dir or not (self.run_dir / "state.pt").exists():
            return
        path = self.run_dir / "state.pt"
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["config"] != _identity(self.config):
            changed = [key for key, value in _identity(self.config).items() if state["config"].get(key) != value]
            raise ValueError(
                f"{self.run_dir} holds a run with other settings ({', '.join(changed)}): choose another folder, "
                "delete this one, or restore the settings and the number of processes"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.best, self.stale, self.stopped = state["best"], state["stale"], state["stopped"]
        if self.stopped.startswith("the budget") and not self._budget_spent():
            self.stopped = ""  # a larger budget was granted
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate  # a budget had lowered it
        if self.config.max_minutes:
            self._hurry()

    def _budget_spent(self) -> bool:
        limit = 60 * self.config.max_minutes
        return bool(limit) and self.seconds > limit


def write_history(history: list[dict], path: Path) -> None:
    """The history as a CSV file, a row an evaluation."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def read_history(folder: Path) -> list[dict[str, float]]:
    """What `write_history` left in a run folder; what a row did not measure is not in it."""
    with open(folder / "history.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _parameter_groups(model: torch.nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW's parameter groups: the model's own `parameter_groups()` where it has them; else all in one, or users'
    embeddings apart where they have a rate of their own."""
    own = getattr(model, "parameter_groups", None)
    groups = own() if own else [{"params": list(model.parameters())}]
    if config.user_rate != 1:
        if own or not hasattr(model, "users"):
            raise ValueError("TrainConfig.user_rate is of a prior that is told users")
        users = list(model.users.parameters())
        known = {id(parameter) for parameter in users}
        others = [parameter for parameter in model.parameters() if id(parameter) not in known]
        groups = [{"params": others}, {"params": users, "lr": config.user_rate * config.learning_rate}]
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]


@contextmanager
def _averaged(ema: EMAModel | None, model: torch.nn.Module):
    """`with` the averaged weights in the model; without an average it changes nothing."""
    if not ema:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def precision(wanted: str) -> str:
    """`wanted`, or for "auto" fp16 on a GPU with tensor cores (compute capability 7 and above) and float32 elsewhere:
    older GPUs gain nothing from half precision.

    Raises:
        ValueError: half precision without a GPU, or bf16 on one that emulates it, as all below capability 8 do.
    """
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "fp16" if generation >= 7 else "no"
    if wanted in ("fp16", "bf16") and not generation:
        raise ValueError(f"training in {wanted} needs a GPU")
    if wanted == "bf16" and generation < 8:
        raise ValueError(f"{torch.cuda.get_device_name()} only emulates bf16, and slowly: take fp16")
    return wanted


def _identity(config: TrainConfig) -> dict:
    """The settings that make a run what it is; budget, tracker, snapshots and checkpoint rhythm may change on resume.

    Its batch_size is that of all processes: it decides which samples a step sees.
    """
    free = ("max_minutes", "tracker", "save_every", "snapshots")
    settings = {key: value for key, value in asdict(config).items() if key not in free}
    return settings | {"batch_size": config.batch_size * world()}


def _mix(seed: int, number: int, stream: int) -> int:
    """A well-spread 63-bit seed of (seed, number, stream), by splitmix64's finaliser (Steele et al. 2014)."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return (value ^ (value >> 31)) >> 1
