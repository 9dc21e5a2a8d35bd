"""What a GPU makes of every system: training speed, eager and captured, memory, and seconds a generated window.

    python benchmarks/gpu.py [--systems vae-diffusion,vavae-dit] [--preset gpu-16gb]

Random inputs; steps of `fit` after the first four, the systems one after the other. The fraction is that of the fastest
matrix product in the preset's precision, measured first. The last row trains diffusers' UNet of equal size as its
example does: AdamW, clipping, GradScaler, EMAModel. What would start after --minutes is left out. --cpu runs the same
code on a CPU, at the smallest sizes, as a check.
"""

import argparse
import contextlib
import gc
import os
import time
from dataclasses import replace

import torch
from diffusers.training_utils import EMAModel
from diffusion_peers import Unet2d, count
from torch.utils.flop_counter import FlopCounterMode

from mdlib.data.augment import as_they_are
from mdlib.models.classifier import SmallCNN
from mdlib.models.codec import FeatureDistance
from mdlib.models.pretrained import ClassifierFeatures
from mdlib.systems import SYSTEMS, attach_losses, get_preset, make_codec, make_prior
from mdlib.training.fit import Batches, TrainConfig, fit
from mdlib.training.state import precision

USERS, WINDOWS, SKIPPED = 8, 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--preset", default="gpu-16gb")
    parser.add_argument("--modes", default="no,graph", help="of TrainConfig.compile")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    if given.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        given.preset, given.steps = "smoke", 3
    elif not torch.cuda.is_available():
        print("no GPU with CUDA is here: nothing was measured (--cpu checks the code on a CPU)")
        return
    until = time.monotonic() + 60 * given.minutes
    kind = precision(get_preset("vae-diffusion", given.preset).prior_training.mixed_precision)
    peak = product_speed({"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32), given.cpu)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, {given.preset}, {kind}, products at {peak / 1e12:.1f} TFLOP/s\n")
    print("| | parameters | batch | mode | steps/s | of the peak | peak GB | s a window |")
    print("|---|--:|--:|---|--:|--:|--:|--:|")
    for system in given.systems.split(","):
        codec, prior, parts = trainings(system, given.preset)
        drawn = ""
        for part, model, data, config in parts:
            work = arithmetic(model, data) * config.batch_size * config.accumulation
            for mode in given.modes.split(","):
                if time.monotonic() > until:
                    print(f"| {system} {part} | | | {mode} | left out: the time is up |")
                    continue
                rate, memory = steps_a_second(model, data, replace(config, compile=mode), given.steps)
                if model is prior:
                    drawn = drawn or f"{seconds_a_window(codec, prior, get_preset(system, given.preset).sampling):.4f}"
                size, share = count(model) / 1e6, work * rate / peak
                print(f"| {system} {part} | {size:.1f} M | {config.batch_size} | {mode} | {rate:.2f} | {share:.1%} "
                      f"| {memory:.1f} | {drawn if model is prior else ''} |", flush=True)  # fmt: skip
        if system == "vae-diffusion" and time.monotonic() < until:
            peer(prior, config, given.steps, kind)
        del codec, prior, parts, model
        gc.collect()


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
    parts = ("codec", codec, Batches((images, users), as_they_are), preset.codec_training)
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
    batch = data.to(device).take(torch.arange(2, device=device), torch.Generator(device))
    with FlopCounterMode(display=False) as counter:
        model.to(device).train().loss(*batch)[0].backward()
    return counter.get_total_flops() / 2


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


def seconds_a_window(codec, prior, sampling: dict) -> float:
    """Sampling and decoding of a batch of 16, after one that warms up."""
    users = torch.arange(16, device=prior.device) % USERS
    decode = codec.decode_tokens if prior.consumes == "tokens" else codec.decode
    codec.to(prior.device).eval()
    for _ in range(2):
        started = wait()
        with torch.no_grad():
            decode(prior.sample(users, generator=torch.Generator().manual_seed(0), **sampling))
        took = wait() - started
    return took / len(users)


def peer(prior, config: TrainConfig, steps: int, kind: str) -> None:
    """A row for diffusers' UNet with as many parameters, in the loop of its unconditional-image example."""
    device, shape = prior.device, prior.latent_shape
    size = max(count(prior), 1_700_000)  # it has no size as small as smoke
    model = Unet2d(shape, size, len(prior.config.block_out_channels), 20).to(device).train()
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=1e-5), EMAModel(model.parameters(), decay=0.9999)
    scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
    data = torch.randn(WINDOWS, *shape, device=device)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind)
    for step in range(SKIPPED + steps):
        if step == SKIPPED:
            started = wait()
        batch = data[torch.randint(WINDOWS, (config.batch_size,), device=device)]
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
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
    print(
        f"| diffusers' example | {count(model) / 1e6:.1f} M | {config.batch_size} | eager | {rate:.2f} | | | |",
        flush=True,
    )


if __name__ == "__main__":
    main()
