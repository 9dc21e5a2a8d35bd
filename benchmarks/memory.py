"""What training takes of a GPU's memory, preset by preset: the codec's, and the prior's.

What torch has allocated at the peak of two steps of `fit`: weights, gradients, optimizer, averages, activations, a
batch. On a GPU in the preset's precision; on a CPU in float32, by torch's profiler. Beyond the weights it grows
linearly with the batch, so large batches are extrapolated from 16 and 32 (--line; --whole counts them as they are).
Half precision stores most activations in half as many bytes. CUDA's context, LPIPS and DINOv2 come on top.

python benchmarks/memory.py [--systems vae-diffusion,vq-diffusion] [--presets gpu-16gb] [--line 4,8 | --whole]
"""

import argparse
import json
import logging
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from mdlib.models.classifier import SmallCNN
from mdlib.models.codec import FeatureDistance
from mdlib.systems import SYSTEMS, attach_losses, get_preset, make_codec, make_prior
from mdlib.training.fit import Batches, fit

USERS = 8
PRESETS = ("gpu-6gb", "gpu-8gb", "gpu-16gb", "p100")
COUNTED: dict[tuple[str, int], int] = {}


def peak(model: torch.nn.Module, tensors: tuple, config, batch: int) -> int:
    """Bytes alive at the peak of two steps of one batch each."""
    on_gpu = torch.cuda.is_available()
    precision = config.mixed_precision if on_gpu else "no"
    config = replace(config, steps=2, batch_size=batch, accumulation=1, mixed_precision=precision, warmup_steps=0)
    if on_gpu:
        fit(model, Batches(tensors), config, progress=False)
        return torch.cuda.max_memory_allocated()
    before = sum(tensor.nbytes for tensor in (*model.state_dict().values(), *tensors))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fit(model, Batches(tensors), config, progress=False)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return before + max(accumulate(event.nbytes() for event in events))


def count(system: str, preset_name: str, part: str, batch: int) -> int:
    """Peak bytes of training one part of a system."""
    torch.manual_seed(0)
    preset = get_preset(system, preset_name, foundation="none")
    codec = make_codec(preset, 1, USERS)
    labels = torch.arange(batch) % USERS
    if part == "codec":
        attach_losses(codec, preset, FeatureDistance(SmallCNN(USERS, 1)))
        images = torch.rand(batch, 1, preset.image_size, preset.image_size) * 2 - 1
        return peak(codec, (images, labels), preset.codec_training, batch)
    prior = make_prior(system, preset, codec, USERS)
    del codec
    if prior.consumes == "tokens":
        inputs = torch.randint(prior.config["num_codes"], (batch, *prior.config["token_shape"]))
    else:
        inputs = torch.randn(batch, *prior.config["latent_shape"])
    return peak(prior, (inputs, labels), preset.prior_training, batch)


def extrapolated(system: str, preset_name: str, part: str, line: tuple[int, ...]) -> tuple[int, float]:
    """(batch size, GB of training at it), from the batches of `line` where it is larger; () counts it as it is."""
    preset = get_preset(system, preset_name, foundation="none")
    batch = getattr(preset, f"{part}_training").batch_size
    sizes = line if line and batch > max(line) else (batch,)
    # Presets that differ by the batch share their networks.
    network = repr((SYSTEMS[system].prior if part == "prior" else preset.codec_class, getattr(preset, part)))
    for size in sizes:
        if (network, size) not in COUNTED:
            COUNTED[network, size] = apart(system, preset_name, part, size)
    counted = [COUNTED[network, size] for size in sizes]
    slope = (counted[-1] - counted[0]) / max(1, sizes[-1] - sizes[0])
    return batch, (counted[-1] + slope * (batch - sizes[-1])) / 1e9


def apart(*which) -> int:
    """`count` in a process of its own."""
    words = [sys.executable, __file__, "--count", json.dumps(which)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--line", default="16,32", help="batches from which larger ones are extrapolated")
    parser.add_argument("--whole", action="store_true", help="count at the preset's own batch: more memory, more time")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        logging.disable(logging.WARNING)
        print(count(*json.loads(options.count)))
        return
    line = () if options.whole else tuple(map(int, options.line.split(",")))
    print(f"{'system':<20} {'preset':<18} {'part':<6} {'batch':>5} {'GB':>6}")
    for system in options.systems.split(","):
        for preset in options.presets.split(","):
            for part in ("codec", "prior") if preset in SYSTEMS[system].presets else ():
                batch, gigabytes = extrapolated(system, preset, part, line)
                print(f"{system:<20} {preset:<18} {part:<6} {batch:>5} {gigabytes:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
