"""Codes to bytes and back: two 4-bit codes a byte, four 6-bit codes in three bytes, and so on.

Codes are one stream of bits, lowest bit first: code ``i`` holds bits ``i * bits .. (i + 1) * bits -
1``. For 4 bits the first code of a pair is therefore the low nibble. A stream ends on a whole byte;
the unused bits of the last are zero.
"""

import math

import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat

_PIECE = 1 << 20  # bytes that are looked up at once, which bounds the temporaries of a large weight


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def _group(bits: int) -> tuple[int, int]:
    """Return the smallest (codes, bytes) group that ends on a whole byte."""
    num_bytes = math.lcm(bits, 8) // 8
    return num_bytes * 8 // bits, num_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of any shape, taken row by row, into one row of bytes.

    Arguments:
        codes: uint8, any shape, values below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint8, ``(packed_size(codes.numel(), bits),)``.
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    num_codes, num_bytes = _group(bits)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % num_codes)).view(-1, num_codes)
    packed = torch.zeros(padded.shape[0], num_bytes, dtype=torch.uint8, device=codes.device)
    for i in range(num_codes):
        byte, shift = divmod(i * bits, 8)
        packed[:, byte] |= padded[:, i] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= padded[:, i] >> (8 - shift)
    return packed.view(-1)[: packed_size(flat.numel(), bits)].contiguous()


def unpack(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo `pack`.

    Arguments:
        packed: uint8, ``(packed_size(prod(shape), bits),)``.
        bits: 1 to 8.
        shape: the shape of the codes.

    Returns:
        uint8 codes of that shape.
    """
    count = math.prod(shape)
    if bits == 8:
        return packed.reshape(shape).clone()
    num_codes, num_bytes = _group(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % num_bytes)).view(-1, num_bytes)
    codes = torch.empty(padded.shape[0], num_codes, dtype=torch.uint8, device=packed.device)
    for i in range(num_codes):
        byte, shift = divmod(i * bits, 8)
        codes[:, i] = padded[:, byte] >> shift
        if shift + bits > 8:
            codes[:, i] |= padded[:, byte + 1] << (8 - shift)
    codes &= (1 << bits) - 1
    return codes.view(-1)[:count].reshape(shape)


def unpack_integers(packed: Tensor, fmt: FloatFormat, shape: torch.Size) -> Tensor:
    """Unpack codes and look up the integers that they stand for, which have to fit into 8 bits.

    Two codes of 4 bits are looked up at once: a byte's pair of integers is one int16.

    Arguments:
        packed: see `unpack`.
        shape: the shape of the codes.

    Returns:
        int8 integers of that shape.
    """
    book = torch.tensor(fmt.code_book, dtype=torch.int8, device=packed.device)
    if fmt.bits != 4:
        codes = unpack(packed, fmt.bits, shape)
        return book.index_select(0, codes.view(-1).int()).view(shape)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([book[byte & 15], book[byte >> 4]], dim=1).view(torch.int16).view(-1)
    pieces = [pairs.index_select(0, piece.int()) for piece in torch.split(packed, _PIECE)]
    return torch.cat(pieces).view(torch.int8)[: shape.numel()].view(shape)
