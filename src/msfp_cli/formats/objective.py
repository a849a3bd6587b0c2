"""What the rounding of a weight is to make small: the error of its layer's output.

`formats.compensation` rounds a weight at a given damping. Which damping is right depends on how
many samples there were and on how much their errors are like those of other calls, so it is chosen
on rows of the input that are in no sum: those that are checked.

Choosing costs a Cholesky factor for each damping and each sum, and as many roundings. The damping
is one number for the whole layer, so it is chosen on some outputs, spread evenly, and on the first
sum of the inputs. Dampings are tried from the smallest, as many at a time as fit into memory, until
they raise the error: most layers take the smallest. Then the whole layer is rounded once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msfp_cli.formats.compensation import compensated_steps
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import round_steps

# Less than 0.03 lowers the error of most layers and raises that of the denoiser: once it is
# quantized, its layers get inputs with errors that the samples do not have.
DAMPINGS = (0.03, 0.1, 0.3, 1.0)
_FACTOR_BYTES = 2**27  # the Cholesky factors that are in use at once, and several copies of them
_OUTPUTS = 256  # on which the damping is chosen, at least, if there are so many


@dataclass(frozen=True)
class CheckRows:
    """What a layer should compute from some rows of its input, and these rows as they are rounded.

    Arguments:
        outputs: of the float layer, without its bias, ``(groups, rows, out / groups)``.
        rounded: ``(groups, rows, k)``.
    """

    outputs: Tensor
    rounded: Tensor

    def signal(self) -> float:
        """Return the sum of the squared outputs; 1 where all are 0."""
        return float(self.outputs.square().sum(dtype=torch.float64)) or 1.0


@dataclass(frozen=True, kw_only=True)
class RoundingObjective:
    """A weight in steps of its grid, and all that decides how it is rounded.

    Arguments:
        fmt: of the weight.
        scale: ``(groups, out / groups, 1)``.
        steps: ``(groups, out / groups, k)``.
        factors: the multiplier of each weight; None for 1.
        parts: of k, each with a sum of its own.
        moments: ``sum x_q x_q^T`` for each part, ``(groups, size, size)``.
        missing: ``sum W (x - x_q) x_q^T``, likewise, ``(groups, out / groups, size)``; empty if the
            input is not rounded.
        checks: other rows of the input.
    """

    fmt: FloatFormat
    scale: Tensor
    steps: Tensor
    factors: Tensor | None
    parts: Sequence[slice]
    moments: Sequence[Tensor]
    missing: Sequence[Tensor]
    checks: CheckRows

    def least(self) -> tuple[float, Tensor]:
        """Return the best damping, and the integers at it; NaN where there are none at any."""
        sample = self._sample()
        batches = sample._batches()
        best = next(batches)
        for each in batches:
            if each[0] > best[0]:
                break
            best = each
        _, damping, integers = best
        return damping, integers if sample is self else self.compensated([damping])[0]

    def error(self, integers: Tensor) -> float:
        """Return the squared error of the layer's output; a NaN where there are no integers."""
        outputs = (self.checks.rounded @ integers.mT).mul_(self.scale.mT)
        return float(outputs.sub_(self.checks.outputs).square_().sum(dtype=torch.float64))

    def nearest(self) -> Tensor:
        """Return the integers nearest to the weight."""
        if self.factors is None:
            return round_steps(self.steps, self.fmt)
        return round_steps(self.steps / self.factors, self.fmt) * self.factors

    def levels(self, integers: Tensor) -> Tensor:
        """Return integers without their multipliers, as the format has them."""
        return integers if self.factors is None else integers / self.factors

    def compensated(self, dampings: Sequence[float]) -> Tensor:
        """Return the integers at some dampings, ``(d, groups, out / groups, k)``."""
        values = torch.tensor(dampings, device=self.steps.device)
        pieces = []
        for number, part in enumerate(self.parts):
            missing = self.missing[number] / self.scale if self.missing else None
            factors = None if self.factors is None else self.factors[..., part]
            own = (self.steps[..., part], self.moments[number], missing)
            pieces.append(compensated_steps(*own, self.fmt, values, factors))
        return torch.cat(pieces, dim=-1)

    def _batches(self) -> Iterator[tuple[float, float, Tensor]]:
        """Yield the least error among a few dampings, its damping and the integers, batch by batch.

        The smallest dampings come first.
        """
        largest = max(moments.numel() for moments in self.moments)
        together = max(1, _FACTOR_BYTES // (4 * largest))
        for first in range(0, len(DAMPINGS), together):
            dampings = DAMPINGS[first : first + together]
            integers = self.compensated(dampings)
            errors = [self._price(each) for each in integers]
            least = errors.index(min(errors))
            yield errors[least], dampings[least], integers[least]

    def _price(self, integers: Tensor) -> float:
        """Return the error, infinity where there are no integers."""
        error = self.error(integers)
        return math.inf if math.isnan(error) else error

    def _sample(self) -> "RoundingObjective":
        """Return the same for some outputs and the first part of the inputs."""
        stride = max(1, self.steps.shape[1] // _OUTPUTS)
        if stride == 1 and len(self.parts) == 1:
            return self
        first = self.parts[0]
        rest = slice(first.stop, None)
        scale = self.scale[:, ::stride]
        of_rest = self.checks.rounded[..., rest] @ self.steps[:, ::stride, rest].mT
        outputs = self.checks.outputs[..., ::stride] - of_rest * scale.mT
        return replace(
            self,
            scale=scale,
            steps=self.steps[:, ::stride, first],
            factors=None if self.factors is None else self.factors[:, ::stride, first],
            parts=[first],
            moments=self.moments[:1],
            missing=[each[:, ::stride] for each in self.missing[:1]],
            checks=CheckRows(outputs, self.checks.rounded[..., first]),
        )
