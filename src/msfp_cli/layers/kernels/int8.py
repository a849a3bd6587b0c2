"""Exact products of signed bytes in torch's own operators: what `cuda.py` does where Triton is missing.

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
_FEWEST_ROWS, _INT_MM_MULTIPLE = 17, 8


class Held(NamedTuple):
    """What a kernel holds of a layer; the first dimension of each is the set of weights, or 1."""

    weights: Tensor  # int8 (sets, out, row): tap by tap, a group's channels each, then zeros
    factors: Tensor  # float32 (sets, out): the input's scale times the weight's
    constants: Tensor  # float32 (sets, kinds of window, out): bias and the zero point's share
    offsets: Tensor  # int32 (sets, out): what the shift of the input took from the sum


def is_wide(fmt: FloatFormat) -> bool:
    """Whether the integers of an input take two bytes."""
    return fmt.largest > (127 if fmt.signed else 255)


def shift_of(fmt: FloatFormat) -> int:
    """Return what is subtracted from the integers of an input to make them signed bytes."""
    return 0 if is_wide(fmt) or fmt.largest <= 127 else 128


def lay_out(integers: Tensor) -> Tensor:
    """Write a weight as `Held` has it, for one set: int8, ``(out, row)``."""
    rows = (integers.permute(0, 2, 3, 1) if integers.ndim == 4 else integers).reshape(
        integers.shape[0], -1
    )
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


def constants_of(share: Tensor, bias: Tensor | float, geometry: Geometry) -> Tensor:
    """Return what is added to an output, by kind of window: float32, ``(kinds, out)``.

    Arguments:
        share: float64 ``(out, kernel height, kernel width)``, the zero point's share of every tap.
        bias: float64 ``(out,)``.

    There is one kind where no window reaches over the edge, or where that makes no difference.
    """
    if not any(geometry.padding) or not bool(share.any()):
        return (share.sum(dim=(1, 2)) + bias).float()[None]
    vertical, horizontal = (taps_of_kinds(taps).to(share.device) for taps in geometry.kernel)
    by_kind = torch.einsum("oij,ri,cj->rco", share, vertical, horizontal)
    return (by_kind.flatten(0, 1) + bias).float()


def hold(
    integers: list[Tensor],
    grids: list[Grid],
    weight_scale: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Held:
    """Prepare a layer.

    Arguments:
        integers: int8, shape of the layer's weight, one per set of weights.
        grids: of the input, one per set.
        weight_scale: float32, ``(out,)``.
    """
    sums = [tap_sums(weight) for weight in integers]
    scale = weight_scale.double()
    added = 0.0 if bias is None else bias.detach().double()
    shares = [
        taps * (scale * grid.zero_point).view(-1, 1, 1)
        for taps, grid in zip(sums, grids, strict=True)
    ]
    constants = [constants_of(share, added, geometry) for share in shares]
    kinds = max(len(constant) for constant in constants)
    shift = shift_of(grids[0].format)
    return Held(
        torch.stack([lay_out(weight) for weight in integers]),
        torch.stack([(scale * grid.scale).float() for grid in grids]),
        torch.stack([constant.expand(kinds, -1) for constant in constants]),
        torch.stack([(taps.sum(dim=(1, 2)) * shift).to(torch.int32) for taps in sums]),
    )


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
    whole = rounded.to(torch.int32)
    low = (whole + 128).bitwise_and(255) - 128
    return [
        plane.to(torch.int8).contiguous() for plane in (low, (whole - low).bitwise_right_shift(8))
    ]


def multiply(
    planes: list[Tensor], held: Held, member: int, geometry: Geometry, shift: int
) -> Tensor:
    """Convolve bytes with bytes, and return the layer's output in float32: ``(batch, rows, columns, out)``."""
    y = (
        integer_sums(planes[0], held.weights[member], geometry, -shift)
        .add_(held.offsets[member])
        .float()
    )
    for plane in planes[1:]:
        y.add_(integer_sums(plane, held.weights[member], geometry, 0).float(), alpha=256)
    return y.mul_(held.factors[member]).add_(
        _constants_at(planes[0], y, held.constants[member], geometry)
    )


def _constants_at(codes: Tensor, y: Tensor, constants: Tensor, geometry: Geometry) -> Tensor:
    """Pick the constant of each window; ``(rows, columns, out)``, or ``(1, out)`` where all are alike."""
    if len(constants) == 1:
        return constants
    vertical, horizontal = (
        window_kinds(
            torch.arange(count, device=y.device), size, *(pair[i] for pair in geometry[:4])
        )
        for i, (count, size) in enumerate(zip(y.shape[1:3], codes.shape[1:3], strict=True))
    )
    return constants[vertical[:, None] * num_window_kinds(geometry.kernel[1]) + horizontal]


def integer_sums(codes: Tensor, weight: Tensor, geometry: Geometry, outside: int) -> Tensor:
    """Convolve bytes with bytes; int32, ``(batch, rows, columns, out)``.

    Arguments:
        codes: int8 ``(batch, height, width, channels)``.
        weight: int8 ``(out, row)``, see `Held`.
        outside: the byte that windows see beyond the edge.
    """
    windows = _windows(codes, geometry, outside)
    groups = geometry.groups
    channels = codes.shape[3] // groups
    sums = [
        _int_mm(
            windows[..., i * channels : (i + 1) * channels].reshape(windows.shape[:3].numel(), -1),
            rows,
        )
        for i, rows in enumerate(weight.chunk(groups))
    ]
    return torch.cat(sums, dim=1).view(*windows.shape[:3], -1)


def _windows(codes: Tensor, geometry: Geometry, outside: int) -> Tensor:
    """View a picture as its windows: ``(batch, rows, columns, kernel height, kernel width, channels)``."""
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
    """Multiply the rows of two int8 matrices, ``(m, k)`` and ``(n, k or more)`` with 0 beyond k; int32, ``(m, n)``."""
    (m, k), n = a.shape, len(b)
    depth, rows, columns = b.shape[1] - k, max(_FEWEST_ROWS - m, 0), -n % _INT_MM_MULTIPLE
    left = functional.pad(a, (0, depth, 0, rows)) if depth or rows else a
    right = functional.pad(b, (0, 0, 0, columns)) if columns else b
    product: Tensor = torch._int_mm(left, right.t())
    return product[:m, :n]
