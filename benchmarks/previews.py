"""What preview images cost: seconds of one, of a step, and the fraction at the default of `preview_every`.

    python benchmarks/previews.py --data FOLDER [--systems vae-diffusion] [--parts prior] [--steps 200]

Trains codec and prior of a run on real windows by `train_stage`, with an image at the end. CPU time of the process, so
that other programs hardly change it; wall time where there is a GPU.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from mdlib.experiments import steps
from mdlib.experiments.run import open_run
from mdlib.systems import get_preset, make_codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--systems", default="vae-diffusion,vqvae-transformer")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--parts", default="codec,prior", help="prior alone: over a codec that is not trained")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    given = parser.parse_args()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    train, spent, systems = steps.fit_stages, [], given.systems.split(",")
    every = get_preset(systems[0], given.preset).codec_training.preview_every

    def timed(*arguments, preview, **options):
        def measured(*words):
            started = clock()
            image = preview(*words)
            spent.append(clock() - started)
            return image

        return train(*arguments, preview=measured, **options)

    steps.fit_stages = timed
    print(
        f"| system | training | ms per step | ms per preview | overhead, one in {every} steps |\n|---|---|--:|--:|--:|"
    )
    for system in systems:
        with tempfile.TemporaryDirectory() as folder:
            settings = dict(codec_steps=given.steps, prior_steps=given.steps, init="none", preset=given.preset)
            run = open_run(Path(folder) / system, data=given.data, system=system, **settings)
            if given.parts == "prior":
                make_codec(run.preset, 1).save_pretrained(run.path / "codec")
            for part in given.parts.split(","):
                stage = {"codec": steps.codec_stage, "prior": steps.prior_stage}[part](run)
                spent.clear()
                started = clock()
                steps.train_stage(stage)
                step = (clock() - started - sum(spent)) / given.steps
                each = sum(spent) / len(spent)
                fraction = each / (each + every * step)
                row = f"{1e3 * step:.0f} | {1e3 * each:.0f} | {fraction:.2%} of the time"
                print(f"| {system} | {stage.name} | {row} |", flush=True)
                if stage.name == "codec":
                    steps.save_codec(stage)


if __name__ == "__main__":
    main()
