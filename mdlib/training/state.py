"""How to train (`TrainConfig`), what training changes (`State`), and its checkpoints."""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from mdlib.models.layers import broadcast_from_first, check_choice, check_number, world
from mdlib.training.capture import MODES
from mdlib.utils import atomic_file, best_device, readable, require_room


@dataclass(frozen=True)
class TrainConfig:
    """Training settings. The model has its own configuration."""

    steps: int = 1000  # optimizer steps, not batches and not epochs
    batch_size: int = 32  # samples per forward pass and process; in a preset: of all processes (experiments.steps)
    accumulation: int = 1  # forward passes per optimizer step
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 50  # optimizer steps, linear
    weight_decay: float = 1e-4
    beta2: float = 0.99  # AdamW's second moment; 0.99 suits runs of a few thousand steps
    clip: float = 1.0  # largest gradient norm
    user_rate: float = 1.0  # learning rate of a prior's user embeddings, relative to all else
    ema_decay: float = 0.0  # 0: no average of the weights
    compile: str = "auto"  # auto | graph | compile | no: a CUDA graph or torch.compile; auto is "no", see docs/gpus.md
    mixed_precision: str = "no"  # no | fp16 | bf16 | auto (fp16 where the GPU gains from it, else no)
    seed: int = 0
    evaluate_every: int = 100  # optimizer steps between held-out losses
    save_every: int = 200  # optimizer steps between checkpoints
    preview_every: int = 1  # optimizer steps between images, 500 in presets; 0: none
    patience: int = 0  # held-out evaluations without a better loss before stopping; 0 never stops early
    keep_best: bool = True  # end with the weights of the lowest held-out loss
    max_minutes: float = 0.0  # wall-clock budget over all resumes, the learning rate falls within it; 0 is none

    def __post_init__(self):
        for one in fields(self):
            kind = {float: int | float}.get(type(one.default), type(one.default))
            if not isinstance(value := getattr(self, one.name), kind):
                raise ValueError(f"TrainConfig.{one.name} must be of type {type(one.default).__name__}, got {value!r}")
        for name in ("steps", "batch_size", "accumulation", "evaluate_every", "save_every"):
            check_number(f"TrainConfig.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "user_rate", "clip"):
            check_number(f"TrainConfig.{name}", getattr(self, name), 0, above=True)
        check_number("TrainConfig.preview_every", self.preview_every, 0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"TrainConfig.ema_decay must be in [0, 1), got {self.ema_decay}")
        check_choice("TrainConfig.mixed_precision", self.mixed_precision, ("no", "fp16", "bf16", "auto"))
        check_choice("TrainConfig.compile", self.compile, MODES)

    def with_steps(self, steps: int) -> "TrainConfig":
        """The same settings with `steps` steps, at most a tenth warm-up."""
        return replace(self, steps=steps, warmup_steps=min(self.warmup_steps, max(1, steps // 10)))

    def defining(self) -> dict:
        """The settings that define a run; the others may change on resume. batch_size is that of all processes
        together: it decides which samples a step sees."""
        settings = asdict(self) | {"batch_size": self.batch_size * world()}
        free = ("steps", "warmup_steps", "max_minutes", "save_every", "preview_every", "compile")
        return {key: value for key, value in settings.items() if key not in free}


class State:
    """The state of a training: the same in all processes at first, or loaded from the checkpoint in `run_dir`."""

    PLAIN = ("step", "seconds", "best", "stale", "stopped", "history")  # in a checkpoint as they are

    def __init__(self, model: torch.nn.Module, config: TrainConfig, run_dir: str | Path | None):
        self.model, self.config, self.run_dir = model, config, Path(run_dir) if run_dir else None
        self.device = torch.device(PartialState(cpu=best_device() == "cpu").device.type)
        # On a CPU channels last is the faster layout of a convolution.
        layout = torch.channels_last if self.device.type == "cpu" else torch.preserve_format
        model.to(self.device, memory_format=layout)
        broadcast_from_first(model.state_dict().values())
        rate, betas, decay = config.learning_rate, (0.9, config.beta2), config.weight_decay
        groups = _parameter_groups(model, config)
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        kind = precision(config.mixed_precision)
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        self.autocast = torch.autocast(self.device.type, dtype, enabled=kind != "no")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=kind == "fp16")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.weights = [parameter.detach() for parameter in self.parameters]  # the same memory, without gradients
        self.ema = [weight.clone() for weight in self.weights] if config.ema_decay else None  # moving averages
        self.generator = torch.Generator(self.device)
        self.passes = None  # forward and backward passes of a step, see `mdlib.training.capture.choose`
        self.step, self.seconds = 0, 0.0
        self.best, self.stale = math.inf, 0  # lowest held-out loss, and evaluations since then
        self.stopped = ""  # why training ends before its last step
        self.history: list[dict] = []
        self.resume()

    @cached_property  # created for the first row: without one there is no folder
    def tensorboard(self):
        """A SummaryWriter; None without `run_dir`, or where TensorBoard or the TensorFlow that it imports is broken."""
        with suppress(Exception):
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(self.run_dir / "tensorboard")

    @property
    def unfinished(self) -> bool:
        return self.step < self.config.steps and not self.stopped

    @property
    def budget_spent(self) -> bool:
        return 0 < 60 * self.config.max_minutes < self.seconds

    def swap_average(self) -> None:
        """Exchange the weights and their average, where there is one."""
        if self.ema is not None:
            own = [weight.clone() for weight in self.weights]
            torch._foreach_copy_(self.weights, self.ema)
            torch._foreach_copy_(self.ema, own)

    def save(self) -> None:
        """Write `run_dir`/state.pt, whole or not at all."""
        content = {key: getattr(self, key) for key in (*self.PLAIN, "ema")}
        content |= {key: getattr(self, key).state_dict() for key in ("model", "optimizer", "scaler")}
        with atomic_file(self.run_dir / "state.pt") as path:
            torch.save({**content, "config": asdict(self.config) | self.config.defining()}, path)

    def resume(self) -> None:
        """Load `run_dir`/state.pt if it exists; ValueError if it is damaged or of other settings."""
        if not self.run_dir or not (file := self.run_dir / "state.pt").exists():
            return
        with readable(file, "delete it: training starts from the beginning of this stage"):
            content = torch.load(file, map_location=self.device, weights_only=True)
        wanted = self.config.defining()
        if changed := [key for key in wanted if content["config"].get(key) != wanted[key]]:
            raise ValueError(
                f"{self.run_dir} holds a run with other settings ({', '.join(changed)}): choose another folder, "
                "delete this one, or restore the settings and the number of processes"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        for key in (*self.PLAIN, "ema"):
            setattr(self, key, content[key])
        if self.stopped.startswith("the budget") and not self.budget_spent:
            self.stopped = ""  # a larger budget was granted
        if self.config.steps > content["config"]["steps"]:  # training continues to more steps than first planned
            self.stopped, self.stale = "", 0

    def check_room(self, name: str) -> None:
        """OSError without room for checkpoint and best weights, twice: old files stay until new ones are complete."""
        if self.run_dir:
            model = sum(tensor.nbytes for tensor in self.model.state_dict().values())
            moments = (2 + (self.ema is not None)) * sum(parameter.nbytes for parameter in self.parameters)
            files = 1 if (self.run_dir / "state.pt").exists() else 2
            require_room(self.run_dir, files * (2 * model + moments), f"training the {name}")

    def keep_best(self, loss: float) -> None:
        """Save the weights if the held-out loss is the lowest so far; end training where patience is exhausted."""
        if loss < self.best:
            self.best, self.stale = loss, 0
            if self.config.keep_best and self.run_dir:
                with atomic_file(self.run_dir / "best.safetensors") as path:
                    save_file({key: value.contiguous() for key, value in self.model.state_dict().items()}, path)
            return
        self.stale += 1
        if 0 < self.config.patience <= self.stale:
            self.stopped = f"no better held-out loss for {self.stale} evaluations"

    def load_final_weights(self) -> None:
        """The best held-out weights, or else the average, or else the last ones; the same in all processes."""
        if self.run_dir and self.config.keep_best and self.best < math.inf:
            file = self.run_dir / "best.safetensors"
            with readable(file, f"delete {self.run_dir}: training starts from the beginning of this stage"):
                self.model.load_state_dict(load_file(file, device=str(self.device)))
        else:
            self.swap_average()
        broadcast_from_first(self.model.state_dict().values())  # a batch norm's averages are each process's own
        self.model.eval()


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
    """`wanted`, or for "auto" fp16 on a GPU with tensor cores (compute capability 7 and above) and "no" elsewhere.
    ValueError for half precision without a GPU, or bf16 on one that emulates it, as all below capability 8 do."""
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "fp16" if generation >= 7 else "no"
    if wanted in ("fp16", "bf16") and not generation:
        raise ValueError(f"training in {wanted} needs a GPU")
    if wanted == "bf16" and generation < 8:
        raise ValueError(f"{torch.cuda.get_device_name()} only emulates bf16, and slowly: use fp16")
    return wanted
