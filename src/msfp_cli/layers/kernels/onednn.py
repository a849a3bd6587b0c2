"""Multiply bytes by bytes through oneDNN: Linear layers and two-dimensional convolutions.

oneDNN multiplies unsigned by signed bytes, sums exactly in int32, and takes factor and constant
along as it writes the output. A signed input is shifted by its largest magnitude to become
unsigned, and the shift is oneDNN's integer zero point, which it subtracts in int32 as well.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfp_cli.layers.kernels.arithmetic import BYTE
from msfp_cli.layers.kernels.geometry import Geometry, frame_of, subtract_frame_


def is_taken(x: Tensor, geometry: Geometry | None, channels: int) -> bool:
    """Whether oneDNN takes an input of this shape; of one that no layer takes it says little.

    Arguments:
        channels: of the inputs that the layer takes.

    Its AMX convolution reads outside of the input where a window sees nothing but padding, and
    wrong rows where the output is one pixel wide and the stride is not 1 (oneDNN of torch 2.13;
    20,104 random shapes without these are exact, written as float32 and as bfloat16).
    """
    if x.numel() == 0 or geometry is None:
        return x.numel() > 0 and x.ndim > 0 and x.shape[-1] == channels
    if x.ndim != 4 or x.shape[1] != channels:
        return False
    rows, columns = geometry.output_size(*x.shape[2:])
    if min(rows, columns) < 1 or (geometry.stride[1] > 1 and columns == 1):
        return False
    sides = zip(x.shape[2:], geometry.kernel, geometry.padding, geometry.dilation, strict=True)
    return all(
        padding <= dilation * (kernel - 1) and dilation <= size
        for size, kernel, padding, dilation in sides
    )


def prepack(integers: Tensor, geometry: Geometry | None) -> Tensor:
    """Lay a weight out as oneDNN wants it; an opaque tensor of as many bytes."""
    if geometry is None:
        linear: Tensor = torch.ops.onednn.qlinear_prepack(integers, None)
        return linear
    _, stride, padding, dilation, groups = geometry
    ones = torch.ones(integers.shape[0])
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        integers, ones, 1.0, 0, stride, padding, dilation, groups, None
    )
    return packed


class Operands(NamedTuple):
    """What one call multiplies: flat, as an operator of torch takes it.

    Arguments:
        planes: bytes of the input, see `to_bytes.round_to_bytes`.
        weights: int8, or laid out by oneDNN; one per member, or only the weight that is used.
        member: an index, or while the call is compiled a tensor of one.
        shift: what was added to the integers of the input.
        factor, constant, frame: see `Arithmetic.of_variant`.
        geometry: `Geometry.flat`, empty for a Linear layer.
    """

    planes: Sequence[Tensor]
    weights: Sequence[Tensor]
    member: int | Tensor
    shift: int
    factor: Tensor
    constant: Tensor
    frame: Tensor | None
    geometry: Sequence[int]

    def multiply(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiply bytes, and return ``factor * (sum - shift) + constant``.

        Arguments:
            dtype: of the output, to which the result is rounded once from float32; see `writes`.
        """
        geometry = Geometry.from_flat(self.geometry)
        weight = self.weights[int(self.member) if len(self.weights) > 1 else 0]
        packed = weight if weight.is_mkldnn else prepack(weight, geometry)
        low, *further = self.planes
        y = _product(low, self.shift & BYTE, packed, self.factor, self.constant, geometry, dtype)
        for plane in further:
            factor = self.factor * (BYTE + 1)
            y.add_(_product(plane, self.shift >> 8, packed, factor, None, geometry, dtype))
        if self.frame is not None and geometry is not None:
            subtract_frame_(y, frame_of(self.frame, geometry, low.shape[2], low.shape[3]))
        return y

    def writes(self, dtype: torch.dtype) -> bool:
        """Whether `multiply` can write a type, with no sum to follow that needs float32."""
        is_final = len(self.planes) == 1 and self.frame is None
        return is_final and dtype == torch.bfloat16 and writes_bfloat16()

    def output(self) -> Tensor:
        """Return a tensor with the shape and layout of what `multiply` returns."""
        geometry = Geometry.from_flat(self.geometry)
        low = self.planes[0]
        if geometry is None:
            return low.new_empty((*low.shape[:-1], len(self.factor)), dtype=torch.float32)
        size = geometry.output_size(low.shape[2], low.shape[3])
        return torch.empty(
            (low.shape[0], len(self.factor), *size),
            dtype=torch.float32,
            device=low.device,
            memory_format=torch.channels_last,
        )


@lru_cache(maxsize=1)
def writes_bfloat16() -> bool:
    """Whether oneDNN can write bfloat16 on this CPU: it rounds to it as torch does, in AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=256)
def _zeros(size: int) -> Tensor:
    """Return the zero points of a weight, which has none."""
    return torch.zeros(size, dtype=torch.int32)


def _product(
    plane: Tensor,
    shift: int,
    weight: Tensor,
    factor: Tensor,
    constant: Tensor | None,
    geometry: Geometry | None,
    dtype: torch.dtype,
) -> Tensor:
    """Call oneDNN for one plane of bytes; where `constant` is None nothing is added.

    Its scale of the input stays 1, as some of its implementations multiply by that first and others
    by the product of both scales.
    """
    operands = (1.0, shift, weight, factor, _zeros(len(factor)), constant)
    output: tuple[Any, ...] = (1.0, 0, dtype, "none", [], "")
    if geometry is None:
        rows = plane.reshape(-1, plane.shape[-1])
        y: Tensor = torch.ops.onednn.qlinear_pointwise(rows, *operands, *output)
        return y.view(*plane.shape[:-1], -1)
    picture = plane.contiguous(memory_format=torch.channels_last)
    y = torch.ops.onednn.qconv2d_pointwise(picture, *operands, *geometry[1:], *output)
    return y


# `Operands.multiply` with a member that is a tensor: one operator to `torch.compile`.
multiply_bytes = torch.library.custom_op(
    "msfp::multiply_bytes",
    lambda *operands: Operands(*operands).multiply(),
    mutates_args=(),
    schema="(Tensor[] planes, Tensor[] weights, Tensor member, int shift, Tensor factor, "
    "Tensor constant, Tensor? frame, int[] geometry) -> Tensor",
)
multiply_bytes.register_fake(lambda *operands: Operands(*operands).output())
