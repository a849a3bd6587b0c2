"""A weight in its file: the same results, and in memory only as long as somebody uses it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from msfp_cli.errors import CheckpointError
from msfp_cli.layers.streamed import stream_, weight_in_memory

LAYERS = {
    "linear": (nn.Linear(6, 4), torch.randn(2, 6)),
    "conv2d": (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)),
    "embedding": (nn.Embedding(7, 4), torch.tensor([0, 6])),
}


def streamed(layer: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Write a layer's weight into a file, and leave it there."""
    save_file({"layer.weight": layer.weight.detach().clone()}, path)
    stream_(layer, path, "layer.weight", torch.empty((), dtype=dtype))
    return layer


def is_away(layer: nn.Module) -> bool:
    return bool(layer.weight.isnan().all()) and layer.weight.untyped_storage().nbytes() < 8


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_gives_what_it_gave_and_keeps_nothing(kind: str, tmp_path: Path) -> None:
    layer, x = LAYERS[kind]
    expected = layer(x)
    weight = layer.weight.detach().clone()
    streamed(layer, tmp_path / "weights.safetensors")
    for _ in range(2):
        assert is_away(layer)
        assert layer.weight.shape == weight.shape
        assert torch.equal(layer(x), expected)
    with weight_in_memory(layer), weight_in_memory(layer):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer.weight, weight)
    assert is_away(layer)


def test_a_weight_is_converted_to_the_type_to_compute_in(tmp_path: Path) -> None:
    layer = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
    expected = layer.weight.detach().float()
    streamed(layer, tmp_path / "weights.safetensors", torch.float32)
    assert layer.weight.dtype == torch.float32
    with weight_in_memory(layer):
        assert torch.equal(layer.weight, expected)


def test_a_call_that_fails_lets_go_of_the_weight(tmp_path: Path) -> None:
    layer = streamed(nn.Linear(6, 4), tmp_path / "weights.safetensors")
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    assert is_away(layer)


def test_a_file_that_is_cut_is_refused_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    layer = streamed(nn.Linear(6, 4), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="download the model again"):
        layer(torch.randn(2, 6))


def test_a_weight_in_memory_stays_as_it_is() -> None:
    layer = nn.Linear(6, 4)
    with weight_in_memory(layer):
        layer.weight.data += 1
    assert not layer.weight.isnan().any()
