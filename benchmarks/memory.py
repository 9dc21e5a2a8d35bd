"""What training takes of a GPU's memory, preset by preset: the codec's, and the prior's.

What torch has allocated at the peak of two steps: weights, gradients, optimizer, averages, activations, a batch. On a
GPU measured in the preset's precision. On a CPU counted in float32 on fake tensors, which have sizes and no content:
nothing is computed, so the largest presets take seconds. Half precision stores most activations in half as many bytes.
CUDA's context, LPIPS and DINOv2 come on top.

python benchmarks/memory.py [--systems vae-diffusion,vq-diffusion] [--presets gpu-16gb]
"""

import argparse
import logging
import os
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdlib.models.classifier import SmallCNN
from mdlib.models.codec import FeatureDistance
from mdlib.systems import SYSTEMS, attach_losses, get_preset, make_codec, make_prior
from mdlib.training.capture import passes
from mdlib.training.fit import Batches, fit
from mdlib.training.state import State

USERS = 8
PRESETS = ("gpu-6gb", "gpu-8gb", "gpu-16gb", "p100")


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations return while they are alive: `now`, and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage) -> None:
        if (key := storage._cdata) not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, storage.nbytes()).atexit = False

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def training(system: str, preset_name: str, part: str) -> tuple:
    """Model, a batch, and configuration of one part of a system."""
    torch.manual_seed(0)
    preset = get_preset(system, preset_name, foundation="none")
    config = replace(getattr(preset, f"{part}_training"), steps=2, accumulation=1, warmup_steps=0)
    codec, batch = make_codec(preset, 1, USERS), config.batch_size
    labels = torch.arange(batch) % USERS
    if part == "codec":
        attach_losses(codec, preset, FeatureDistance(SmallCNN(USERS, 1)))
        return codec, (torch.rand(batch, 1, preset.image_size, preset.image_size) * 2 - 1, labels), config
    prior = make_prior(system, preset, codec, USERS)
    if prior.consumes == "tokens":
        return prior, (torch.randint(codec.num_codes, (batch, *codec.token_shape)), labels), config
    return prior, (torch.randn(batch, *codec.latent_shape), labels), config


def measured(*which: str) -> int:
    """Bytes at the peak of two steps of `fit` on a GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, batch, config = training(*which)
    fit(model, Batches(batch), config, progress=False)
    return torch.cuda.max_memory_allocated()


def counted(*which: str) -> int:
    """Bytes at the peak of two steps as `fit` takes them."""
    with FakeTensorMode(allow_non_fake_inputs=True), Allocated() as allocated:
        model, batch, config = training(*which)
        if hasattr(model, "quantizer"):
            model.quantizer._started = True  # else it looks at a batch
        model.to = lambda *_, **__: model  # fake tensors cannot be moved
        state = State(model.train(), replace(config, mixed_precision="no"), None)
        for _ in range(config.steps):
            passes(state, [batch])
            for group in state.optimizer.param_groups:  # as fit clips them
                gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
                torch._foreach_mul_(gradients, (config.clip / (norm + 1e-6)).clamp(max=1.0))
            state.optimizer.step()
            if state.ema is not None:
                torch._foreach_lerp_(state.ema, state.weights, 0.1)
        return allocated.peak


def table(systems: list[str], presets: list[str]) -> None:
    """Print a row for each training, counted in a process of its own."""
    print(f"{'system':<20} {'preset':<18} {'part':<6} {'batch':>5} {'GB':>6}")
    for system in systems:
        for preset in presets:
            for part in ("codec", "prior") if preset in SYSTEMS[system].presets else ():
                words = [sys.executable, __file__, "--count", system, preset, part]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                gigabytes = int(done.stdout.splitlines()[-1]) / 1e9
                batch = getattr(get_preset(system, preset), f"{part}_training").batch_size
                print(f"{system:<20} {preset:<18} {part:<6} {batch:>5} {gigabytes:>6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--count", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.count:
        return table(options.systems.split(","), options.presets.split(","))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print((measured if torch.cuda.is_available() else counted)(*options.count), flush=True)
    os._exit(0)  # fake tensors may crash an interpreter when it ends, and in a later count


if __name__ == "__main__":
    main()
