"""A call that is repeated from a layer on gives what the whole call gives, for less work."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import record_few
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.prefix import RepeatedCall
from tiny_pipelines import BUILDERS


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_a_change_of_any_layer_does_what_it_does_in_the_whole_call(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    _, denoiser, calls = record_few(tiny(name), tmp_path, num_images=2)
    call = calls[-1]
    repeated = RepeatedCall(denoiser, call)
    before = {key: vars(module).keys() for key, module in denoiser.named_modules()}
    unchanged = replay(denoiser, call)
    for layer_name, layer in find_layers(denoiser).items():
        weight = layer.weight.data
        layer.weight.data = weight + 0.5 * weight.abs().amax() * torch.sign(weight)
        whole = replay(denoiser, call)
        assert torch.equal(repeated.from_layer(layer_name), whole), layer_name
        layer.weight.data = weight
        assert torch.equal(repeated.from_layer(layer_name), unchanged)
    assert {key: vars(module).keys() for key, module in denoiser.named_modules()} == before


class Chain(nn.Module):
    """Three blocks of a layer each, one after another; the second may write into its input."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        self.in_place = in_place
        self.runs = 0
        for block in self.blocks:
            block[0].register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.runs += 1

    def forward(self, sample: torch.Tensor, timestep: int, return_dict: bool = True) -> object:
        for number, block in enumerate(self.blocks):
            if self.in_place and number == 1:
                sample.mul_(2)
            sample = block(sample)
        return (sample,)


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_blocks_before_the_layer_do_not_run_unless_their_output_is_written_to(
    in_place: bool,
) -> None:
    torch.manual_seed(0)
    chain = Chain(in_place=in_place)
    arguments = {"sample": torch.randn(2, 4), "timestep": 1}
    call = DenoiserCall(component="unet", timestep=1, arguments=arguments, output=torch.ones(2, 4))
    expected = replay(chain, call)
    repeated = RepeatedCall(chain, call)
    chain.runs = 0
    assert torch.equal(repeated.from_layer("blocks.2.0"), expected)
    assert chain.runs == (2 if in_place else 1)
    chain.runs = 0
    assert torch.equal(repeated.from_layer("blocks.0.0"), expected)
    assert chain.runs == 3
