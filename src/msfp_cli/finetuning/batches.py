"""Draw training batches from a recording: what update n sees is a function of the seed and n alone.

The recording is parted into lanes, shard s to lane ``s mod lanes``; every update takes rows of one
shard from each lane, each row at a timestep of its own. Because a draw depends on nothing but
(seed, update, lane), a killed run resumes by counting, and lanes can be shared among processes
without changing what the update sees.

Each timestep has a share of the rows, and `Trainer` divides its loss by that: whatever the shares,
the gradient has the same mean, but not the same noise (importance sampling; the shares are ours).
The rows of an update lie evenly over the shares, laid end to end from noisy to clean (systematic
sampling), those of the next update a golden section further on: so a timestep gets its share of any
stretch of updates to within a few rows. A lane takes a stretch of the schedule, another one each
time, which mostly one member of a hub serves, so that its weights are rounded once for all rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from msfp_cli.errors import RunError
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.pipelines.rows import JoinedCall, join_rows
from msfp_cli.recording.result import Recording

_MAX_CACHED_BYTES = 2 << 30
_ALIGNED = 0.2  # of a share: more than that is not worth one rounding of each weight
_GOLDEN = (math.sqrt(5) - 1) / 2


class Batches:
    """Batches of one component's calls."""

    def __init__(
        self, recording: Recording, component: str, *, batch_size: int, lanes: int, seed: int
    ) -> None:
        """Index the recording by reading its headers.

        Raises:
            RunError: the recording holds no call of the component.
        """
        self._recording = recording
        self._batch_size, self._lanes, self._seed = batch_size, lanes, seed
        self._where: dict[float, dict[int, list[int]]] = {}  # timestep, shard, positions
        for shard in range(recording.num_shards):
            for position, timestep in enumerate(recording.timesteps(shard, component)):
                if timestep is not None:
                    self._where.setdefault(timestep, {}).setdefault(shard, []).append(position)
        if not self._where:
            raise RunError(
                f"the recording holds no call of {component}; run `msfp calibrate --overwrite`"
            )
        self.timesteps: Sequence[float] = sorted(self._where, reverse=True)
        self.shares: dict[float, float] = dict.fromkeys(self.timesteps, 1 / len(self.timesteps))
        self._cache: dict[int, list[DenoiserCall]] = {}

    def share_out_(self, weights: Mapping[float, float]) -> None:
        """Give each timestep a share of the rows: half of them equally, half in proportion to `weights`.

        Where that changes no share by more than a fifth, every lane's stretch is made to end where
        a timestep does.
        """
        total, count = sum(weights[timestep] for timestep in self.timesteps), len(self.timesteps)
        if not 0 < total < math.inf:
            return
        shares = torch.tensor(
            [0.5 / count + 0.5 * weights[t] / total for t in self.timesteps], dtype=torch.float64
        )
        stretch = ((shares.cumsum(0) - shares / 2) * self._lanes).long()
        factors = (
            1
            / torch.zeros(self._lanes, dtype=torch.float64).index_add_(0, stretch, shares)[stretch]
        )
        aligned = shares * factors / (shares @ factors)
        if (aligned / shares - 1).abs().max() <= _ALIGNED:
            shares = aligned
        self.shares = dict(zip(self.timesteps, shares.tolist(), strict=True))

    def drawn(self, step: int, lane: int) -> list[float]:
        """Return the timestep of each row that a lane contributes to an update, from noisy to clean."""
        rows, stretch = self._batch_size, (lane + step) % self._lanes
        start = float(torch.rand((), generator=self._generator(0, -1), dtype=torch.float64))
        first = stretch * rows + (start + step * _GOLDEN) % 1
        places = (torch.arange(rows, dtype=torch.float64) + first) / (rows * self._lanes)
        ends = torch.tensor([self.shares[t] for t in self.timesteps], dtype=torch.float64).cumsum(0)
        found = torch.searchsorted(ends, places * ends[-1], right=True).clamp_max(len(ends) - 1)
        return [self.timesteps[index] for index in found.tolist()]

    def batch(self, step: int, lane: int) -> list[JoinedCall]:
        """Return the rows that a lane contributes to an update, in as few calls as they can be joined to."""
        generator, timesteps = self._generator(step, lane), self.drawn(step, lane)
        shard = self._pick(
            self._own({s for t in timesteps for s in self._where[t]}, lane), generator
        )
        calls = []
        for timestep in timesteps:
            where = self._where[timestep]
            source = shard if shard in where else self._pick(self._own(where, lane), generator)
            calls.append(self._shard(source)[self._pick(where[source], generator)])
        batch = max(len(call.output) for call in calls)
        order = torch.randperm(batch, generator=generator).tolist()
        return join_rows(
            [(call, order[i % batch] % len(call.output)) for i, call in enumerate(calls)]
        )

    def _own(self, shards: Iterable[int], lane: int) -> list[int]:
        """Return those of the shards that are the lane's, all where none is."""
        ordered = sorted(shards)
        return [shard for shard in ordered if shard % self._lanes == lane] or ordered

    @staticmethod
    def _pick(things: Sequence[int], generator: torch.Generator) -> int:
        return things[int(torch.randint(len(things), (), generator=generator))]

    def _generator(self, step: int, lane: int) -> torch.Generator:
        # Distinct for every (seed, step, lane) that can occur; the primes keep neighbours apart.
        return torch.Generator().manual_seed(
            ((self._seed * 1_000_003 + step) * 8_191 + lane + 1) % 2**63
        )

    def _shard(self, index: int) -> list[DenoiserCall]:
        """Load a shard, keeping as many in memory as the bound allows."""
        if index not in self._cache:
            calls = self._recording.shard(index)
            size = sum(call.output.nbytes for call in calls) * 4
            while self._cache and size * (len(self._cache) + 1) > _MAX_CACHED_BYTES:
                self._cache.pop(next(iter(self._cache)))
            self._cache[index] = calls
        return self._cache[index]
