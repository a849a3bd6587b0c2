"""What a user asked for, as frozen values that go to JSON and back; nothing here needs torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from msfp_cli.errors import UsageError
from msfp_cli.formats import INPUT_INTEGER_BITS, MAX_BITS, MIN_BITS, WEIGHT_INTEGER_BITS, FloatFormat, formats_of_width
from msfp_cli.keep import DEFAULT_KEEP, KeepRule

DEFAULT_RUN = Path("msfp-run")
FORMAT_SETS = ("mixed", "signed", "unsigned", "integer")
LOSSES = ("dfa", "plain")
INITS = ("zero", "svd")
SAMPLINGS = ("error", "uniform")
PRECISIONS = ("no", "bf16")
STEPS_BEFORE = ("signed", "calibrated")  # what an export may be compared with, besides full precision
MAX_HUB = 255
NUM_IMAGES = 800  # recorded where nobody says how many
NUM_IMAGES_LARGE = 200  # the same of a large denoiser, whose pictures take longer, hold more, and need more disk
LARGE = 100_000_000  # parameters
MAX_CONDITIONS = 200  # recorded of a list that nobody gave: the rest is left to evaluate on
_HELD_OUT = 24  # conditions of a long recording, some more where it does not divide: each measurement takes time
DTYPES = ("float32", "float16", "bfloat16")

T = TypeVar("T", bound="Recipe")


class Recipe:
    """A frozen dataclass that survives JSON; unknown and missing keys are errors."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[T], data: dict[str, Any]) -> T:
        """Undo `to_json`.

        Raises:
            ValueError: a key is unknown or missing; whoever reads the file says which and what to do.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if set(data) != known:
            odd = sorted(set(data) ^ known)
            raise ValueError(f"settings do not fit this version of msfp: key {odd[0]!r}")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})


@dataclass(frozen=True, kw_only=True)
class ModelSource(Recipe):
    """Where a pipeline comes from.

    Arguments:
        model: a local directory, a hub id, or ``msfp:fashion`` for the built-in pipeline.
        revision, variant: as in ``from_pretrained``.
        dtype: a name in `DTYPES`; None chooses float32 on a CPU and bfloat16 elsewhere.
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class RecordRecipe(Recipe):
    """How to record denoiser calls.

    Arguments:
        conditions: a prompt or class label per image; None for each image of an unconditional pipeline.
        num_inference_steps, guidance_scale: as in the pipeline's call; None leaves its default.
        seed: image i is drawn from ``seed + i``.
        batch_size: images per pipeline call.
    """

    conditions: tuple[str | None, ...]
    num_inference_steps: int | None = 20
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.conditions:
            raise UsageError("no prompts to record; give at least one")
        _at_least("batch size", self.batch_size, 1)
        if self.num_inference_steps is not None:
            _at_least("steps", self.num_inference_steps, 1)

    @property
    def num_shards(self) -> int:
        """How many pipeline calls the recording takes."""
        return -(-len(self.conditions) // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class CalibrateRecipe(Recipe):
    """How to choose the formats.

    Arguments:
        weights, activations: bits, 2 to 8; None leaves them in floating point.
        formats: a name in `FORMAT_SETS`, or formats separated by commas (``e2m1,ue2m2``).
        keep: rules ``PATTERN:BITS``, the last that matches wins; `DEFAULT_KEEP` comes before them.
        lift: share of the multiply-adds that may be lifted to 8 bits, worst layers first; 0 for none.
        max_samples: elements of each layer's input that are kept for the search.
        sensitivity_calls: recorded calls on which each layer's contribution to the error is measured.
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
                raise UsageError(f"{what} {bits} is out of range; choose {MIN_BITS} to {MAX_BITS} bits, or none")
        if self.weights is None and self.activations is None:
            raise UsageError("neither weights nor activations are quantized; give --weights or --activations some bits")
        if not 0 <= self.lift <= 1:
            raise UsageError(f"--lift {self.lift} is out of range; it is a share of the multiply-adds, 0 to 1")
        _at_least("samples", self.max_samples, 1)
        _at_least("sensitivity calls", self.sensitivity_calls, 1)
        for rule in self.keep:
            KeepRule.parse(rule)
        if self.formats not in FORMAT_SETS:
            widths = {FloatFormat.parse(name).bits for name in self.formats.split(",")}
            if not widths & {self.weights, self.activations}:
                raise UsageError(f"--formats {self.formats!r} names no format of the bits that were asked for")

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
            UsageError: `formats` is neither a set's name nor a list of formats, or leaves none of this width.
        """
        signed, unsigned = (formats_within(bits, INPUT_INTEGER_BITS, signed=signed) for signed in (True, False))
        sets = {
            "mixed": signed + unsigned,
            "signed": signed,
            "unsigned": unsigned,
            "integer": tuple(fmt for fmt in unsigned if fmt.is_uniform),
        }
        if self.formats in sets:
            return sets[self.formats]
        # A list speaks of the width it names; layers kept or lifted to another width have their free choice.
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
    return tuple(fmt for fmt in formats_of_width(bits, signed=signed) if fmt.integer_bits <= integer_bits)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """How to train the LoRA hubs and the router.

    Arguments:
        steps: updates.
        batch_size: rows that each lane contributes to an update, each at a timestep of its own, as one call.
        lanes: calls per update, each of another stretch of the schedule, shared evenly among processes; the recording
            is parted among them.
        hub_size: LoRAs per layer; 1 is plain LoRA.
        rank: of each LoRA.
        init: a name in `INITS`: B begins at ``zero``, or A and B at the singular value decomposition (``svd``) of the
            weight's rounding error.
        learning_rate: of the LoRAs, decaying linearly to 0; B counts in steps of the weight's grid.
        router_learning_rate: of the router; a fast one moves timesteps among members before these have learned.
        input_learning_rate: of the scale and zero point of each layer's input; 0 leaves them as calibrated.
        loss: ``dfa`` weights each timestep by its denoising factor, ``plain`` does not.
        loss_power: the factor's exponent.
        timesteps: how a row's timestep is drawn: by the ``error`` that it makes, or ``uniform``ly; the gradient's
            mean is the same.
        mixed_precision: a name in `PRECISIONS`, what the denoiser computes in while training.
        seed: of the initial values and of the order of the data.
        evaluate_every: updates between two measurements on held-out calls.
    """

    steps: int = 2000
    batch_size: int = 16
    lanes: int = 2
    hub_size: int = 2
    rank: int = 32
    init: str = "zero"
    learning_rate: float = 4e-2
    router_learning_rate: float = 1e-4
    input_learning_rate: float = 1e-3
    loss: str = "dfa"
    loss_power: float = 0.25
    timesteps: str = "error"
    mixed_precision: str = "no"
    seed: int = 0
    evaluate_every: int = 500

    def __post_init__(self) -> None:
        for what, value in (
            ("--steps", self.steps),
            ("--batch-size", self.batch_size),
            ("--gradient-accumulation", self.lanes),
            ("--hub-size", self.hub_size),
            ("--rank", self.rank),
            ("--evaluate-every", self.evaluate_every),
        ):
            _at_least(what, value, 1)
        if self.hub_size > MAX_HUB:
            raise UsageError(f"--hub-size must be at most {MAX_HUB}, got {self.hub_size}")
        for what, name, known in (
            ("--loss", self.loss, LOSSES),
            ("--init", self.init, INITS),
            ("--timesteps", self.timesteps, SAMPLINGS),
            ("--mixed-precision", self.mixed_precision, PRECISIONS),
        ):
            if name not in known:
                raise UsageError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")
        for what, rate in (
            ("--learning-rate", self.learning_rate),
            ("--router-learning-rate", self.router_learning_rate),
        ):
            if not 0 < rate < math.inf:
                raise UsageError(f"{what} must be positive, got {rate:g}")
        if not 0 < self.loss_power <= 4:
            raise UsageError(f"--loss-power must be above 0 and at most 4, got {self.loss_power:g}")
        if not 0 <= self.input_learning_rate < math.inf:
            raise UsageError(f"--input-learning-rate must not be negative, got {self.input_learning_rate:g}")


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{what} must be at least {least}, got {value}")


def recorded_conditions(
    conditions: Sequence[str | None], num_images: int
) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Share so many pictures out: conditions that are not held out come again, with other noise, if there are too few.

    Returns:
        The condition of each picture to calibrate on, and of each that is held out.
    """
    chosen, held_out = split_held_out(conditions)
    count = max(len(chosen), num_images - len(held_out))
    return tuple(chosen[i % len(chosen)] for i in range(count)), held_out


def split_held_out(conditions: Sequence[str | None]) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Set every fifth condition aside, of many only some 24 in all; a lone one serves for both (with other seeds).

    Returns:
        The conditions to calibrate on, and those held out to measure on.
    """
    if len(conditions) < 5:
        return tuple(conditions[:-1] or conditions), tuple(conditions[-1:])
    every = max(5, len(conditions) // _HELD_OUT)
    held_out = tuple(c for i, c in enumerate(conditions) if i % every == every - 1)
    return tuple(c for i, c in enumerate(conditions) if i % every != every - 1), held_out
