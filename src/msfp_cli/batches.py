"""Draw training batches from a recording: what update n sees is a function of the seed and n alone.

The recording is parted into lanes, shard s to lane ``s mod lanes``; every update takes one call from each lane, each of
a timestep of its own, and some rows of each call. Because a draw depends on nothing but (seed, update, lane), a killed
run resumes by counting, and lanes can be shared among processes without changing what the update sees.

Timesteps come in rounds of as many calls as there are timesteps. With equal shares each is visited once a round, in
random order; a timestep with a greater share is visited more often, and `Trainer` divides its loss by that, so the
gradient's mean stays what it was and its noise falls (importance sampling; the shares are ours).
"""

import math
from collections.abc import Mapping, Sequence

import torch

from msfp_cli.denoiser import DenoiserCall, take_rows
from msfp_cli.errors import RunError
from msfp_cli.recording import Recording

_MAX_CACHED_BYTES = 2 << 30


class Batches:
    """Batches of one component's calls."""

    def __init__(self, recording: Recording, component: str, *, batch_size: int, lanes: int, seed: int) -> None:
        """Index the recording by reading its headers.

        Raises:
            RunError: the recording holds no call of the component.
        """
        self._recording = recording
        self._batch_size, self._lanes, self._seed = batch_size, lanes, seed
        self._where: dict[float, list[tuple[int, int]]] = {}
        for shard in range(recording.num_shards):
            for position, timestep in enumerate(recording.timesteps(shard, component)):
                if timestep is not None:
                    self._where.setdefault(timestep, []).append((shard, position))
        if not self._where:
            raise RunError(f"the recording holds no call of {component}; run `msfp calibrate --overwrite`")
        self.timesteps: Sequence[float] = sorted(self._where, reverse=True)
        self.shares: dict[float, float] = dict.fromkeys(self.timesteps, 1 / len(self.timesteps))
        self._cache: dict[int, list[DenoiserCall]] = {}

    def share_out_(self, weights: Mapping[float, float]) -> None:
        """Give each timestep a share of the updates: half of them equally, half in proportion to `weights`."""
        total, count = sum(weights[timestep] for timestep in self.timesteps), len(self.timesteps)
        if 0 < total < math.inf:
            self.shares = {t: 0.5 / count + 0.5 * weights[t] / total for t in self.timesteps}

    def timestep(self, step: int, lane: int) -> float:
        """Return the timestep of a call: evenly spaced draws from the shares, in an order drawn for the round."""
        turn, position = divmod(step * self._lanes + lane, len(self.timesteps))
        generator = self._generator(turn, -1)
        order = torch.randperm(len(self.timesteps), generator=generator)
        start = torch.rand((), generator=generator, dtype=torch.float64)
        ends = torch.tensor([self.shares[t] for t in self.timesteps], dtype=torch.float64).cumsum(0)
        drawn = int(torch.searchsorted(ends, (order[position] + start) / len(order) * ends[-1], right=True))
        return self.timesteps[min(drawn, len(order) - 1)]

    def batch(self, step: int, lane: int) -> DenoiserCall:
        """Return the rows that a lane contributes to an update."""
        generator = self._generator(step, lane)
        places = self._where[self.timestep(step, lane)]
        own = [place for place in places if place[0] % self._lanes == lane] or places
        shard, position = own[int(torch.randint(len(own), (), generator=generator))]
        call = self._shard(shard)[position]
        rows = torch.randperm(call.output.shape[0], generator=generator)[: self._batch_size]
        return take_rows(call, rows.sort().values)

    def _generator(self, step: int, lane: int) -> torch.Generator:
        # Distinct for every (seed, step, lane) that can occur; the primes keep neighbours apart.
        return torch.Generator().manual_seed(((self._seed * 1_000_003 + step) * 8_191 + lane + 1) % 2**63)

    def _shard(self, index: int) -> list[DenoiserCall]:
        """Load a shard, keeping as many in memory as the bound allows."""
        if index not in self._cache:
            calls = self._recording.shard(index)
            size = sum(call.output.nbytes for call in calls) * 4
            while self._cache and size * (len(self._cache) + 1) > _MAX_CACHED_BYTES:
                self._cache.pop(next(iter(self._cache)))
            self._cache[index] = calls
        return self._cache[index]
