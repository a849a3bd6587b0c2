"""How far a quantized denoiser is from the full-precision one, by timestep and by layer.

Everything in msfp that says "error" of a tensor means the squared error relative to the signal,

    sum |values - reference|^2 / sum |reference|^2,

summed in float64. `SquaredError` keeps numerator and denominator apart, because sums over calls,
timesteps and processes are added before they are divided.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.rows import take_rows
from msfp_cli.pipelines.watch import watch_layers
from msfp_cli.recording.recipe import LARGE
from msfp_cli.recording.result import Recording


@dataclass(frozen=True)
class SquaredError:
    """A squared error and the signal it is relative to; sums of them are sums of both.

    Arguments:
        error: ``sum |values - reference|^2``.
        signal: ``sum |reference|^2``.
    """

    error: float = 0.0
    signal: float = 0.0

    @classmethod
    def of(cls, values: Tensor, reference: Tensor) -> "SquaredError":
        """Compare two tensors of one shape."""
        exact = reference.cpu().double()
        error = (values.cpu().double() - exact).square().sum()
        return cls(float(error), float(exact.square().sum()))

    def __add__(self, other: "SquaredError") -> "SquaredError":
        """Return the error over what both were measured on."""
        return SquaredError(self.error + other.error, self.signal + other.signal)

    @property
    def relative(self) -> float:
        """The error as a share of the signal; 0 if there is no signal."""
        return self.error / self.signal if self.signal else 0.0


def relative_error(values: Tensor, reference: Tensor) -> float:
    """Return the squared error of `values` as a share of the signal in `reference`."""
    return SquaredError.of(values, reference).relative


@dataclass
class OutputError:
    """The error of a denoiser's output, summed by timestep."""

    sums: dict[float, SquaredError] = field(default_factory=dict)

    def add(self, timestep: float, output: Tensor, recorded: Tensor) -> None:
        """Count one call."""
        before = self.sums.get(timestep, SquaredError())
        self.sums[timestep] = before + SquaredError.of(output, recorded)

    def total(self) -> SquaredError:
        """Return the error over all calls."""
        return sum(self.sums.values(), SquaredError())

    def relative(self) -> float:
        """Return the relative error over all calls."""
        return self.total().relative

    def absolute(self) -> dict[float, float]:
        """Return the squared error by timestep."""
        return {timestep: total.error for timestep, total in self.sums.items()}

    def by_timestep(self) -> list[tuple[float, float]]:
        """Return (timestep, relative error) from noisy to clean."""
        ordered = sorted(self.sums, reverse=True)
        return [(timestep, self.sums[timestep].relative) for timestep in ordered]


def output_error(
    denoiser: nn.Module,
    calls: Iterable[DenoiserCall],
    advance: Callable[[int], None] = lambda steps: None,
) -> OutputError:
    """Measure a denoiser's output on recorded calls of the full-precision one."""
    error = OutputError()
    for call in calls:
        error.add(call.timestep, replay(denoiser, call), call.output)
        advance(1)
    return error


def layer_errors(
    denoiser: nn.Module, reference: nn.Module, layers: Iterable[str], calls: Iterable[DenoiserCall]
) -> dict[str, float]:
    """Measure each layer's output where both denoisers run as a whole.

    What reaches a layer is already in error, too.

    Arguments:
        denoiser: the quantized one.
        reference: the full-precision one, with layers of the same names.
        calls: recorded calls; one call's outputs of all layers are in memory at a time.

    Returns:
        Relative squared error by layer, 0 for a layer that did not run or has no signal.
    """
    errors = dict.fromkeys(layers, SquaredError())
    for call in calls:
        expected = _layer_outputs(reference, errors, call)
        outputs = _layer_outputs(denoiser, errors, call)
        for name in expected.keys() & outputs.keys():
            for output, exact in zip(outputs[name], expected[name], strict=True):
                errors[name] += SquaredError.of(output, exact)
    return {name: error.relative for name, error in errors.items()}


def _layer_outputs(
    denoiser: nn.Module, names: Iterable[str], call: DenoiserCall
) -> dict[str, list[Tensor]]:
    """Return what each named layer gives during one call, every time that it runs."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.setdefault(name, []).append(output.detach().cpu())

    with watch_layers({name: denoiser.get_submodule(name) for name in names}, keep):
        replay(denoiser, call)
    return outputs


_ROWS = 4  # of each call: enough to rank layers, and a quarter of the time of a default batch
# A call of a large denoiser takes seconds, and is repeated for each layer. One call of one row
# ranks layers nearly as more do (docs/lab/calibration.md).
_LARGE_CALLS = 1
_LARGE_ROWS = 1


def calls_and_rows(num_weights: int, count: int) -> tuple[int, int]:
    """Return on how many calls to compare the layers of a denoiser, and on how many rows of each.

    Arguments:
        num_weights: of the denoiser.
        count: calls, if it is a small one.
    """
    return (count, _ROWS) if num_weights < LARGE else (min(count, _LARGE_CALLS), _LARGE_ROWS)


def spread_calls(
    recording: Recording, component: str, count: int, max_rows: int = _ROWS
) -> list[DenoiserCall]:
    """Pick calls spread over the timesteps and over the pipeline runs, a few rows of each."""
    shards = [i for i in range(recording.num_shards) if recording.num_calls(component, [i])]
    calls = []
    for i in range(count if shards else 0):
        run = list(recording.calls(component, [shards[i % len(shards)]]))
        call = run[(2 * i + 1) * len(run) // (2 * count)]
        calls.append(take_rows(call, _spread_rows(len(call.output), max_rows)))
    return calls


def _spread_rows(batch: int, max_rows: int) -> Tensor:
    """Return the indices of a few rows, from both halves of a guided batch; one has the prompt."""
    if max_rows == 1:  # the first half of a guided batch is without
        return torch.tensor([batch - 1])
    return torch.linspace(0, batch - 1, min(max_rows, batch)).long()
