"""Quantize one layer alone, to see how much that moves the output, and choose which to lift."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from msfp_cli.calibration.result import LayerChoice
from msfp_cli.formats.multipliers import step_sizes
from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.layers.quantized import FloatLayer
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.layers.streamed import weight_in_memory


def by_multiply_adds(layer: LayerChoice) -> float:
    """Return the price of a layer where more bits cost time."""
    return layer.multiply_adds


def by_weights(layer: LayerChoice) -> float:
    """Return the price of a layer where more bits cost bytes, but no time."""
    return layer.num_weights


def choose_lifted(
    layers: Mapping[str, LayerChoice],
    budget: float,
    price: Callable[[LayerChoice], float] = by_multiply_adds,
    among: Collection[str] | None = None,
) -> list[str]:
    """Choose the layers to lift: greatest sensitivity for the price first, within the budget.

    Arguments:
        layers: those with a sensitivity are candidates.
        budget: share of the price of all layers, 0 to 1.
        price: of a layer.
        among: the candidates; None for all.
    """
    left = budget * sum(map(price, layers.values()))
    gain = {
        name: layer.sensitivity / price(layer)
        for name, layer in layers.items()
        if layer.sensitivity and (among is None or name in among)
    }
    chosen = []
    for name in sorted(gain, key=lambda name: (-gain[name], name)):
        if price(layers[name]) <= left:
            left -= price(layers[name])
            chosen.append(name)
    return chosen


@contextmanager
def quantized_alone(
    layer: FloatLayer,
    scheme: LayerScheme,
    scale: Tensor | None,
    multipliers: Tensor | None = None,
) -> Iterator[None]:
    """Quantize one layer's weight and input while the context is open.

    Arguments:
        scale: of the weight, ``(out_features,)``.
        multipliers: uint8 ``(out_features, groups)``, where its groups have some.
    """
    with ExitStack() as undo:
        undo.enter_context(weight_in_memory(layer))
        weight = layer.weight.data
        undo.callback(setattr, layer.weight, "data", weight)
        if scheme.weight is not None and scale is not None:
            sizes = step_sizes(scale, multipliers, weight.shape).to(weight.device)
            rotate = scheme.transform.rotate
            layer.weight.data = rotate(fake_quantize(rotate(weight), Grid(scheme.weight, sizes)))
        if scheme.input is not None:
            hook = functools.partial(quantize_input, scheme)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            undo.callback(handle.remove)
        yield


def quantize_input(
    scheme: LayerScheme, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Quantize the one argument of a layer; a forward pre-hook of torch."""
    given = (*args, *kwargs.values())
    assert scheme.input is not None, "this layer's input is in floating point"
    rounded = scheme.transform.rounded(given[0].float(), scheme.input)
    return (scheme.transform.rotate(rounded).to(given[0].dtype),), {}
