"""How far a quantized denoiser is from the full-precision one: its output by timestep, and each layer's output."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.rows import take_rows
from msfp_cli.recording.result import Recording


@dataclass
class OutputError:
    """Squared error of a denoiser's output and of the signal, summed by timestep."""

    sums: dict[float, tuple[float, float]] = field(default_factory=dict)

    def add(self, timestep: float, output: Tensor, recorded: Tensor) -> None:
        """Count one call."""
        wanted = recorded.double()
        error, signal = self.sums.get(timestep, (0.0, 0.0))
        error += float((output.cpu().double() - wanted).square().sum())
        self.sums[timestep] = (error, signal + float(wanted.square().sum()))

    def relative(self) -> float:
        """Return ``sum |output - recorded|^2 / sum |recorded|^2`` over all calls; 0 if there is no signal."""
        signal = sum(signal for _, signal in self.sums.values())
        return sum(error for error, _ in self.sums.values()) / signal if signal else 0.0

    def absolute(self) -> dict[float, float]:
        """Return the squared error by timestep."""
        return {timestep: error for timestep, (error, _) in self.sums.items()}

    def by_timestep(self) -> list[tuple[float, float]]:
        """Return (timestep, relative error) from noisy to clean."""
        ordered = sorted(self.sums.items(), reverse=True)
        return [
            (timestep, error / signal if signal else 0.0) for timestep, (error, signal) in ordered
        ]


def output_error(denoiser: nn.Module, calls: Iterable[DenoiserCall]) -> OutputError:
    """Measure a denoiser's output on recorded calls of the full-precision one."""
    error = OutputError()
    for call in calls:
        error.add(call.timestep, replay(denoiser, call), call.output)
    return error


def layer_errors(
    denoiser: nn.Module, reference: nn.Module, layers: Iterable[str], calls: Iterable[DenoiserCall]
) -> dict[str, float]:
    """Measure each layer's output where both denoisers run as a whole: what reaches it is already in error, too.

    Arguments:
        denoiser: the quantized one.
        reference: the full-precision one, with layers of the same names.
        calls: recorded calls; one call's outputs of all layers are in memory at a time.

    Returns:
        Relative squared error by layer, 0 for a layer that did not run or has no signal.
    """
    names = tuple(layers)
    sums = dict.fromkeys(names, (0.0, 0.0))
    for call in calls:
        wanted, got = (_outputs(module, names, call) for module in (reference, denoiser))
        for name in wanted.keys() & got.keys():
            for exact, other in zip(wanted[name], got[name], strict=True):
                error, signal = sums[name]
                error += float((other.double() - exact.double()).square().sum())
                sums[name] = (error, signal + float(exact.double().square().sum()))
    return {name: error / signal if signal else 0.0 for name, (error, signal) in sums.items()}


def _outputs(
    denoiser: nn.Module, names: Iterable[str], call: DenoiserCall
) -> Mapping[str, list[Tensor]]:
    """Return what each named layer gives during one call, every time that it runs."""
    seen: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for name in names:

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:  # noqa: ANN401
                seen.setdefault(name, []).append(output.detach().cpu())

            hooks.callback(denoiser.get_submodule(name).register_forward_hook(keep).remove)
        with torch.no_grad():
            replay(denoiser, call)
    return seen


MAX_ROWS = 4  # of each call: enough to rank layers, and a quarter of the time of a default batch


def spread_calls(recording: Recording, component: str, count: int) -> list[DenoiserCall]:
    """Pick calls spread over the timesteps and over the pipeline runs, a few rows of each."""
    shards = [
        i
        for i in range(recording.num_shards)
        if any(t is not None for t in recording.timesteps(i, component))
    ]
    picked = []
    for i in range(count if shards else 0):
        calls = [
            call for call in recording.shard(shards[i % len(shards)]) if call.component == component
        ]
        call = calls[(2 * i + 1) * len(calls) // (2 * count)]
        batch = call.output.shape[0]
        rows = torch.linspace(
            0, batch - 1, min(MAX_ROWS, batch)
        ).long()  # both halves of a guided batch
        picked.append(take_rows(call, rows))
    return picked
