"""Replay recorded calls through the float denoiser and keep what calibration needs of each layer's input.

Kept per layer: a bounded random sample, the same number of elements from every call so that all
timesteps weigh alike; the true minimum and maximum; and the multiply-adds of one call, the unit in
which the lift's budget is counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.errors import CalibrationError
from msfp_cli.layers.base import FloatLayer
from msfp_cli.layers.quantized import kind_of
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.progress import Advance


@dataclass
class LayerObservation:
    """What was seen at the input of one layer.

    Arguments:
        minimum, maximum: over all elements of all calls.
        multiply_adds: of one call, averaged over the calls.
        samples: pieces of the random sample, float32 on the CPU.
    """

    minimum: float = float("inf")
    maximum: float = float("-inf")
    multiply_adds: float = 0.0
    samples: list[Tensor] = field(default_factory=list)

    def values(self) -> Tensor:
        """Return the sample with the true minimum and maximum in it, ``(samples + 2,)``."""
        return torch.cat([*self.samples, torch.tensor([self.minimum, self.maximum])])


def count_multiply_adds(layer: FloatLayer, output: Tensor) -> int:
    """Return the multiply-adds that produced `output`: its elements times the inputs that each one sums."""
    return 0 if kind_of(layer).is_table else output.numel() * layer.weight[0].numel()


def observe(
    denoiser: nn.Module,
    calls: Iterable[DenoiserCall],
    num_calls: int,
    *,
    max_samples: int,
    generator: torch.Generator,
    advance: Advance,
) -> dict[str, LayerObservation]:
    """Watch the input of every layer over the recorded calls; a table's are indices, of which none are kept.

    Arguments:
        num_calls: how many calls there are, to share `max_samples` among them.
        max_samples: bound on the elements kept per layer.

    Returns:
        One observation per layer that ran; a layer that never ran is absent.

    Raises:
        CalibrationError: an input holds a NaN or an infinity; the message names the layer and the
            timestep.
    """
    per_call = max(1, max_samples // max(1, num_calls))
    seen: dict[str, LayerObservation] = {}
    timestep = 0.0

    def hook(name: str, layer: FloatLayer, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(-1)
        low, high = (float(bound) for bound in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise CalibrationError(
                f"the input of layer {name!r} holds a NaN or infinity at timestep {timestep:g}; the model overflows "
                "in this precision: try --dtype float32, or --dtype bfloat16 on a GPU"
            )
        observation = seen.setdefault(name, LayerObservation())
        observation.minimum, observation.maximum = (
            min(observation.minimum, low),
            max(observation.maximum, high),
        )
        observation.multiply_adds += count_multiply_adds(layer, output) / num_calls
        if kind_of(layer).is_table:
            return
        index = torch.randint(x.numel(), (min(per_call, x.numel()),), generator=generator)
        observation.samples.append(x[index.to(x.device)].float().cpu())

    handles = [
        layer.register_forward_hook(
            lambda layer, args, output, name=name: hook(name, layer, args, output)
        )
        for name, layer in find_layers(denoiser).items()
    ]
    try:
        for call in calls:
            timestep = call.timestep
            replay(denoiser, call)
            advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return seen
