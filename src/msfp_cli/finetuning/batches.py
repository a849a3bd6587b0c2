"""Draw training batches from a recording: update n is a function of the seed and of n alone.

An update has some calls of the denoiser, numbered 0, 1, .... The recording's shards are divided
among these numbers, shard s to call ``s mod calls_per_update``; a call takes rows of one shard,
each row at a timestep of its own. Because a draw depends on nothing but (seed, update, call), a
killed run resumes by counting, and the calls of an update can be shared among processes without
changing what the update sees.

Each timestep has a share of the rows, and the loss is divided by that (`TrainingTask.row_weights`):
whatever the shares, the gradient has the same mean, but not the same noise (importance sampling;
the shares are ours). The rows of an update lie evenly over the shares, laid end to end from noisy
to clean (systematic sampling), those of the next update a golden section further on: so a timestep
gets its share of any stretch of updates to within a few rows. A call takes a stretch of the
schedule, a different one in each update, which mostly one member of a hub serves, so that its
weights are rounded once for all rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from msfp_cli.errors import RunError
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.pipelines.rows import JoinedCall, join_rows
from msfp_cli.recording.result import Recording

_MAX_CACHED_BYTES = 2 << 30
# How far a share may move, relative to itself, so that calls end where timesteps do. More noise
# than that is not worth rounding each weight only once.
_LARGEST_MOVE = 0.2
# Multiples of the golden section, modulo 1, are spread as evenly as possible for any count.
_GOLDEN = (math.sqrt(5) - 1) / 2


class Batches:
    """Batches of one component's calls."""

    def __init__(
        self,
        recording: Recording,
        component: str,
        *,
        batch_size: int,
        calls_per_update: int,
        seed: int,
    ) -> None:
        """Index the recording by reading its headers.

        Arguments:
            batch_size: rows of a call.

        Raises:
            RunError: the recording holds no call of the component.
        """
        self._recording = recording
        self._batch_size = batch_size
        self._calls_per_update = calls_per_update
        self._seed = seed
        # Positions in each shard of each timestep's calls.
        self._where: dict[float, dict[int, list[int]]] = {}
        for shard in range(recording.num_shards):
            for position, timestep in enumerate(recording.timesteps(shard, component)):
                if timestep is not None:
                    self._where.setdefault(timestep, {}).setdefault(shard, []).append(position)
        if not self._where:
            raise RunError(
                f"the recording holds no call of {component}; "
                "run the same `msfp calibrate` again, with --overwrite"
            )
        self.timesteps: Sequence[float] = sorted(self._where, reverse=True)
        self.shares: dict[float, float] = dict.fromkeys(self.timesteps, 1 / len(self.timesteps))
        self._cache: dict[int, list[DenoiserCall]] = {}

    def share_out_(self, weights: Mapping[float, float]) -> None:
        """Give each timestep its share of the rows: half equally, half in proportion to `weights`.

        Where that changes no share by more than a fifth, the stretch of each call is made to end
        where a timestep does.
        """
        count = len(self.timesteps)
        total = sum(weights[timestep] for timestep in self.timesteps)
        if not 0 < total < math.inf:
            return
        shares = torch.tensor(
            [0.5 / count + 0.5 * weights[t] / total for t in self.timesteps], dtype=torch.float64
        )
        aligned = self._align(shares)
        if (aligned / shares - 1).abs().max() <= _LARGEST_MOVE:
            shares = aligned
        self.shares = dict(zip(self.timesteps, shares.tolist(), strict=True))

    def _align(self, shares: Tensor) -> Tensor:
        """Return shares whose sum over the timesteps of each call's stretch is the same.

        A timestep belongs to the stretch in which the middle of its share lies.
        """
        stretch = ((shares.cumsum(0) - shares / 2) * self._calls_per_update).long()
        sums = torch.zeros(self._calls_per_update, dtype=torch.float64)
        sums.index_add_(0, stretch, shares)
        factors = 1 / sums[stretch]
        return shares * factors / (shares @ factors)

    def timesteps_of(self, step: int, index: int) -> list[float]:
        """Return the timestep of each row of a call, from noisy to clean.

        Arguments:
            step: the number of the update.
            index: the number of the call in the update.
        """
        rows = self._batch_size
        stretch = (index + step) % self._calls_per_update
        start = float(torch.rand((), generator=self._generator(0, -1), dtype=torch.float64))
        first = stretch * rows + (start + step * _GOLDEN) % 1
        places = (torch.arange(rows, dtype=torch.float64) + first) / (rows * self._calls_per_update)
        ends = torch.tensor([self.shares[t] for t in self.timesteps], dtype=torch.float64).cumsum(0)
        positions = torch.searchsorted(ends, places * ends[-1], right=True)
        return [self.timesteps[i] for i in positions.clamp_max(len(ends) - 1).tolist()]

    def batch(self, step: int, index: int) -> list[JoinedCall]:
        """Return the rows of a call, as several calls where they cannot be joined to one.

        Arguments:
            step: the number of the update.
            index: the number of the call in the update.
        """
        generator = self._generator(step, index)
        timesteps = self.timesteps_of(step, index)
        shards = {shard for timestep in timesteps for shard in self._where[timestep]}
        shard = self._pick(self._own(shards, index), generator)
        calls = []
        for timestep in timesteps:
            where = self._where[timestep]
            source = shard if shard in where else self._pick(self._own(where, index), generator)
            calls.append(self._shard(source)[self._pick(where[source], generator)])
        batch = max(len(call.output) for call in calls)
        order = torch.randperm(batch, generator=generator).tolist()
        return join_rows(
            [(call, order[i % batch] % len(call.output)) for i, call in enumerate(calls)]
        )

    def _own(self, shards: Iterable[int], index: int) -> list[int]:
        """Return those of the shards that belong to the call's number, all where none does."""
        ordered = sorted(shards)
        own = [shard for shard in ordered if shard % self._calls_per_update == index]
        return own or ordered

    @staticmethod
    def _pick(things: Sequence[int], generator: torch.Generator) -> int:
        return things[int(torch.randint(len(things), (), generator=generator))]

    def _generator(self, step: int, index: int) -> torch.Generator:
        # Distinct for every (seed, step, index) that can occur; the primes keep neighbours apart.
        return torch.Generator().manual_seed(
            ((self._seed * 1_000_003 + step) * 8_191 + index + 1) % 2**63
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
