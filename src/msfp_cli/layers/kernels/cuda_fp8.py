"""Run Linear layers on the float8 units of an NVIDIA GPU, and all others as `cuda` does.

Every 4-bit grid times a power of two is exact in float8 e4m3: the
magnitudes have at most four significant bits and span less than its 18 octaves. So the products are
exact, too, but the sum is as good as the unit's accumulator, which on Hopper is said to keep about
14 bits (DeepSeek-V3, arXiv:2412.19437, section 3.5.2). An int8 sum is exact, and on most GPUs as
fast by specification; hence ``auto`` never takes float8.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels import int8
from msfp_cli.layers.kernels.arithmetic import KINDS_IN_INTEGERS, add_bias
from msfp_cli.layers.kernels.cuda import Cuda, keep_in_place, refusal_of_device

_ADA = (8, 9)
_E4M3_LARGEST = 448
_E4M3_SMALLEST_POWER = -9
_E4M3_BITS = 4


class CudaFp8(Kernel):
    """Runs Linear layers without a hub as float8 times float8, and others as `Cuda` does."""

    name: ClassVar[str] = "cuda-fp8"
    kinds: ClassVar[frozenset[str] | None] = KINDS_IN_INTEGERS
    device: ClassVar[str | None] = "cuda"
    lays_out: ClassVar[bool] = True

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say why the layer cannot run here, or nothing."""
        return Cuda.refusal(layer) or refusal_of_device(layer, _ADA)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Turn the bytes into float8, where both formats are exact in it."""
        self.cuda = Cuda(layer, keep_packed=keep_packed)
        self.holds_weight = self.cuda.holds_weight
        self.product: Float8Product | None = None
        scheme = layer.scheme
        is_simple = self.cuda.is_linear and scheme.hub == 1 and not scheme.weight_groups
        if is_simple and self.holds_weight:
            self.product = Float8Product.of(self.cuda, layer.weight_format())
        if self.product is not None:
            self.cuda.drop_weights_()

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the layer in float8 where it can be."""
        if self.product is None or self.cuda.simulates(x):
            return self.cuda(layer, x)
        codes = self.cuda.round(x, self.cuda.members, self.product.input_exponent)[0]
        y = self.product.multiply(codes.view(-1, x.shape[-1]), layer.kernel_bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of a member's weight, int8, shape of the float weight."""
        if self.product is None:
            return self.cuda.integers(member)
        return int8.take_back(self.product.integers(), self.cuda.shape)


class Float8Product(NamedTuple):
    """A Linear layer in float8.

    Arguments:
        weights: float8 ``(out, row)``, both filled up with zeros.
        factors: float32 ``(1, out)``.
        shares: of the zero point, float64 ``(1, out)``.
        one: a scale that `torch._scaled_mm` wants, float32 ``()``.
        input_exponent, weight_exponent: the powers of two that make float8 of integers.
    """

    weights: Tensor
    factors: Tensor
    shares: Tensor
    one: Tensor
    input_exponent: int
    weight_exponent: int

    @classmethod
    def of(cls, cuda: Cuda, weight_format: FloatFormat) -> "Float8Product | None":
        """Make float8 of a layer's bytes; None where a format is not exact in it."""
        input_exponent = e4m3_exponent(cuda.format)
        weight_exponent = e4m3_exponent(weight_format)
        if input_exponent is None or weight_exponent is None:
            return None
        rows = cuda.tensors.weights[0]
        filled = functional.pad(rows, (0, 0, 0, -len(rows) % int8.ROW_MULTIPLE))
        product = cls(
            weights=(filled.float() * 2.0**weight_exponent).to(torch.float8_e4m3fn),
            factors=cuda.tensors.factors * 2.0 ** -(input_exponent + weight_exponent),
            shares=cuda.tensors.constants[0],
            one=torch.ones((), device=rows.device),
            input_exponent=input_exponent,
            weight_exponent=weight_exponent,
        )
        keep_in_place(*product[:4])
        return product

    def multiply(self, codes: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply rows of float8, ``(rows, in)``, and return the layer's output in float32."""
        missing = self.weights.shape[1] - codes.shape[1]
        if missing:
            codes = functional.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype)
        sums = torch._scaled_mm(
            codes, self.weights.t(), self.one, self.one, out_dtype=torch.float32
        )
        return torch.addcmul(
            add_bias(self.shares, bias), sums[:, : self.factors.shape[1]], self.factors
        )

    def integers(self) -> Tensor:
        """Return the integers of the weight, int8, as they were laid out."""
        return (self.weights.float() * 2.0**-self.weight_exponent).to(torch.int8)


def e4m3_exponent(fmt: FloatFormat) -> int | None:
    """Return a power of two that makes a format's integers exact in float8 e4m3, or None."""
    exponent = min(0, _E4M3_LARGEST.bit_length() - fmt.largest.bit_length())
    if fmt.largest * 2.0**exponent > _E4M3_LARGEST:
        exponent -= 1
    for magnitude in fmt.magnitudes[1:]:
        power = (magnitude & -magnitude).bit_length() - 1  # of its lowest bit
        too_long = (magnitude >> power).bit_length() > _E4M3_BITS
        if too_long or power + exponent < _E4M3_SMALLEST_POWER:
            return None
    return exponent
