"""What `fit` adds to a bare training step: its time over forward + backward + optimizer, at smoke sizes on one thread.

    python benchmarks/step.py [SYSTEM …]

CPU time, not wall time. Rounds of both in alternation: the ratio is the median of the rounds' ratios, the times are the
least ones, so that other programs on the machine hardly change them.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from mdlib.experiments.run import open_run
from mdlib.experiments.steps import codec_stage, prior_stage
from mdlib.simulation.dataset import simulate_dataset
from mdlib.training.fit import Batches, TrainConfig, fit

SYSTEMS = ("vqvae-transformer", "vae-diffusion", "vqvae-ldm", "vavae-dit", "vq-diffusion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="*", default=SYSTEMS)
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| system | model | bare step, ms | step of fit, ms | ratio |\n|---|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        simulate_dataset(data, users=4, windows=48, size=64, progress=False)
        for system in given.systems:
            run = open_run(Path(folder) / system, data=str(data), system=system, preset="smoke")
            for make in (codec_stage, prior_stage):
                stage = make(run)
                bare, whole, ratio = measure(stage.model, stage.data, stage.config, given.steps, given.rounds)
                print(f"| {system} | {stage.name} | {bare:.1f} | {whole:.1f} | {ratio:.2f} |", flush=True)
                if stage.name == "codec":
                    stage.codec.to("cpu").save_pretrained(run.path / "codec")


def measure(model: torch.nn.Module, data: Batches, config: TrainConfig, steps: int, rounds: int) -> tuple[float, ...]:
    """Milliseconds of CPU a bare step and a step of `fit`, and their ratio."""
    config = replace(config, evaluate_every=10**9, save_every=10**9, max_minutes=0.0)
    pairs = [(bare(model, data, config, steps), in_fit(model, data, config, steps)) for _ in range(rounds)]
    ratio = statistics.median(whole / alone for alone, whole in pairs)
    return *(1e3 * min(times) / steps for times in zip(*pairs, strict=True)), ratio


def bare(model, data, config, steps: int) -> float:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = data.take(torch.arange(config.batch_size), torch.Generator())
    for step in range(steps + 2):
        if step == 2:
            started = time.process_time()
        optimizer.zero_grad()
        for _ in range(config.accumulation):
            model.loss(*batch)[0].backward()
        optimizer.step()
    return time.process_time() - started


def in_fit(model, data, config, steps: int) -> float:
    """Seconds of `steps` steps after the first two: what `fit` does before and after its loop is not counted."""
    reads = []
    clock = replace(data, transform=lambda *batch: reads.append(time.process_time()) or taken(data, *batch))
    fit(model, clock, replace(config, steps=steps + 3, learning_rate=1e-5), progress=False)
    return reads[(steps + 2) * config.accumulation] - reads[2 * config.accumulation]


def taken(data: Batches, *batch):
    return data.transform(*batch) if data.transform else batch[:-1]


if __name__ == "__main__":
    main()
