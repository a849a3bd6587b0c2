"""The timesteps at which a denoiser's inputs have 8 bits instead of fewer.

At some steps of sampling an error moves the picture more than at others: at the first ones, which
decide its course, and near the end, where little noise is left to hide it. So 8 bits at a few steps
take away a large part of the error (ours). The bits of weights stay as they are, and so does the
size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msfp_cli.layers.routing import TABLE_SIZE, table_index


@dataclass(frozen=True, kw_only=True)
class InputLift:
    """Which timesteps of one denoiser have lifted inputs.

    Arguments:
        timesteps: of the recording, 0 to 1000, from noisy to clean.
        lifted: of each of them, whether its inputs are lifted.
        gains: of each of them, its share of the error of the final sample that inputs of fewer bits
            make, each timestep alone; their sum is 1.
    """

    timesteps: tuple[float, ...]
    lifted: tuple[bool, ...]
    gains: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.timesteps or len({len(self.timesteps), len(self.lifted), len(self.gains)}) > 1:
            raise ValueError("the lifted timesteps do not fit the timesteps")

    @property
    def share(self) -> float:
        """The share of the sampling steps whose inputs are lifted."""
        return sum(self.lifted) / len(self.lifted)

    def rows(self) -> Tensor:
        """Return for each row of a router's table whether inputs are lifted, bool ``(1001,)``.

        A row between recorded timesteps does as the nearest of them, the lower one of two.
        """
        known = sorted(zip(self.timesteps, self.lifted, strict=True))
        places = torch.tensor([table_index(timestep) for timestep, _ in known])
        distances = (torch.arange(TABLE_SIZE)[:, None] - places).abs()
        return torch.tensor([lifted for _, lifted in known])[distances.argmin(dim=1)]

    def at(self, timestep: float) -> bool:
        """Whether inputs are lifted at a timestep."""
        return self._rows[table_index(timestep)]

    @cached_property
    def _rows(self) -> list[bool]:
        rows: list[bool] = self.rows().tolist()
        return rows


def choose_timesteps(gains: Mapping[float, float], budget: float) -> list[float]:
    """Choose the timesteps whose gain is greatest.

    Arguments:
        gains: by timestep.
        budget: share of the timesteps, 0 to 1.
    """
    count = int(budget * len(gains) + 1e-9)
    best = sorted(gains, key=lambda timestep: (-gains[timestep], timestep))
    return [timestep for timestep in best[:count] if gains[timestep] > 0]
