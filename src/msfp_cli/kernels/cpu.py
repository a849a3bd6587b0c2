"""Run a layer on the 8-bit integer units of a CPU, through oneDNN.

Every 4-bit grid but one is a small integer times a scale, so with input ``x = s_a q_a + z`` and weight ``w = s_w q_w``

    y[o] = s_a s_w[o] sum(q_a q_w[o]) + z s_w[o] sum(q_w[o]) + bias[o]

is a product of unsigned and signed bytes, summed exactly in int32, and a constant per output channel. oneDNN takes the
scales and the constant along as it writes the output. A signed input is shifted by its largest magnitude to become
unsigned, and the shift is oneDNN's integer zero point, which it subtracts in int32 as well. The few layers kept at 8
bits may have integers of up to 16 bits: these are two planes of bytes, two products, and a sum.

A convolution pads with real zeros, not with ``z``, so the constant is too much where the kernel reaches over the edge.
Those outputs are a frame, at most as wide as the padding: `subtract_frame_` takes from them ``z s_w[o] sum(q_w[o])``
over the taps that lie outside, in four strips (derivation: ours).

Rounding the input is a dozen passes, and over a whole tensor they cost more than the product. They are done piece by
piece, so that a piece stays in the cache (`round_to_bytes`): 2.2 ms for 2.6 million elements on two cores, where one
fused pass by inductor took 3.3. Under ``torch.compile`` it is fused with what comes before.

Without VNNI a CPU adds two products in 16 bits, so formats whose pair could overflow are refused there.
"""

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from msfp_cli.formats import INPUT_INTEGER_BITS, WEIGHT_INTEGER_BITS
from msfp_cli.kernels.geometry import Geometry, subtract_frame_, tap_sums
from msfp_cli.kernels.kernel import Kernel
from msfp_cli.kernels.reference import input_grid, run_reference
from msfp_cli.rounding import Grid, round_steps

if TYPE_CHECKING:
    from msfp_cli.layers import QuantizedLayer

_PIECE = 1 << 16  # elements for each thread: 256 KiB of float32, which stay in its cache from pass to pass
_INT16, _INT32 = 2**15 - 1, 2**31 - 1


class Cpu(Kernel):
    """Runs a layer as bytes times bytes.

    The weight is kept as oneDNN lays it out for its units, one byte each, and the layer's codes can go; with
    `keep_packed` the codes stay and are unpacked at every call.
    """

    name: ClassVar[str] = "cpu"
    device: ClassVar[str | None] = "cpu"

    @staticmethod
    def refusal(layer: "QuantizedLayer") -> str | None:
        """Say why the layer cannot run here, or nothing."""
        weight, grid = layer.parameters_of.weight, layer.parameters_of.input
        if weight is None or grid is None:
            return f"the {'weight' if weight is None else 'input'} is in floating point"
        device = layer.get_buffer("weight_scale").device.type
        if device != "cpu":
            return f"the layer is on {device}"
        if platform.machine().lower() not in ("x86_64", "amd64") or not _has_onednn():
            return "it needs oneDNN on an x86 CPU"
        for fmt, integer_bits in ((weight, WEIGHT_INTEGER_BITS), (grid.format, INPUT_INTEGER_BITS)):
            if fmt.integer_bits > integer_bits:
                return f"{fmt} takes integers of {fmt.integer_bits} bits"
        if isinstance(layer, nn.Conv2d) and Geometry.of(layer) is None:
            return f"padding {layer.padding!r} in mode {layer.padding_mode!r}"
        product = min(grid.format.largest * (1 + grid.format.signed), 255) * weight.largest
        if product * layer.weight_shape[1:].numel() > _INT32:
            return "the sum could overflow 32 bits"
        if 2 * product > _INT16 and not torch.cpu._is_vnni_supported():
            return f"{grid.format} times {weight} could overflow 16 bits, which this CPU adds in: it lacks VNNI"
        return None

    def __init__(self, layer: "QuantizedLayer", *, keep_packed: bool) -> None:
        """Lay out the weights, and fold zero point and bias into one constant per output channel."""
        grids = [grid for grid in layer.parameters_of.inputs() if grid is not None]
        fmt = grids[0].format
        self.holds_weight = not keep_packed
        self.shift = fmt.largest if fmt.signed else 0
        self.geometry = Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None
        self.scales = torch.tensor([grid.scale for grid in grids])
        self.weight_scale = layer.get_buffer("weight_scale")
        self.weights: list[Tensor] = []
        taps = []
        for member, grid in enumerate(grids):
            integers = layer.integers(member)
            taps.append(tap_sums(integers) * (self.weight_scale.double() * grid.zero_point).view(-1, 1, 1))
            if not keep_packed:
                self.weights.append(_prepack(integers, self.geometry))
        bias = 0.0 if layer.bias is None else layer.bias.detach().double()
        self.constants = torch.stack([(tap.sum(dim=(1, 2)) + bias).float() for tap in taps])
        framed = self.geometry is not None and any(self.geometry.padding) and any(grid.zero_point for grid in grids)
        self.frames = torch.stack(taps).float() if framed else None

    def __call__(self, layer: "QuantizedLayer", x: Tensor) -> Tensor:
        """Run the layer; what needs gradients, or a shape that oneDNN does not take, goes to the reference."""
        if not _is_taken(x, self.geometry) or (torch.is_grad_enabled() and x.requires_grad):
            return run_reference(layer, x)
        member = layer.member()
        planes = round_to_bytes(x.detach(), input_grid(layer, member), self.shift)
        weights = self.weights or [layer.integers(member)]
        if isinstance(member, int) and not torch.compiler.is_compiling():
            weight = weights[member if self.weights else 0]
            frame = None if self.frames is None else self.frames[member]
            scale, constant = float(self.scales[member]), self.constants[member]
            y = _multiply(planes, weight, scale, self.shift, self.weight_scale, constant, frame, self.geometry)
        else:
            y = self._multiply_picked(planes, weights, torch.as_tensor(member).view(1))
        return y.to(x.dtype)

    def _multiply_picked(self, planes: list[Tensor], weights: list[Tensor], member: Tensor) -> Tensor:
        """Multiply by the weight of a member that is a tensor: what `torch.compile` sees."""
        scale, constant = (many.index_select(0, member)[0] for many in (self.scales, self.constants))
        frame = None if self.frames is None else self.frames.index_select(0, member)[0]
        pick = member if self.weights else torch.zeros_like(member)
        geometry = self.geometry.flat() if self.geometry else []
        y: Tensor = multiply_bytes(
            planes, weights, pick, scale, self.shift, self.weight_scale, constant, frame, geometry
        )
        return y

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of one set of weights, int8, shape of the float weight."""
        plain = self.weights[int(member)].to_dense()
        return plain if self.geometry else plain.t()


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _is_taken(x: Tensor, geometry: Geometry | None) -> bool:
    """Whether oneDNN takes an input of this shape.

    Its AMX convolution reads outside of the input where a window sees nothing but padding, and wrong rows where the
    output is one pixel wide and the stride is not 1 (oneDNN of torch 2.13; 7,800 random shapes without these are
    exact).
    """
    if x.numel() == 0 or geometry is None:
        return x.numel() > 0
    if x.ndim != 4 or (geometry.stride[1] > 1 and geometry.output_size(*x.shape[2:])[1] == 1):
        return False
    sides = zip(x.shape[2:], geometry.kernel, geometry.padding, geometry.dilation, strict=True)
    return all(padding <= dilation * (kernel - 1) and dilation <= size for size, kernel, padding, dilation in sides)


def round_to_bytes(x: Tensor, grid: Grid, shift: int) -> list[Tensor]:
    """Round reals to the integers of their grid, plus a shift that makes them unsigned.

    Arguments:
        x: floating point, any shape.

    Returns:
        ``code_book[quantize(x, grid)] + shift`` as planes of bytes, the low one first: one plane where the integers
        fit, else two; uint8, shape and layout of `x`. A NaN gives any byte.
    """
    wide = grid.format.largest + shift > 255
    if torch.compiler.is_compiling():
        return _planes(round_steps((x.float() - grid.zero_point) / grid.scale, grid.format).add(shift), wide)
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    dense = x.permute(0, 2, 3, 1) if channels_last else x.contiguous()
    values, planes = dense.reshape(-1), [torch.empty(dense.shape, dtype=torch.uint8) for _ in range(1 + wide)]
    size = _PIECE * torch.get_num_threads()
    for start in range(0, len(values), size):
        piece = values[start : start + size].float()
        steps = torch.sub(piece, grid.zero_point).div_(grid.scale)
        integers = round_steps(steps, grid.format).add_(shift)
        for plane, byte in zip(planes, _planes(integers, wide) if wide else [integers], strict=True):
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
    packed: Tensor = torch.ops.onednn.qconv_prepack(integers, ones, 1.0, 0, stride, padding, dilation, groups, None)
    return packed


def _multiply(
    planes: Sequence[Tensor],
    weight: Tensor,
    scale: float,
    shift: int,
    weight_scale: Tensor,
    constant: Tensor,
    frame: Tensor | None,
    geometry: Geometry | None,
) -> Tensor:
    """Multiply bytes, and write ``scale * weight_scale * (sum - shift) + constant`` in float32."""
    packed = weight if weight.is_mkldnn else _prepack(weight, geometry)
    no_zero_points = torch.zeros(len(weight_scale), dtype=torch.int32)
    y: Tensor | None = None
    for i, plane in enumerate(planes):
        given = (scale * 256**i, (shift >> 8 * i) & 255, packed, weight_scale, no_zero_points)
        product = _product(plane, given, None if i else constant, geometry)
        y = product if y is None else y.add_(product)
    assert y is not None, "there is at least one plane"
    if frame is not None and geometry is not None:
        subtract_frame_(y, frame, geometry, planes[0].shape[2], planes[0].shape[3])
    return y


def _product(plane: Tensor, given: tuple[Any, ...], constant: Tensor | None, geometry: Geometry | None) -> Tensor:
    """Call oneDNN for one plane of bytes; where `constant` is None nothing is added."""
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    if geometry is None:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(plane.reshape(-1, plane.shape[-1]), *given, constant, *output)
        return y.view(*plane.shape[:-1], -1)
    codes = plane.contiguous(memory_format=torch.channels_last)
    y = torch.ops.onednn.qconv2d_pointwise(codes, *given, constant, *geometry[1:], *output)
    return y


@torch.library.custom_op("msfp::multiply_bytes", mutates_args=())
def multiply_bytes(
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    pick: Tensor,
    scale: Tensor,
    shift: int,
    weight_scale: Tensor,
    constant: Tensor,
    frame: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    """Run `_multiply` with one of several weights, chosen by a tensor: one operator to `torch.compile`."""
    where = Geometry.from_flat(geometry)
    return _multiply(planes, weights[int(pick)], float(scale), shift, weight_scale, constant, frame, where)


@multiply_bytes.register_fake
def _(
    planes: Sequence[Tensor],
    weights: Sequence[Tensor],
    pick: Tensor,
    scale: Tensor,
    shift: int,
    weight_scale: Tensor,
    constant: Tensor,
    frame: Tensor | None,
    geometry: Sequence[int],
) -> Tensor:
    where, codes = Geometry.from_flat(geometry), planes[0]
    if where is None:
        return codes.new_empty((*codes.shape[:-1], len(weight_scale)), dtype=torch.float32)
    shape = (codes.shape[0], len(weight_scale), *where.output_size(codes.shape[2], codes.shape[3]))
    return torch.empty(shape, dtype=torch.float32, device=codes.device, memory_format=torch.channels_last)
