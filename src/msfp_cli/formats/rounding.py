"""Reals to codes and back: ``value = scale * code_book[code] + zero_point``.

`quantize` rounds to the nearest value; a tie goes to the even code, as IEEE 754 asks. Everything is
computed in float32 whatever the input's type, because a 16-bit scale would move the grid itself.
`fake_quantize` equals ``dequantize(quantize(x))`` bit for bit, but gets there without codes, in a
few passes that run at the speed of memory (see `_round_to_octaves`); its gradient passes straight
through inside the grid's range and is zero where the value was clipped (Bengio et al. 2013,
arXiv:1308.3432). Infinities saturate. A NaN has no code: `quantize` gives it an arbitrary one,
`fake_quantize` keeps it a NaN, and calibration refuses it by the layer's name.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from msfp_cli.formats.float_format import FloatFormat

Context: TypeAlias = Any  # what torch passes to an autograd function, and does not name


_LARGEST = float(np.finfo(np.float32).max)
_TABLE_BITS = 8  # integers of more bits would need a large table of codes


@dataclass(frozen=True)
class Grid:
    """A format placed on the real line.

    Arguments:
        format: the code book.
        scale: the value of the smallest step, positive and exact in float32: a number, or a tensor
            that broadcasts against the values, e.g. ``(out_features, 1)`` for one scale per output
            channel.
        zero_point: the value of code 0, a real number; 0 where the format is signed, as
            `fake_quantize` relies on.

    Raises:
        ValueError: a number cannot be what it is said to be.
    """

    format: FloatFormat
    scale: Tensor | float
    zero_point: float = 0.0

    def __post_init__(self) -> None:
        # A GPU would have to be waited for; `are_scales` checks the tensors of files.
        if not isinstance(self.scale, Tensor):
            self._refuse_numbers(self.scale)
        if self.format.signed and isinstance(self.zero_point, float) and self.zero_point:
            raise ValueError(f"{self.format} has a sign, so no zero point of {self.zero_point:g}")

    def _refuse_numbers(self, scale: float) -> None:
        # Small numbers first: a cast of large ones to float32 would warn.
        if not 0 < scale * self.format.largest < _LARGEST or not np.float32(scale) > 0:
            raise ValueError(f"a scale of {scale:g} is not positive and finite in float32")
        if not abs(self.zero_point) < _LARGEST:
            raise ValueError(f"a zero point of {self.zero_point:g} is not finite in float32")

    @classmethod
    def with_maximum(
        cls, fmt: FloatFormat, max_value: Tensor, zero_point: float | None = None
    ) -> "Grid":
        """Place a format so that its largest magnitude is `max_value` above the zero point.

        All is computed in float32.

        Arguments:
            max_value: float32, ``()`` for one scale, or the shape of the scales.
        """
        scale = max_value.float() / fmt.largest
        zero = 0.0 if zero_point is None else float(torch.tensor(zero_point, dtype=torch.float32))
        return cls(fmt, float(scale) if scale.ndim == 0 else scale, zero)

    @property
    def max_value(self) -> Tensor | float:
        """The value of the largest magnitude, measured from the zero point."""
        return self.scale * self.format.largest


def are_scales(scale: Tensor) -> bool:
    """Whether all elements can be scales: positive, and finite times any integer of 8 bits."""
    return bool(((scale > 0) & torch.isfinite(scale.float() * 2**8)).all())


def per_channel(scale: Tensor, num_dims: int) -> Tensor:
    """Shape one scale per output channel so that it broadcasts against a weight: ``(out, 1, ...)``.

    Arguments:
        scale: ``(out,)``.
        num_dims: dimensions of the weight.
    """
    return scale.view(-1, *[1] * (num_dims - 1))


@lru_cache(maxsize=256)
def _borders(fmt: FloatFormat, device: torch.device) -> Tensor:
    """Return borders such that ``magnitude > border`` means the upper of two neighbouring codes.

    A border is the midpoint; where the upper code is the even one it is lowered by one float32
    step, so that the tie itself goes up.
    """
    magnitudes = torch.tensor(fmt.magnitudes, dtype=torch.float32, device=device)
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    upper_is_even = torch.arange(1, len(magnitudes), device=device) % 2 == 0
    return torch.where(upper_is_even, torch.nextafter(middle, torch.zeros_like(middle)), middle)


def _make_code_book(fmt: FloatFormat, device: torch.device) -> Tensor:
    return torch.tensor(fmt.code_book, dtype=torch.float32, device=device)


_cached_code_book = lru_cache(maxsize=256)(_make_code_book)


def code_book(fmt: FloatFormat, device: torch.device) -> Tensor:
    """Return the code book as float32, ``(2**bits,)``; a constant of a compiled graph."""
    return (_make_code_book if torch.compiler.is_compiling() else _cached_code_book)(fmt, device)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Round reals to the nearest codes; a tie goes to the even code.

    Arguments:
        x: floating point, any shape that `grid` broadcasts to.

    Returns:
        uint8 codes, shape of `x`; the sign is the highest bit, and zero is always code 0.
    """
    steps = (x.detach().float() - grid.zero_point) / grid.scale
    steps = steps.contiguous()
    if grid.format.integer_bits <= _TABLE_BITS:
        return _look_up_codes(round_steps(steps, grid.format), grid.format)
    borders = _borders(grid.format, x.device)
    if not grid.format.signed:
        return torch.bucketize(steps, borders, out_int32=True).to(torch.uint8)
    codes = torch.bucketize(steps.abs(), borders, out_int32=True)
    negative = (steps < 0) & (codes > 0)
    return (codes + negative * grid.format.sign_bit).to(torch.uint8)


def _look_up_codes(integers: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the code of each integer of the code book; a NaN gets some code.

    A table is ten times as fast as a binary search among the borders.

    Arguments:
        integers: float32, overwritten.
    """
    table = _table_of_codes(fmt, integers.device)
    index = integers.add_(fmt.largest).int().clamp_(0, len(table) - 1)
    return table.index_select(0, index.view(-1)).view(index.shape)


@lru_cache(maxsize=256)
def _table_of_codes(fmt: FloatFormat, device: torch.device) -> Tensor:
    """Return the codes of the integers from ``-largest`` to ``largest``; those of others are 0."""
    table = torch.zeros(2 * fmt.largest + 1, dtype=torch.uint8)
    for code, integer in enumerate(fmt.code_book):
        if integer:  # a signed format has a second code for 0
            table[integer + fmt.largest] = code
    return table.to(device)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Turn codes into reals, ``scale * code_book[code] + zero_point`` in float32."""
    book = code_book(grid.format, codes.device)
    levels = book.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return levels * grid.scale + grid.zero_point


def _round_to_octaves(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """Round multiples of the smallest step to the format's magnitudes, in place.

    Signs are kept, and ties go to the even code.

    Masking a float32 down to its exponent gives the power of two below it, hence the step of its
    octave, once clamped to the subnormals' step. Adding and subtracting ``1.5 * 2^23`` such steps
    then rounds to whole steps, half to even (an old trick; for ``M >= 1`` the even multiple is the
    even code). Needs no table and no codes. The multiple of the power is exact, so it does not
    matter whether it is rounded before it is added.

    Arguments:
        steps: float32, at most the largest magnitude; overwritten.
    """
    if fmt.mantissa_bits == 0:
        return _round_to_powers(steps)
    power = steps.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power = power.clamp_min_(1 << fmt.mantissa_bits)
    many = 1.5 * 2 ** (23 - fmt.mantissa_bits)
    return steps.add_(power, alpha=many).sub_(power, alpha=many)


def _round_to_powers(steps: Tensor) -> Tensor:
    """Round to 0, 1, 2, 4 ..., signs kept; a tie goes to the even exponent.

    The result is a float32 whose mantissa was rounded away. The exponent field is 127 where the
    code is 1, so even codes have even fields. What is at most a half becomes 0; the minimum, which
    elsewhere is the power, makes it so, and keeps a NaN.
    """
    magnitude = steps.abs()
    bits = magnitude.view(torch.int32)
    carried = bits.bitwise_right_shift(23).bitwise_and_(1).add_(bits).add_(0x3FFFFF)
    powers = carried.bitwise_and_(0x7F800000).view(torch.float32).clamp_min_(1)
    above = functional.hardshrink(magnitude, 0.5).mul_(2)
    return torch.minimum(powers, above).copysign_(steps)


def round_steps(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """Round multiples of the smallest step to what the format can hold, NaN kept.

    Arguments:
        steps: float32; overwritten where the format is unsigned.
    """
    inside = steps.clamp(-fmt.largest, fmt.largest) if fmt.signed else steps.clamp_(0, fmt.largest)
    return inside.round_() if fmt.is_uniform else _round_to_octaves(inside, fmt)


def _round(x: Tensor, grid: Grid) -> Tensor:
    """Return ``dequantize(quantize(x, grid), grid)``, with NaN kept."""
    exact = x.detach().float()
    steps = exact / grid.scale if grid.format.signed else (exact - grid.zero_point).div_(grid.scale)
    rounded = round_steps(steps, grid.format).mul_(grid.scale)
    return rounded.add_(grid.zero_point)  # adding 0 makes a -0 a 0


class _StraightThrough(torch.autograd.Function):
    """Round; the gradient passes straight through inside ``[low, high]``."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, grid: Grid) -> Tensor:
        low = grid.zero_point - grid.max_value * grid.format.signed
        exact = x.float()  # a 16-bit comparison would round the bounds, too
        ctx.save_for_backward((exact >= low) & (exact <= grid.zero_point + grid.max_value))
        return _round(x, grid).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Round reals to the grid and stay in reals.

    The gradient passes straight through inside the grid's range.

    Returns:
        The type and shape of `x`; equal to ``dequantize(quantize(x, grid), grid)`` rounded to that
        type, NaN kept.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        rounded: Tensor = _StraightThrough.apply(x, grid)  # type: ignore[no-untyped-call]
        return rounded
    return _round(x, grid).to(x.dtype)


class _LearnedGrid(torch.autograd.Function):
    """Round; the gradient is straight through for the values, exact for what moves the grid."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, grid: Grid, shift: Tensor, unit: float) -> Tensor:
        y = _round(x, grid)
        ctx.grid = grid
        ctx.unit = unit
        ctx.save_for_backward(x, y)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, y = ctx.saved_tensors
        grid = ctx.grid
        high = grid.zero_point + grid.max_value
        low = grid.zero_point - grid.max_value * grid.format.signed
        exact = x.float()  # sums in 16 bits would be noise
        slope = grad.float()
        # In one pass what `slope * ((exact >= low) & (exact <= high))` takes four for; its bounds
        # are exclusive.
        passed = torch.ops.aten.hardtanh_backward(
            slope, exact, _next(low, -math.inf), _next(high, math.inf)
        )
        # y = zero_point + scale * q: inside, q follows x and log(scale) is left with y - x;
        # outside, q stands still.
        along = _dot(slope, y) - _dot(passed, exact)
        if not ctx.unit:  # no zero point
            return passed.to(grad.dtype), None, torch.stack([along, along * 0]), None
        clipped = slope.sum() - passed.sum()
        moved = torch.stack([along - grid.zero_point * clipped, clipped * ctx.unit])
        return passed.to(grad.dtype), None, moved, None


def _next(value: float, towards: float) -> float:
    """Return the next float32 in a direction."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def fake_quantize_learned(x: Tensor, grid: Grid, shift: Tensor, unit: float) -> Tensor:
    """Round as `fake_quantize` does, with gradients for the grid as well.

    The gradients are those of a learned step size (Esser et al. 2020, arXiv:1902.08153), and of a
    zero point.

    Arguments:
        grid: where it is now, with a number for a scale.
        shift: float32, ``(2,)``; takes the gradients of the scale's logarithm and of the zero point
            counted in `unit`.
        unit: 0 where the format is signed, which has no zero point.
    """
    rounded: Tensor = _LearnedGrid.apply(x, grid, shift, unit)  # type: ignore[no-untyped-call]
    return rounded
