"""The scheme of one quantized layer: its formats and grids, as plain values and as JSON."""

from dataclasses import dataclass
from typing import Any

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
    """

    weight: FloatFormat | None = None
    input: Grid | None = None
    hub: int = 1
    further_inputs: tuple[Grid, ...] = ()
    lookup: bool = False

    def __post_init__(self) -> None:
        if self.hub > MAX_HUB:
            raise ValueError(f"a hub of {self.hub} has more than {MAX_HUB} members")
        if self.hub < 1 or len(self.further_inputs) not in (0, self.hub - 1):
            raise ValueError(
                f"{len(self.further_inputs)} further inputs do not fit a hub of {self.hub}"
            )
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
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LayerScheme":
        """Undo `to_json`.

        Raises:
            UsageError: a format is unknown.
            KeyError, TypeError: a field is missing or of the wrong kind.
        """
        weight = data["weight"]
        grid = data["input"]
        return cls(
            weight=None if weight is None else FloatFormat.parse(weight),
            input=None if grid is None else _grid_from_json(grid),
            hub=int(data.get("hub", 1)),
            further_inputs=tuple(
                _grid_from_json(further) for further in data.get("further_inputs", ())
            ),
            lookup=bool(data.get("lookup", False)),
        )

    def input_of(self, member: int) -> Grid | None:
        """Return the grid of a member's input."""
        return self.further_inputs[member - 1] if member and self.further_inputs else self.input

    def inputs(self) -> tuple[Grid | None, ...]:
        """Return the grid of the input for each member."""
        return tuple(self.input_of(member) for member in range(self.hub))


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    return {"format": grid.format.name, "scale": grid.scale, "zero_point": grid.zero_point}


def _grid_from_json(data: dict[str, Any]) -> Grid:
    return Grid(FloatFormat.parse(data["format"]), float(data["scale"]), float(data["zero_point"]))
