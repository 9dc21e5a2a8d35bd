"""What a GPU makes of every system: training speed, eager and captured, memory, and seconds a generated window.

    python benchmarks/gpu.py [--systems vae-diffusion,vavae-dit] [--preset gpu-16gb]

Random inputs; steps of `fit` after the first four, the systems one after the other; windows in float32 and, where the
preset trains in half precision, in that; with "compile" among --modes also by a compiled network. "Of the peak" is the
fraction of the fastest matrix product in the preset's precision, measured first. The UNets of diffusers and, if
installed, of denoising-diffusion-pytorch, of the size of vae-diffusion's, train as in diffusers' example: AdamW,
clipping, GradScaler, EMAModel. Then the evaluation's classifiers. What would start after --minutes is left out. --cpu
checks the code at small sizes. --count counts the arithmetic of a preset, and the operations of a training step, on any
machine.
"""

import argparse
import copy
import gc
import importlib.util
import itertools
import os
import time
from dataclasses import replace

import torch
from diffusers.training_utils import EMAModel
from diffusion_peers import Ddp, Unet2d, count
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mdlib.data.augment import classical_augmentation, cutmix, no_augmentation
from mdlib.models.classifier import ResNet18, SmallCNN
from mdlib.models.codec import FeatureDistance
from mdlib.models.pretrained import ClassifierFeatures
from mdlib.models.prior import Request
from mdlib.systems import SYSTEMS, attach_losses, get_preset, make_codec, make_prior
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.training.state import precision

USERS, WINDOWS, SKIPPED = 8, 256, 4
VIEWS = "view t transpose permute expand select slice split unbind squeeze unsqueeze detach alias as_strided".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--preset", default="gpu-16gb")
    parser.add_argument("--modes", default="no,graph", help="of TrainConfig.compile")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--count", action="store_true")
    given = parser.parse_args()
    if given.count:
        return counted(given.systems.split(","), given.preset)
    if given.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        given.preset, given.steps = "smoke", 3
    elif not torch.cuda.is_available():
        print("no GPU with CUDA is here: nothing was measured (--cpu checks the code on a CPU)")
        return
    until = time.monotonic() + 60 * given.minutes
    kind = precision(get_preset("vae-diffusion", given.preset).prior_training.mixed_precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    peak = product_speed(dtype, given.cpu)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, {given.preset}, {kind}, products at {peak / 1e12:.1f} TFLOP/s\n")
    print("| | parameters | batch | mode | steps/s | of the peak | peak GB | s a window |")
    print("|---|--:|--:|---|--:|--:|--:|--:|")
    for system in given.systems.split(","):
        codec, prior, parts = trainings(system, given.preset)
        sampling = get_preset(system, given.preset).sampling
        drawn = []
        for part, model, data, config in parts:
            work = arithmetic(model, data) * config.batch_size * config.accumulation
            for mode in given.modes.split(","):
                if time.monotonic() > until:
                    print(f"| {system} {part} | | | {mode} | left out: the time is up |")
                    continue
                rate, memory = steps_a_second(model, data, replace(config, compile=mode), given.steps)
                if model is prior and not drawn:
                    compiles = "compile" in given.modes.split(",")
                    drawn = [f"{one:.4f}" for one in seconds_a_window(codec, prior, sampling, dtype, compiles)]
                size, share = count(model) / 1e6, work * rate / peak
                print(f"| {system} {part} | {size:.1f} M | {config.batch_size} | {mode} | {rate:.2f} | {share:.1%} "
                      f"| {memory:.1f} | {', '.join(drawn) if model is prior else ''} |", flush=True)  # fmt: skip
        if system == "vae-diffusion":
            for kind in (Unet2d, Ddp) if importlib.util.find_spec("denoising_diffusion_pytorch") else (Unet2d,):
                if time.monotonic() < until:
                    peer(kind, prior, config, given.steps, dtype)
        del codec, prior, parts, model
        gc.collect()
    data, config = pictures(128), TrainConfig(batch_size=32)
    for kind, mode in itertools.product((SmallCNN, ResNet18), given.modes.split(",")):
        if time.monotonic() < until:
            rate, memory = steps_a_second(kind(USERS), data, replace(config, compile=mode), given.steps)
            print(f"| {kind.__name__} of the evaluation | | 32 | {mode} | {rate:.2f} | | {memory:.1f} | |", flush=True)


def pictures(size: int) -> Batches:
    """Windows of the evaluation's classifiers, with their augmentation."""
    augmented = lambda *batch: cutmix(*classical_augmentation(*batch), USERS, batch[-1])
    images = torch.randint(0, 256, (WINDOWS, 1, size, size), dtype=torch.uint8)
    return Batches((images, torch.arange(WINDOWS) % USERS), augmented)


def trainings(system: str, name: str) -> tuple:
    """Codec, prior, and for both: name, model, data and training. Losses that need a download are left out."""
    torch.manual_seed(0)
    preset = get_preset(system, name)
    codec = make_codec(preset, 1, USERS)
    prior = make_prior(system, preset, codec, USERS)
    users, teacher = torch.arange(WINDOWS) % USERS, SmallCNN(USERS)
    images = torch.randint(0, 256, (WINDOWS, 1, preset.image_size, preset.image_size), dtype=torch.uint8)
    foundation = ClassifierFeatures(teacher, images) if codec.aligned else None
    attach_losses(codec, preset, FeatureDistance(teacher), foundation=foundation)
    if prior.consumes == "tokens":
        inputs = torch.randint(codec.num_codes, (WINDOWS, *codec.token_shape))
    else:
        inputs = torch.randn(WINDOWS, *codec.latent_shape)
    parts = ("codec", codec, Batches((images, users), no_augmentation), preset.codec_training)
    return codec, prior, (parts, ("prior", prior, Batches((inputs, users)), preset.prior_training))


def wait() -> float:
    """The time once the GPU has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def product_speed(dtype: torch.dtype, small: bool) -> float:
    """FLOP a second of the fastest of some square matrix products."""
    device, speeds = "cpu" if small else "cuda", []
    for size in (256,) if small else (4096, 8192):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(5):
            started = wait()
            for _ in range(10):
                a @ b
            speeds.append(10 * 2 * size**3 / (wait() - started))
    return max(speeds)


def arithmetic(model: torch.nn.Module, data: Batches) -> float:
    """FLOP of the forward and backward pass of one sample."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = data.to(device).take(torch.arange(1, device=device), torch.Generator(device))
    with FlopCounterMode(display=False) as counter:
        counter.mod_tracker.__exit__()  # its hooks forbid the gradients that weigh VA-VAE's losses
        model.to(device).eval().loss(*batch)[0].backward()
    return counter.get_total_flops()


def sampling_arithmetic(prior, sampling: dict) -> float:
    """FLOP of one sample, without decoding, counted without computing them."""
    users, options = torch.zeros(1, dtype=torch.long, device="meta"), dict(sampling)
    request = Request(users, None, None, options.pop("guidance_scale", 1.0), None, users.float(), None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(prior).to("meta").eval().draw(request, **options)
    return counter.get_total_flops()


def counted(systems: list[str], name: str) -> None:
    heads = "codec, a step | prior, a step | prior, a window | operations of codec | of prior"
    print(f"TFLOP, {name}\n\n| | {heads} |\n|---|--:|--:|--:|--:|--:|")
    for system in systems:
        _, prior, parts = trainings(system, name)
        steps = [arithmetic(model, data) * how.batch_size * how.accumulation for _, model, data, how in parts]
        figures = *steps, sampling_arithmetic(prior, get_preset(system, name).sampling)
        started = [str(operations(model, data)) for _, model, data, _ in parts]
        print(f"| {system} | {' | '.join([f'{figure / 1e12:.3f}' for figure in figures] + started)} |", flush=True)
    for kind in (SmallCNN, ResNet18):
        model, data = kind(USERS), pictures(64)
        every, batch = operations(model, data), data.take(torch.arange(2), torch.Generator())
        model.train().zero_grad()
        with Operations() as passes:
            model.loss(*batch)[0].backward()
        print(f"{kind.__name__}: {every} operations a step, {passes.number} of them in the forward and backward pass")


class Operations(TorchDispatchMode):
    """Counts operations that a GPU would have to be given: all but views."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += function._schema.name.removeprefix("aten::") not in VIEWS
        return function(*arguments, **options or {})


def operations(model: torch.nn.Module, data: Batches) -> int:
    """Operations of a step of `fit`, from runs of two and four steps."""
    numbers = []
    for steps in (2, 4):
        with Operations() as counter:
            fit(model, data, TrainConfig(steps=steps, batch_size=2, ema_decay=0.999, evaluate_every=9), progress=False)
        numbers.append(counter.number)
    return (numbers[1] - numbers[0]) // 2


def steps_a_second(model: torch.nn.Module, data: Batches, config: TrainConfig, steps: int) -> tuple[float, float]:
    """Optimizer steps a second in `fit`, and GB at the peak."""
    reads, calls = [], []
    marks = [SKIPPED * config.accumulation, (SKIPPED + steps) * config.accumulation]

    def clock(*batch):
        if len(calls) in marks:
            reads.append(wait())
        calls.append(None)
        return data.transform(*batch) if data.transform else batch[:-1]

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = replace(config, steps=SKIPPED + steps + 1, learning_rate=1e-5, evaluate_every=10**9, save_every=10**9)
    fit(model, replace(data, transform=clock), config, progress=False)
    return steps / (reads[1] - reads[0]), torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def seconds_a_window(codec, prior, sampling: dict, dtype: torch.dtype, compiles: bool) -> list[float]:
    """Sampling and decoding of a batch of 16, after one that warms up: in float32, under autocast to `dtype`, and so by
    a compiled network."""
    users = torch.arange(16, device=prior.device) % USERS
    decode = codec.decode_tokens if prior.consumes == "tokens" else codec.decode
    codec.to(prior.device).eval()
    took = []
    halves = (False, True) if dtype != torch.float32 else (False,)
    for number, half in enumerate(halves + halves[-1:] * compiles):
        if number == len(halves):
            prior = copy.deepcopy(prior)  # the other trains on
            prior.compile(dynamic=False)
        for _ in range(2):
            started = wait()
            with torch.no_grad(), torch.autocast(prior.device.type, dtype, enabled=half):
                decode(prior.sample(users, generator=torch.Generator().manual_seed(0), **sampling))
            last = (wait() - started) / len(users)
        took.append(last)
    return took


def peer(kind: type, prior, config: TrainConfig, steps: int, dtype: torch.dtype) -> None:
    """A row for another UNet with as many parameters, in the loop of diffusers' unconditional-image example."""
    device, shape = prior.device, prior.latent_shape
    size = max(count(prior), 1_700_000)  # they have no size as small as smoke
    model = kind(shape, size, len(prior.config.block_out_channels), 20).to(device).train()
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=1e-5), EMAModel(model.parameters(), decay=0.9999)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    data = torch.randn(WINDOWS, *shape, device=device)
    for step in range(SKIPPED + steps):
        if step == SKIPPED:
            started = wait()
        batch = data[torch.randint(WINDOWS, (config.batch_size,), device=device)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = model.loss(batch, None)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.step(model.parameters())
        loss.item()  # the example logs it
    rate = steps / (wait() - started)
    name = {Unet2d: "diffusers' UNet", Ddp: "denoising-diffusion-pytorch"}[kind]
    print(f"| {name} | {count(model) / 1e6:.1f} M | {config.batch_size} | eager | {rate:.2f} | | | |", flush=True)


if __name__ == "__main__":
    main()
