"""What fewer steps cost and save, of one trained pipeline: DDPM 1000, DDIM 50, PNDM 50 and DPM-Solver++ 20 of a
diffusion prior; Euler 250, Euler 25 and Heun 25 of a flow.

Each sampler draws the same number of windows of each user. Fréchet distances of its windows to those of the first one,
on intensities averaged over a grid of 8 × 8 cells, stand beside that of a second set of the first one with other noise:
so much is chance at this number of windows. The two named last are timed side by side, A B A B. The first takes 1000
(250) network calls a window: minutes to hours on a CPU.

python benchmarks/samplers.py --pipeline RUN/pipeline [--images 512 --guidance 1.0 --rounds 5]
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from mdlib.evaluation.metrics import frechet_distance
from mdlib.models.dit import LightningDiT
from mdlib.models.unet import LatentDiffusion
from mdlib.pipeline import MicroDopplerPipeline, load_pipeline
from mdlib.utils import DataError

SAMPLERS = {  # of each prior, the reference first
    LatentDiffusion: {
        "DDPM 1000": ("ddpm", 1000),
        "PNDM 50": ("pndm", 50),
        "DDIM 50": ("ddim", 50),
        "DPM-Solver++ 20": ("dpm++", 20),
    },
    LightningDiT: {"Euler 250": ("euler", 250), "Euler 25": ("euler", 25), "Heun 25": ("heun", 25)},
}
GRID = 8  # features are means over GRID × GRID cells


def load(path: str) -> MicroDopplerPipeline:
    pipeline = load_pipeline(path)
    if type(pipeline.prior) not in SAMPLERS:
        raise DataError(f"{path} holds a {type(pipeline.prior).__name__}, which has no samplers to compare")
    return pipeline


@torch.no_grad()
def draw(pipeline: MicroDopplerPipeline, count: int, batch: int, seed: int, **sampling) -> tuple[torch.Tensor, float]:
    """Features (count, GRID²) of windows spread evenly over the users, and the seconds it took."""
    started = time.perf_counter()
    labels = torch.arange(count, device=pipeline.device) % len(pipeline.config.users)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in labels.split(batch):
        images = pipeline.codec.decode(pipeline.prior.sample(part, generator=generator, **sampling))
        parts.append(F.adaptive_avg_pool2d(images.mean(1, keepdim=True), GRID).flatten(1).cpu())
    return torch.cat(parts), time.perf_counter() - started


def variance(features: torch.Tensor) -> float:
    """Summed over the features: a sampler that draws too much alike shows it here first."""
    return float(features.var(0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="the pipeline/ folder of a run")
    parser.add_argument("--images", type=int, default=512, help="windows of each sampler")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--guidance", type=float, help="guidance scale; the pipeline's own unless given")
    parser.add_argument("--rounds", type=int, default=5, help="of one batch each, for the speed ratio")
    options = parser.parse_args()
    if options.images <= GRID**2:
        parser.error(f"--images must exceed the {GRID**2} features")
    try:
        pipeline = load(options.pipeline)
    except DataError as error:
        raise SystemExit(str(error)) from None
    shared = {"guidance_scale": 1.0, **pipeline.config.sampling, "classifier_scale": 0.0}
    if options.guidance is not None:
        shared["guidance_scale"] = options.guidance
    print(
        f"torch {torch.__version__}, {pipeline.device}, {torch.get_num_threads()} threads, {options.images} windows of "
        f"{len(pipeline.config.users)} users, guidance {shared['guidance_scale']:g}"
    )

    samplers = SAMPLERS[type(pipeline.prior)]
    reference, *_, slower, faster = samplers

    def run(sampler: str, count: int, seed: int) -> tuple[torch.Tensor, float]:
        scheduler, steps = samplers[sampler]
        sampling = {**shared, "scheduler": scheduler, "num_inference_steps": steps}
        return draw(pipeline, count, options.batch, seed, **sampling)

    run(faster, options.batch, 0)  # warm up
    print(f"{'':<16} {'seconds':>8} {'variance':>9} {'Fréchet distance':>17} {'of chance':>10}")
    first, seconds = run(reference, options.images, 0)
    print(f"{reference:<16} {seconds:>8.1f} {variance(first):>9.4f} {'the reference':>17}", flush=True)
    chance = None
    for sampler in samplers:
        features, seconds = run(sampler, options.images, 1)  # other noise than the reference's, for all of them
        distance = frechet_distance(features, first)
        chance = chance or distance  # the reference comes first
        name = f"{sampler} again" if sampler == reference else sampler
        print(
            f"{name:<16} {seconds:>8.1f} {variance(features):>9.4f} {distance:>17.4f} {distance / chance:>10.2f}",
            flush=True,
        )

    times = {slower: [], faster: []}
    for _ in range(options.rounds):
        for sampler, runs in times.items():
            runs.append(run(sampler, options.batch, 0)[1])
    told = [f"{s} {statistics.median(t):.2f} s ({min(t):.2f}–{max(t):.2f})" for s, t in times.items()]
    long, short = map(statistics.median, times.values())
    print(f"a batch of {options.batch}: {', '.join(told)}: {long / short:.2f} times as fast")


if __name__ == "__main__":
    main()
