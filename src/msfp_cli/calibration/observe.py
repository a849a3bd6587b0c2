"""Replay recorded calls through the float denoiser and observe the input of every layer.

Kept per layer: a bounded random sample, the same number of elements from every call so that all
timesteps weigh alike; the true minimum and maximum; the multiply-adds of one call, the unit in
which the lift's budget is counted; and the layer's role, which the first call shows.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from msfp_cli.errors import CalibrationError
from msfp_cli.layers.quantized import kind_of
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.watch import watch_layers
from msfp_cli.progress import Advance
from msfp_cli.recording.flow import trace_roles

# Of a layer and its input: tensors of the input's shape, ``(views, ...)``, the input first.
Views: TypeAlias = Callable[[Any, Tensor], Tensor]


@dataclass
class LayerObservation:
    """The input of one layer, over all calls.

    Arguments:
        num_calls: how many calls of the denoiser there are.
        minimum, maximum: over all elements of all calls.
        products: multiply-adds of all calls.
        role: one of `recording.flow`, None for most layers.
        samples: pieces of the random sample, float32 ``(views, elements)`` on the CPU; the first
            view is the input itself.
    """

    num_calls: int
    minimum: float = float("inf")
    maximum: float = float("-inf")
    products: int = 0
    role: str | None = None
    samples: list[Tensor] = field(default_factory=list)

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds of one call, averaged over the calls."""
        return self.products / self.num_calls

    def __add__(self, later: "LayerObservation") -> "LayerObservation":
        """Return what was observed in the calls of both."""
        return LayerObservation(
            num_calls=self.num_calls,
            minimum=min(self.minimum, later.minimum),
            maximum=max(self.maximum, later.maximum),
            products=self.products + later.products,
            role=self.role,
            samples=[*self.samples, *later.samples],
        )

    def views(self) -> Tensor:
        """Return the sample, ``(views, samples)``."""
        return torch.cat(self.samples, dim=1)

    def values(self) -> Tensor:
        """Return the sample with the true minimum and maximum in it, ``(samples + 2,)``."""
        return torch.cat([self.views()[0], torch.tensor([self.minimum, self.maximum])])


@dataclass
class _Observer:
    """Notes the input of every layer that runs.

    Arguments:
        num_calls: how many calls of the denoiser there will be.
        samples_per_call: elements kept of a layer's input at one run of the layer.
        generator: draws them.
        views: of a layer's input, that are sampled at the same elements.
        timestep: of the call that is being replayed, for the error.
    """

    num_calls: int
    samples_per_call: int
    generator: torch.Generator
    views: Views
    timestep: float = 0.0
    observations: dict[str, LayerObservation] = field(default_factory=dict)

    def add(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note one run of one layer."""
        x = args[0].detach().reshape(-1)
        low, high = self._bounds(name, x)
        observation = self.observations.setdefault(name, LayerObservation(self.num_calls))
        observation.minimum = min(observation.minimum, low)
        observation.maximum = max(observation.maximum, high)
        kind = kind_of(layer)
        observation.products += kind.multiply_adds(layer, args[0], output)
        if not kind.is_table:
            observation.samples.append(self._sample(self.views(layer, args[0].detach())))

    def _bounds(self, name: str, x: Tensor) -> tuple[float, float]:
        """Return the least and the greatest element, and refuse what is not finite."""
        low, high = (float(bound) for bound in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"the input of layer {name!r} holds a NaN or infinity at timestep "
                f"{self.timestep:g}; the model overflows in this precision: "
                "try --dtype float32, or --dtype bfloat16 on a GPU"
            )
        return low, high

    def _sample(self, views: Tensor) -> Tensor:
        """Draw elements, with replacement."""
        flat = views.flatten(1)
        size = flat.shape[1]
        index = torch.randint(size, (min(self.samples_per_call, size),), generator=self.generator)
        return flat[:, index.to(flat.device)].float().cpu()


def observe(
    denoiser: nn.Module,
    calls: Iterable[DenoiserCall],
    num_calls: int,
    *,
    max_samples: int,
    generator: torch.Generator,
    advance: Advance,
    views: Views = lambda layer, x: x[None],
) -> dict[str, LayerObservation]:
    """Watch the input of every layer over recorded calls.

    The input of an embedding is indices, of which no sample is kept.

    Arguments:
        num_calls: how many calls there are, to share `max_samples` among them.
        max_samples: bound on the elements kept per layer.
        views: gives, of a layer and its input, what is sampled at the same elements.

    Returns:
        One observation per layer that ran; a layer that never ran is absent.

    Raises:
        CalibrationError: an input holds a NaN or an infinity; the message names the layer and the
            timestep. Or the denoiser runs what cannot be followed.
    """
    observer = _Observer(
        num_calls=num_calls,
        samples_per_call=max(1, max_samples // max(1, num_calls)),
        generator=generator,
        views=views,
    )
    roles: dict[str, str] | None = None
    with watch_layers(find_layers(denoiser), observer.add):
        for call in calls:
            observer.timestep = call.timestep
            if roles is None:
                roles = _roles_of(denoiser, call)
            else:
                replay(denoiser, call)
            advance(1)
    for name, observation in observer.observations.items():
        observation.role = (roles or {}).get(name)
    return observer.observations


def _roles_of(denoiser: nn.Module, call: DenoiserCall) -> dict[str, str]:
    """Return the roles of a denoiser's layers, and refuse one of which they cannot be found.

    torch has operators that run others, and lets nobody watch what passes through them.
    """
    try:
        return trace_roles(denoiser, call)
    except NotImplementedError as error:
        operator = re.search(r"HigherOrderOperator (\w+)", str(error))
        if operator is None:
            raise
        raise CalibrationError(
            f"{type(denoiser).__name__} runs torch's {operator[1]}, inside of which msfp cannot "
            "watch its layers; choose another attention with set_attention_backend, if it has one"
        ) from error
