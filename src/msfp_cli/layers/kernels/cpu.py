"""Run a layer on the 8-bit integer units of a CPU, through oneDNN.

The formula is that of `arithmetic`. oneDNN multiplies unsigned by signed bytes, sums exactly in
int32, and takes factor and constant along as it writes the output. A signed input is shifted by its
largest magnitude to become unsigned, and the shift is oneDNN's integer zero point, which it
subtracts in int32 as well.

Rounding the input is eight passes, and over a whole tensor they cost more than the product. They
are done piece by piece, so that a piece stays in the cache (`round_to_bytes`). Under
``torch.compile`` it is one pass, three times as fast (docs/performance.md), fused with what comes
before.

Without VNNI a CPU adds two products in 16 bits, so formats whose pair could overflow are refused
there.
"""

import platform
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from msfp_cli.formats.float_format import BYTE_BITS
from msfp_cli.formats.rounding import Grid, round_steps
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.arithmetic import (
    BYTE,
    KINDS_IN_INTEGERS,
    Arithmetic,
    of_one_shape,
    refusal_of_integers,
    refusal_of_overflow,
    unsigned_planes,
    widest_input,
)
from msfp_cli.layers.kernels.geometry import Geometry, Strip, frame_of, subtract_frame_
from msfp_cli.layers.kernels.reference import run_reference
from msfp_cli.layers.kernels.simulated import input_grids, is_lifted, simulate

# Elements for each thread: 256 KiB of float32, which stay in its cache from pass to pass.
_PIECE = 1 << 16
_MAX_FRAMES = 8  # of a layer, each of a variant and a size of picture
_INT8 = 2**7 - 1
_INT16 = 2**15 - 1


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
        return refusal_of_integers(layer) or _refusal_here(layer) or _refusal_of_sums(layer)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Lay out the weights, and fold scales and zero point."""
        integers = [layer.integers(member) for member in range(layer.scheme.hub)]
        self.arithmetic = Arithmetic.of(layer, integers)
        self.holds_weight = not keep_packed
        self.weights: list[Tensor] = []
        self._frames: dict[tuple[int | Tensor, torch.Size], list[Strip]] = {}
        if self.holds_weight:
            packed = [_prepack(each, self.arithmetic.geometry) for each in integers]
            self.weights = list(map(of_one_shape, packed))

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the layer.

        A shape that oneDNN does not take goes to the reference, what needs gradients is simulated.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return simulate(layer, x)
        if not _is_taken(x, self.arithmetic.geometry):
            return run_reference(layer, x, self.arithmetic)
        variant = layer.variant()
        grids = input_grids(layer, variant)
        if torch.compiler.is_compiling():
            lifted = torch.as_tensor(is_lifted(layer, variant))
            planes = _round_compiled(x.detach(), grids, lifted, self.arithmetic.shift)
            member = torch.as_tensor(layer.member())
            y: Tensor = multiply_bytes(*self._operands(layer, planes, variant, member))
        else:
            planes = round_to_bytes(x.detach(), grids[0], self.arithmetic.shift)
            operands = self._operands(layer, planes, variant, layer.member())
            y = operands._replace(frame=None).multiply()
            subtract_frame_(y, self._frame(operands.frame, variant, x.shape[2:]))
        return y.to(x.dtype)

    def _frame(
        self, taps: Tensor | None, variant: int | Tensor, size: torch.Size
    ) -> Sequence[Strip]:
        """Return what the edges of an output have too much; the last few sizes are remembered."""
        if taps is None or self.arithmetic.geometry is None:
            return ()
        frame = self._frames.get((variant, size))
        if frame is None:
            frame = frame_of(taps, self.arithmetic.geometry, *size)
            if len(self._frames) == _MAX_FRAMES:
                self._frames = {}
            self._frames[variant, size] = frame
        return frame

    def _operands(
        self,
        layer: QuantizedLayer,
        planes: Sequence[Tensor],
        variant: int | Tensor,
        member: int | Tensor,
    ) -> "CpuOperands":
        """Gather what is multiplied; of weights that are kept packed, one is unpacked here."""
        geometry = self.arithmetic.geometry
        factor, constant, frame = self.arithmetic.of_variant(variant, layer.kernel_bias)
        return CpuOperands(
            planes=planes,
            weights=self.weights if self.holds_weight else [layer.integers(member)],
            member=member,
            shift=self.arithmetic.shift,
            factor=factor,
            constant=constant,
            frame=frame,
            geometry=[] if geometry is None else geometry.flat(),
        )

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of a member's weight, int8, shape of the float weight."""
        plain = self.weights[int(member)].to_dense()
        return plain if self.arithmetic.geometry else plain.t().contiguous()


def _refusal_here(layer: QuantizedLayer) -> str | None:
    """Say why no layer can run on this device, or nothing."""
    device = layer.get_buffer("weight_scale").device.type
    if device != "cpu":
        return f"the layer is on {device}"
    return None if runs_on_this_cpu() else "it needs oneDNN on an x86 CPU"


def runs_on_this_cpu() -> bool:
    """Whether this machine has what the kernel needs."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and bool(torch.backends.mkldnn.is_available())


def _refusal_of_sums(layer: QuantizedLayer) -> str | None:
    """Say where the sums of a layer could overflow, or nothing."""
    weight = layer.weight_format()
    fmt = widest_input(layer.scheme)
    largest_byte = min(fmt.largest * (1 + fmt.signed), BYTE)
    if reason := refusal_of_overflow(layer, largest_byte):
        return reason
    if 2 * largest_byte * layer.largest_integer > _INT16 and not torch.cpu._is_vnni_supported():
        return (
            f"products of {fmt} and {weight} could overflow the 16-bit sums of this CPU: "
            "it lacks VNNI"
        )
    return None


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
    is_channels_last = (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )
    dense = x.permute(0, 2, 3, 1) if is_channels_last else x.contiguous()
    planes = _round_by_pieces(dense, grid, shift)
    return [plane.permute(0, 3, 1, 2) if is_channels_last else plane for plane in planes]


def _round_compiled(x: Tensor, grids: Sequence[Grid], lifted: Tensor, shift: int) -> list[Tensor]:
    """Do as `round_to_bytes`, in operators that a compiler fuses.

    Arguments:
        grids: the usual one, and the one for lifted inputs, if there is one.
        lifted: whether to use that, of one element.
    """
    x = x.float()
    integers = [round_steps((x - grid.zero_point) / grid.scale, grid.format) for grid in grids]
    chosen = integers[0] if len(grids) == 1 else torch.where(lifted, integers[1], integers[0])
    largest = max(grid.format.largest for grid in grids) + shift
    return [plane.to(torch.uint8) for plane in unsigned_planes(chosen.add(shift), largest)]


def _round_by_pieces(dense: Tensor, grid: Grid, shift: int) -> list[Tensor]:
    """Round a contiguous tensor piece by piece, so that a piece stays in the cache."""
    planes = [torch.empty(dense.shape, dtype=torch.uint8)]
    if grid.format.largest + shift > BYTE:
        planes.append(torch.empty_like(planes[0]))
    size = _PIECE * torch.get_num_threads()
    flat = [tensor.reshape(-1).split(size) for tensor in (dense, *planes)]
    for values, *parts in zip(*flat, strict=True):
        piece = values.float()
        if grid.zero_point:
            steps = torch.sub(piece, grid.zero_point).div_(grid.scale)
        else:
            steps = piece / grid.scale
        _write_bytes(round_steps(steps, grid.format), grid.format.largest, shift, parts)
    return planes


def _write_bytes(integers: Tensor, largest: int, shift: int, planes: Sequence[Tensor]) -> None:
    """Write integers plus a shift as bytes.

    They become signed integers first, of a byte where they fit without the shift: torch converts
    float32 to uint8 one value at a time, which takes as long as four passes.

    Arguments:
        integers: float32, of magnitudes up to `largest`; with the shift, at least 0.
        planes: uint8, to write the bytes to: of all bits of the sums, the low ones first.
    """
    low, *further = planes
    if not further and largest <= _INT8:
        low.view(torch.int8).copy_(integers)
        if shift:
            low.add_(shift)
        return
    shifted = integers.int().add_(shift)
    low.copy_(shifted)
    for plane in further:
        plane.copy_(shifted.bitwise_right_shift_(BYTE_BITS))


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


class CpuOperands(NamedTuple):
    """What one call multiplies: flat, as an operator of torch takes it.

    Arguments:
        planes: bytes of the input, see `round_to_bytes`.
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

    def multiply(self) -> Tensor:
        """Multiply bytes, and return ``factor * (sum - shift) + constant`` in float32."""
        geometry = Geometry.from_flat(self.geometry)
        weight = self.weights[int(self.member) if len(self.weights) > 1 else 0]
        packed = weight if weight.is_mkldnn else _prepack(weight, geometry)
        low, *further = self.planes
        y = _product(low, self.shift & BYTE, packed, self.factor, self.constant, geometry)
        for plane in further:
            factor = self.factor * (BYTE + 1)
            y.add_(_product(plane, self.shift >> 8, packed, factor, None, geometry))
        if self.frame is not None and geometry is not None:
            subtract_frame_(y, frame_of(self.frame, geometry, low.shape[2], low.shape[3]))
        return y

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
) -> Tensor:
    """Call oneDNN for one plane of bytes; where `constant` is None nothing is added.

    Its scale of the input stays 1, as some of its implementations multiply by that first and others
    by the product of both scales.
    """
    operands = (1.0, shift, weight, factor, _zeros(len(factor)), constant)
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    if geometry is None:
        rows = plane.reshape(-1, plane.shape[-1])
        y: Tensor = torch.ops.onednn.qlinear_pointwise(rows, *operands, *output)
        return y.view(*plane.shape[:-1], -1)
    picture = plane.contiguous(memory_format=torch.channels_last)
    y = torch.ops.onednn.qconv2d_pointwise(picture, *operands, *geometry[1:], *output)
    return y


# `CpuOperands.multiply` with a member that is a tensor: one operator to `torch.compile`.
multiply_bytes = torch.library.custom_op(
    "msfp::multiply_bytes",
    lambda *operands: CpuOperands(*operands).multiply(),
    mutates_args=(),
    schema="(Tensor[] planes, Tensor[] weights, Tensor member, int shift, Tensor factor, "
    "Tensor constant, Tensor? frame, int[] geometry) -> Tensor",
)
multiply_bytes.register_fake(lambda *operands: CpuOperands(*operands).output())
