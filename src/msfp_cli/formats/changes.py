"""Codes that differ little from other codes: which ones changed, and to what.

Fine-tuning moves few codes of a weight, nearly all of them to the next level of the grid, so the
members of a hub are told from the first by three ascending lists of positions: codes that went one
level up, one level down, and elsewhere; the last with the new codes. A list of ``m`` positions
below ``n`` is held as Elias and Fano did (Elias 1974, doi:10.1145/321812.321820): the lowest
``floor(log2(n / m))`` bits of each position as they are, and of the rest how often each value
occurs, in unary. That takes about ``2 + log2(n / m)`` bits a position, half a bit more than any
code could, and both ways are a few operations on whole tensors.

As bytes, one list after another, numbers with their lowest byte or bit first::

    count       4 bytes, m
    low         m * floor(log2(n / m)) bits, filled up to a byte
    high        m + (n >> floor(log2(n / m))) + 1 bits, filled up: bit i + (position i >> ...) is 1

and at the end the new codes of the third list, packed as `packing` does.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.packing import pack, packed_size, unpack

_COUNT_BYTES = 4


def changes_between(first: Tensor, other: Tensor, fmt: FloatFormat) -> Tensor:
    """Return what makes other codes of the first ones.

    Arguments:
        first, other: uint8 ``(n,)``, codes of `fmt`.

    Returns:
        uint8, one-dimensional.
    """
    up, down = _neighbours(fmt)
    before = first.long()
    differ = first != other
    to_up = differ & (up[before] == other)
    to_down = differ & (down[before] == other) & ~to_up
    elsewhere = differ & ~to_up & ~to_down
    lists = [_encode(mask.numpy()) for mask in (to_up, to_down, elsewhere)]
    return torch.cat([*map(torch.from_numpy, lists), pack(other[elsewhere], fmt.bits)])


def apply_changes(first: Tensor, changes: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Undo `changes_between`.

    Arguments:
        first: uint8 ``(n,)``.
        changes: begins with what `changes_between` returned.

    Returns:
        The other codes, uint8 ``(n,)``, and the bytes that come after their changes.

    Raises:
        ValueError: these are not changes of `n` codes.
    """
    up, down = _neighbours(fmt)
    data = changes.numpy()
    rising, data = _decode(data, len(first))
    falling, data = _decode(data, len(first))
    elsewhere, data = _decode(data, len(first))
    size = packed_size(len(elsewhere), fmt.bits)
    if len(data) < size:
        raise ValueError("the new codes are cut off")
    codes = first.clone()
    codes[rising] = up[first[rising].long()]
    codes[falling] = down[first[falling].long()]
    codes[elsewhere] = unpack(torch.from_numpy(data[:size].copy()), fmt.bits, (len(elsewhere),))
    return codes, changes[len(changes) - len(data) + size :]


def _neighbours(fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Return the codes of the next level up and down for each code; the ends have themselves."""
    code_of = {integer: code for code, integer in reversed(list(enumerate(fmt.code_book)))}
    levels = list(fmt.levels)
    ranks = [levels.index(integer) for integer in fmt.code_book]
    last = len(levels) - 1
    up = [code_of[levels[min(rank + 1, last)]] for rank in ranks]
    down = [code_of[levels[max(rank - 1, 0)]] for rank in ranks]
    return torch.tensor(up, dtype=torch.uint8), torch.tensor(down, dtype=torch.uint8)


def _num_low_bits(count: int, size: int) -> int:
    """Return ``floor(log2(size / count))``; 0 where that would be negative."""
    return max(0, (size // max(count, 1)).bit_length() - 1)


def _encode(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the positions at which a mask is true, as bytes."""
    positions = np.flatnonzero(mask)
    count = len(positions)
    low_bits = _num_low_bits(count, len(mask))
    low = positions[:, None] >> np.arange(low_bits) & 1
    high = np.zeros(count + (len(mask) >> low_bits) + 1, dtype=np.uint8)
    high[np.arange(count) + (positions >> low_bits)] = 1
    parts = [np.packbits(bits.reshape(-1).astype(bool), bitorder="little") for bits in (low, high)]
    return np.concatenate([np.array([count], "<u4").view(np.uint8), *parts])


def _decode(data: NDArray[np.uint8], size: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the positions that bytes begin with, and the bytes after them.

    Arguments:
        size: what all positions are below.
    """
    if len(data) < _COUNT_BYTES:
        raise ValueError("a list of positions is cut off")
    count = int(data[:_COUNT_BYTES].copy().view("<u4")[0])
    if count > size:
        raise ValueError(f"{count} positions of {size} changed")
    low_bits = _num_low_bits(count, size)
    num_high = count + (size >> low_bits) + 1
    low_end = _COUNT_BYTES + packed_size(count * low_bits, 1)
    high_end = low_end + packed_size(num_high, 1)
    if len(data) < high_end:
        raise ValueError("a list of positions is cut off")
    bits = np.unpackbits(data[_COUNT_BYTES:low_end], count=count * low_bits, bitorder="little")
    low = bits.reshape(count, low_bits).astype(np.int64) @ (1 << np.arange(low_bits))
    high = np.flatnonzero(np.unpackbits(data[low_end:high_end], count=num_high, bitorder="little"))
    if len(high) != count:
        raise ValueError(f"a list has {len(high)} positions, not {count}")
    positions = ((high - np.arange(count)) << low_bits) + low
    if (np.diff(positions) <= 0).any() or (positions >= size).any():
        raise ValueError("a list of positions does not ascend")
    return positions, data[high_end:]
