"""What a quantized layer computes, in integers; the formula that kernels share.

Every 4-bit grid but one is a small integer times a scale, so with input ``x = s_a q_a + z`` and
weight ``w = s_w q_w``

    y[o] = sum(q_a q_w[o]) * factor[o] + constant[o]
    factor[o] = s_a s_w[o]        constant[o] = z s_w[o] sum(q_w[o]) + bias[o]

The sum is exact. It is rounded to float32, multiplied, rounded, added to, and rounded again, in
this order, so kernels that follow it agree to the last bit, whoever multiplies. The few layers kept
at 8 bits may have integers of up to 16 bits: these are two planes of bytes, two such products, the
second without a constant, and their sum.

A convolution pads with real zeros, not with ``z``, so the constant is too much where the kernel
reaches over the edge. Those outputs are a frame, at most as wide as the padding: `subtract_frame_`
takes from them ``z s_w[o] sum(q_w[o])`` over the taps that lie outside, in four strips (derivation:
ours).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msfp_cli.formats.float_format import INPUT_INTEGER_BITS, WEIGHT_INTEGER_BITS
from msfp_cli.layers.base import QuantizedLayer
from msfp_cli.layers.kernels.geometry import Geometry, tap_sums

BYTE = 255
KINDS_IN_INTEGERS = frozenset({"linear", "conv2d"})


class Arithmetic(NamedTuple):
    """What an output is computed from besides the sums; the first dimension of each tensor is the set of weights."""

    shift: int  # makes the integers of a signed input unsigned
    geometry: Geometry | None  # None for a Linear layer
    factors: Tensor  # float32 (sets, out)
    constants: Tensor  # float32 (sets, out)
    frames: (
        Tensor | None
    )  # float32 (sets, out, kernel height, kernel width): the zero point's share of each tap

    @classmethod
    def of(cls, layer: QuantizedLayer, integers: Sequence[Tensor]) -> "Arithmetic":
        """Fold scales into one factor per output channel, zero point and bias into one constant.

        Arguments:
            integers: int8, shape of the layer's weight, one per set of weights.
        """
        grids = [grid for grid in layer.scheme.inputs() if grid is not None]
        geometry = layer.geometry()
        scale = layer.get_buffer("weight_scale").double()
        factors = torch.stack([(scale * grid.scale).float() for grid in grids])
        zeros = [(scale * grid.zero_point).view(-1, 1, 1) for grid in grids]
        shares = [tap_sums(weight) * zero for weight, zero in zip(integers, zeros, strict=True)]
        bias = 0.0 if layer.bias is None else layer.bias.detach().double()
        constants = torch.stack([(share.sum(dim=(1, 2)) + bias).float() for share in shares])
        framed = (
            geometry is not None
            and any(geometry.padding)
            and any(grid.zero_point for grid in grids)
        )
        fmt = grids[0].format
        frames = torch.stack(shares).float() if framed else None
        return cls(fmt.largest if fmt.signed else 0, geometry, factors, constants, frames)

    def of_member(self, member: int | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return factor, constant and frame of one set of weights, an index or a tensor of one."""
        found = [None if many is None else _pick(many, member) for many in self[2:]]
        return found[0], found[1], found[2]  # type: ignore[return-value]  # the first two are tensors


def _pick(many: Tensor, member: int | Tensor) -> Tensor:
    return many[member] if isinstance(member, int) else many.index_select(0, member.view(1))[0]


def refusal_of_integers(layer: QuantizedLayer) -> str | None:
    """Say why a layer cannot be computed in integers, or nothing."""
    weight, grid = layer.scheme.weight, layer.scheme.input
    if weight is None or grid is None:
        return f"the {'weight' if weight is None else 'input'} is in floating point"
    for fmt, integer_bits in ((weight, WEIGHT_INTEGER_BITS), (grid.format, INPUT_INTEGER_BITS)):
        if fmt.integer_bits > integer_bits:
            return f"{fmt} takes integers of {fmt.integer_bits} bits"
    return refusal_of_geometry(layer)


def refusal_of_geometry(layer: QuantizedLayer) -> str | None:
    """Say why a convolution slides as no kernel in integers does, or nothing."""
    try:
        layer.geometry()
    except ValueError as error:
        return str(error)
    return None
