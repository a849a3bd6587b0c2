"""Run a layer on the 8-bit units of an NVIDIA GPU.

As on a CPU, ``y = s_a s_w[o] sum(q_a q_w[o])`` plus a constant, and the sum is exact in int32. An
input is rounded to signed bytes in one pass, and convolved in another that writes the layer's
output, scaled and in its type: two Triton kernels (`triton_ops`). Triton comes with torch's builds
for CUDA. Where it is missing, and on GPUs before Ampere, the same arithmetic runs as torch's own
operators (`int8`), in more passes; a warning says so once.

Under ``torch.compile`` rounding is left to the compiler, which fuses it with the norm or activation
before it. Compiled code may divide with an error in the last bit, so a value on the border between
two codes may fall to the other side, in our layers as in simulated ones.
"""

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels import int8
from msfp_cli.layers.kernels.arithmetic import (
    BYTE,
    KINDS_IN_INTEGERS,
    add_bias,
    refusal_of_geometry,
    refusal_of_overflow,
)
from msfp_cli.layers.kernels.geometry import Geometry, num_window_kinds
from msfp_cli.layers.kernels.simulated import simulate

_INT32 = 2**31 - 1
_TURING = (7, 5)
_AMPERE = (8, 0)
_MOST_KINDS = 2048  # constants per output channel


class Cuda(Kernel):
    """Runs a layer as signed bytes times signed bytes.

    The weight is kept as one byte each, and the layer's codes can go; with `keep_packed` the codes
    stay and are unpacked at every call.
    """

    name: ClassVar[str] = "cuda"
    kinds: ClassVar[frozenset[str] | None] = KINDS_IN_INTEGERS
    device: ClassVar[str | None] = "cuda"
    lays_out: ClassVar[bool] = True

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say why the layer cannot run here, or nothing."""
        weight = layer.scheme.weight
        grid = layer.scheme.input
        if weight is None or grid is None:
            return f"the {'weight' if weight is None else 'input'} is in floating point"
        if layer.scheme.lifted_input is not None:
            return "its input has other bits at some timesteps"
        return refusal_of_device(layer, _TURING) or _refusal_of_numbers(layer, weight, grid.format)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Lay out the weights, and fold scales and zero point."""
        grids = [grid for grid in layer.scheme.inputs() if grid is not None]
        members = range(len(grids))
        scale = layer.get_buffer("weight_scale")
        geometry = layer.geometry()
        self.is_linear = geometry is None
        self.geometry = geometry or int8.POINT
        self.format = grids[0].format
        self.shape = layer.weight_shape
        self.holds_weight = not keep_packed
        self.fused = triton_ops(scale.device) is not None
        integers = [layer.integers(member) for member in members]
        self.tensors = int8.Int8Layer.of(integers, grids, scale, self.geometry)
        numbers = [[grid.scale, grid.zero_point] for grid in grids]
        self.numbers = torch.tensor(numbers, dtype=torch.float32, device=scale.device)
        self.members = torch.arange(len(grids), device=scale.device)
        if keep_packed:
            self.drop_weights_()
        keep_in_place(*self.tensors, self.numbers, self.members)

    def drop_weights_(self) -> None:
        """Let go of the weights: the layer keeps its codes, or another kernel holds them."""
        self.tensors = self.tensors._replace(weights=self.tensors.weights.new_empty(0))

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the layer on its input, or simulate it, see `simulates`."""
        if self.simulates(x):
            return simulate(layer, x)
        member = layer.member()
        at = self.members[member : member + 1] if isinstance(member, int) else member.view(1)
        operands = self._operands(layer, x, at)
        if torch.compiler.is_compiling():
            y: Tensor = multiply_bytes(*operands)
        else:
            y = operands.multiply()
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1) if self.is_linear else y

    def simulates(self, x: Tensor) -> bool:
        """Whether an input needs gradients, is empty, or goes beyond 2^31 elements.

        An input of another shape than the layer takes is simulated, too, which refuses it.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return True
        return not (self._fits_rows(x) if self.is_linear else self._fits_picture(x))

    def _fits_rows(self, x: Tensor) -> bool:
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:
            return False
        output = x.numel() // x.shape[-1] * self.shape[0] if x.numel() else 0
        return 0 < x.numel() and max(x.numel(), output) <= _INT32

    def _fits_picture(self, x: Tensor) -> bool:
        if x.ndim != 4 or x.numel() == 0 or x.shape[1] != self.shape[1] * self.geometry.groups:
            return False
        rows, columns = self.geometry.output_size(x.shape[2], x.shape[3])
        output = x.shape[0] * self.shape[0] * rows * columns
        return rows > 0 and columns > 0 and max(x.numel(), output) <= _INT32

    def _operands(self, layer: QuantizedLayer, x: Tensor, at: Tensor) -> "CudaOperands":
        """Gather what is multiplied.

        Arguments:
            at: the member that runs, int64 ``(1,)`` on the layer's device.
        """
        planes = self.round(x, at)
        constants = add_bias(self.tensors.constants, layer.kernel_bias)
        tensors = self.tensors._replace(constants=constants)
        if not self.holds_weight:  # unpack one, and pick what goes with it
            weights = int8.lay_out(layer.integers(at))[None]
            tensors = int8.Int8Layer(weights, *(rows.index_select(0, at) for rows in tensors[1:]))
            at = torch.zeros_like(at)
        is_channels_last = not x.is_contiguous() and x.is_contiguous(
            memory_format=torch.channels_last
        )
        return CudaOperands(
            planes,
            *tensors,
            member=at,
            shift=int8.shift_of(self.format),
            geometry=self.geometry.flat(),
            dtype=x.dtype,
            channels_last=self.is_linear or is_channels_last,
            fused=self.fused,
        )

    def round(self, x: Tensor, at: Tensor, exponent: int | None = None) -> list[Tensor]:
        """Round an input, a picture or rows, as `int8.round_to_bytes` does."""
        picture = x.detach()
        if self.is_linear:
            picture = picture.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        ops = triton_ops(x.device) if self.fused and not torch.compiler.is_compiling() else None
        if ops is None:
            numbers = self.numbers.index_select(0, at)[0]
            return int8.round_to_bytes(picture, numbers, self.format, exponent)
        planes: list[Tensor] = ops.round_to_bytes(picture, self.numbers, at, self.format, exponent)
        return planes

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of a member's weight, int8, shape of the float weight."""
        return int8.take_back(self.tensors.weights[int(member)], self.shape)


def refusal_of_device(layer: QuantizedLayer, least: tuple[int, int]) -> str | None:
    """Say why no layer can run where this one is, or nothing.

    Arguments:
        least: the lowest compute capability.
    """
    device = layer.get_buffer("weight_scale").device
    if device.type != "cuda":
        return f"the layer is on {device.type}"
    if torch.version.hip:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        return f"the GPU has compute capability {_dotted(capability)}, below {_dotted(least)}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _refusal_of_numbers(layer: QuantizedLayer, weight: FloatFormat, fmt: FloatFormat) -> str | None:
    for numbers, largest in ((weight, 127), (fmt, int8.WIDEST)):
        if numbers.largest > largest:
            return f"{numbers} takes integers up to {numbers.largest}"
    reason = refusal_of_geometry(layer)
    if reason is not None:
        return reason
    geometry = layer.geometry() or int8.POINT
    kinds = num_window_kinds(geometry.kernel[0]) * num_window_kinds(geometry.kernel[1])
    if any(geometry.padding) and kinds > _MOST_KINDS:
        return f"padding around windows of {geometry.kernel[0]}x{geometry.kernel[1]}"
    return refusal_of_overflow(layer, max(128, min(fmt.largest, BYTE)))


def keep_in_place(*tensors: Tensor) -> None:
    """Let CUDA graphs read tensors where they are, without a copy; they must not be replaced."""
    for tensor in tensors:
        if tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor)  # type: ignore[attr-defined, no-untyped-call]


def triton_ops(device: torch.device) -> ModuleType | None:
    """Return the Triton kernels, if they run on a device: a GPU from Ampere on, or interpreted."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE:
        return _import_triton_ops()
    return _import_triton_ops() if os.environ.get("TRITON_INTERPRET") == "1" else None


@lru_cache(maxsize=1)
def _import_triton_ops() -> ModuleType | None:
    try:
        return import_module("msfp_cli.layers.kernels.triton_ops")
    except ImportError:
        warnings.warn(
            "Triton is not installed, so quantized layers take slower operators of torch",
            stacklevel=2,
        )
        return None


class CudaOperands(NamedTuple):
    """What one call multiplies: flat, as an operator of torch takes it.

    Arguments:
        planes: bytes of the input, ``(batch, height, width, channels)``.
        weights, factors, constants, offsets: see `int8.Int8Layer`.
        member: whose weight, int64 ``(1,)``.
        shift: what was subtracted from the integers of the input.
        geometry: `Geometry.flat`; a Linear layer's is that of `int8.POINT`.
        dtype, channels_last: type and layout of the output.
        fused: whether Triton's kernels run.
    """

    planes: Sequence[Tensor]
    weights: Tensor
    factors: Tensor
    constants: Tensor
    offsets: Tensor
    member: Tensor
    shift: int
    geometry: Sequence[int]
    dtype: torch.dtype
    channels_last: bool
    fused: bool

    def multiply(self) -> Tensor:
        """Convolve bytes with bytes: ``(batch, out, rows, columns)``."""
        y = self.output()
        planes = list(self.planes)
        geometry = self._geometry()
        layer = int8.Int8Layer(self.weights, self.factors, self.constants, self.offsets)
        ops = triton_ops(y.device) if self.fused else None
        if ops is None:
            result = int8.multiply(planes, layer, int(self.member), geometry, self.shift)
            return y.copy_(result.permute(0, 3, 1, 2))
        # The second plane is added to the first, which needs float32.
        sums = y if len(planes) == 1 else torch.empty_like(y, dtype=torch.float32)
        ops.multiply_(sums, planes, layer, self.member, geometry, self.shift)
        return sums.to(self.dtype)

    def output(self) -> Tensor:
        """Return room for what `multiply` computes."""
        batch, height, width, _ = self.planes[0].shape
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(
            (batch, self.factors.shape[1], *self._geometry().output_size(height, width)),
            dtype=self.dtype,
            device=self.planes[0].device,
            memory_format=layout,
        )

    def _geometry(self) -> Geometry:
        return Geometry.from_flat(self.geometry) or int8.POINT


# `CudaOperands.multiply`, one operator to `torch.compile`.
multiply_bytes = torch.library.custom_op(
    "msfp::multiply_int8",
    lambda *operands: CudaOperands(*operands).multiply(),
    mutates_args=(),
    schema="(Tensor[] planes, Tensor weights, Tensor factors, Tensor constants, Tensor offsets, "
    "Tensor member, int shift, int[] geometry, ScalarType dtype, bool channels_last, bool fused) "
    "-> Tensor",
)
multiply_bytes.register_fake(lambda *operands: CudaOperands(*operands).output())
