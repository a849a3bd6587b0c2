"""Round the input to its grid, then run the layer in floating point: what training does.

    y = conv(fake_quantize(x), dequantize(codes)) + bias

A convolution pads *after* rounding, with real zeros rather than with the zero point, as the float
layer does. Sums are in floating point, so their last digits depend on the order in which a
processor adds.
"""

from typing import ClassVar

import torch
from torch import Tensor

from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.layers.base import Kernel, QuantizedLayer


def simulate(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Run `layer` on `x` in the type of `x`; gradients reach `x`."""
    if layer.scheme.input is not None:
        x = fake_quantize(x, input_grid(layer, layer.member()))
    return layer.apply_weight(x, layer.float_weight().to(x.dtype))


class Simulated(Kernel):
    """Runs any layer on any device; slower than the float layer, as it rounds before it runs."""

    name: ClassVar[str] = "simulated"
    kinds: ClassVar[frozenset[str] | None] = None

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Refuse nothing."""
        return None

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Need nothing: the layer's codes are read at each call."""

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run `layer` on `x`."""
        return simulate(layer, x)


def input_grid(layer: QuantizedLayer, member: int | Tensor) -> Grid:
    """Return the grid of a member's input; its numbers are tensors where `member` is one."""
    scheme = layer.scheme
    grids = [scheme.input_of(member)] if isinstance(member, int) else scheme.inputs()
    first = grids[0]
    assert first is not None, "this layer's input is in floating point"
    if isinstance(member, int):
        return first
    numbers = torch.tensor(
        [[g.scale, g.zero_point] for g in grids if g is not None], device=member.device
    )
    scale, zero_point = numbers.index_select(0, member.view(1))[0].unbind()
    return Grid(first.format, scale, zero_point)  # type: ignore[arg-type]  # the zero point is a tensor like the scale
