"""Pipelines that earlier versions saved still load: the names of modules, classes and weights are a file format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mdlib.pipeline import MicroDopplerPipeline

LOSSES = ("projection.", "discriminator.", "batches")  # saved with a VA-VAE then, no part of it now
SAVED = json.loads((Path(__file__).parent / "pipelines_0_1_0.json").read_text())


@pytest.mark.parametrize("system", SAVED)
def test_a_pipeline_saved_by_0_1_0_loads_and_draws(system, tmp_path):
    for name, content in SAVED[system]["files"].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    for name, tensors in SAVED[system]["tensors"].items():
        weights = {key: torch.zeros(shape, dtype=getattr(torch, kind)) for key, (kind, shape) in tensors.items()}
        first = next(key for key, value in weights.items() if value.is_floating_point() and not key.startswith(LOSSES))
        weights[first] += 0.5
        save_file(weights, tmp_path / name)
    pipeline = MicroDopplerPipeline.from_pretrained(tmp_path)
    for name, tensors in SAVED[system]["tensors"].items():
        loaded = getattr(pipeline, name.split("/")[0]).state_dict()
        assert loaded.keys() >= {key for key in tensors if not key.startswith(LOSSES)}
        assert any((value == 0.5).all() for value in loaded.values() if value.numel())
    assert len(pipeline([3, 7]).images) == 2 * len(pipeline.config.conditions)
