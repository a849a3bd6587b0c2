"""Quantize one layer alone, to see how much that moves the output, and choose which to lift."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from msfp_cli.calibration.result import LayerChoice
from msfp_cli.formats.rounding import Grid, fake_quantize, per_channel
from msfp_cli.layers.base import FloatLayer
from msfp_cli.layers.scheme import LayerScheme


def choose_lifted(layers: Mapping[str, LayerChoice], budget: float) -> list[str]:
    """Choose the layers to lift: greatest sensitivity per multiply-add first, within the budget.

    Arguments:
        layers: those with a sensitivity are candidates.
        budget: share of all multiply-adds, 0 to 1.
    """
    left = budget * sum(layer.multiply_adds for layer in layers.values())
    gain = {
        name: layer.sensitivity / layer.multiply_adds
        for name, layer in layers.items()
        if layer.sensitivity
    }
    chosen = []
    for name in sorted(gain, key=lambda name: (-gain[name], name)):
        if layers[name].multiply_adds <= left:
            left -= layers[name].multiply_adds
            chosen.append(name)
    return chosen


@contextmanager
def quantized_alone(layer: FloatLayer, scheme: LayerScheme, scale: Tensor | None) -> Iterator[None]:
    """Quantize one layer's weight and input while the context is open.

    Arguments:
        scale: of the weight, ``(out_features,)``.
    """
    weight = layer.weight.data
    with ExitStack() as undo:
        undo.callback(setattr, layer.weight, "data", weight)
        if scheme.weight is not None and scale is not None:
            rows = per_channel(scale, weight.ndim).to(weight.device)
            layer.weight.data = fake_quantize(weight, Grid(scheme.weight, rows))
        if scheme.input is not None:
            hook = functools.partial(_quantize_input, scheme.input)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            undo.callback(handle.remove)
        yield


def _quantize_input(
    grid: Grid, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Quantize the one argument of a layer; a forward pre-hook of torch."""
    given = (*args, *kwargs.values())
    return (fake_quantize(given[0], grid),), {}
