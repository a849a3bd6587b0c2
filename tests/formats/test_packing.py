import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msfp_cli.formats.packing import pack, packed_size, unpack


@st.composite
def codes_of_a_width(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@given(codes_of_a_width())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_bytes_are_one_little_endian_number_and_unpack_undoes_pack(
    drawn: tuple[list[int], int],
) -> None:
    codes, bits = drawn
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == number.to_bytes(math.ceil(len(codes) * bits / 8), "little")
    assert packed.numel() == packed_size(len(codes), bits)
    assert unpack(packed, bits, (len(codes),)).tolist() == codes


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [0x1, 0x2, 0xF, 0x0, 0xA], [0x21, 0x0F, 0x0A]),
        (6, [0b000001, 0b000010, 0b000011, 0b000100], [0b10_000001, 0b0011_0000, 0b000100_00]),
        (
            6,
            [0b111111, 0b000000, 0b101010, 0b110011, 0b100001],
            [0x3F, 0b1010_0000, 0b110011_10, 0b00_100001],
        ),
        (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], [0b00001101, 1]),
        (8, [0, 7, 255], [0, 7, 255]),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed


def test_two_4_bit_codes_take_a_byte_and_four_6_bit_codes_three() -> None:
    assert [packed_size(n, 4) for n in range(5)] == [0, 1, 1, 2, 2]
    assert [packed_size(n, 6) for n in range(6)] == [0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("bits", range(1, 9))
def test_shapes_survive_row_by_row(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (3, 5, 7), dtype=torch.uint8, generator=generator)
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape), codes)
    assert torch.equal(
        pack(codes.permute(2, 0, 1), bits), pack(codes.permute(2, 0, 1).contiguous(), bits)
    )
    assert torch.equal(pack(codes, bits), pack(codes.flatten(), bits))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing_packs_to_nothing(bits: int, shape: tuple[int, ...]) -> None:
    packed = pack(torch.empty(shape, dtype=torch.uint8), bits)
    assert packed.shape == (0,)
    assert unpack(packed, bits, shape).shape == shape


def test_a_scalar_packs_to_one_byte() -> None:
    packed = pack(torch.tensor(5, dtype=torch.uint8), 4)
    assert packed.tolist() == [5]
    assert unpack(packed, 4, ()).item() == 5


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_makes_a_copy(bits: int) -> None:
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    packed = pack(codes, bits)
    codes.zero_()
    unpacked = unpack(packed, bits, (2,))
    packed.zero_()
    assert unpacked.tolist() == [1, 2]
