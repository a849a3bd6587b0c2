"""Run a layer on the 8-bit integer units of a CPU, through oneDNN.

The formula is that of `arithmetic`. oneDNN multiplies unsigned by signed bytes, sums exactly in
int32, and takes factor and constant along as it writes the output. A signed input is shifted by its
largest magnitude to become unsigned, and the shift is oneDNN's integer zero point, which it
subtracts in int32 as well.

Rounding the input is a dozen passes, and over a whole tensor they cost more than the product. They
are done piece by piece, so that a piece stays in the cache (`round_to_bytes`); one fused pass by
inductor is faster for uniform formats alone (docs/performance.md). Under ``torch.compile`` it is
fused with what comes before.

Without VNNI a CPU adds two products in 16 bits, so formats whose pair could overflow are refused
there.
"""

import platform
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from msfp_cli.formats.rounding import Grid, round_steps
from msfp_cli.layers.base import QuantizedLayer
from msfp_cli.layers.kernels.arithmetic import (
    BYTE,
    KINDS_IN_INTEGERS,
    Arithmetic,
    refusal_of_integers,
)
from msfp_cli.layers.kernels.geometry import Geometry, subtract_frame_
from msfp_cli.layers.kernels.kernel import Kernel
from msfp_cli.layers.kernels.reference import run_reference
from msfp_cli.layers.kernels.simulated import input_grid, simulate

_PIECE = (
    1 << 16
)  # elements for each thread: 256 KiB of float32, which stay in its cache from pass to pass
_INT16, _INT32 = 2**15 - 1, 2**31 - 1


class Cpu(Kernel):
    """Runs a layer as bytes times bytes.

    The weight is kept as oneDNN lays it out for its units, one byte each, and the layer's codes can
    go; with `keep_packed` the codes stay and are unpacked at every call.
    """

    name: ClassVar[str] = "cpu"
    kinds: ClassVar[frozenset[str] | None] = KINDS_IN_INTEGERS
    device: ClassVar[str | None] = "cpu"
    lays_out: ClassVar[bool] = True

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say why the layer cannot run here, or nothing."""
        reason = refusal_of_integers(layer)
        if reason is not None:
            return reason
        device = layer.get_buffer("weight_scale").device.type
        if device != "cpu":
            return f"the layer is on {device}"
        if platform.machine().lower() not in ("x86_64", "amd64") or not _has_onednn():
            return "it needs oneDNN on an x86 CPU"
        weight, grid = layer.scheme.weight, layer.scheme.input
        assert weight is not None and grid is not None, "refused just now"
        product = min(grid.format.largest * (1 + grid.format.signed), BYTE) * weight.largest
        if product * layer.weight_shape[1:].numel() > _INT32:
            return "the sum could overflow 32 bits"
        if 2 * product > _INT16 and not torch.cpu._is_vnni_supported():
            return f"{grid.format} times {weight} could overflow 16 bits, which this CPU adds in: it lacks VNNI"
        return None

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Lay out the weights, and fold scales, zero point and bias."""
        integers = [layer.integers(member) for member in range(layer.scheme.hub)]
        self.arithmetic = Arithmetic.of(layer, integers)
        self.holds_weight = not keep_packed
        self.weights = (
            [] if keep_packed else [_prepack(each, self.arithmetic.geometry) for each in integers]
        )

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the layer; a shape that oneDNN does not take goes to the reference, what needs gradients is simulated."""
        if torch.is_grad_enabled() and x.requires_grad:
            return simulate(layer, x)
        shift, geometry = self.arithmetic[:2]
        if not _is_taken(x, geometry):
            return run_reference(layer, x, self.arithmetic)
        member = layer.member()
        planes = round_to_bytes(x.detach(), input_grid(layer, member), shift)
        weights, numbers = (
            self.weights or [layer.integers(member)],
            self.arithmetic.of_member(member),
        )
        if isinstance(member, int) and not torch.compiler.is_compiling():
            y = _multiply(planes, weights[member if self.weights else 0], shift, *numbers, geometry)
        else:
            pick = torch.as_tensor(member).view(1) * self.holds_weight
            y = multiply_bytes(
                planes, weights, pick, shift, *numbers, geometry.flat() if geometry else []
            )
        return y.to(x.dtype)

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of one set of weights, int8, shape of the float weight."""
        plain = self.weights[int(member)].to_dense()
        return plain if self.arithmetic.geometry else plain.t().contiguous()


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _is_taken(x: Tensor, geometry: Geometry | None) -> bool:
    """Whether oneDNN takes an input of this shape.

    Its AMX convolution reads outside of the input where a window sees nothing but padding, and
    wrong rows where the output is one pixel wide and the stride is not 1 (oneDNN of torch 2.13;
    7,800 random shapes without these are exact).
    """
    if x.numel() == 0 or geometry is None:
        return x.numel() > 0
    if x.ndim != 4 or (geometry.stride[1] > 1 and geometry.output_size(*x.shape[2:])[1] == 1):
        return False
    sides = zip(x.shape[2:], geometry.kernel, geometry.padding, geometry.dilation, strict=True)
    return all(
        padding <= dilation * (kernel - 1) and dilation <= size
        for size, kernel, padding, dilation in sides
    )


def round_to_bytes(x: Tensor, grid: Grid, shift: int) -> list[Tensor]:
    """Round reals to the integers of their grid, plus a shift that makes them unsigned.

    Arguments:
        x: floating point, any shape.

    Returns:
        ``code_book[quantize(x, grid)] + shift`` as planes of bytes, the low one first: one plane
        where the integers fit, else two; uint8, shape and layout of `x`. A NaN gives any byte.
    """
    wide = grid.format.largest + shift > 255
    if torch.compiler.is_compiling():
        return _planes(
            round_steps((x.float() - grid.zero_point) / grid.scale, grid.format).add(shift), wide
        )
    channels_last = (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )
    dense = x.permute(0, 2, 3, 1) if channels_last else x.contiguous()
    values, planes = (
        dense.reshape(-1),
        [torch.empty(dense.shape, dtype=torch.uint8) for _ in range(1 + wide)],
    )
    size = _PIECE * torch.get_num_threads()
    for start in range(0, len(values), size):
        piece = values[start : start + size].float()
        steps = torch.sub(piece, grid.zero_point).div_(grid.scale)
        integers = round_steps(steps, grid.format).add_(shift)
        for plane, byte in zip(
            planes, _planes(integers, wide) if wide else [integers], strict=True
        ):
            plane.view(-1)[start : start + size] = byte
    return [plane.permute(0, 3, 1, 2) if channels_last else plane for plane in planes]


def _planes(integers: Tensor, wide: bool) -> list[Tensor]:
    """Part non-negative integers, given as float32, into one or two planes of bytes."""
    if not wide:
        return [integers.to(torch.uint8)]
    whole = integers.to(torch.int32)
    return [whole.bitwise_and(255).to(torch.uint8), whole.bitwise_right_shift(8).to(torch.uint8)]


def _prepack(integers: Tensor, geometry: Geometry | None) -> Tensor:
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


def _multiply(
    planes: Sequence[Tensor],
    weight: Tensor,
    shift: int,
    factor: Tensor,
    constant: Tensor,
    frame: Tensor | None,
    geometry: Geometry | None,
) -> Tensor:
    """Multiply bytes, and write ``factor * (sum - shift) + constant`` in float32."""
    packed = weight if weight.is_mkldnn else _prepack(weight, geometry)
    y = _product(planes[0], shift & BYTE, packed, factor, constant, geometry)
    for plane in planes[1:]:
        y.add_(_product(plane, shift >> 8, packed, factor * (BYTE + 1), None, geometry))
    if frame is not None and geometry is not None:
        subtract_frame_(y, frame, geometry, planes[0].shape[2], planes[0].shape[3])
    return y


def _product(
    plane: Tensor,
    shift: int,
    weight: Tensor,
    factor: Tensor,
    constant: Tensor | None,
    geometry: Geometry | None,
) -> Tensor:
    """Call oneDNN for one plane of bytes; where `constant` is None nothing is added.

    Its scale of the input stays 1, as some of its implementations multiply by that first and others
    by the product of both scales.
    """
    given = (1.0, shift, weight, factor, torch.zeros(len(factor), dtype=torch.int32), constant)
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    if geometry is None:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            plane.reshape(-1, plane.shape[-1]), *given, *output
        )
        return y.view(*plane.shape[:-1], -1)
    codes = plane.contiguous(memory_format=torch.channels_last)
    y = torch.ops.onednn.qconv2d_pointwise(codes, *given, *geometry[1:], *output)
    return y


@torch.library.custom_op("msfp::multiply_bytes", mutates_args=())
def multiply_bytes(
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    pick: Tensor,
    shift: int,
    factor: Tensor,
    constant: Tensor,
    frame: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    """Run `_multiply` with one of several weights, chosen by a tensor: one operator to `torch.compile`."""
    return _multiply(
        planes, weights[int(pick)], shift, factor, constant, frame, Geometry.from_flat(geometry)
    )


@multiply_bytes.register_fake
def _(
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    pick: Tensor,
    shift: int,
    factor: Tensor,
    constant: Tensor,
    frame: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    where, codes = Geometry.from_flat(geometry), planes[0]
    if where is None:
        return codes.new_empty((*codes.shape[:-1], len(factor)), dtype=torch.float32)
    shape = (codes.shape[0], len(factor), *where.output_size(codes.shape[2], codes.shape[3]))
    return torch.empty(
        shape, dtype=torch.float32, device=codes.device, memory_format=torch.channels_last
    )
