"""A weight without a calibration: its format, its scales and its packed codes, in a few passes.

`search` is exact and takes its time. Here a weight of a large model is read once, so this counts:
the format is chosen by some of the rows, and the maxima are a coarser grid. On Gaussian and on
heavy-tailed rows the squared error is within a thousandth of the exact one
(`tests/formats/test_weights.py` allows a hundredth).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.packing import pack
from msfp_cli.formats.rounding import Grid, quantize
from msfp_cli.formats.search import SearchSpace, search_rows

_SPACE = SearchSpace(num_maxima=24, num_refinements=1)
_JUDGES = 128  # rows by which the format is chosen
_BLOCK = 1 << 20  # elements that are rounded at once: they stay in a processor's cache


@dataclass(frozen=True, kw_only=True)
class CodedWeight:
    """A weight as codes.

    Arguments:
        format: of all its rows.
        scale: float32, ``(out,)``.
        codes: uint8, the packed codes of the rows, one after another.
    """

    format: FloatFormat
    scale: Tensor
    codes: Tensor


def encode_weight(weight: Tensor, formats: Sequence[FloatFormat]) -> CodedWeight:
    """Choose a format and a scale for each output channel, and round to the nearest code.

    Arguments:
        weight: floating point, ``(out, ...)``, finite.
        formats: signed candidates.
    """
    rows = weight.detach().reshape(weight.shape[0], -1)
    fmt = _choose_format(rows, formats)
    best = search_rows(rows, (fmt,), _SPACE.for_bits(fmt.bits)).winner
    scale = best.max_value / fmt.largest
    return CodedWeight(format=fmt, scale=scale, codes=pack_rows(rows, scale, fmt))


def _choose_format(rows: Tensor, formats: Sequence[FloatFormat]) -> FloatFormat:
    """Return the format of least error over evenly spaced rows."""
    if len(formats) == 1:
        return formats[0]
    judges = rows[:: max(1, len(rows) // _JUDGES)]
    return search_rows(judges, formats, _SPACE.for_bits(formats[0].bits)).winner.format


def pack_rows(rows: Tensor, scale: Tensor, fmt: FloatFormat) -> Tensor:
    """Round rows to the nearest codes and pack them, block by block.

    Arguments:
        rows: floating point, ``(out, rest)``.
        scale: float32, ``(out,)``.

    Returns:
        uint8, ``(packed_size(rows.numel(), fmt.bits),)``.
    """
    height = max(8, _BLOCK // max(1, rows.shape[1]) // 8 * 8)  # 8 rows end on a whole byte
    blocks = zip(rows.split(height), scale.split(height), strict=True)
    codes = [pack(quantize(block, Grid(fmt, part[:, None])), fmt.bits) for block, part in blocks]
    return torch.cat(codes)


def is_finite(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are finite; those of an offloaded part are not there."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return True
    numbers = tensor.float() if tensor.element_size() == 1 else tensor  # torch cannot compare all
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(numbers))
