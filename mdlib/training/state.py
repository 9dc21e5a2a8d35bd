"""How to train (`TrainConfig`), what training changes (`State`), and its checkpoints."""

import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from mdlib.models.layers import broadcast_from_first, world
from mdlib.utils import require_room, whole_file


@dataclass(frozen=True)
class TrainConfig:
    """How to train. What is trained is the model's own configuration."""

    steps: int = 1000  # optimizer steps, not batches and not epochs
    batch_size: int = 32  # samples a forward pass of a process; in a preset of all together (mdlib.experiments.steps)
    accumulation: int = 1  # forward passes an optimizer step
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 50  # optimizer steps, linear
    weight_decay: float = 1e-4
    beta2: float = 0.99  # AdamW's second moment; 0.99 suits runs of a few thousand steps
    clip: float = 1.0  # gradient norm
    user_rate: float = 1.0  # learning rate of a prior's user embeddings over that of all else
    ema_decay: float = 0.0  # 0: no average of the weights
    mixed_precision: str = "no"  # no | fp16 | bf16 | auto (fp16 where the GPU gains from it, else no)
    seed: int = 0
    evaluate_every: int = 100  # optimizer steps between held-out losses
    save_every: int = 200  # optimizer steps between checkpoints
    patience: int = 0  # held-out evaluations without a better loss before stopping; 0 never stops early
    keep_best: bool = True  # end with the weights of the lowest held-out loss
    max_minutes: float = 0.0  # wall-clock budget over all resumes, the learning rate falls within it; 0 is none
    snapshots: bool = False  # save the weights each time training has taken twice as long
    tracker: str = "tensorboard"  # tensorboard | wandb | none

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0 or self.user_rate <= 0 or not 0 <= self.ema_decay < 1:
            raise ValueError("TrainConfig needs learning_rate > 0, user_rate > 0 and ema_decay in [0, 1)")
        if self.mixed_precision not in ("no", "fp16", "bf16", "auto"):
            raise ValueError(f"TrainConfig.mixed_precision is no, fp16, bf16 or auto, not {self.mixed_precision!r}")
        if self.tracker not in ("tensorboard", "wandb", "none"):
            raise ValueError(f"TrainConfig.tracker must be tensorboard, wandb or none, got {self.tracker!r}")
        if self.tracker == "wandb" and not find_spec("wandb"):
            raise ModuleNotFoundError("TrainConfig.tracker is wandb, which is missing: pip install wandb")

    def defining(self) -> dict:
        """The settings that define a run; the others may change on resume. batch_size is that of all processes
        together: it decides which samples a step sees."""
        free = ("max_minutes", "tracker", "save_every", "snapshots")
        settings = {key: value for key, value in asdict(self).items() if key not in free}
        return settings | {"batch_size": self.batch_size * world()}


@dataclass
class State:
    """What training changes; a checkpoint holds all of it."""

    config: TrainConfig
    run_dir: Path | None
    device: torch.device
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    weights: list[torch.Tensor]  # the trainable parameters, without their graph
    average: list[torch.Tensor]  # their moving average; empty without ema_decay
    step: int = 0
    seconds: float = 0.0
    best: float = math.inf  # lowest held-out loss
    stale: int = 0  # evaluations since then
    stopped: str = ""  # why training ends before its last step
    history: list[dict] = field(default_factory=list)

    @property
    def unfinished(self) -> bool:
        return self.step < self.config.steps and not self.stopped

    @property
    def budget_spent(self) -> bool:
        return 0 < 60 * self.config.max_minutes < self.seconds


_PLAIN = ("step", "seconds", "best", "stale", "stopped", "history")  # fields of State that are plain values


def start(model: torch.nn.Module, config: TrainConfig, run_dir: str | Path | None) -> State:
    """The state before the first step, the same in all processes, or that of the checkpoint in `run_dir`."""
    device = torch.device(PartialState(cpu=not torch.cuda.is_available()).device.type)
    # On a CPU channels last is the faster layout of a convolution.
    model.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.preserve_format)
    broadcast_from_first(model.state_dict().values())
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    kind = precision(config.mixed_precision)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    weights = [parameter.data for parameter in model.parameters() if parameter.requires_grad]
    state = State(
        config,
        Path(run_dir) if run_dir else None,
        device,
        model,
        optimizer,
        torch.autocast(device.type, dtype, enabled=kind != "no"),
        torch.amp.GradScaler(device.type, enabled=kind == "fp16"),
        weights,
        [tensor.clone() for tensor in weights if config.ema_decay],
    )
    resume(state)
    return state


def _parameter_groups(model: torch.nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW's parameter groups: the model's own `parameter_groups()`, or else all parameters in one, with the user
    embeddings in another where they have a learning rate of their own."""
    own = getattr(model, "parameter_groups", None)
    groups = own() if own else [{"params": list(model.parameters())}]
    if config.user_rate != 1:
        if own or not hasattr(model, "users"):
            raise ValueError(f"TrainConfig.user_rate is for priors with `users`; {type(model).__name__} needs 1")
        users = list(model.users.parameters())
        others = [parameter for parameter in model.parameters() if parameter not in set(users)]
        groups = [{"params": others}, {"params": users, "lr": config.user_rate * config.learning_rate}]
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]


def precision(wanted: str) -> str:
    """`wanted`, or for "auto" fp16 on a GPU with tensor cores (compute capability 7 and above) and "no" elsewhere:
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


# Checkpoints ---------------------------------------------------------------------------------------------------


def save(state: State) -> None:
    """Write `run_dir`/state.pt, whole or not at all."""
    content = {key: getattr(state, key) for key in _PLAIN} | {
        "config": state.config.defining(),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "average": state.average,
    }
    with whole_file(state.run_dir / "state.pt") as path:
        torch.save(content, path)


def resume(state: State) -> None:
    """Load `run_dir`/state.pt if it exists.

    Raises:
        ValueError: it is a run of another configuration.
    """
    if not state.run_dir or not (state.run_dir / "state.pt").exists():
        return
    content = torch.load(state.run_dir / "state.pt", map_location=state.device, weights_only=True)
    if "average" not in content:
        raise ValueError(
            f"{state.run_dir}/state.pt is of mdlib 0.1: delete it to train again, or choose another folder"
        )
    wanted = state.config.defining()
    if changed := [key for key in wanted if content["config"].get(key) != wanted[key]]:
        raise ValueError(
            f"{state.run_dir} holds a run with other settings ({', '.join(changed)}): choose another folder, "
            "delete this one, or restore the settings and the number of processes"
        )
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    if content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    for tensor, saved in zip(state.average, content["average"], strict=True):
        tensor.copy_(saved)
    for key in _PLAIN:
        setattr(state, key, content[key])
    if state.stopped.startswith("the budget") and not state.budget_spent:
        state.stopped = ""  # a larger budget was granted


def check_room(state: State, name: str) -> None:
    """OSError without room for a checkpoint and the best weights, each twice: a new file replaces a whole one."""
    if state.run_dir:
        model = sum(tensor.nbytes for tensor in state.model.state_dict().values())
        checkpoint = model + sum(tensor.nbytes for tensor in (*state.weights, *state.weights, *state.average))
        files = 1 if (state.run_dir / "state.pt").exists() else 2
        require_room(state.run_dir, files * (checkpoint + model), f"training the {name}")


def swap_average(state: State) -> None:
    """Exchange the weights and their average, where there is one."""
    for weight, average in zip(state.weights, state.average, strict=False):
        own = weight.clone()
        weight.copy_(average)
        average.copy_(own)


def keep_best(state: State, loss: float) -> None:
    """Save the weights if the held-out loss is the lowest so far; end training where patience is exhausted."""
    if loss < state.best:
        state.best, state.stale = loss, 0
        if state.config.keep_best and state.run_dir:
            _save_weights(state, "best.safetensors")
        return
    state.stale += 1
    if 0 < state.config.patience <= state.stale:
        state.stopped = f"no better held-out loss for {state.stale} evaluations"


def save_snapshot(state: State) -> None:
    """Save the weights if snapshots are wanted and training has taken twice as long as at the last one."""
    if state.config.snapshots and state.run_dir:
        saved = {int(path.stem) for path in (state.run_dir / "snapshots").glob("*.safetensors")}
        if state.seconds >= 2 * max((row["seconds"] for row in state.history if row["step"] in saved), default=0):
            _save_weights(state, f"snapshots/{state.step}.safetensors")


def _save_weights(state: State, name: str) -> None:
    with whole_file(state.run_dir / name) as path:
        save_file({key: value.contiguous() for key, value in state.model.state_dict().items()}, path)


def load_final_weights(state: State, found_best: bool) -> None:
    """The best held-out weights, or else the average, or else the last ones; the same in all processes."""
    if found_best and state.config.keep_best and (state.run_dir / "best.safetensors").exists():
        state.model.load_state_dict(load_file(state.run_dir / "best.safetensors", device=str(state.device)))
    else:
        swap_average(state)
    broadcast_from_first(state.model.state_dict().values())  # a batch norm's averages are each process's own
    state.model.eval()
