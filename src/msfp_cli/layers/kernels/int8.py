"""Exact products of signed bytes in torch's own operators, for GPUs where Triton is missing.

GPUs multiply signed bytes, so the integers of an input have to become such. Most fit as they are.
Unsigned ones up to 255 (``ue3m1``) are shifted down by 128, and the sum is put right by ``128
sum(q_w)``, an integer added to an integer. Wider ones, up to two bytes, are split, ``q = low + 256
high`` with both signed: two products, added in float32.

A picture is held as ``(batch, height, width, channels)``, and a Linear layer is the convolution of
a picture one pixel wide with a window of one tap, so there is one arithmetic. A window over the
edge sees the byte that stands for the integer 0, which is ``-shift``; the zero point's share there
comes with the constant (see `geometry`).

``torch._int_mm`` is cuBLAS's product of int8 matrices to int32. It wants more than 16 rows and
multiples of 8, which zeros fill up, and a convolution's windows are first written out side by side.
The same functions run on a CPU, slowly, and there they are tested.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid, round_steps
from msfp_cli.layers.kernels.geometry import (
    Geometry,
    num_window_kinds,
    tap_sums,
    taps_of_kinds,
    window_kinds,
)

ROW_MULTIPLE = 16  # rows of weights are filled up to this, for `_int_mm` and for loads of 16 bytes
WIDEST = 127 * 256 + 127  # the largest integer of two signed bytes
POINT = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
_FEWEST_ROWS = 17
_INT_MM_MULTIPLE = 8


class Int8Layer(NamedTuple):
    """A layer as products of bytes need it; the first dimension is the member of its hub, or 1.

    Arguments:
        weights: int8 ``(members, out, row)``: tap by tap, a group's channels each, then zeros.
        factors: float32 ``(members, out)``: the input's scale times the weight's.
        constants: ``(members, kinds of window, out)``: the zero point's share, float64; for a call,
            float32 and with the bias.
        offsets: int32 ``(members, out)``: what the shift of the input took from the sum.
    """

    weights: Tensor
    factors: Tensor
    constants: Tensor
    offsets: Tensor

    @classmethod
    def of(
        cls,
        integers: list[Tensor],
        grids: list[Grid],
        weight_scale: Tensor,
        geometry: Geometry,
    ) -> "Int8Layer":
        """Lay a layer's weights out, and fold its scales and its zero point.

        Arguments:
            integers: int8, shape of the layer's weight, one per member.
            grids: of the input, one per member.
            weight_scale: float32, ``(out,)``.
        """
        sums = [tap_sums(weight) for weight in integers]
        scale = weight_scale.double()
        shares = [
            taps * (scale * grid.zero_point).view(-1, 1, 1)
            for taps, grid in zip(sums, grids, strict=True)
        ]
        constants = [constants_of(share, geometry) for share in shares]
        kinds = max(len(constant) for constant in constants)
        shift = shift_of(grids[0].format)
        offsets = [(taps.sum(dim=(1, 2)) * shift).to(torch.int32) for taps in sums]
        return cls(
            weights=torch.stack([lay_out(weight) for weight in integers]),
            factors=torch.stack([(scale * grid.scale).float() for grid in grids]),
            constants=torch.stack([constant.expand(kinds, -1) for constant in constants]),
            offsets=torch.stack(offsets),
        )


def is_wide(fmt: FloatFormat) -> bool:
    """Whether the integers of an input take two bytes."""
    return fmt.largest > (127 if fmt.signed else 255)


def shift_of(fmt: FloatFormat) -> int:
    """Return what is subtracted from the integers of an input to make them signed bytes."""
    return 0 if is_wide(fmt) or fmt.largest <= 127 else 128


def lay_out(integers: Tensor) -> Tensor:
    """Write a member's weight as `Int8Layer` has it: int8, ``(out, row)``."""
    taps_first = integers.permute(0, 2, 3, 1) if integers.ndim == 4 else integers
    rows = taps_first.reshape(len(integers), -1)
    return functional.pad(rows, (0, -rows.shape[1] % ROW_MULTIPLE))


def take_back(rows: Tensor, shape: torch.Size) -> Tensor:
    """Undo `lay_out`.

    Arguments:
        shape: of the layer's weight.
    """
    plain = rows[: shape[0], : shape[1:].numel()]
    if len(shape) == 2:
        return plain.contiguous()
    return plain.reshape(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2).contiguous()


def constants_of(share: Tensor, geometry: Geometry) -> Tensor:
    """Return what is added to an output, by kind of window: float64, ``(kinds, out)``.

    Arguments:
        share: float64 ``(out, kernel height, kernel width)``, the zero point's share of every tap.

    There is one kind where no window reaches over the edge, or where that makes no difference.
    """
    if not any(geometry.padding) or not bool(share.any()):
        return share.sum(dim=(1, 2))[None]
    vertical, horizontal = [taps_of_kinds(taps).to(share.device) for taps in geometry.kernel]
    return torch.einsum("oij,ri,cj->rco", share, vertical, horizontal).flatten(0, 1)


def round_to_bytes(
    x: Tensor, numbers: Tensor, fmt: FloatFormat, exponent: int | None = None
) -> list[Tensor]:
    """Round a picture to the integers of its grid, as signed bytes or as float8.

    Arguments:
        x: floating point, ``(batch, channels, height, width)``.
        numbers: float32 ``(2,)``, scale and zero point: a tensor, as a GPU multiplies by the
            inverse of a plain number.
        exponent: give the integers times a power of two, in float8 e4m3, instead.

    Returns:
        ``(batch, height, width, channels)``; int8, one or two planes, the low one first.
    """
    rounded = round_steps((x.detach().float() - numbers[1]) / numbers[0], fmt).permute(0, 2, 3, 1)
    if exponent is not None:
        return [(rounded * 2.0**exponent).to(torch.float8_e4m3fn).contiguous()]
    if not is_wide(fmt):
        return [(rounded - shift_of(fmt)).to(torch.int8).contiguous()]
    return [plane.to(torch.int8).contiguous() for plane in signed_planes(rounded.to(torch.int32))]


def signed_planes(integers: Tensor) -> list[Tensor]:
    """Part int32 integers into two planes of signed bytes, ``low + 256 high``."""
    low = (integers + 128).bitwise_and(255) - 128
    return [low, (integers - low).bitwise_right_shift(8)]


def multiply(
    planes: list[Tensor], layer: Int8Layer, member: int, geometry: Geometry, shift: int
) -> Tensor:
    """Convolve bytes with bytes, and return the layer's output in float32.

    Returns:
        ``(batch, rows, columns, out)``.
    """
    low, *further = planes
    weight = layer.weights[member]
    sums = integer_sums(low, weight, geometry, -shift).add_(layer.offsets[member])
    y = sums.float()
    for plane in further:
        y.add_(integer_sums(plane, weight, geometry, 0).float(), alpha=256)
    constants = _constants_at(low, y, layer.constants[member], geometry)
    return y.mul_(layer.factors[member]).add_(constants)


def _constants_at(codes: Tensor, y: Tensor, constants: Tensor, geometry: Geometry) -> Tensor:
    """Pick the constant of each window.

    Returns:
        ``(rows, columns, out)``, or ``(1, out)`` where all windows are alike.
    """
    if len(constants) == 1:
        return constants
    rows = torch.arange(y.shape[1], device=y.device)
    columns = torch.arange(y.shape[2], device=y.device)
    vertical = window_kinds(rows, codes.shape[1], *geometry.along(0))
    horizontal = window_kinds(columns, codes.shape[2], *geometry.along(1))
    return constants[vertical[:, None] * num_window_kinds(geometry.kernel[1]) + horizontal]


def integer_sums(codes: Tensor, weight: Tensor, geometry: Geometry, outside: int) -> Tensor:
    """Convolve bytes with bytes; int32, ``(batch, rows, columns, out)``.

    Arguments:
        codes: int8 ``(batch, height, width, channels)``.
        weight: int8 ``(out, row)``, see `Int8Layer`.
        outside: the byte that windows see beyond the edge.
    """
    windows = _windows(codes, geometry, outside)
    count = windows.shape[:3].numel()
    of_groups = zip(
        windows.chunk(geometry.groups, dim=5), weight.chunk(geometry.groups), strict=True
    )
    sums = [_int_mm(group.reshape(count, -1), rows) for group, rows in of_groups]
    return torch.cat(sums, dim=1).view(*windows.shape[:3], -1)


def _windows(codes: Tensor, geometry: Geometry, outside: int) -> Tensor:
    """View a picture as its windows.

    Returns:
        ``(batch, rows, columns, kernel height, kernel width, channels)``.
    """
    kernel, stride, (up, left), dilation, _ = geometry
    rows, columns = geometry.output_size(codes.shape[1], codes.shape[2])
    if up or left:
        codes = functional.pad(codes, (0, 0, left, left, up, up), value=outside)
    batch, line, pixel, channel = codes.stride()
    steps = (
        batch,
        line * stride[0],
        pixel * stride[1],
        line * dilation[0],
        pixel * dilation[1],
        channel,
    )
    return codes.as_strided((codes.shape[0], rows, columns, *kernel, codes.shape[3]), steps)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply the rows of two int8 matrices.

    Arguments:
        a: ``(m, k)``.
        b: ``(n, k or more)``, 0 beyond k.

    Returns:
        int32 ``(m, n)``.
    """
    m, k = a.shape
    n = len(b)
    depth = b.shape[1] - k
    rows = max(_FEWEST_ROWS - m, 0)
    columns = -n % _INT_MM_MULTIPLE
    left = functional.pad(a, (0, depth, 0, rows)) if depth or rows else a
    right = functional.pad(b, (0, 0, 0, columns)) if columns else b
    product: Tensor = torch._int_mm(left, right.t())
    return product[:m, :n]
