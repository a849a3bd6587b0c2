"""The reference of kernels: compute a layer as `arithmetic` says, with exact float products.

Integers, and sums of their products, are exact in float32 up to 2^24 and in float64 up to 2^53, in
whatever order they are added. So this kernel has the very bits of one on 8-bit units, needs none,
and is slow. Pictures are laid out as oneDNN does, channels last, because the norm that follows adds
in the order that it finds.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid, round_steps
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.arithmetic import (
    BYTE,
    KINDS_IN_INTEGERS,
    Arithmetic,
    refusal_of_integers,
    unsigned_planes,
)
from msfp_cli.layers.kernels.geometry import Geometry, frame_of, subtract_frame_
from msfp_cli.layers.kernels.simulated import input_grids, simulate

_EXACT_IN_FLOAT32 = 2**24


class Reference(Kernel):
    """Runs a layer on any device; a NaN in the input is one in the output."""

    name: ClassVar[str] = "reference"
    kinds: ClassVar[frozenset[str] | None] = KINDS_IN_INTEGERS

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say why the layer cannot run here, or nothing."""
        return refusal_of_integers(layer)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Fold scales and zero point; the layer's codes are read at each call."""
        integers = [layer.integers(member) for member in range(layer.scheme.hub)]
        self.arithmetic = Arithmetic.of(layer, integers)

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run `layer` on `x`."""
        return run_reference(layer, x, self.arithmetic)


def run_reference(layer: QuantizedLayer, x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Run `layer` on `x`; what needs gradients or is compiled is simulated.

    Compilers do not keep the last digits.

    Arguments:
        arithmetic: of this layer.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return simulate(layer, x)
    geometry = arithmetic.geometry
    if geometry is not None and x.ndim == 3:
        return run_reference(layer, x[None], arithmetic)[0]
    variant = layer.variant()
    (grid,) = input_grids(layer, variant)
    factor, constant, frame = arithmetic.of_variant(variant, layer.kernel_bias)
    along = (-1, 1, 1) if geometry else (-1,)
    weight = layer.integers(layer.member()).to(_exact_type(layer, grid.format))
    planes = _planes(x.detach().float(), grid, arithmetic.shift)
    y = _sums(planes[0], weight, geometry).mul_(factor.view(along)).add_(constant.view(along))
    for plane in planes[1:]:
        y.add_(_sums(plane, weight, geometry).mul_((factor * (BYTE + 1)).view(along)))
    if frame is not None and geometry is not None:
        subtract_frame_(y, frame_of(frame, geometry, x.shape[2], x.shape[3]))
    return y.to(x.dtype)


def _planes(x: Tensor, grid: Grid, shift: int) -> list[Tensor]:
    """Round an input as a kernel on bytes does; planes lose the bytes of the shift again."""
    steps = torch.sub(x, grid.zero_point).div_(grid.scale)
    integers = round_steps(steps, grid.format)
    planes = unsigned_planes(integers.add_(shift), grid.format.largest + shift)
    shift_bytes = (shift & BYTE, shift >> 8)
    return [plane.sub_(byte) for plane, byte in zip(planes, shift_bytes, strict=False)]


def _exact_type(layer: QuantizedLayer, fmt: FloatFormat) -> torch.dtype:
    """Return a type in which the layer's sums are exact."""
    product = min(fmt.largest, BYTE) * layer.largest_integer
    most = product * layer.weight_shape[1:].numel()
    return torch.float32 if most <= _EXACT_IN_FLOAT32 else torch.float64


def _sums(integers: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """Multiply and add up in the weight's type, then round to float32."""
    x = integers.to(weight.dtype)
    if geometry is None:
        return functional.linear(x, weight).float()
    _, stride, padding, dilation, groups = geometry
    sums = functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    return sums.float().contiguous(memory_format=torch.channels_last)
