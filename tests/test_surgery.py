import pytest
import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError
from msfp_cli.formats import FloatFormat
from msfp_cli.layers import LayerParameters, QuantConv2d, QuantLinear
from msfp_cli.rounding import Grid
from msfp_cli.surgery import find_layers, replace_layers_

PARAMETERS = LayerParameters(weight=FloatFormat.parse("e2m1"), input=Grid(FloatFormat.parse("ue2m2"), 0.1, -0.2))


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Masked(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class Plain(nn.Linear):
    """A subclass that only adds an attribute."""

    extra = 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 6)), nn.LayerNorm(6)])
        self.odd = nn.ModuleDict({"doubling": Doubling(4, 4), "masked": Masked(3, 3, 1), "plain": Plain(4, 4)})
        self.upsample = nn.ConvTranspose2d(4, 4, 2)
        self.line = nn.Conv1d(4, 4, 1)
        self.embedding = nn.Embedding(3, 4)


def test_finds_linear_and_conv2d_in_order_of_definition() -> None:
    assert list(find_layers(Net())) == ["conv_in", "blocks.0.0", "blocks.0.2", "odd.plain"]


def test_found_layers_are_the_modules_themselves() -> None:
    net = Net()
    assert all(net.get_submodule(name) is layer for name, layer in find_layers(net).items())


def test_replaces_only_the_named_layers_in_place() -> None:
    net = Net()
    before = {name: module for name, module in net.named_modules() if name}
    new = replace_layers_(net, {"conv_in": PARAMETERS, "blocks.0.2": PARAMETERS, "odd.plain": PARAMETERS})
    assert [type(layer) for layer in new.values()] == [QuantConv2d, QuantLinear, QuantLinear]
    for name, module in net.named_modules():
        if name:
            assert module is (new[name] if name in new else before[name])
    assert list(find_layers(net)) == ["blocks.0.0"]
    assert all(layer.parameters_of == PARAMETERS for layer in new.values())


def test_new_layers_share_the_bias_and_have_the_settings_of_the_old() -> None:
    net = Net()
    old = find_layers(net)
    new = replace_layers_(net, dict.fromkeys(old, PARAMETERS))
    for name, layer in new.items():
        assert layer.bias is old[name].bias
        assert layer.weight_shape == old[name].weight.shape
    conv = new["conv_in"]
    assert isinstance(conv, QuantConv2d)
    assert (conv.stride, conv.padding, conv.bias) == ((2, 2), (1, 1), None)


def test_replaced_network_runs() -> None:
    net = Net()
    old = find_layers(net)
    for name, layer in replace_layers_(net, dict.fromkeys(old, PARAMETERS)).items():
        layer.store_(old[name].weight.detach(), torch.full(layer.weight_shape[:1], 0.05))
    assert net.blocks[0](torch.ones(2, 4)).shape == (2, 6)
    assert net.conv_in(torch.ones(1, 3, 8, 8)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("name", ["conv_out", "blocks.0.1", "blocks.7.0", "odd.doubling", "upsample"])
def test_unknown_layer_is_named_and_nothing_is_replaced(name: str) -> None:
    net = Net()
    before = dict(net.named_modules())
    with pytest.raises(CheckpointError, match=f"Net has no layer '{name}'.*another model"):
        replace_layers_(net, {"conv_in": PARAMETERS, name: PARAMETERS})
    assert dict(net.named_modules()) == before
