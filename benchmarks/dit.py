"""Training speed and memory of LightningDiT-S beside diffusers' DiTTransformer2DModel, on 256 tokens.

Both take latents of 4 × 16 × 16 at patch 1 and train on the mean square error with AdamW. diffusers' blocks each hold
an embedding of the time and of the classes: "equal parameters" gives it one block less, "equal blocks" as many. Runs
side by side, A B C A B C, medians; peak memory: of a process of its own, above what it had before the first step.

python benchmarks/dit.py [--batch 8 --rounds 5 --device cuda]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from diffusers import DiTTransformer2DModel

from mdlib.models.dit import LightningDiT

USERS = 31
SHAPE = (4, 16, 16)
KINDS = ("ours", "ours, checkpointing", "diffusers, equal parameters", "diffusers, equal blocks")


def peer(layers: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=SHAPE[0],
        num_layers=layers,
        sample_size=SHAPE[1],
        patch_size=1,
        num_embeds_ada_norm=USERS + 1,
    )


class Training:
    """One model, and a training step of it."""

    def __init__(self, kind: str, batch: int, device: str):
        torch.manual_seed(0)
        self.ours = kind.startswith("ours")
        if self.ours:
            self.model = LightningDiT(SHAPE, USERS, gradient_checkpointing="checkpointing" in kind)
        else:
            self.model = peer(11 if "parameters" in kind else 12)
        self.model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.latents = torch.randn(batch, *SHAPE, device=device)
        self.labels = torch.arange(batch, device=device) % USERS

    def __call__(self) -> float:
        """One optimizer step; its seconds."""
        _wait()
        started = time.perf_counter()
        t, noise = torch.rand(len(self.latents), device=self.latents.device), torch.randn_like(self.latents)
        velocity = self.latents - noise
        noisy = noise + t.view(-1, 1, 1, 1) * velocity
        if self.ours:
            made = self.model(noisy, t, self.model.users(self.labels))
        else:
            made = self.model(noisy, timestep=t, class_labels=self.labels).sample[:, : SHAPE[0]]
        self.optimizer.zero_grad()
        (made - velocity).square().mean().backward()
        self.optimizer.step()
        _wait()
        return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory(kind: str, batch: int, device: str) -> float:
    """Peak MiB of three steps above those before the first one, weights and the rest of the process left out."""
    training = Training(kind, batch, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(3):
        training()
    after = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return (after - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, options.batch, options.device)))
        return
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, batch {options.batch}")
    peaks = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--memory-of", kind, "--batch", str(options.batch)]
        answer = subprocess.run([*command, "--device", options.device], stdout=subprocess.PIPE, text=True, check=True)
        peaks[kind] = json.loads(answer.stdout.splitlines()[-1])
    trainings = {kind: Training(kind, options.batch, options.device) for kind in KINDS}
    runs = {kind: [] for kind in KINDS}
    for training in trainings.values():
        training()  # warm up
    for _ in range(options.rounds):
        for kind, training in trainings.items():
            runs[kind].append(training())
    ours = statistics.median(runs["ours"])
    print(
        f"{'':<28} {'parameters':>11} {'s a step':>9} {'min–max':>12} {'steps/s of ours':>16} {'MiB':>6} {'of ours':>8}"
    )
    for kind, training in trainings.items():
        size = sum(parameter.numel() for parameter in training.model.parameters()) / 1e6
        median, spread = statistics.median(runs[kind]), f"{min(runs[kind]):.2f}–{max(runs[kind]):.2f}"
        print(
            f"{kind:<28} {size:>9.1f} M {median:>9.2f} {spread:>12} {ours / median:>16.2f} {peaks[kind]:>6.0f} "
            f"{peaks[kind] / peaks['ours']:>8.2f}"
        )


if __name__ == "__main__":
    main()
