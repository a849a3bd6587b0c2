"""Where the windows of a convolution lie, and what falls over the edge of the picture.

A layer pads with real zeros, after its input was rounded. Written as ``x = scale q + z``, a zero
inside of the picture has some integer ``q``, but the padding is not on the grid unless ``z`` is 0:
it contributes neither ``q`` nor ``z``. Kernels multiply integers, where padding with the integer 0
is right, and add a constant per output channel for the share of ``z``, which is too much wherever
the window reaches over the edge. Two ways to get it right are here.

`frame_of` computes the difference in four strips, once for each size of a picture, and
`subtract_frame_` takes it from the finished output: few operations, each on little.

`window_kinds` is for kernels that look their constant up as they write. Along one dimension, the
taps inside of the picture are always neighbours, from some ``a`` to before some ``b``, so there are
``k (k + 1) / 2 + 1`` kinds of window (one is empty), whatever the picture's size. A constant for
each pair of a vertical and a horizontal kind, 49 for 3x3, is computed once with the layer, and a
window's kind is a few integer operations (derivation: ours).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Settings: TypeAlias = tuple[Any, ...]
Convolution: TypeAlias = Any  # an nn.Conv2d, quantized or not
# What a convolution computes; people replace it in a layer, to pad the two sides differently.
_OPERATOR = "_conv_forward"


class Geometry(NamedTuple):
    """How a convolution slides; each but the last is a pair, vertical and horizontal."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, layer: nn.Conv2d) -> "Geometry":
        """Return how a layer slides.

        Raises:
            ValueError: it does not pad with the same number of zeros on both sides, or somebody has
                replaced what it computes.
        """
        if _OPERATOR in layer.__dict__:
            raise ValueError(f"{_OPERATOR} is not torch's")
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        named = {"valid": (0, 0), "same": (reach[0] // 2, reach[1] // 2)}
        padding = named[layer.padding] if isinstance(layer.padding, str) else layer.padding
        is_lopsided = layer.padding == "same" and any(r % 2 for r in reach)
        pads_values = layer.padding_mode != "zeros" and any(padding)
        if is_lopsided or pads_values:
            raise ValueError(f"padding {layer.padding!r} in mode {layer.padding_mode!r}")
        return cls(
            _pair(layer.kernel_size),
            _pair(layer.stride),
            _pair(padding),
            _pair(layer.dilation),
            layer.groups,
        )

    def flat(self) -> list[int]:
        """Return the numbers in a row, as an operator takes them."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def from_flat(cls, numbers: Sequence[int]) -> "Geometry | None":
        """Undo `flat`; no numbers are no convolution."""
        if not numbers:
            return None
        kernel, stride, padding, dilation = [_pair(numbers[i : i + 2]) for i in range(0, 8, 2)]
        return cls(kernel, stride, padding, dilation, numbers[8])

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the output's height and width."""
        return self._output_length(0, height), self._output_length(1, width)

    def _output_length(self, dim: int, size: int) -> int:
        reach = self.dilation[dim] * (self.kernel[dim] - 1)
        return (size + 2 * self.padding[dim] - reach - 1) // self.stride[dim] + 1

    def along(self, dim: int) -> tuple[int, int, int, int]:
        """Return kernel, stride, padding and dilation of one dimension."""
        return self.kernel[dim], self.stride[dim], self.padding[dim], self.dilation[dim]


def settings_of(layer: Convolution) -> Settings:
    """Return what `Geometry.of` reads of a layer and its owner may set between two calls."""
    slides = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return (*slides, layer.padding_mode, layer.__dict__.get(_OPERATOR))


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = numbers
    return vertical, horizontal


def tap_sums(integers: Tensor) -> Tensor:
    """Sum a weight's integers over its input channels.

    Returns:
        float64 ``(out, kernel height, kernel width)``.
    """
    sums = integers.sum(dim=1, dtype=torch.int64).double()
    return sums if sums.ndim == 3 else sums.view(-1, 1, 1)


@lru_cache(maxsize=256)
def _inside(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[Tensor, int, int]:
    """Say for every output position of one dimension which taps fall inside the picture.

    Returns:
        float32 0 or 1, ``(positions, kernel)``; how many positions at the start have a tap outside;
        and where those at the end begin.
    """
    positions = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    where = torch.arange(positions)[:, None] * stride - padding + torch.arange(kernel) * dilation
    inside = (where >= 0) & (where < size)
    whole = inside.all(dim=1).nonzero().view(-1).tolist()
    start, end = (whole[0], whole[-1] + 1) if whole else (positions, positions)
    return inside.float(), start, end


class Strip(NamedTuple):
    """A part of the edge of an output, ``[:, :, rows, columns]``, and what it has too much.

    Arguments:
        excess: ``(out, rows, columns)``, or what broadcasts to that.
    """

    rows: slice
    columns: slice
    excess: Tensor


def frame_of(taps: Tensor, geometry: Geometry, height: int, width: int) -> list[Strip]:
    """Return the share of the zero point that taps outside of a picture have in its output.

    Arguments:
        taps: ``(out, kernel height, kernel width)``, the share of each tap.
        height, width: of the input.

    Returns:
        At most four strips, which do not overlap.
    """
    rows, top, bottom = _inside(height, *geometry.along(0))
    columns, left, right = _inside(width, *geometry.along(1))
    total = taps.sum(dim=(1, 2))[:, None, None]
    strips = []
    for strip in (slice(0, top), slice(bottom, None)):
        if len(rows[strip]):
            inside = torch.einsum("oij,hi,wj->ohw", taps, rows[strip], columns)
            strips.append(Strip(strip, slice(None), total - inside))
    for strip in (slice(0, left), slice(right, None)):
        if len(columns[strip]) and top < bottom:
            inside = torch.einsum("oij,wj->ow", taps, columns[strip])[:, None]
            strips.append(Strip(slice(top, bottom), strip, total - inside))
    return strips


def subtract_frame_(y: Tensor, frame: Sequence[Strip]) -> None:
    """Take from an output what its edges have too much, see `frame_of`.

    Arguments:
        y: ``(batch, out, rows, columns)``.
    """
    for rows, columns, excess in frame:
        y[:, :, rows, columns] -= excess


def num_window_kinds(taps: int) -> int:
    """Return how many runs of neighbouring taps there are, the empty one among them."""
    return taps * (taps + 1) // 2 + 1


def taps_of_kinds(taps: int) -> Tensor:
    """Say which taps each kind of window has inside of the picture.

    Returns:
        0 or 1, float64 ``(kinds, taps)``.
    """
    kinds = torch.zeros(num_window_kinds(taps), taps, dtype=torch.float64)
    row = 0
    for first in range(taps):
        for last in range(first + 1, taps + 1):
            row += 1
            kinds[row, first:last] = 1
    return kinds


def window_kinds(
    positions: Tensor, size: int, kernel: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """Return the kind of the window at each output position of one dimension.

    A kind is a row of `taps_of_kinds`.

    Arguments:
        positions: int64, any shape.
        size: the picture's height or width.
    """
    start = padding - positions * stride  # of the picture, counted from the window's first tap
    first = _taps_before(start, kernel, dilation)
    last = _taps_before(start + size, kernel, dilation)
    kind = first * kernel - first * (first - 1) // 2 + last - first
    return torch.where(first < last, kind, 0)


def _taps_before(place: Tensor, kernel: int, dilation: int) -> Tensor:
    """Count a window's taps that lie before a place, counted from the window's first tap."""
    taps = (place.clamp(min=0) + dilation - 1).div(dilation, rounding_mode="floor")
    return taps.clamp(max=kernel)
