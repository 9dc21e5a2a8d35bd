"""The diffusion prior next to two well-known implementations, at equal shape, batch and number of parameters.

ours    LatentDiffusion (conditional, v-prediction) with full attention, and with window_axial at the same widths
ddp     denoising-diffusion-pytorch: Unet + GaussianDiffusion as its README builds them (v-prediction, flash attention)
unet2d  diffusers' UNet2DModel with attention at the last level but one, equal widths two by two, two blocks a level
        and a DDPM ε loss, as its unconditional-image example builds it
The peers' widths are searched until their parameters match those of ours with full attention within 3 %, group norms
have 4 groups where a width is no multiple of 32. They have as many levels as ours, to work at the same resolutions,
unless --levels says otherwise. All train by `fit`: same optimizer, clipping and data. Rounds A B C A B C,
medians; peak memory is that of training in a fresh process less what it held after the imports.

python benchmarks/diffusion_peers.py [--shape 4 16 16 --widths 48 96 --batch 32 --rounds 5]
"""

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # memory and seconds are read as a CPU run has them
os.environ["TQDM_DISABLE"] = "1"  # the sampler of denoising-diffusion-pytorch shows a bar

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import nn

from mdlib.models.unet import LatentDiffusion
from mdlib.training.fit import Batches, TrainConfig, fit

USERS = 31


class Ours(nn.Module):
    def __init__(self, shape, widths, attention, sampling_steps):
        super().__init__()
        self.prior = LatentDiffusion(shape, USERS, block_out_channels=widths, layers_per_block=1, attention=attention)
        self.options = dict(num_inference_steps=sampling_steps, scheduler="ddim")
        self.told = f"widths {', '.join(map(str, widths))}"

    def loss(self, latents, labels):
        return self.prior.loss(latents, labels)

    def draw(self, count):
        return self.prior.sample(torch.arange(count, device=self.prior.device) % USERS, **self.options)


class Ddp(nn.Module):
    def __init__(self, shape, parameters, levels, sampling_steps):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        super().__init__()
        multiples = (1, 2, 4, 8)[:levels]

        def unet(dim, init_dim):
            return Unet(dim, init_dim=init_dim, dim_mults=multiples, channels=shape[0], flash_attn=True)

        dim, init = match(parameters, unet, range(8, 129, 2), usual=lambda dim: dim, seconds=range(4, 257))
        self.told = f"dim {dim}, init_dim {init}, dim_mults {', '.join(map(str, multiples))}"
        self.diffusion = GaussianDiffusion(
            unet(dim, init), image_size=shape[1:], sampling_timesteps=sampling_steps, auto_normalize=False
        )

    def loss(self, latents, labels):
        return self.diffusion(latents), {}

    def draw(self, count):
        return self.diffusion.sample(count)


class Unet2d(nn.Module):
    def __init__(self, shape, parameters, levels, sampling_steps):
        super().__init__()

        multiples = (1, 1, 2, 2, 4, 4)[-levels:]

        def unet(width, last):
            widths = [width * multiple // multiples[0] for multiple in multiples[:-1]] + [last]
            attends = [level == levels - 2 for level in range(levels)]
            return UNet2DModel(
                sample_size=shape[1:],
                in_channels=shape[0],
                out_channels=shape[0],
                layers_per_block=2,
                block_out_channels=widths,
                down_block_types=["AttnDownBlock2D" if here else "DownBlock2D" for here in attends],
                up_block_types=["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
                norm_num_groups=4 if any(width % 32 for width in widths) else 32,
            )

        usual = lambda width: width * multiples[-1] // multiples[0]
        size = match(parameters, unet, range(8, 257, 8), usual, seconds=range(8, 1025, 4))
        self.unet, self.schedule = unet(*size), DDPMScheduler(num_train_timesteps=1000)
        self.sampler = DDIMPipeline(self.unet, DDIMScheduler.from_config(self.schedule.config))
        self.sampler.set_progress_bar_config(disable=True)
        self.sampling_steps = sampling_steps
        self.told = f"widths {', '.join(map(str, self.unet.config.block_out_channels))}"

    def loss(self, latents, labels):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        return F.mse_loss(self.unet(noisy, timesteps).sample, noise), {}

    def draw(self, count):
        return self.sampler(batch_size=count, num_inference_steps=self.sampling_steps, output_type="np").images


def match(parameters, make, firsts, usual, seconds):
    """The two sizes of a network of that many parameters, within 3 %: the first as its usual proportion to the second
    would have it, the second as near to that proportion as the count allows."""
    with torch.device("meta"):
        first = min(firsts, key=lambda size: abs(count(make(size, usual(size))) - parameters))
        for second in sorted(seconds, key=lambda size: abs(size - usual(first))):
            if abs(count(make(first, second)) / parameters - 1) <= 0.03:
                return first, second
    raise SystemExit(f"no size of {make.__qualname__.split('.')[0]} has {parameters:,} parameters: change --widths")


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def make(name, options):
    """A candidate with random weights, the same at every call."""
    torch.manual_seed(0)
    shape, widths = tuple(options.shape), tuple(options.widths)
    if name.startswith("ours"):
        return Ours(shape, widths, name.split()[1], options.sampling_steps)
    parameters = count(Ours(shape, widths, "full", 1))
    levels = options.levels or len(widths)
    return {"ddp": Ddp, "unet2d": Unet2d}[name](shape, parameters, levels, options.sampling_steps)


def train(model, options, steps):
    """Optimizer steps a second."""
    latents = torch.randn(8 * options.batch, *options.shape)
    config = TrainConfig(steps=steps, batch_size=options.batch, evaluate_every=steps)
    history = fit(model, Batches((latents, torch.arange(len(latents)) % USERS)), config, progress=False)
    return steps / history[-1]["seconds"]


def sample(model, options):
    """Images a second."""
    started = time.perf_counter()
    with torch.inference_mode():
        model.draw(options.batch)
    return options.batch / (time.perf_counter() - started)


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_of_training(name):
    """MiB, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # it said why
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[4, 16, 16], metavar=("D", "H", "W"))
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 96], help="of our levels")
    parser.add_argument("--levels", type=int, default=0, help="of the peers; 0 as many as ours")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a round")
    parser.add_argument("--sampling-steps", type=int, default=20, help="DDIM steps, all of them network calls")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        raise SystemExit("the peer is missing: pip install denoising-diffusion-pytorch")
    if options.memory_of:
        import denoising_diffusion_pytorch  # noqa: F401

        imports = peak_mib()
        train(make(options.memory_of, options), options, 3)
        print(peak_mib() - imports)
        return
    names = ["ours full", "ours window_axial", "ddp", "unet2d"]
    # First of all: the peak that a new process reports starts from what this one holds.
    memory = {name: peak_of_training(name) for name in names}
    models = {name: make(name, options) for name in names}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, shape {tuple(options.shape)}, batch "
        f"{options.batch}, {options.sampling_steps} DDIM steps a sample, "
        f"{options.rounds} rounds of {options.steps} training steps and {options.batch} samples"
    )
    for name, model in models.items():
        print(f"{name}: {count(model):,} parameters, {model.told}")
    rates = {name: ([], []) for name in names}
    for number in range(options.rounds + 1):
        for name, model in models.items():
            pair = train(model, options, options.steps), sample(model, options)
            if number:  # the first round warms up
                rates[name][0].append(pair[0])
                rates[name][1].append(pair[1])
    ours = [statistics.median(values) for values in rates["ours full"]]
    half = f"{'min–max':>13} {'of ours':>8}"
    print(f"{'':<18} {'steps/s':>8} {half} {'images/s':>9} {half} {'peak MiB':>9} {'of ours':>8}")
    for name, pair in rates.items():
        columns = ""
        for values, own, width in zip(pair, ours, (8, 9), strict=True):
            median = statistics.median(values)
            spread = f"{min(values):.2f}–{max(values):.2f}"
            columns += f" {median:>{width}.2f} {spread:>13} {median / own:>8.2f}"
        print(f"{name:<18}{columns} {memory[name]:>9.0f} {memory[name] / memory['ours full']:>8.2f}")


if __name__ == "__main__":
    main()
