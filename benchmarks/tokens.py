"""Network calls against quality of the priors over tokens: a run of vqvae-transformer, then runs of vq-diffusion on the
same split and token grid.

Each sampler draws the same number of windows of each user, with its preset's guidance. Classifiers trained on
the first run's split predict the user of each (identity) and give its Fréchet distance to unseen real windows, divided
by that between two halves of these (fd ratio). Metrics are means over
--repeats seeds; network calls are those of one batch.

python benchmarks/tokens.py --runs RUN RUN [--per-user 10 --repeats 2]
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from timeit import repeat

import torch

from mdlib.data.windows import WindowSet, to_uint8
from mdlib.evaluation.augmentation_study import Arms, unseen_classifiers
from mdlib.evaluation.evidence import Protocol, trained_once
from mdlib.evaluation.fidelity import fidelity
from mdlib.evaluation.protocol import identity
from mdlib.experiments.run import Run, open_run
from mdlib.models.classifier import SmallCNN
from mdlib.models.vqdiffusion import VQDiffusion
from mdlib.pipeline import MicroDopplerPipeline, load_pipeline
from mdlib.reports.report import gather

TIMED = 32  # windows of the batch whose sampling is timed

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


def sample_windows(pipeline: MicroDopplerPipeline, real: WindowSet, per_user: int, seed: int) -> WindowSet:
    """Generate windows of every user, without writing files."""
    generated = pipeline(list(pipeline.config.users), per_user, seed, output_type="pt")
    labels = torch.tensor([real.users.index(user) for user in generated.users])
    files = tuple(replace(real.files[0], user=user) for user in generated.users)
    return replace(real, images=to_uint8(generated.images), labels=labels, files=files)


def quality(run: Run, generated: WindowSet, folder: str) -> dict:
    """identity (fraction of generated windows that are classified as their user) and fd_ratio. folder: caches the
    classifiers, so that they are trained once for a split."""
    protocol, evidence = Protocol(**run.preset.validation), gather(run.windows, run.split, generated)
    classifiers = unseen_classifiers(evidence, protocol, folder)
    train = evidence.train
    job = SmallCNN, folder, train.images, train.labels, train.num_users, protocol.evaluation_steps
    arms = Arms({"real_only": [trained_once(*job, seed) for seed in range(protocol.seeds)]}, {}, 0.0)
    return {
        "identity": identity(evidence, classifiers)["accuracy"]["value"],
        "fd_ratio": fidelity(evidence, arms)["fd_ratio"]["value"],
    }


def sampling_speed(pipeline: MicroDopplerPipeline, rounds: int = 3) -> dict:
    """Seconds per window, decoding included, in the fastest of `rounds` batches; and network calls per batch."""
    users, calls = pipeline.config.users, []
    rows = pipeline.plan(users, TIMED, 0, pipeline.config.conditions[:1])[:: len(users)]
    blocks = next(part for part in pipeline.prior.modules() if isinstance(part, torch.nn.ModuleList))
    hook = blocks[0].register_forward_hook(lambda *_: calls.append(1))  # once per network call
    seconds = min(repeat(lambda: [*pipeline.stream(rows, TIMED)], number=1, repeat=rounds)) / TIMED
    hook.remove()
    return {"seconds_per_window": seconds, "network_calls": len(calls) // rounds}


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
