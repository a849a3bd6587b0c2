"""Round the input of a layer to bytes, on a CPU.

Rounding is eight passes, and over a whole tensor they cost more than the product that follows. They
are done piece by piece, so that a piece stays in the cache. Under ``torch.compile`` it is one pass,
three times as fast (docs/performance.md), fused with what comes before.

An input in bfloat16 or float16 has one of 65,536 values, so there rounding is two passes: the bits
of a value are the index of its byte in a table, which the eight passes have made once.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from msfp_cli.formats.float_format import BYTE_BITS
from msfp_cli.formats.rounding import Grid, round_steps
from msfp_cli.layers.kernels.arithmetic import BYTE, unsigned_planes

# Elements for each thread: 256 KiB of float32, which stay in its cache from pass to pass.
_PIECE = 1 << 16
_INT8 = 2**7 - 1
_INDEX_BITS = 16


def round_to_bytes(x: Tensor, grid: Grid, shift: int) -> list[Tensor]:
    """Round reals to the integers of their grid, plus a shift that makes them unsigned.

    Arguments:
        x: floating point, any shape.

    Returns:
        ``code_book[quantize(x, grid)] + shift`` as planes of bytes, the low one first: one plane
        where the integers fit, else two; uint8, shape and layout of `x`. A NaN gives any byte.
    """
    return _in_layout(x, lambda dense: _round_by_pieces(dense, grid, shift))


def can_be_looked_up(dtype: torch.dtype) -> bool:
    """Whether a type has so few values that `tables_of_bytes` can list them."""
    return dtype.itemsize * BYTE_BITS == _INDEX_BITS


def tables_of_bytes(dtype: torch.dtype, grid: Grid, shift: int) -> list[Tensor]:
    """Round every value of a type of 16 bits; a plane's table is uint8, ``(65536,)``."""
    bits = torch.arange(1 << _INDEX_BITS, dtype=torch.int32).to(torch.int16)
    return _round_by_pieces(bits.view(dtype), grid, shift)


def look_up_bytes(x: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Return what `round_to_bytes` does, by the tables of the input's type."""
    return _in_layout(x, lambda dense: _look_up_by_pieces(dense, tables))


def _in_layout(x: Tensor, planes_of: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """Round a tensor in the order in which its values lie in memory."""
    is_channels_last = (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )
    dense = x.permute(0, 2, 3, 1) if is_channels_last else x.contiguous()
    planes = planes_of(dense)
    return [plane.permute(0, 3, 1, 2) if is_channels_last else plane for plane in planes]


def round_compiled(x: Tensor, grids: Sequence[Grid], lifted: Tensor, shift: int) -> list[Tensor]:
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


def _look_up_by_pieces(dense: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Look a contiguous tensor up piece by piece, so that the indices stay in the cache."""
    planes = [torch.empty(dense.shape, dtype=torch.uint8) for _ in tables]
    for bits, *parts in _pieces(dense.view(torch.uint16), *planes):
        index = bits.int()
        for table, part in zip(tables, parts, strict=True):
            torch.index_select(table, 0, index, out=part)
    return planes


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Part contiguous tensors of one shape into flat pieces."""
    size = _PIECE * torch.get_num_threads()
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


def _round_by_pieces(dense: Tensor, grid: Grid, shift: int) -> list[Tensor]:
    """Round a contiguous tensor piece by piece, so that a piece stays in the cache."""
    planes = [torch.empty(dense.shape, dtype=torch.uint8)]
    if grid.format.largest + shift > BYTE:
        planes.append(torch.empty_like(planes[0]))
    for values, *parts in _pieces(dense, *planes):
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
