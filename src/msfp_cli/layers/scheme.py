"""The scheme of one quantized layer: its formats and grids, as plain values and as JSON."""

from dataclasses import dataclass
from typing import Any

from msfp_cli.files.typed import read_fields
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid
from msfp_cli.formats.transform import InputTransform

MAX_HUB = 256  # a router's table has a byte for a member


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """What one quantized layer needs besides its tensors.

    Arguments:
        weight: format of the weight, one scale per output channel; None leaves the weight in
            floating point.
        input: grid of the input, one for the whole tensor; None leaves the input in floating point.
        hub: members of the layer's hub, each with a weight of its own; the denoiser's router
            picks one by timestep.
        further_inputs: grids of the input for the second member and those after it; empty if they
            share one.
        lifted_input: grid of the input at the timesteps where it is lifted to 8 bits, for all
            members; None if it has the same bits at all timesteps.
        lookup: whether this is a table, whose rows are looked up: one scale per row, no input to
            round, no hub.
        weight_groups: groups of each row of the weight that have a multiplier, see
            `formats.multipliers`; 0 for none.
        transform: what is done to the input before it is rounded; only if weight and input are.
    """

    weight: FloatFormat | None = None
    input: Grid | None = None
    hub: int = 1
    further_inputs: tuple[Grid, ...] = ()
    lifted_input: Grid | None = None
    lookup: bool = False
    weight_groups: int = 0
    transform: InputTransform = InputTransform()

    def __post_init__(self) -> None:
        if self.variants > MAX_HUB:
            raise ValueError(f"a hub of {self.hub} has more than {MAX_HUB} members")
        if not self._may_lift():
            raise ValueError("the lifted input does not fit the input")
        if self.hub < 1 or len(self.further_inputs) not in (0, self.hub - 1):
            raise ValueError(
                f"{len(self.further_inputs)} further inputs do not fit a hub of {self.hub}"
            )
        if self.weight_groups < 0 or (self.weight_groups and self.weight is None):
            raise ValueError(f"{self.weight_groups} groups do not fit this weight")
        if self.lookup and (self.input is not None or self.hub > 1):
            raise ValueError("a table has neither a hub nor an input to round")
        if not self.transform.is_identity and (self.weight is None or self.input is None):
            raise ValueError("only an input that is rounded, as the weight is, can be transformed")

    def _may_lift(self) -> bool:
        """Whether the grid of lifted inputs has the sign of the others, as kernels want it."""
        if self.lifted_input is None:
            return True
        return self.input is not None and (
            self.lifted_input.format.signed == self.input.format.signed
        )

    @property
    def variants(self) -> int:
        """How many ways to run the layer there are, which its route chooses from by timestep.

        Variant v uses member ``v % hub``; from ``hub`` on, the input is lifted.
        """
        return self.hub if self.lifted_input is None else 2 * self.hub

    @property
    def tunable(self) -> bool:
        """Whether fine-tuning has a hub for the layer: it multiplies by a quantized weight."""
        return self.weight is not None and not self.lookup

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; floats are exact in float32 and survive the trip."""
        return {
            "weight": None if self.weight is None else self.weight.name,
            "input": None if self.input is None else _grid_to_json(self.input),
            "hub": self.hub,
            "further_inputs": [_grid_to_json(grid) for grid in self.further_inputs],
            **({"lifted_input": _grid_to_json(self.lifted_input)} if self.lifted_input else {}),
            **({"lookup": True} if self.lookup else {}),
            **({"weight_groups": self.weight_groups} if self.weight_groups else {}),
            **self.transform.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LayerScheme":
        """Undo `to_json`.

        Raises:
            UsageError: a format is unknown.
            ValueError: a field is unknown, missing, of another type, or out of range.
        """
        written = read_fields(_Written, data)
        return cls(
            weight=None if written.weight is None else FloatFormat.parse(written.weight),
            input=None if written.input is None else written.input.grid(),
            hub=1 if written.hub is None else written.hub,
            further_inputs=tuple(further.grid() for further in written.further_inputs or ()),
            lifted_input=None if written.lifted_input is None else written.lifted_input.grid(),
            lookup=bool(written.lookup),
            weight_groups=written.weight_groups or 0,
            transform=InputTransform(
                rotation=written.rotation or 0, token_scales=bool(written.token_scales)
            ),
        )

    def input_of(self, variant: int) -> Grid | None:
        """Return the grid of a variant's input."""
        if variant >= self.hub:
            return self.lifted_input
        return self.further_inputs[variant - 1] if variant and self.further_inputs else self.input

    def input_bits(self, lifted_share: float) -> float:
        """Return the average bits of an input; one in floating point counts as 16.

        Arguments:
            lifted_share: of the sampling steps, those at which inputs are lifted.
        """
        bits = 16.0 if self.input is None else float(self.input.format.bits)
        if self.lifted_input is None:
            return bits
        return bits + lifted_share * (self.lifted_input.format.bits - bits)

    def inputs(self) -> tuple[Grid | None, ...]:
        """Return the grid of the input for each variant."""
        return tuple(self.input_of(variant) for variant in range(self.variants))


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    return {"format": grid.format.name, "scale": grid.scale, "zero_point": grid.zero_point}


@dataclass(frozen=True, kw_only=True)
class _WrittenGrid:
    """A grid as it lies in a document."""

    format: str
    scale: float
    zero_point: float

    def grid(self) -> Grid:
        return Grid(FloatFormat.parse(self.format), self.scale, self.zero_point)


@dataclass(frozen=True, kw_only=True)
class _Written:
    """A scheme as it lies in a document."""

    weight: str | None
    input: _WrittenGrid | None
    hub: int | None = None
    further_inputs: tuple[_WrittenGrid, ...] | None = None
    lifted_input: _WrittenGrid | None = None
    lookup: bool | None = None
    weight_groups: int | None = None
    rotation: int | None = None
    token_scales: bool | None = None
