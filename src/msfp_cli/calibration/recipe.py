"""How formats are chosen, and which candidates a layer has; nothing here needs torch."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from msfp_cli.calibration.keep import DEFAULT_KEEP, KeepRule, parse_bits
from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import (
    BYTE_BITS,
    INPUT_INTEGER_BITS,
    MAX_BITS,
    MIN_BITS,
    FloatFormat,
    formats_of_width,
    formats_within,
    one_byte_formats,
)
from msfp_cli.recipe import Recipe, option

ROUNDINGS = ("compensated", "nearest")
INPUT_SCALES = ("auto", "tensor", "token")
ROTATIONS = ("auto", "none", "hadamard")
_GROUP = 32  # weights
_TEXT_BITS = 4
FORMAT_SETS = ("mixed", "signed", "unsigned", "integer")


def _read_bits(option_name: str) -> Callable[[str], int | None]:
    """Return what reads the bits of an option."""
    return lambda text: parse_bits(text, option_name)


def _write_bits(bits: int | None) -> str:
    return "none" if bits is None else str(bits)


def _read_groups(text: str) -> int:
    """Read the weights of a group, or ``none``, which is 0."""
    if text.strip().lower() == "none":
        return 0
    if not text.strip().isdecimal():
        raise UsageError(f"--weight-groups {text!r} is not a number; choose 32, 64 or none")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class CalibrateRecipe(Recipe):
    """How to choose the formats.

    Bits that are None leave weights or activations in floating point. `DEFAULT_KEEP` comes before
    the rules of `keep`.
    """

    PRESETS = {
        "paper": {
            "lift": 0.0,
            "input_lift": 0.0,
            "rounding": "nearest",
            "weight_groups": 0,
            "input_scales": "tensor",
            "rotate": "none",
            "keep": ("@first:8", "@last:8"),
        }
    }

    weights: int | None = option(
        4,
        f"Bits of the weights, {MIN_BITS} to {MAX_BITS}, or none for floating point.",
        at_least=MIN_BITS,
        at_most=MAX_BITS,
        read=_read_bits("--weights"),
        write=_write_bits,
    )
    activations: int | None = option(
        4,
        f"Bits of the layers' inputs, {MIN_BITS} to {MAX_BITS}, or none for floating point.",
        at_least=MIN_BITS,
        at_most=MAX_BITS,
        read=_read_bits("--activations"),
        write=_write_bits,
    )
    formats: str = option(
        "mixed",
        "Formats to choose from: signed, unsigned, mixed (both), integer, or a list such as "
        "e2m1,ue2m2. Weights are always signed.",
    )
    keep: tuple[str, ...] = option(
        (),
        "PATTERN:BITS sets the bits of the layers whose name matches (none: floating point); "
        "repeatable, the last match wins. @first, @last and @conditions are the layers that the "
        "recorded calls show to be first or last on the sample's way, or to see only time and "
        "conditions. Default: @first:none, @last:none, @conditions:8; embedding tables get 8 bits.",
    )
    lift: float = option(
        0.05,
        "Share of the multiply-adds, 0 to 1, that may get 8 bits: the layers with the largest "
        "error come first. Where inputs have 8 bits or more, the share of the weights.",
        at_least=0,
        at_most=1,
    )
    input_lift: float = option(
        0.0,
        "Share of the sampling steps, 0 to 1, at which all inputs may get 8 bits: the steps with "
        "the largest gain come first.",
        at_least=0,
        at_most=1,
        before=0.0,
    )
    rounding: str = option(
        "compensated",
        "How weights are rounded: compensated for the least error of the layer's output, nearest "
        "to the nearest code.",
        choices=ROUNDINGS,
        before="nearest",
    )
    weight_groups: int | None = option(
        None,
        "Weights in a row that share a multiplier of their output channel's step, which takes 4 "
        "bits; none for one step a channel. Default: 32 where inputs have 8 bits or more, "
        "otherwise none.",
        at_least=0,
        at_most=1024,
        read=_read_groups,
        write=lambda size: str(size) if size else "none",
        before=0,
    )
    input_scales: str = option(
        "auto",
        "Scales of the inputs of Linear layers: tensor for one that all tokens share, token for "
        "one times the size of each token, where that lowers the error of the input; auto for "
        "token where inputs have fewer than 8 bits and most weights are in Linear layers.",
        choices=INPUT_SCALES,
        before="tensor",
    )
    rotate: str = option(
        "auto",
        "Rotation of the inputs of Linear layers: none, or hadamard for blocks of channels, and "
        "the weights against them, where that lowers the error of the input; auto for hadamard "
        "where inputs have fewer than 8 bits and most weights are in Linear layers.",
        choices=ROTATIONS,
        before="none",
    )
    also: tuple[str, ...] = option(
        (),
        "NAME:weights=BITS quantizes the weights of a text encoder as well, such as "
        "text_encoder_2:weights=4, when the pipeline is exported; repeatable. Default: none.",
        before=(),
    )
    max_samples: int = option(
        40_000,
        "Elements of each layer's input that are kept for the search.",
        at_least=1,
        is_typed=False,
    )
    sensitivity_calls: int = option(
        4,
        "Recorded calls on which each layer's part of the error is measured.",
        at_least=1,
        is_typed=False,
    )
    seed: int = option(0, "Seed of the elements that are kept.", is_typed=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None and self.activations is None:
            raise UsageError(
                "neither weights nor activations are quantized; give --weights or --activations "
                "some bits"
            )
        if self.input_lift > 0 and self.has_wide_inputs:
            raise UsageError(
                "--input-lift gives 8 bits to inputs that have fewer; leave it out, or give "
                "--activations fewer than 8"
            )
        self._refuse_idle_transforms()
        for rule in self.keep:
            KeepRule.parse(rule)
        self.text_encoders()
        if self.formats not in FORMAT_SETS:
            widths = {FloatFormat.parse(name).bits for name in self.formats.split(",")}
            if not widths & {self.weights, self.activations}:
                raise UsageError(
                    f"--formats {self.formats!r} names no format with the bits of --weights or "
                    "--activations"
                )

    def _refuse_idle_transforms(self) -> None:
        """Refuse to transform inputs where they, or the weights, stay in floating point."""
        if None not in (self.weights, self.activations):
            return
        for name, value in (("--input-scales", self.input_scales), ("--rotate", self.rotate)):
            if value not in ("auto", "tensor", "none"):
                raise UsageError(
                    f"{name} {value} is for layers whose weights and inputs are quantized; leave "
                    "it out, or give --weights and --activations some bits"
                )

    @property
    def has_wide_inputs(self) -> bool:
        """Whether inputs have so many bits that a layer with 8-bit weights takes no more time."""
        return self.activations is None or self.activations >= BYTE_BITS

    def settled(self, *, mostly_linear: bool) -> "CalibrateRecipe":
        """Return the recipe for one denoiser: what is done to its inputs is no longer `auto`.

        Arguments:
            mostly_linear: whether most weights of the denoiser are in Linear layers, as those of a
                transformer are. In others, such layers are too few for the gain to be worth its
                time.
        """
        is_worth_it = mostly_linear and self.weights is not None and not self.has_wide_inputs
        scales, rotation = ("token", "hadamard") if is_worth_it else ("tensor", "none")
        return replace(
            self,
            input_scales=scales if self.input_scales == "auto" else self.input_scales,
            rotate=rotation if self.rotate == "auto" else self.rotate,
        )

    def lifted_formats(self, *, signed: bool) -> tuple[FloatFormat, ...]:
        """Return the candidates for an input where it is lifted: of 8 bits, integers of a byte."""
        return one_byte_formats(BYTE_BITS, signed=signed)

    @property
    def group_weights(self) -> int:
        """Weights of a group that has a multiplier; 0 for none.

        With inputs of 4 bits most of the error is theirs, and multipliers lowered it by less than
        the lift did for the same bytes.
        """
        if self.weight_groups is None:
            return _GROUP if self.has_wide_inputs else 0
        return self.weight_groups

    def text_encoders(self) -> dict[str, int]:
        """Return the bits of the weights of each text encoder that is quantized as well.

        Raises:
            UsageError: `also` is not of that form.
        """
        found = dict[str, int]()
        for text in self.also:
            name, _, value = text.partition(":weights=")
            bits = parse_bits(value or str(_TEXT_BITS), "--also")
            if bits is None or not name or ":" in name:
                raise UsageError(
                    f"cannot read --also {text!r}; write NAME:weights=BITS, "
                    "for instance text_encoder_2:weights=4"
                )
            found[name] = bits
        return found

    def idle_rules(self, names: Collection[str]) -> list[str]:
        """Return the rules of `keep` that match no layer: of another model, or misspelt.

        Arguments:
            names: of a model's layers.

        Raises:
            UsageError: the rules leave no layer to quantize.
        """
        rules = {text: KeepRule.parse(text) for text in self.keep}
        # Which layers have a role is known when a call was recorded.
        is_open = any(rule.is_of_role and rule.bits is not None for rule in rules.values())
        is_kept = bool(self.keep) and not is_open
        if is_kept and all(self.kept_bits(name) == (True, None) for name in names):
            raise UsageError(
                f"--keep {self.keep[-1]!r} leaves every layer in floating point, so nothing would "
                "be quantized; give a pattern that matches fewer"
            )
        return [
            text
            for text, rule in rules.items()
            if not rule.is_of_role and not any(map(rule.matches, names))
        ]

    def kept_bits(self, name: str, role: str | None = None) -> tuple[bool, int | None]:
        """Return whether a rule matches the layer, and its bits (None: floating point)."""
        for text in reversed(DEFAULT_KEEP + self.keep):
            rule = KeepRule.parse(text)
            if rule.matches(name, role):
                return True, rule.bits
        return False, None

    def input_formats(self, bits: int, *, wide: bool = True) -> tuple[FloatFormat, ...]:
        """Return the candidates for a layer's input.

        Arguments:
            wide: whether their integers may take two bytes, of which 8-bit units make two products.
                Otherwise narrower formats are among them: e2m4 instead of e2m5.

        Raises:
            UsageError: `formats` is neither the name of a set nor a list of formats.
        """
        if wide:
            signed = formats_within(bits, INPUT_INTEGER_BITS, signed=True)
            unsigned = formats_within(bits, INPUT_INTEGER_BITS, signed=False)
        else:
            signed = one_byte_formats(bits, signed=True)
            unsigned = one_byte_formats(bits, signed=False)
        sets = {
            "mixed": signed + unsigned,
            "signed": signed,
            "unsigned": unsigned,
            "integer": tuple(fmt for fmt in unsigned if fmt.is_uniform),
        }
        if self.formats in sets:
            return sets[self.formats]
        # A list restricts the widths that it names; layers with other bits choose freely.
        named = [FloatFormat.parse(name) for name in self.formats.split(",")]
        return tuple(fmt for fmt in named if fmt.bits == bits) or sets["mixed"]

    def weight_formats(self, bits: int) -> tuple[FloatFormat, ...]:
        """Return the candidates for a weight: signed ones, of ``integer`` only the uniform one."""
        signed = formats_within(bits, BYTE_BITS, signed=True)
        if self.formats == "integer":
            return tuple(fmt for fmt in signed if fmt.is_uniform)
        if self.formats in FORMAT_SETS:
            return signed
        named = {FloatFormat.parse(name) for name in self.formats.split(",")}
        return tuple(fmt for fmt in formats_of_width(bits, signed=True) if fmt in named) or signed
