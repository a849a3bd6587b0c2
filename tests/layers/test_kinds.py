"""Every kind of layer: what it computes, what it counts, and that it is replaced and restored."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.layers.kernels.registry import KERNELS, choose_kernel
from msfp_cli.layers.quantized import KINDS, kind_of
from msfp_cli.layers.replace import quantized_layers, store_layers_
from msfp_cli.layers.scheme import LayerScheme

E2M1 = FloatFormat.parse("e2m1")
INPUT = Grid(FloatFormat.parse("ue2m2"), 0.125, -0.28125)
# Layers of sound, pictures and videos, with their settings, and the shape of an input.
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d, {"padding": 1, "stride": 2}, (2, 4, 9)),
    "conv1d circular": (nn.Conv1d, {"padding": 1, "padding_mode": "circular"}, (2, 4, 9)),
    "conv3d": (nn.Conv3d, {"padding": (1, 0, 1), "groups": 2}, (2, 4, 3, 5, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d, {"stride": 2, "output_padding": 1}, (2, 4, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d, {"stride": 2, "padding": 1}, (2, 4, 5, 6)),
    "conv_transpose2d grouped": (
        nn.ConvTranspose2d,
        {"groups": 2, "dilation": 2, "bias": False},
        (2, 4, 5, 6),
    ),
    "conv_transpose3d": (nn.ConvTranspose3d, {"stride": (1, 2, 1)}, (1, 4, 2, 3, 4)),
}


class Net(nn.Module):
    """A model of one layer, called by keyword."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        y: Tensor = self.layer(input=x)
        return y


def built(name: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    layer_class, settings, shape = LAYERS[name]
    return Net(layer_class(4, 6, 3, **settings)), torch.randn(shape)


def scales_of(layer: Any) -> Tensor:  # noqa: ANN401 (a layer)
    return layer.weight.detach().flatten(1).abs().amax(dim=1) / E2M1.largest


@pytest.mark.parametrize("name", LAYERS)
def test_layer_rounds_weight_and_input_and_computes_as_torch_does(name: str) -> None:
    net, x = built(name)
    float_net = copy.deepcopy(net)
    scale = scales_of(net.layer)
    store_layers_(net, {"layer": LayerScheme(weight=E2M1, input=INPUT)}, {"layer": scale})
    (layer,) = quantized_layers(net).values()
    assert isinstance(layer, type(float_net.layer)) and layer.kind == name.split()[0]
    weight = float_net.layer.weight
    grid = Grid(E2M1, scale.view(-1, *[1] * (weight.ndim - 1)))
    with torch.no_grad():
        weight.copy_(fake_quantize(weight, grid))
        torch.testing.assert_close(net(x), float_net(fake_quantize(x, INPUT)))
    assert layer.get_buffer("weight_codes").numel() == -(-weight.numel() // 2)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("name", LAYERS)
def test_simulated_runs_the_layer_and_every_other_kernel_refuses_it(name: str, kernel: str) -> None:
    net, x = built(name)
    scale = scales_of(net.layer)
    store_layers_(net, {"layer": LayerScheme(weight=E2M1, input=INPUT)}, {"layer": scale})
    (layer,) = quantized_layers(net).values()
    chosen, reason = choose_kernel(layer, kernel)
    assert chosen.name == "simulated"
    assert (kernel == "simulated") == (reason == "")
    assert reason == "" or reason.endswith(f"it does not run layers of the kind {layer.kind!r}")
    layer.prepare_(kernel)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@pytest.mark.parametrize("name", LAYERS)
def test_multiply_adds_are_those_of_ones(name: str) -> None:
    net, x = built(name)
    layer: Any = net.layer
    layer.padding = (0,) * (x.ndim - 2)  # what is padded is counted, but is not summed up
    with torch.no_grad():
        layer.weight.fill_(1)
        if layer.bias is not None:
            layer.bias.zero_()
        layer.padding_mode = "zeros"
        output = layer(torch.ones_like(x))
    assert kind_of(layer).multiply_adds(layer, x, output) == int(output.sum())


def test_kinds_have_names_of_their_own_and_know_their_twins() -> None:
    assert len(KINDS) == 8
    for name, kind in KINDS.items():
        assert name == kind.name == kind.quantized_class.kind
        assert issubclass(kind.quantized_class, kind.float_class)
