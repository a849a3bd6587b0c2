"""What a quantized layer computes, in integers; the formula that kernels share.

Every 4-bit grid but one is a small integer times a scale, so with input ``x = s_a q_a + z`` and
weight ``w = s_w q_w``

    y[o] = sum(q_a q_w[o]) * factor[o] + constant[o]
    factor[o] = s_a s_w[o]        constant[o] = z s_w[o] sum(q_w[o]) + bias[o]

The bias is the model's parameter, so it is read at each call; the rest is computed once. The sum is
exact. It is rounded to float32, multiplied, rounded, added to, and rounded again, in this order, so
kernels that follow it agree to the last bit, whoever multiplies. The few layers kept at 8 bits may
have integers of up to 16 bits: these are two planes of bytes, two such products, the second without
a constant, and their sum.

A convolution pads with real zeros, not with ``z``, so the constant is too much where the kernel
reaches over the edge. Those outputs are a frame, at most as wide as the padding: `subtract_frame_`
takes from them ``z s_w[o] sum(q_w[o])`` over the taps that lie outside, in four strips (derivation:
ours).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msfp_cli.formats.float_format import BYTE_BITS, INPUT_INTEGER_BITS, FloatFormat
from msfp_cli.layers.base import QuantizedLayer
from msfp_cli.layers.kernels.geometry import Geometry, tap_sums
from msfp_cli.layers.scheme import LayerScheme

BYTE = 255
_INT32 = 2**31 - 1
KINDS_IN_INTEGERS = frozenset({"linear", "conv2d"})


class Arithmetic(NamedTuple):
    """What an output is computed from besides the sums; a tensor has a row per variant.

    Arguments:
        shift: what makes the integers of a signed input unsigned, of every variant.
        geometry: how a convolution slides; None for a Linear layer.
        factors: float32 ``(variants, out)``.
        shares: the zero point's share of an output, float64 ``(variants, out)``.
        frames: the zero point's share of each tap, float32 ``(variants, out, kernel height, kernel
            width)``; None where no window sees padding, or where that makes no difference.
    """

    shift: int
    geometry: Geometry | None
    factors: Tensor
    shares: Tensor
    frames: Tensor | None

    @classmethod
    def of(cls, layer: QuantizedLayer, integers: Sequence[Tensor]) -> "Arithmetic":
        """Fold scales into one factor per output channel, and the zero point into one share.

        Arguments:
            integers: int8, shape of the layer's weight, one per member.
        """
        grids = [grid for grid in layer.scheme.inputs() if grid is not None]
        scale = layer.get_buffer("weight_scale").double()
        sums = [tap_sums(weight) for weight in integers]
        shares = [
            sums[variant % len(sums)] * (scale * grid.zero_point).view(-1, 1, 1)
            for variant, grid in enumerate(grids)
        ]
        fmt = widest_input(layer.scheme)
        geometry = layer.geometry()
        pads = geometry is not None and any(geometry.padding)
        return cls(
            shift=fmt.largest if fmt.signed else 0,
            geometry=geometry,
            factors=of_one_shape(torch.stack([(scale * grid.scale).float() for grid in grids])),
            shares=of_one_shape(torch.stack([share.sum(dim=(1, 2)) for share in shares])),
            frames=(
                of_one_shape(torch.stack(shares).float())
                if pads and any(grid.zero_point for grid in grids)
                else None
            ),
        )

    def of_variant(
        self, variant: int | Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return factor, constant and frame of one variant, an index or a tensor of one.

        Arguments:
            bias: the layer's, as it is now.
        """
        frame = None if self.frames is None else _pick(self.frames, variant)
        constant = add_bias(_pick(self.shares, variant), bias)
        return _pick(self.factors, variant), constant, frame


def of_one_shape(tensor: Tensor) -> Tensor:
    """Mark a tensor of a kernel: its shape is not among those that change.

    With ``torch.compile(dynamic=True)`` a picture of 16 pixels would else share a symbol with 16
    channels, and a graph would serve that size alone. This is what ``torch._dynamo.mark_static``
    does, whose import takes a second.
    """
    indices = set(range(tensor.ndim))
    vars(tensor).update(_dynamo_static_indices=indices, _has_dynamo_dim_marking=True)
    return tensor


def add_bias(shares: Tensor, bias: Tensor | None) -> Tensor:
    """Return constants, the zero point's shares plus the bias; float32 ``(..., out)``.

    Arguments:
        shares: float64 ``(..., out)``.
        bias: ``(out,)``, as it is now.
    """
    return shares.float() if bias is None else (shares + bias.detach()).float()


def _pick(rows: Tensor, variant: int | Tensor) -> Tensor:
    return rows[variant] if isinstance(variant, int) else rows.index_select(0, variant.view(1))[0]


def widest_input(scheme: LayerScheme) -> FloatFormat:
    """Return the format whose integers are the largest, of an input that is quantized."""
    formats = [grid.format for grid in (scheme.input, scheme.lifted_input) if grid is not None]
    return max(formats, key=lambda fmt: fmt.largest)


def unsigned_planes(integers: Tensor, largest: int) -> list[Tensor]:
    """Part integers into planes of bytes, the low one first: ``low + 256 high``.

    Arguments:
        integers: float32, 0 to `largest`.

    Returns:
        float32, where a NaN stays one: one plane if the integers fit into a byte, else two.
    """
    if largest <= BYTE:
        return [integers]
    high = integers.div(BYTE + 1).floor_()
    return [integers.sub(high, alpha=BYTE + 1), high]


def refusal_of_integers(layer: QuantizedLayer) -> str | None:
    """Say why a layer cannot be computed in integers, or nothing."""
    if layer.kind not in KINDS_IN_INTEGERS:
        return f"layers of the kind {layer.kind!r} run in floating point"
    weight = layer.scheme.weight
    if weight is None or layer.scheme.input is None:
        return f"the {'weight' if weight is None else 'input'} is in floating point"
    widest = widest_input(layer.scheme)
    for fmt, integer_bits in ((weight, BYTE_BITS), (widest, INPUT_INTEGER_BITS)):
        if fmt.integer_bits > integer_bits:
            return f"{fmt} takes integers of {fmt.integer_bits} bits"
    return refusal_of_geometry(layer)


def refusal_of_overflow(layer: QuantizedLayer, byte: int) -> str | None:
    """Say that 32 bits might not hold a layer's sums, or nothing.

    Arguments:
        byte: the largest magnitude of an input's byte.
    """
    largest = byte * layer.largest_integer * layer.weight_shape[1:].numel()
    return "the sum could overflow 32 bits" if largest > _INT32 else None


def refusal_of_geometry(layer: QuantizedLayer) -> str | None:
    """Say why a convolution slides as no kernel in integers does, or nothing."""
    try:
        layer.geometry()
    except ValueError as error:
        return str(error)
    return None
