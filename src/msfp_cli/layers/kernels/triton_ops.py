"""Two Triton kernels: round an input to bytes, and convolve bytes with bytes.

Both are what `int8` does, in one pass each. `round_kernel` reads the input once, in whatever order
it lies, and writes bytes channel by channel within a pixel, so that the convolution reads 16 at a
time; it moves half of what a copy of a 16-bit picture would. Its arithmetic is
`rounding.round_steps`, bit by bit, with a division that rounds as IEEE 754 asks.

`multiply_kernel` is a matrix product whose left matrix is never written: a program owns a tile of
windows times output channels, walks over taps and channels, and loads for every window the piece of
the picture that lies under the tap. A Linear layer is a picture one pixel wide. Sums stay in int32
registers; the shift, the scales, the constant for the kind of window, and the conversion to the
output's type happen on the way out. Which member runs is read from the GPU's memory, so a
hub costs no copy and no synchronisation, and CUDA graphs may record it.

The tile is chosen from `TILES` by size: the largest of which there are three for every two
processors of the GPU, the best on an H100 or near it (docs/gpu.md). Nothing is tuned at run time;
``benchmarks/gpu.py --tiles`` shows what is best on another GPU. Sizes of pictures are not
specialized on, so that a denoiser's levels share builds.

Import this module only where Triton is installed. With ``TRITON_INTERPRET=1`` it runs on a CPU, for
tests.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.layers.kernels.geometry import Geometry, num_window_kinds
from msfp_cli.layers.kernels.int8 import Int8Layer, is_wide, shift_of

_EXPONENT = tl.constexpr(0x7F800000)  # the bits of a float32's exponent
_BAND = tl.constexpr(8)  # so many rows of tiles run side by side, which keeps weights in the cache
_LEAST_DEPTH = 32  # what one instruction multiplies


class Tile(NamedTuple):
    """What one program computes, and with how much of the GPU.

    A larger one would need more registers than a thread has.
    """

    windows: int
    outs: int
    depth: int
    warps: int
    stages: int


TILES = (
    Tile(128, 64, 64, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 32, 128, 4, 4),
    Tile(32, 32, 128, 4, 4),
    Tile(16, 32, 128, 4, 4),
)


def choose_tile(windows: int, outs: int, processors: int) -> Tile:
    """Return the largest tile of which there are 1.5 per processor, else the smallest that fits."""
    fitting = [tile for tile in TILES if tile.windows < 2 * windows and tile.outs < 2 * outs] or [
        TILES[-1]
    ]
    for tile in fitting:
        if triton.cdiv(windows, tile.windows) * triton.cdiv(outs, tile.outs) >= 1.5 * processors:
            return tile
    return fitting[-1]


@triton.jit
def _round(steps, largest, SIGNED: tl.constexpr, MANTISSA: tl.constexpr):
    """Round as `rounding.round_steps` does, to int32."""
    if SIGNED:
        size = tl.minimum(tl.abs(steps), largest)
    else:
        size = tl.minimum(tl.maximum(steps, 0.0), largest)
    bits = size.to(tl.int32, bitcast=True)
    if MANTISSA == 0:
        carried = (bits + ((bits >> 23) & 1) + 0x3FFFFF) & _EXPONENT
        power = tl.maximum(carried.to(tl.float32, bitcast=True), 1.0)
        rounded = tl.where(size > 0.5, power, 0.0)
    else:
        power = tl.maximum((bits & _EXPONENT).to(tl.float32, bitcast=True), 1.0 * (1 << MANTISSA))
        shift = power * (1.5 * (1 << (23 - MANTISSA)))
        rounded = (size + shift) - shift
    whole = rounded.to(tl.int32)
    if SIGNED:
        whole = tl.where(steps < 0, -whole, whole)
    return whole


# fmt: off
@triton.jit(do_not_specialize=["pixels", "per_picture"])
def round_kernel(
    x, numbers, member, low, high, pixels, channels,
    per_picture, per_channel, per_pixel, largest,
    SIGNED: tl.constexpr, MANTISSA: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr,
    GAIN: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: on
    """Round a tile of pixels times channels of one picture, and write its bytes."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    picture = tl.program_id(2)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    at = tl.load(member)
    scale, zero_point = tl.load(numbers + 2 * at), tl.load(numbers + 2 * at + 1)
    places = picture * per_picture + pixel[:, None] * per_pixel + channel[None, :] * per_channel
    values = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    steps = tl.div_rn(values - zero_point, tl.broadcast_to(scale, values.shape))
    whole = _round(steps, largest, SIGNED, MANTISSA)
    places = (picture * pixels + pixel)[:, None] * channels + channel[None, :]
    if GAIN != 0.0:
        tl.store(low + places, (whole.to(tl.float32) * GAIN).to(tl.float8e4nv), mask=mask)
    elif WIDE:
        byte = ((whole + 128) & 255) - 128
        tl.store(low + places, byte.to(tl.int8), mask=mask)
        tl.store(high + places, ((whole - byte) >> 8).to(tl.int8), mask=mask)
    else:
        tl.store(low + places, (whole - SHIFT).to(tl.int8), mask=mask)


@triton.jit
def _kind(position, size, stride, padding, dilation, TAPS: tl.constexpr):
    """Return `geometry.window_kinds` of positions in one dimension."""
    start = padding - position * stride
    first = tl.minimum((tl.maximum(start, 0) + dilation - 1) // dilation, TAPS)
    last = tl.minimum((tl.maximum(start + size, 0) + dilation - 1) // dilation, TAPS)
    return tl.where(first < last, first * TAPS - first * (first - 1) // 2 + last - first, 0)


@triton.jit
def _tile_of(program, tiles_down, tiles_across):
    """Return the row and column of a program's tile: bands of rows, each run column by column."""
    in_band = _BAND * tiles_across
    first = program // in_band * _BAND
    high = tl.minimum(tiles_down - first, _BAND)
    return first + program % in_band % high, program % in_band // high


# fmt: off
@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "windows", "per_picture"])
def multiply_kernel(
    codes, weights, member, factors, constants, offsets, y,
    height, width, channels, rows, columns, windows, outs, row,
    groups, stride_down, stride_across, pad_down, pad_across,
    dilation_down, dilation_across, per_picture, per_out, per_pixel,
    DOWN: tl.constexpr, ACROSS: tl.constexpr, KINDS: tl.constexpr, KINDS_ACROSS: tl.constexpr,
    OUTSIDE: tl.constexpr, PLANE: tl.constexpr,
    WINDOWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: on
    """Convolve a tile of windows with a tile of output channels; write it, or add a high plane."""
    group, group_outs, group_channels = tl.program_id(1), outs // groups, channels // groups
    down, across = _tile_of(tl.program_id(0), tl.cdiv(windows, WINDOWS), tl.cdiv(group_outs, OUTS))
    window = down * WINDOWS + tl.arange(0, WINDOWS)
    picture, pixel = window // (rows * columns), window % (rows * columns)
    i, j = pixel // columns, pixel % columns
    top, left = i * stride_down - pad_down, j * stride_across - pad_across
    out = across * OUTS + tl.arange(0, OUTS)
    is_out, out = out < group_outs, group * group_outs + out
    at = tl.load(member)
    weights += at * outs * row
    depth, chunks = tl.arange(0, DEPTH), tl.cdiv(group_channels, DEPTH)
    sums = tl.zeros((WINDOWS, OUTS), dtype=tl.int32)
    for step in range(0, DOWN * ACROSS * chunks):
        tap, channel = step // chunks, step % chunks * DEPTH + depth
        line, dot = top + tap // ACROSS * dilation_down, left + tap % ACROSS * dilation_across
        inside = (line >= 0) & (line < height) & (dot >= 0) & (dot < width) & (window < windows)
        places = ((picture * height + line) * width + dot)[:, None] * channels
        places += group * group_channels
        is_channel = channel < group_channels
        code = tl.load(
            codes + places + channel[None, :],
            mask=inside[:, None] & is_channel[None, :], other=OUTSIDE,
        )
        weight = tl.load(
            weights + out[None, :] * row + (tap * group_channels + channel)[:, None],
            mask=is_out[None, :] & is_channel[:, None], other=0,
        )
        sums = tl.dot(code, weight, sums, out_dtype=tl.int32)
    mask = (window < windows)[:, None] & is_out[None, :]
    places = (picture * per_picture + pixel * per_pixel)[:, None] + (out * per_out)[None, :]
    factor = tl.load(factors + at * outs + out, mask=is_out, other=0.0)[None, :]
    if PLANE == 0:
        sums += tl.load(offsets + at * outs + out, mask=is_out, other=0)[None, :]
        if KINDS == 1:
            constant = tl.load(constants + at * outs + out, mask=is_out, other=0.0)[None, :]
        else:
            kind = _kind(i, height, stride_down, pad_down, dilation_down, DOWN) * KINDS_ACROSS
            kind += _kind(j, width, stride_across, pad_across, dilation_across, ACROSS)
            of_kind = constants + (at * KINDS + kind)[:, None] * outs
            constant = tl.load(of_kind + out[None, :], mask=mask, other=0.0)
        values = sums.to(tl.float32) * factor + constant
    else:
        values = sums.to(tl.float32) * (factor * 256) + tl.load(y + places, mask=mask, other=0.0)
    tl.store(y + places, values.to(y.dtype.element_ty), mask=mask)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def round_to_bytes(
    x: Tensor, numbers: Tensor, member: Tensor, fmt: FloatFormat, exponent: int | None = None
) -> list[Tensor]:
    """Do as `int8.round_to_bytes`, with the numbers of all members and the one that runs.

    Arguments:
        x: ``(batch, channels, height, width)``, in any order.
        numbers: float32 ``(members, 2)``.
        member: int64 ``(1,)``.
    """
    batch, channels, height, width = x.shape
    if height > 1 and width > 1 and x.stride(2) != width * x.stride(3):
        x = x.contiguous()
    per_pixel = x.stride(3) if width > 1 else x.stride(2)
    dtype, count = (torch.int8, 1 + is_wide(fmt)) if exponent is None else (torch.float8_e4m3fn, 1)
    planes = [x.new_empty((batch, height, width, channels), dtype=dtype) for _ in range(count)]
    share = (16, 256) if x.stride(1) == 1 and channels > 64 else (64, 64)
    grid = (triton.cdiv(height * width, share[0]), triton.cdiv(channels, share[1]), batch)
    with _device_of(x):
        round_kernel[grid](
            x, numbers, member, planes[0], planes[-1], height * width, channels,
            x.stride(0), x.stride(1), per_pixel, float(fmt.largest),
            SIGNED=fmt.signed, MANTISSA=fmt.mantissa_bits, SHIFT=shift_of(fmt), WIDE=count > 1,
            GAIN=0.0 if exponent is None else 2.0**exponent,
            PIXELS=share[0], CHANNELS=share[1], enable_fp_fusion=False,
        )  # fmt: skip
    return planes


def multiply_(
    y: Tensor,
    planes: list[Tensor],
    layer: Int8Layer,
    member: Tensor,
    geometry: Geometry,
    shift: int,
    tile: Tile | None = None,
) -> None:
    """Write what `int8.multiply` returns into an output of any type and order.

    Arguments:
        y: ``(batch, out, rows, columns)``, rows and columns in line; float32 where there are two
            planes.
        member: int64 ``(1,)``.
        tile: instead of `choose_tile`'s.
    """
    batch, outs, rows, columns = y.shape
    _, height, width, channels = planes[0].shape
    windows, groups = batch * rows * columns, geometry.groups
    tile = tile or choose_tile(windows, outs // groups, _processors(y))
    depth = min(tile.depth, max(_LEAST_DEPTH, triton.next_power_of_2(channels // groups)))
    grid = (triton.cdiv(windows, tile.windows) * triton.cdiv(outs // groups, tile.outs), groups)
    with _device_of(y):
        for i, plane in enumerate(planes):
            multiply_kernel[grid](
                plane, *layer[:1], member, *layer[1:], y,
                height, width, channels, rows, columns, windows, outs, layer.weights.shape[2],
                groups, *geometry.stride, *geometry.padding, *geometry.dilation,
                y.stride(0), y.stride(1), y.stride(3) if columns > 1 else y.stride(2),
                DOWN=geometry.kernel[0], ACROSS=geometry.kernel[1],
                KINDS=layer.constants.shape[1], KINDS_ACROSS=num_window_kinds(geometry.kernel[1]),
                OUTSIDE=-shift, PLANE=i, WINDOWS=tile.windows, OUTS=tile.outs, DEPTH=depth,
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
            )  # fmt: skip


def _processors(x: Tensor) -> int:
    """Return how many multiprocessors a tensor's GPU has."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
