"""What time it is in a call of a denoiser: which argument says so, and in which unit.

Pipelines tell their denoisers the time in many ways. Stable Diffusion passes the training timestep,
999 to 0; Flux a share of it, 1 to 0; Lumina 2 and Z-Image count up, 0 to 1, while the noise goes;
samplers of EDM pass a logarithm of the noise. msfp counts alike for all of them, from 1000 (noise)
to 0 (clean): the rows of a router's table. A `Clock` says how an argument becomes such a number;
`pipelines.discovery` learns it by watching the pipeline.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from msfp_cli.errors import MsfpError
from msfp_cli.files.documents import Json
from msfp_cli.files.typed import read_fields

Time: TypeAlias = Tensor | float  # as a pipeline passes it
_UNITS = (1.0, 1000.0)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How a denoiser is told the time: its timestep is ``scale * argument + offset``.

    Arguments:
        argument: name of the argument of the denoiser's ``forward``.
        scale, offset: bring it to 1000 (noise) .. 0 (clean).
    """

    argument: str = "timestep"
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def of_unit(cls, unit: float) -> "Clock":
        """Return the clock of files that only know a unit of the argument ``timestep``.

        Raises:
            ValueError: the unit is neither 1 nor 1000.
        """
        if unit not in _UNITS:
            raise ValueError(f"a timestep unit of {unit} is neither 1 nor 1000")
        return cls(scale=float(unit))

    @property
    def unit(self) -> float | None:
        """What `of_unit` makes the clock of, None if no unit does."""
        return self.scale if self in map(Clock.of_unit, _UNITS) else None

    def read(self, value: Time) -> float:
        """Return the timestep of a call, which all rows of its batch have to share.

        In a row with one value for each token, some may be clean: the noisiest counts.

        Raises:
            MsfpError: the rows of the batch are at several timesteps.
        """
        if not isinstance(value, Tensor):
            return float(value) * self.scale + self.offset
        values = value.detach().cpu().double() * self.scale + self.offset
        rows = values.flatten(1).amax(dim=1) if values.ndim > 1 else values.reshape(-1)
        if (rows != rows[0]).any():
            raise MsfpError(
                "the denoiser was called with several timesteps at once; "
                "a router needs one for the whole batch"
            )
        return float(rows[0])

    def traced(self, value: Tensor) -> Tensor:
        """Return the same as a tensor of one element, for a graph that serves every timestep.

        A compiled call cannot look whether the rows of a batch share their timestep; the noisiest
        counts.
        """
        return (value.reshape(-1).double() * self.scale + self.offset).amax(dim=0, keepdim=True)

    def to_json(self) -> dict[str, Json]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> "Clock":
        """Undo `to_json`.

        Raises:
            ValueError: a key is unknown or missing, or a value is not finite.
        """
        clock: Clock = read_fields(cls, dict(data))
        if not torch.tensor([clock.scale, clock.offset]).isfinite().all():
            raise ValueError(f"{clock} is not finite")
        return clock


# Of denoisers that are passed the training timestep, as in Stable Diffusion.
TRAINING_CLOCK = Clock()
