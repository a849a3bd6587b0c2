from fractions import Fraction
from itertools import product

import pytest
import torch

from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat, formats_of_width


def valid_formats() -> list[FloatFormat]:
    found = []
    for exponent_bits, mantissa_bits, signed in product(range(10), range(10), (True, False)):
        try:
            found.append(FloatFormat(exponent_bits, mantissa_bits, signed))
        except UsageError:
            continue
    return found


FORMATS = valid_formats()
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def test_exactly_the_widths_2_to_8_are_formats() -> None:
    shapes = {(f.exponent_bits, f.mantissa_bits, f.signed) for f in FORMATS}
    wanted = {
        (e, m, s)
        for e, m, s in product(range(9), range(9), (True, False))
        if e + m >= 1 and 2 <= e + m + s <= 8
    }
    assert shapes <= wanted
    assert {shape for shape in wanted if shape[0] <= 5} <= shapes


@each_format
def test_bits_add_up(fmt: FloatFormat) -> None:
    assert fmt.bits == fmt.signed + fmt.exponent_bits + fmt.mantissa_bits
    assert len(fmt.code_book) == 2**fmt.bits


@each_format
def test_magnitudes_follow_ieee_754_with_subnormals(fmt: FloatFormat) -> None:
    bias = 2 ** max(fmt.exponent_bits - 1, 0) - 1
    smallest = Fraction(2) ** (1 - bias - fmt.mantissa_bits)
    for code, magnitude in enumerate(fmt.magnitudes):
        exponent, mantissa = divmod(code, 2**fmt.mantissa_bits)
        fraction = Fraction(mantissa, 2**fmt.mantissa_bits)
        value = (
            Fraction(2) ** (exponent - bias) * (1 + fraction)
            if exponent
            else Fraction(2) ** (1 - bias) * fraction
        )
        assert magnitude == value / smallest


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_finite_values_equal_torch_float8(name: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    finite = theirs.isfinite()
    ours = torch.tensor(FloatFormat.parse(name).magnitudes, dtype=torch.float64) * theirs[1]
    assert torch.equal(ours[finite], theirs[finite])


@each_format
def test_levels_are_sorted_distinct_and_symmetric_if_signed(fmt: FloatFormat) -> None:
    assert all(low < high for low, high in zip(fmt.levels, fmt.levels[1:], strict=False))
    assert set(fmt.levels) == set(fmt.code_book)
    assert len(fmt.levels) == 2**fmt.bits - fmt.signed
    assert fmt.levels[-1] == fmt.largest
    assert fmt.levels[0] == (-fmt.largest if fmt.signed else 0)
    if fmt.signed:
        assert all(-low == high for low, high in zip(fmt.levels, reversed(fmt.levels), strict=True))
        assert all(
            fmt.code_book[c | fmt.sign_bit] == -fmt.code_book[c] for c in range(fmt.sign_bit)
        )


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("e1m2", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("e2m1", [0, 1, 2, 3, 4, 6, 8, 12]),
        ("e3m0", [0, 1, 2, 4, 8, 16, 32, 64]),
        ("ue1m3", [*range(16)]),
        ("ue0m4", [*range(16)]),
        ("ue2m2", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]),
        ("ue3m1", [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]),
        ("ue4m0", [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]),
    ],
)
def test_four_bit_magnitudes_equal_the_published_table(name: str, magnitudes: list[int]) -> None:
    assert list(FloatFormat.parse(name).magnitudes) == magnitudes


@each_format
def test_name_leads_back_to_the_format(fmt: FloatFormat) -> None:
    assert FloatFormat.parse(fmt.name) == fmt
    assert FloatFormat.parse(f" {fmt.name.upper()} ") == fmt
    assert (
        str(fmt)
        == fmt.name
        == f"{'' if fmt.signed else 'u'}e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "e",
        "fp4",
        "e2",
        "m1",
        "2m1",
        "e2m1x",
        "se2m1",
        "e-1m3",
        "e2 m1",
        "e10m1",
        "uue2m2",
        "e2m1,ue2m2",
    ],
)
def test_unreadable_name_says_how_to_write_one(name: str) -> None:
    with pytest.raises(UsageError, match="write it like e2m1"):
        FloatFormat.parse(name)


@pytest.mark.parametrize(
    "name", ["e0m0", "ue0m0", "ue1m0", "ue0m1", "e4m4", "ue4m5", "e0m8", "e9m9"]
)
def test_name_of_too_few_or_too_many_bits_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        FloatFormat.parse(name)


@pytest.mark.parametrize("shape", [(-1, 4), (4, -1), (0, 0)])
def test_negative_or_no_magnitude_bits_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError):
        FloatFormat(*shape, signed=True)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16])
def test_no_formats_of_a_width_out_of_range(bits: int, signed: bool) -> None:
    with pytest.raises(UsageError, match=f"{bits} bits"):
        formats_of_width(bits, signed=signed)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("mantissa_bits", range(1, 9))
def test_no_exponent_bit_is_the_same_grid_as_one(mantissa_bits: int, signed: bool) -> None:
    if not 2 <= mantissa_bits + signed <= 8:
        return
    without, with_one = (FloatFormat(e, mantissa_bits - e, signed) for e in (0, 1))
    assert without.code_book == with_one.code_book


@each_format
def test_uniform_means_equal_steps(fmt: FloatFormat) -> None:
    steps = {high - low for low, high in zip(fmt.magnitudes, fmt.magnitudes[1:], strict=False)}
    assert fmt.is_uniform == (len(steps) == 1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_formats_of_a_width_are_distinct_grids_with_the_uniform_one_first(
    bits: int, signed: bool
) -> None:
    formats = formats_of_width(bits, signed=signed)
    assert all(fmt.bits == bits and fmt.signed == signed for fmt in formats)
    assert len({fmt.levels for fmt in formats}) == len(formats)
    assert [fmt.is_uniform for fmt in formats] == [True] + [False] * (len(formats) - 1)


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (4, "e1m2 e2m1 e3m0 ue1m3 ue2m2 ue3m1 ue4m0"),
        (6, "e1m4 e2m3 e3m2 e4m1 ue1m5 ue2m4 ue3m3 ue4m2"),
        (8, "e1m6 e2m5 e3m4 e4m3 e5m2 ue1m7 ue2m6 ue3m5 ue4m4 ue5m3"),
    ],
)
def test_widths_list_the_documented_formats(bits: int, names: str) -> None:
    assert [
        f.name for signed in (True, False) for f in formats_of_width(bits, signed=signed)
    ] == names.split()


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.bits == 4], ids=str)
def test_four_bit_grids_fit_eight_bit_units(fmt: FloatFormat) -> None:
    levels = torch.tensor(fmt.levels, dtype=torch.float32)
    scaled = (
        levels * 2.0**-9
    )  # the smallest float8_e4m3 number: any power of two may go into the scale
    assert torch.equal(scaled.to(torch.float8_e4m3fn).float(), scaled)
    integers = torch.iinfo(torch.int8 if fmt.signed else torch.uint8)
    is_small = integers.min <= fmt.levels[0] and fmt.levels[-1] <= integers.max
    assert is_small == (fmt.name != "ue4m0")
    if is_small:
        assert torch.equal(levels.to(torch.float8_e4m3fn).float(), levels)
