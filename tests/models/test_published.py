"""Published weights: the files they come in, what is never unpickled, and models they fit completely or not at all."""

import pytest
import torch
from helpers import Trap
from safetensors.torch import save_file
from torch import nn

from mdlib.models.pretrained import load_completely, load_weights

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
OLDER = {name: 0 * tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    "name, kept",
    [
        ("bare.pt", WEIGHTS),
        ("bare.pth", WEIGHTS),
        ("averaged.pt", {"model": OLDER, "ema": WEIGHTS, "opt": {"state": {}}, "step": 3}),
        ("model.ckpt", {"model": WEIGHTS, "state_dict": OLDER}),
        ("lightning.ckpt", {"state_dict": WEIGHTS, "epoch": 3}),
        ("bare.safetensors", WEIGHTS),
    ],
)
def test_weights_are_found_in_the_files_people_publish(tmp_path, name, kept):
    file = tmp_path / name
    (save_file if file.suffix == ".safetensors" else torch.save)(kept, file)
    for source in (file, str(file)):
        torch.testing.assert_close(load_weights(source), WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize("inside", [False, True])
def test_objects_are_not_unpickled(tmp_path, inside):
    file, trap = tmp_path / "trap.pt", Trap(tmp_path / "sprung")
    torch.save({"ema": WEIGHTS, "config": trap} if inside else trap, file)
    message = refused(file)
    assert "holds more than tensors, or none, and is not unpickled: convert it to .safetensors" in message
    assert not (tmp_path / "sprung").exists()


def refused(file, error=ValueError) -> str:
    with pytest.raises(error) as answer:
        load_weights(file)
    message = str(answer.value)
    assert str(file) in message and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<html>404: Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10300000000\n",
        b'{"weights": "elsewhere"}',
        b"\x80\x02.",
        b"U\xdcb\xb7: \x0e",
        b"PK\x03\x04 cut off",
        bytes(range(256)),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, suffix, content):
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    refused(file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_download_that_was_cut_off_is_refused(tmp_path, suffix):
    file = tmp_path / f"file{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:-20])
    refused(file)


@pytest.mark.parametrize("kept", [[torch.ones(2)], torch.ones(2), {"weight": 3}, {"ema": {"decay": 0.9}}, {0: "a"}])
def test_what_holds_no_weights_by_name_is_refused(tmp_path, kept):
    file = tmp_path / "other.pt"
    torch.save(kept, file)
    assert refused(file) == f"{file} holds no weights by name"


def test_a_missing_file_is_told(tmp_path):
    assert "no weights at" in refused(tmp_path / "absent.safetensors", FileNotFoundError)
    assert "no weights at" in refused(tmp_path, FileNotFoundError)  # a folder


def test_weights_that_fit_are_loaded():
    model = nn.Linear(3, 2)
    load_completely(model, WEIGHTS, "file.pt")
    torch.testing.assert_close(dict(model.state_dict()), WEIGHTS)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"weight": None}, "it misses weight"),
        ({"scale": torch.ones(2)}, "it does not know scale"),
        ({"bias": torch.ones(1)}, "of another shape are bias"),
        ({"bias": torch.ones(2, 1)}, "of another shape are bias"),
        ({f"x{n}": torch.ones(1) for n in range(5)}, "it does not know x0, x1, x2 and 2 more"),
        (
            {"weight": None, "scale": torch.ones(2), "bias": torch.ones(3)},
            "it does not know scale; it misses weight; of another shape are bias",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(changed, told):
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor for name, tensor in {**WEIGHTS, **changed}.items() if tensor is not None}
    with pytest.raises(ValueError) as answer:
        load_completely(model, weights, "file.pt")
    assert str(answer.value) == f"file.pt does not fit this Linear: {told}"
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
