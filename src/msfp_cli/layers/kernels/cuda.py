"""Run a layer on the 8-bit units of an NVIDIA GPU.

As on a CPU, ``y = s_a s_w[o] sum(q_a q_w[o])`` plus a constant, and the sum is exact in int32. An
input is rounded to signed bytes in one pass, and convolved in another that writes the layer's
output, scaled and in its type: two Triton kernels (`triton_ops`). Triton comes with torch's builds
for CUDA. Where it is missing, and on GPUs before Ampere, the same arithmetic runs as torch's own
operators (`int8`), in more passes; a warning says so once.

Under ``torch.compile`` rounding is left to the compiler, which fuses it with the norm or activation
before it. Compiled code may divide with an error in the last bit, so a value on the border between
two codes may fall to the other side, in our layers as in simulated ones.

`CudaFp8` has to be asked for. Every 4-bit grid times a power of two is exact in float8 e4m3: the
magnitudes have at most four significant bits and span less than its 18 octaves. So the products are
exact, too, but the sum is as good as the unit's accumulator, which on Hopper is said to keep about
14 bits (DeepSeek-V3, arXiv:2412.19437, section 3.5.2). An int8 sum is exact, and on most GPUs as
fast by specification; hence ``auto`` never takes float8.
"""

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.layers.base import QuantizedLayer
from msfp_cli.layers.kernels import int8
from msfp_cli.layers.kernels.arithmetic import KINDS_IN_INTEGERS, refusal_of_geometry
from msfp_cli.layers.kernels.geometry import Geometry, num_window_kinds
from msfp_cli.layers.kernels.int8 import POINT, Held
from msfp_cli.layers.kernels.kernel import Kernel
from msfp_cli.layers.kernels.simulated import simulate

_INT32 = 2**31 - 1
_TURING, _AMPERE, _ADA = (7, 5), (8, 0), (8, 9)
_MOST_KINDS = 2048  # constants per output channel
_E4M3_LARGEST, _E4M3_SMALLEST_POWER, _E4M3_BITS = 448, -9, 4


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
        weight, grid = layer.scheme.weight, layer.scheme.input
        if weight is None or grid is None:
            return f"the {'weight' if weight is None else 'input'} is in floating point"
        return _refused_device(layer, _TURING) or _refused_numbers(layer, weight, grid.format)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Lay out the weights, and fold zero point and bias into one constant per output channel."""
        grids = [grid for grid in layer.scheme.inputs() if grid is not None]
        self.format = grids[0].format
        self.holds_weight = not keep_packed
        geometry = layer.geometry()
        self.is_linear, self.geometry = geometry is None, geometry or POINT
        scale, sets = layer.get_buffer("weight_scale"), range(len(grids))
        self.shape = layer.weight_shape
        self.held = int8.hold(
            [layer.integers(i) for i in sets], grids, scale, layer.bias, self.geometry
        )
        self.numbers = torch.tensor(
            [[grid.scale, grid.zero_point] for grid in grids], device=scale.device
        )
        self.members = torch.arange(len(grids), device=scale.device)
        self.fused = triton_ops(scale.device) is not None
        self.exponent: int | None = None
        if keep_packed:
            self.held = self.held._replace(weights=self.held.weights.new_empty(0))
        _keep_in_place(*self.held, self.numbers, self.members)

    @property
    def weights(self) -> Tensor:
        """The weights as they are held: sets, then what a set takes."""
        return self.held.weights

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the layer; what needs gradients, or is empty or beyond 2^31 elements, is simulated."""
        if not self._is_taken(x) or (torch.is_grad_enabled() and x.requires_grad):
            return simulate(layer, x)
        member = layer.member()
        at = self.members[member : member + 1] if isinstance(member, int) else member.view(1)
        return self.run(layer, x, at)

    def run(self, layer: QuantizedLayer, x: Tensor, at: Tensor) -> Tensor:
        """Run the layer with the set of weights that a tensor names: int64 ``(1,)`` on the layer's device."""
        planes = self.round(x, at)
        held = self.held
        if not self.holds_weight:
            rows = int8.lay_out(layer.integers(at))
            held, at = (
                Held(rows[None], *(many.index_select(0, at) for many in held[1:])),
                torch.zeros_like(at),
            )
        in_lines = not self.is_linear and (
            x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        )
        shift, geometry = int8.shift_of(self.format), self.geometry.flat()
        multiply = multiply_bytes if torch.compiler.is_compiling() else _multiply
        y: Tensor = multiply(planes, *held, at, shift, geometry, x.dtype, not in_lines, self.fused)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1) if self.is_linear else y

    def round(self, x: Tensor, at: Tensor) -> list[Tensor]:
        """Round an input, a picture or rows, as `int8.round_to_bytes` does."""
        picture = x.detach()
        if self.is_linear:
            picture = picture.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        fused = (
            triton_ops(picture.device) if self.fused and not torch.compiler.is_compiling() else None
        )
        if fused is not None:
            planes: list[Tensor] = fused.round_to_bytes(
                picture, self.numbers, at, self.format, self.exponent
            )
            return planes
        return int8.round_to_bytes(
            picture, self.numbers.index_select(0, at)[0], self.format, self.exponent
        )

    def _is_taken(self, x: Tensor) -> bool:
        outs, numel = self.shape[0], x.numel()
        if self.is_linear:
            return 0 < numel and max(numel, numel // x.shape[-1] * outs) <= _INT32
        if x.ndim != 4:
            return False
        rows, columns = self.geometry.output_size(x.shape[2], x.shape[3])
        return (
            0 < numel
            and rows > 0
            and columns > 0
            and max(numel, x.shape[0] * outs * rows * columns) <= _INT32
        )

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of one set of weights, int8, shape of the float weight."""
        return int8.take_back(self.held.weights[int(member)], self.shape)


class CudaFp8(Cuda):
    """Runs Linear layers with one set of weights as float8 times float8, and every other layer as `Cuda` does."""

    name: ClassVar[str] = "cuda-fp8"
    kinds: ClassVar[frozenset[str] | None] = KINDS_IN_INTEGERS

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say why the layer cannot run here, or nothing."""
        return Cuda.refusal(layer) or _refused_device(layer, _ADA)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Turn the bytes into float8, where both formats are exact in it."""
        super().__init__(layer, keep_packed=keep_packed)
        weight = layer.scheme.weight
        assert weight is not None, "refused before"
        exponent, self.weight_exponent = e4m3_exponent(self.format), e4m3_exponent(weight) or 0
        if exponent is None or e4m3_exponent(weight) is None:
            return
        if keep_packed or not self.is_linear or len(self.members) > 1:
            return
        self.exponent = exponent
        rows = functional.pad(self.held.weights[0], (0, 0, 0, -self.shape[0] % int8.ROW_MULTIPLE))
        floats = (rows.float() * 2.0**self.weight_exponent).to(torch.float8_e4m3fn)
        factors = self.held.factors * 2.0 ** -(exponent + self.weight_exponent)
        self.held = self.held._replace(weights=floats[None], factors=factors)
        self.one = torch.ones((), device=rows.device)
        _keep_in_place(*self.held, self.one)

    def run(self, layer: QuantizedLayer, x: Tensor, at: Tensor) -> Tensor:
        """Run the layer in float8 where it can be."""
        if self.exponent is None:
            return super().run(layer, x, at)
        codes, weight = self.round(x, at)[0].view(-1, x.shape[-1]), self.held.weights[0]
        if codes.shape[1] < weight.shape[1]:
            codes = functional.pad(
                codes.view(torch.uint8), (0, weight.shape[1] - codes.shape[1])
            ).view(codes.dtype)
        sums = torch._scaled_mm(codes, weight.t(), self.one, self.one, out_dtype=torch.float32)[
            :, : self.shape[0]
        ]
        y = torch.addcmul(self.held.constants[0], sums, self.held.factors)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of one set of weights, int8, shape of the float weight."""
        if self.exponent is None:
            return super().integers(member)
        rows = self.held.weights[0].float() * 2.0**-self.weight_exponent
        return int8.take_back(rows.to(torch.int8), self.shape)


def e4m3_exponent(fmt: FloatFormat) -> int | None:
    """Return a power of two that brings a format's integers into float8 e4m3, all of them exact, or None."""
    exponent = min(0, _E4M3_LARGEST.bit_length() - fmt.largest.bit_length())
    if fmt.largest * 2.0**exponent > _E4M3_LARGEST:
        exponent -= 1
    for magnitude in fmt.magnitudes[1:]:
        power = (magnitude & -magnitude).bit_length() - 1  # of its lowest bit
        if (
            magnitude >> power
        ).bit_length() > _E4M3_BITS or power + exponent < _E4M3_SMALLEST_POWER:
            return None
    return exponent


def _refused_device(layer: QuantizedLayer, least: tuple[int, int]) -> str | None:
    device = layer.get_buffer("weight_scale").device
    if device.type != "cuda":
        return f"the layer is on {device.type}"
    if torch.version.hip:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        return f"the GPU has compute capability {'.'.join(map(str, capability))}, below {'.'.join(map(str, least))}"
    return None


def _refused_numbers(layer: QuantizedLayer, weight: FloatFormat, fmt: FloatFormat) -> str | None:
    for numbers, largest in ((weight, 127), (fmt, int8.WIDEST)):
        if numbers.largest > largest:
            return f"{numbers} takes integers up to {numbers.largest}"
    reason = refusal_of_geometry(layer)
    if reason is not None:
        return reason
    geometry = layer.geometry() or POINT
    kinds = num_window_kinds(geometry.kernel[0]) * num_window_kinds(geometry.kernel[1])
    if any(geometry.padding) and kinds > _MOST_KINDS:
        return f"padding around windows of {geometry.kernel[0]}x{geometry.kernel[1]}"
    if max(128, min(fmt.largest, 255)) * weight.largest * layer.weight_shape[1:].numel() > _INT32:
        return "the sum could overflow 32 bits"
    return None


def _keep_in_place(*tensors: Tensor) -> None:
    """Let CUDA graphs read tensors where they are rather than copy them first; another tensor is compiled anew."""
    for tensor in tensors:
        if tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor)  # type: ignore[attr-defined, no-untyped-call]


def triton_ops(device: torch.device) -> ModuleType | None:
    """Return the Triton kernels where they run on a device: on GPUs from Ampere on, and where they are interpreted."""
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


def _multiply(
    planes: Sequence[Tensor],
    weights: Tensor,
    factors: Tensor,
    constants: Tensor,
    offsets: Tensor,
    member: Tensor,
    shift: int,
    geometry: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    fused: bool,
) -> Tensor:
    """Convolve bytes with bytes, with one of several sets of weights: ``(batch, out, rows, columns)``."""
    held, where = Held(weights, factors, constants, offsets), Geometry.from_flat(geometry) or POINT
    y = _output(
        planes,
        weights,
        factors,
        constants,
        offsets,
        member,
        shift,
        geometry,
        dtype,
        channels_last,
        fused,
    )
    ops = triton_ops(y.device) if fused else None
    if ops is None:
        return y.copy_(
            int8.multiply(list(planes), held, int(member), where, shift).permute(0, 3, 1, 2)
        )
    wide = y if len(planes) == 1 else torch.empty_like(y, dtype=torch.float32)
    ops.multiply_(wide, list(planes), held, member, where, shift)
    return wide.to(dtype)


def _output(
    planes: Sequence[Tensor],
    weights: Tensor,
    factors: Tensor,
    constants: Tensor,
    offsets: Tensor,
    member: Tensor,
    shift: int,
    geometry: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    fused: bool,
) -> Tensor:
    """Return room for what `_multiply` computes."""
    where = Geometry.from_flat(geometry) or POINT
    batch, height, width, _ = planes[0].shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch, factors.shape[1], *where.output_size(height, width))
    return torch.empty(shape, dtype=dtype, device=planes[0].device, memory_format=layout)


multiply_bytes = torch.library.custom_op("msfp::multiply_int8", _multiply, mutates_args=())
multiply_bytes.register_fake(_output)
