"""Network calls against quality of the priors over tokens: a run of vqvae-transformer, then runs of vq-diffusion on the
same split and token grid.

Each sampler draws the same number of windows of each user, with its preset's guidance. Classifiers trained on
the first run's split predict the user of each (identity) and give its Fréchet distance to unseen real windows, divided
by that between two halves of these (fd ratio). Figures are means over
--repeats seeds; network calls are those of one batch.

python benchmarks/tokens.py --runs RUN RUN [--per-user 10 --repeats 2]
"""

import argparse
import statistics
import tempfile

from mdlib.experiments.compare import quality, sample_windows, sampling_speed
from mdlib.experiments.run import Run, open_run
from mdlib.models.vqdiffusion import VQDiffusion
from mdlib.pipeline import MicroDopplerPipeline, load_pipeline

SAMPLERS = {  # of VQDiffusion
    **{f"ancestral {steps}": dict(sampler="ancestral", num_inference_steps=steps) for steps in (50, 25, 12)},
    **{f"mask-predict {steps}": dict(sampler="mask_predict", num_inference_steps=steps) for steps in (32, 16, 8)},
}


def samplers(pipeline: MicroDopplerPipeline) -> dict[str, dict]:
    own = dict(pipeline.config.sampling)
    if not isinstance(pipeline.prior, VQDiffusion):
        return {type(pipeline.prior).__name__: own}
    kept = {key: own[key] for key in ("guidance_scale", "temperature", "top_p") if key in own}
    most = {"ancestral": pipeline.prior.noise.timesteps, "mask_predict": pipeline.prior.num_tokens}
    possible = {name: some for name, some in SAMPLERS.items() if some["num_inference_steps"] <= most[some["sampler"]]}
    return {name: {**kept, **some} for name, some in possible.items()}


def measure(run: Run, pipeline: MicroDopplerPipeline, folder: str, per_user: int, repeats: int) -> dict:
    draws = [
        quality(run, sample_windows(pipeline, run.windows, per_user, seed), folder) for seed in range(1, repeats + 1)
    ]
    return {key: statistics.mean(one[key] for one in draws) for key in draws[0]} | sampling_speed(pipeline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--per-user", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    runs = [open_run(path) for path in options.runs]
    folder, first = tempfile.mkdtemp(), None  # of the classifiers, which are trained once
    print(f"{'sampler':28} {'calls':>5} {'ms/window':>9} {'identity':>8} {'fd ratio':>8} {'over first':>10}")
    for run in runs:
        pipeline = load_pipeline(run.path / "pipeline")
        for name, sampling in samplers(pipeline).items():
            pipeline.register_to_config(sampling=sampling)
            found = measure(runs[0], pipeline, folder, options.per_user, options.repeats)
            first = first or found["fd_ratio"]
            print(
                f"{name:28} {found['network_calls']:5d} {1000 * found['seconds_per_window']:9.1f} "
                f"{100 * found['identity']:7.1f}% {found['fd_ratio']:8.2f} {found['fd_ratio'] / first:10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
