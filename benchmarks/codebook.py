"""The EMA codebook of mdlib against diffusers' `VectorQuantizer` (legacy=False), which learns by gradients, in the same
encoder and decoder: equal first weights, batches and steps. Metrics are of held-out windows of the same users.

python benchmarks/codebook.py [--data DIR] [--preset demo] [--steps 500] [--windows 10] [--seeds 1]
Without --data, windows of 31 simulated people.
"""

import argparse
import tempfile
from dataclasses import replace

import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import Tensor, nn

from mdlib.data.augment import no_augmentation
from mdlib.data.files import find_windows
from mdlib.data.splits import apply_split, make_split
from mdlib.data.windows import load_windows
from mdlib.evaluation.metrics import code_counts, codebook_metrics, psnr
from mdlib.simulation.dataset import simulate_dataset
from mdlib.systems import get_preset, make_codec, seeded
from mdlib.training.fit import Batches, fit
from mdlib.training.latents import decode_all, encode_all


class GradientCodebook(nn.Module):
    """diffusers' quantiser with the methods of `mdlib.models.vqvae.VectorQuantizer` that a `VQVAE` calls."""

    def __init__(self, num_codes: int, dim: int, beta: float):
        super().__init__()
        self.quantizer = VectorQuantizer(num_codes, dim, beta, legacy=False, sane_index_shape=True)
        self.num_codes, self.beta = num_codes, beta

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, loss, (_, _, indices) = self.quantizer(z)
        return codes, indices, loss / self.beta  # the codec multiplies by beta

    def nearest(self, z: Tensor) -> Tensor:
        return self(z)[1]

    def lookup(self, indices: Tensor) -> Tensor:
        return self.quantizer.embedding(indices).movedim(-1, 1)

    def count(self, index: Tensor) -> Tensor:
        return torch.bincount(index, minlength=self.num_codes).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--windows", type=int, default=10, help="training windows per user")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    preset = get_preset("vqvae-transformer", options.preset, codec_steps=options.steps)
    data = options.data or tempfile.mkdtemp()
    if not options.data:
        simulate_dataset(data, users=31, windows=60, size=preset.image_size, progress=False)
    windows = load_windows(data, size=preset.image_size)
    parts = apply_split(windows, make_split(find_windows(data), windows_per_user=options.windows))
    train, test = parts["train"], parts["test"]
    print(f"{len(train)} training windows, {len(test)} held out, {options.steps} steps")
    print(f"{'codebook':12} {'seed':>4} {'codes':>5} {'usage':>6} {'perplexity':>10} {'PSNR':>8}")
    for seed in range(options.seeds):
        for name in ("EMA", "gradient"):
            codec = seeded(seed, make_codec, preset)
            if name == "gradient":
                sizes = (codec.num_codes, codec.config.code_dim, codec.config.commitment_weight)
                codec.quantizer = seeded(seed, GradientCodebook, *sizes)
            batches = Batches((train.images, train.labels), no_augmentation)
            fit(codec, batches, replace(preset.codec_training, seed=seed), progress=False)
            tokens = encode_all(codec, test.images, "tokens")
            counts = code_counts(tokens, test.labels, codec.num_codes, test.num_users)
            found = codebook_metrics(counts, test.labels.bincount(minlength=test.num_users))
            decoded = decode_all(codec, encode_all(codec, test.images, "latents"))
            print(
                f"{name:12} {seed:4d} {codec.num_codes:5d} {100 * found['usage']:5.0f}% {found['perplexity']:10.1f} "
                f"{float(psnr(decoded, test.float()).mean()):5.2f} dB",
                flush=True,
            )


if __name__ == "__main__":
    main()
