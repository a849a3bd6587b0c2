"""A quantized layer in operators that OpenVINO turns into a product of bytes.

OpenVINO's low-precision transformations look for a ``FakeQuantize`` over the integers of a byte
before a product whose weight is a constant of bytes times a scale. They make one kernel of 8-bit
units of it, which sums exactly in int32. The formula is that of `kernels.arithmetic`: the weight is
given as ``q_w factor``, so that the factor is applied to the finished sum.

The integers of an input are found without looking at bits, which OpenVINO cannot do: the rounding
of float32 itself is used, at the step that each value has in its format (`_to_fewer_bits`). All of
this becomes one pass over the input, which ends in bytes.

The products of all members of a hub are computed, and one result is selected, because OpenVINO lays
a weight out once, when it compiles. An input that is lifted at some timesteps is rounded both ways,
and its bytes are selected, so the product is computed once; its factor changes with the timestep
and is applied to the sum. A layer that cannot be a product of bytes is written in floating point.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from msfp_cli.formats.float_format import BYTE_BITS, FloatFormat
from msfp_cli.formats.rounding import Grid, dequantize, per_channel
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.arithmetic import (
    BYTE,
    Arithmetic,
    refusal_of_integers,
    refusal_of_overflow,
    widest_input,
)
from msfp_cli.layers.kernels.geometry import Geometry
from msfp_cli.layers.kernels.simulated import is_lifted

_SIGNED = (-128, 127)
_UNSIGNED = (0, BYTE)
_MANTISSA_BITS = 23  # of a float32
_ALTERNATING = 26214.0  # 0.4 * 2^16: in units of 2^n and rounded, it is odd where n is, up to 2^16


class Traced(Kernel):
    """Runs a layer while its denoiser is traced; what it computes can be compared with others."""

    name: ClassVar[str] = "traced"
    kinds: ClassVar[frozenset[str] | None] = None

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Refuse nothing."""
        return None

    @staticmethod
    def reason(layer: QuantizedLayer) -> str | None:
        """Say why a layer that multiplies is computed in floating point, or nothing."""
        if layer.scheme.lookup:
            return None
        return refusal_of_integers(layer) or refusal_of_overflow(layer, BYTE)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool = True) -> None:
        """Unpack the weights, and fold scales and zero point."""
        members = range(layer.scheme.hub)
        self.arithmetic: Arithmetic | None = None
        if layer.scheme.weight is None:
            self.weights = [layer.float_weight()]
        elif layer.weight_format().integer_bits > BYTE_BITS:
            self.weights = [dequantize(layer.codes(m), layer.weight_grid()) for m in members]
        else:
            self.weights = [layer.integers(member) for member in members]
            if not layer.scheme.lookup and self.reason(layer) is None:
                self.arithmetic = Arithmetic.of(layer, self.weights)

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the variant that the route says, an index or a tensor of one."""
        variant = layer.variant()
        if isinstance(variant, int):
            return self._run(layer, x, variant % layer.scheme.hub, is_lifted(layer, variant))
        member = variant % layer.scheme.hub
        lifted = is_lifted(layer, variant)
        y = self._run(layer, x, 0, lifted)
        for other in range(1, layer.scheme.hub):
            y = torch.where(member == other, self._run(layer, x, other, lifted), y)
        return y

    def _run(self, layer: QuantizedLayer, x: Tensor, member: int, lifted: bool | Tensor) -> Tensor:
        """Run a member.

        Arguments:
            lifted: whether its input is.
        """
        weight = self.weights[member]
        grid = layer.scheme.input_of(member)
        if self.arithmetic is not None and grid is not None:
            return _run_in_bytes(layer, x, self.arithmetic, weight, member, lifted)
        if grid is not None:
            rounded = integers_of(x, grid) * grid.scale + grid.zero_point
            other = layer.scheme.lifted_input
            if other is not None:
                to_8_bits = integers_of(x, other) * other.scale + other.zero_point
                rounded = _select(lifted, to_8_bits, rounded)
            x = rounded
        if weight.dtype == torch.int8:
            scale = per_channel(layer.get_buffer("weight_scale"), weight.ndim)
            weight = weight.float() * scale
        return layer.apply_weight(x, weight)


def _select(lifted: bool | Tensor, of_lifted: Tensor, usual: Tensor) -> Tensor:
    """Return one of two tensors, by a plain condition or by a tensor of one."""
    if isinstance(lifted, bool):
        return of_lifted if lifted else usual
    return torch.where(lifted, of_lifted, usual)


def _run_in_bytes(
    layer: QuantizedLayer,
    x: Tensor,
    arithmetic: Arithmetic,
    weight: Tensor,
    member: int,
    lifted: bool | Tensor,
) -> Tensor:
    """Multiply bytes; of wide integers, both planes at once."""
    geometry = arithmetic.geometry
    usual = layer.scheme.input_of(member)
    other = layer.scheme.lifted_input
    assert usual is not None, "it is quantized"
    fmt = widest_input(layer.scheme)
    factor, constant, frame = arithmetic.of_variant(member, layer.kernel_bias)
    integers = integers_of(x, usual)
    ratio: Tensor | None = None
    if other is not None:
        integers = _select(lifted, integers_of(x, other), integers)
        of_lifted = arithmetic.of_variant(member + layer.scheme.hub, layer.kernel_bias)
        constant = _select(lifted, of_lifted[1], constant)
        if frame is not None and of_lifted[2] is not None:
            frame = _select(lifted, of_lifted[2], frame)
        ratio = _select(lifted, of_lifted[0], factor)
        factor = torch.ones_like(factor)
    low, *further = planes_of(integers, fmt)
    codes = _say_bytes(torch.cat([low, *further]) if further else low, fmt)
    y = _product(codes, weight, factor, geometry)
    along = (-1, 1, 1) if geometry else (-1,)
    if ratio is not None:
        y = y * ratio.view(along)
    if further:
        y, upper = y.chunk(2)
        y = y + constant.view(along) + upper * (BYTE + 1)
    else:
        y = y + constant.view(along)
    return y if frame is None or geometry is None else y - _outside(x, frame, geometry)


def integers_of(x: Tensor, grid: Grid) -> Tensor:
    """Round an input to the integers of its grid.

    Arguments:
        x: float32, any shape.

    Returns:
        float32, shape of `x`.
    """
    fmt = grid.format
    steps = (x - grid.zero_point) / grid.scale
    inside = steps.clamp(-fmt.largest if fmt.signed else 0, fmt.largest)
    return inside.round() if fmt.is_uniform else _to_fewer_bits(inside, fmt)


def _to_fewer_bits(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """Round multiples of the smallest step to a format's mantissa; a tie goes to the even code.

    With m bits of mantissa, a float32 that is 2^(23-m) times as large as a value has the step of
    the value's octave for its last bit: subtracting the value rounds it, and the second difference
    is exact (Veltkamp's splitting; Dekker 1971, doi:10.1007/BF01397083). Both have the same sign,
    so the first difference may leave the octave at its lower end only, next to a power of two,
    which the finer step holds, too. Small values share the step of the subnormals: for them it is
    a constant.

    Without a mantissa, ties lie between powers of two, and the code is even for every second one:
    there the last bit of the large number has to alternate from octave to octave.

    Arguments:
        steps: float32, at most the largest magnitude.
    """
    constant = 1.5 * 2**fmt.mantissa_bits
    if fmt.signed:
        share = torch.where(steps.abs() >= constant, steps, constant)
    else:
        share = steps.clamp_min(constant)
    large = share * 2.0 ** (_MANTISSA_BITS - fmt.mantissa_bits)
    if not fmt.mantissa_bits:
        large = large + _ALTERNATING
    return large - (large - steps)


def _range_of(fmt: FloatFormat) -> tuple[int, int]:
    return _SIGNED if fmt.signed else _UNSIGNED


def planes_of(integers: Tensor, fmt: FloatFormat) -> list[Tensor]:
    """Part integers into bytes, ``low + 256 high``; signed ones if the format is signed.

    Returns:
        float32: one plane if the integers fit into a byte, else two.
    """
    lowest, highest = _range_of(fmt)
    if fmt.largest <= highest:
        return [integers]
    upper = ((integers - lowest) / (BYTE + 1)).floor()
    return [integers - upper * (BYTE + 1), upper]


def _say_bytes(integers: Tensor, fmt: FloatFormat) -> Tensor:
    """Say that integers are bytes: the identity on them, and what OpenVINO looks for."""
    return torch.fake_quantize_per_tensor_affine(integers, 1.0, 0, *_range_of(fmt))


def _product(codes: Tensor, weight: Tensor, factor: Tensor, geometry: Geometry | None) -> Tensor:
    """Multiply bytes, and take the factor of each output channel along in the weight."""
    scaled = weight.float() * per_channel(factor, weight.ndim)
    if geometry is None:
        return functional.linear(codes, scaled)
    _, stride, padding, dilation, groups = geometry
    return functional.conv2d(codes, scaled, None, stride, padding, dilation, groups)


def _outside(x: Tensor, taps: Tensor, geometry: Geometry) -> Tensor:
    """Return the zero point's share of the taps that lie outside the picture.

    Arguments:
        taps: ``(out, kernel height, kernel width)``.

    Returns:
        ``(1, out, rows, columns)``.
    """
    up, left = geometry.padding
    inside = torch.zeros_like(x[:1, :1])
    mask = functional.pad(inside, (left, left, up, up), value=1.0)
    return functional.conv2d(mask, taps[:, None], None, geometry.stride, 0, geometry.dilation)
