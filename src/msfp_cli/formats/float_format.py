"""Small floating-point formats as plain numbers; nothing here needs torch.

A format ``ExMy`` spends one bit on the sign (if signed), ``E`` bits on the exponent and ``M`` on
the mantissa. There is no infinity and no NaN, so every code is a number, and exponent field 0 holds
subnormals. Measured in the smallest step of the format, every magnitude is an integer::

    exponent field 0       ->  m                        m = 0 .. 2^M - 1
    exponent field e >= 1  ->  (2^M + m) * 2^(e - 1)

so ``e2m1`` is 0 1 2 3 4 6 8 12 and ``e1m2`` is the uniform grid 0 .. 7. A real grid is such a *code
book* times a scale, ``scale = max_value / largest``; the maximum is a real number, which is the
same as a real exponent bias (Kuzmin et al. 2022, arXiv:2208.09225). Unsigned formats add a real
zero point, so the freed sign bit buys twice as many levels on a one-sided range (mixup-sign
floating point, Zhao et al. 2025, arXiv:2505.21591). A format with ``E = 1`` equals the uniform
(integer) grid of one more mantissa bit, hence integer quantization is part of the same search.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from msfp_cli.errors import UsageError

MIN_BITS = 2
MAX_BITS = 8
BYTE_BITS = 8  # of the integers of a weight: what 8-bit units take
INPUT_INTEGER_BITS = 16  # two bytes, one after the other
MAX_EXPONENT_BITS = 5  # 31 octaves; more would leave float32's own range
_NAME = re.compile(r"(u?)e(\d)m(\d)")


@dataclass(frozen=True)
class FloatFormat:
    """Describe a floating-point format of 2 to 8 bits.

    Arguments:
        exponent_bits: bits of the exponent field, 0 (a uniform grid) to 5.
        mantissa_bits: bits of the mantissa field, 0 or more.
        signed: whether one bit is spent on the sign.

    Raises:
        UsageError: the bits do not add up to 2..8, no magnitude bit is left, or the exponent is
            wider than 5 bits.
    """

    exponent_bits: int
    mantissa_bits: int
    signed: bool

    def __post_init__(self) -> None:
        if (
            self.exponent_bits < 0
            or self.mantissa_bits < 0
            or self.exponent_bits + self.mantissa_bits < 1
        ):
            raise UsageError(f"a format needs exponent or mantissa bits, got {self.name}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(
                f"{self.name} has {self.bits} bits; formats have {MIN_BITS} to {MAX_BITS}"
            )
        if self.exponent_bits > MAX_EXPONENT_BITS:
            raise UsageError(f"{self.name} has more than {MAX_EXPONENT_BITS} exponent bits")

    @classmethod
    def parse(cls, name: str) -> "FloatFormat":
        """Read a format from its name, ``e2m1`` (signed) or ``ue2m2`` (unsigned).

        Raises:
            UsageError: the name is not of that form, or names no valid format.
        """
        match = _NAME.fullmatch(name.strip().lower())
        if match is None:
            raise UsageError(
                f"unknown format {name!r}; write it like e2m1 (signed) or ue2m2 (unsigned)"
            )
        return cls(int(match[2]), int(match[3]), signed=not match[1])

    @property
    def name(self) -> str:
        """The name that ``parse`` reads."""
        return f"{'' if self.signed else 'u'}e{self.exponent_bits}m{self.mantissa_bits}"

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """All bits of a code, the sign's among them."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @cached_property
    def magnitudes(self) -> tuple[int, ...]:
        """Magnitudes in smallest steps, ascending; the index is the code without its sign bit."""
        lead = 1 << self.mantissa_bits
        subnormal = tuple(range(lead))
        normal: list[int] = []
        for exponent in range(1, 1 << self.exponent_bits):
            normal.extend(mantissa << (exponent - 1) for mantissa in range(lead, 2 * lead))
        return subnormal + tuple(normal)

    @property
    def largest(self) -> int:
        """The largest magnitude."""
        return self.magnitudes[-1]

    @property
    def sign_bit(self) -> int:
        """The code's bit that says "negative"; 0 for an unsigned format."""
        return len(self.magnitudes) if self.signed else 0

    @cached_property
    def code_book(self) -> tuple[int, ...]:
        """The integer that each code stands for; a signed format has a second code for 0."""
        return (
            self.magnitudes + tuple(-m for m in self.magnitudes) if self.signed else self.magnitudes
        )

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """The distinct integers of the code book, ascending."""
        return tuple(sorted(set(self.code_book)))

    @property
    def integer_bits(self) -> int:
        """Bits of the code book's integers with their sign: 5 for e2m1's -12..12."""
        return self.largest.bit_length() + int(self.signed)

    @property
    def is_uniform(self) -> bool:
        """Whether all steps are equal, as in an integer grid."""
        return self.exponent_bits <= 1


def formats_of_width(bits: int, *, signed: bool) -> tuple[FloatFormat, ...]:
    """List every distinct grid of a bit width, uniform first.

    ``E = 0`` is left out, because it equals ``E = 1``.

    Raises:
        UsageError: `bits` is not in 2..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise UsageError(f"{bits} bits is out of range; formats have {MIN_BITS} to {MAX_BITS}")
    width = bits - int(signed)
    # Below 8 bits a fifth exponent bit buys octaves that no tensor has: never chosen, so not
    # listed.
    widest = min(width, MAX_EXPONENT_BITS if bits == MAX_BITS else MAX_EXPONENT_BITS - 1)
    return tuple(
        FloatFormat(exponent, width - exponent, signed) for exponent in range(1, widest + 1)
    )


def formats_within(bits: int, integer_bits: int, *, signed: bool) -> tuple[FloatFormat, ...]:
    """List the formats of a width whose integers are narrow enough for 8-bit units."""
    return tuple(
        fmt for fmt in formats_of_width(bits, signed=signed) if fmt.integer_bits <= integer_bits
    )


def one_byte_formats(bits: int, *, signed: bool) -> tuple[FloatFormat, ...]:
    """List for every exponent the finest format of at most `bits` bits with integers of one byte.

    At 8 bits they are e1m6 and e2m4: e2m5 spans as many octaves as e2m4, in steps half as large, so
    its integers take two bytes.
    """
    finest: dict[int, FloatFormat] = {}
    for width in range(max(MIN_BITS, bits - 1), bits + 1):
        for fmt in formats_within(width, BYTE_BITS, signed=signed):
            finest[fmt.exponent_bits] = fmt
    return tuple(finest.values())
