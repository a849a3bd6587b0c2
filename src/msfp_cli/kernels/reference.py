"""The reference semantics: round the input to its grid, then run the layer in floating point.

    y = conv(fake_quantize(x), dequantize(codes)) + bias

A convolution pads *after* rounding, with real zeros rather than with the zero point, as the float layer does. Kernels
on 8-bit units compute the same sum as ``s_a * s_w[o] * sum(q_a * q_w[o])`` plus a zero-point term.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from msfp_cli.rounding import fake_quantize

if TYPE_CHECKING:
    from msfp_cli.layers import QuantizedLayer


def run(layer: "QuantizedLayer", x: Tensor) -> Tensor:
    """Run `layer` on `x` in the type of `x`."""
    grid = layer.parameters_of.input_of(layer.member())
    if grid is not None:
        x = fake_quantize(x, grid)
    return layer.apply_weight(x, layer.weight.to(x.dtype))
