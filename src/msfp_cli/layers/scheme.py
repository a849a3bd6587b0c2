"""The scheme of one quantized layer: its formats and grids, as plain values and as JSON."""

from dataclasses import dataclass
from typing import Any

from msfp_cli.files.typed import read_fields
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid

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
        lookup: whether this is a table, whose rows are looked up: one scale per row, no input to
            round, no hub.
        weight_groups: groups of each row of the weight that have a multiplier, see
            `formats.multipliers`; 0 for none.
    """

    weight: FloatFormat | None = None
    input: Grid | None = None
    hub: int = 1
    further_inputs: tuple[Grid, ...] = ()
    lookup: bool = False
    weight_groups: int = 0

    def __post_init__(self) -> None:
        if self.hub > MAX_HUB:
            raise ValueError(f"a hub of {self.hub} has more than {MAX_HUB} members")
        if self.hub < 1 or len(self.further_inputs) not in (0, self.hub - 1):
            raise ValueError(
                f"{len(self.further_inputs)} further inputs do not fit a hub of {self.hub}"
            )
        if self.weight_groups < 0 or (self.weight_groups and self.weight is None):
            raise ValueError(f"{self.weight_groups} groups do not fit this weight")
        if self.lookup and (self.input is not None or self.hub > 1):
            raise ValueError("a table has neither a hub nor an input to round")

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
            **({"lookup": True} if self.lookup else {}),
            **({"weight_groups": self.weight_groups} if self.weight_groups else {}),
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
            lookup=bool(written.lookup),
            weight_groups=written.weight_groups or 0,
        )

    def input_of(self, member: int) -> Grid | None:
        """Return the grid of a member's input."""
        return self.further_inputs[member - 1] if member and self.further_inputs else self.input

    def inputs(self) -> tuple[Grid | None, ...]:
        """Return the grid of the input for each member."""
        return tuple(self.input_of(member) for member in range(self.hub))


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
    lookup: bool | None = None
    weight_groups: int | None = None
