"""How formats are chosen, and which candidates a layer has; nothing here needs torch."""

from dataclasses import dataclass

from msfp_cli.calibration.keep import DEFAULT_KEEP, KeepRule
from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import (
    INPUT_INTEGER_BITS,
    MAX_BITS,
    MIN_BITS,
    WEIGHT_INTEGER_BITS,
    FloatFormat,
    formats_of_width,
)
from msfp_cli.recipe import Recipe, at_least

FORMAT_SETS = ("mixed", "signed", "unsigned", "integer")


@dataclass(frozen=True, kw_only=True)
class CalibrateRecipe(Recipe):
    """How to choose the formats.

    Arguments:
        weights, activations: bits, 2 to 8; None leaves them in floating point.
        formats: a name in `FORMAT_SETS`, or formats separated by commas (``e2m1,ue2m2``).
        keep: rules ``PATTERN:BITS``, the last that matches wins; `DEFAULT_KEEP` comes before them.
        lift: share of the multiply-adds that may be lifted to 8 bits, worst layers first; 0 for
            none.
        max_samples: elements of each layer's input that are kept for the search.
        sensitivity_calls: recorded calls on which each layer's contribution to the error is
            measured.
        seed: of the sample.
    """

    weights: int | None = 4
    activations: int | None = 4
    formats: str = "mixed"
    keep: tuple[str, ...] = ()
    lift: float = 0.05
    max_samples: int = 40_000
    sensitivity_calls: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for what, bits in (("--weights", self.weights), ("--activations", self.activations)):
            if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
                raise UsageError(
                    f"{what} {bits} is out of range; choose {MIN_BITS} to {MAX_BITS} bits, or none"
                )
        if self.weights is None and self.activations is None:
            raise UsageError(
                "neither weights nor activations are quantized; give --weights or --activations some bits"
            )
        if not 0 <= self.lift <= 1:
            raise UsageError(
                f"--lift {self.lift} is out of range; it is a share of the multiply-adds, 0 to 1"
            )
        at_least("samples", self.max_samples, 1)
        at_least("sensitivity calls", self.sensitivity_calls, 1)
        for rule in self.keep:
            KeepRule.parse(rule)
        if self.formats not in FORMAT_SETS:
            widths = {FloatFormat.parse(name).bits for name in self.formats.split(",")}
            if not widths & {self.weights, self.activations}:
                raise UsageError(
                    f"--formats {self.formats!r} names no format of the bits that were asked for"
                )

    def kept_bits(self, name: str) -> tuple[bool, int | None]:
        """Return whether a rule speaks of the layer, and the bits it keeps (None: floating point)."""
        for text in reversed(DEFAULT_KEEP + self.keep):
            rule = KeepRule.parse(text)
            if rule.matches(name):
                return True, rule.bits
        return False, None

    def input_formats(self, bits: int) -> tuple[FloatFormat, ...]:
        """Return the candidates for a layer's input.

        Raises:
            UsageError: `formats` is neither a set's name nor a list of formats, or leaves none of
                this width.
        """
        signed, unsigned = (
            formats_within(bits, INPUT_INTEGER_BITS, signed=signed) for signed in (True, False)
        )
        sets = {
            "mixed": signed + unsigned,
            "signed": signed,
            "unsigned": unsigned,
            "integer": tuple(fmt for fmt in unsigned if fmt.is_uniform),
        }
        if self.formats in sets:
            return sets[self.formats]
        # A list speaks of the width it names; layers kept or lifted to another width have their
        # free choice.
        named = [FloatFormat.parse(name) for name in self.formats.split(",")]
        return tuple(fmt for fmt in named if fmt.bits == bits) or sets["mixed"]

    def weight_formats(self, bits: int) -> tuple[FloatFormat, ...]:
        """Return the candidates for a weight: always signed; uniform only, where integers were asked for."""
        signed = formats_within(bits, WEIGHT_INTEGER_BITS, signed=True)
        if self.formats == "integer":
            return tuple(fmt for fmt in signed if fmt.is_uniform)
        if self.formats in FORMAT_SETS:
            return signed
        named = {FloatFormat.parse(name) for name in self.formats.split(",")}
        return tuple(fmt for fmt in formats_of_width(bits, signed=True) if fmt in named) or signed


def formats_within(bits: int, integer_bits: int, *, signed: bool) -> tuple[FloatFormat, ...]:
    """List the formats of a width whose integers are that narrow: what is chosen should also run on 8-bit units."""
    return tuple(
        fmt for fmt in formats_of_width(bits, signed=signed) if fmt.integer_bits <= integer_bits
    )
