"""Search the formats of one layer: the best grid for its weight and for its input.

A weight gets one scale per output channel, an input one grid for the whole tensor. How many bits
they get is said by the recipe's rules, or by a lift to 8 bits.
"""

from dataclasses import dataclass

from torch import Tensor

from msfp_cli.calibration.observe import LayerObservation
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import LayerChoice, Score
from msfp_cli.formats.rounding import Grid
from msfp_cli.formats.search import SearchResult, SearchSpace, search_rows, search_tensor
from msfp_cli.layers.base import FloatLayer
from msfp_cli.layers.quantized import kind_of
from msfp_cli.layers.scheme import LayerScheme

LIFTED_BITS = TABLE_BITS = 8
_SPACE = SearchSpace()


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer's choice and the scales of its weight, ``(out_features,)``; None: not quantized."""

    choice: LayerChoice
    scale: Tensor | None


def search_layer(
    name: str,
    layer: FloatLayer,
    observation: LayerObservation,
    recipe: CalibrateRecipe,
    space: SearchSpace = _SPACE,
    *,
    lifted: bool = False,
) -> CalibratedLayer:
    """Search one layer at the bits that the recipe gives it."""
    reason, weight_bits, input_bits = bits_of(name, layer, recipe, lifted=lifted)
    weight = inputs = None
    if weight_bits is not None:
        weight = search_rows(
            layer.weight, recipe.weight_formats(weight_bits), space.for_bits(weight_bits)
        )
    if input_bits is not None:
        # Of the layers that take most of the time, inputs of two bytes would double the products.
        candidates = recipe.input_formats(input_bits, wide=reason != "default")
        inputs = search_tensor(observation.values(), candidates, space.for_bits(input_bits))
    best = inputs.winner if inputs else None
    grid = Grid.with_maximum(best.format, best.max_value[0], best.zero_point) if best else None
    choice = LayerChoice(
        kind=kind_of(layer).name,
        reason=reason,
        num_weights=layer.weight.numel(),
        multiply_adds=observation.multiply_adds,
        minimum=observation.minimum,
        maximum=observation.maximum,
        scheme=LayerScheme(
            weight=weight.winner.format if weight else None,
            input=grid,
            lookup=kind_of(layer).is_table,
        ),
        weight_scores=_scores(weight),
        input_scores=_scores(inputs),
    )
    scale = weight.winner.max_value.cpu() / weight.winner.format.largest if weight else None
    return CalibratedLayer(choice, scale)


def _scores(result: SearchResult | None) -> tuple[Score, ...]:
    """Return the scores of a search as plain numbers."""
    if result is None:
        return ()
    return tuple(
        Score(
            format=score.format.name,
            error=score.error,
            max_value=float(score.max_value[0]) if score.max_value.numel() == 1 else None,
            zero_point=score.zero_point,
        )
        for score in result.scores
    )


def bits_of(
    name: str, layer: FloatLayer, recipe: CalibrateRecipe, *, lifted: bool = False
) -> tuple[str, int | None, int | None]:
    """Return why a layer gets its bits, those of its weight, and those of its input."""
    kept, bits = recipe.kept_bits(name)
    if kind_of(layer).is_table:  # a class or a position, and all that follows depends on it
        return "kept", None if recipe.weights is None else bits if kept else TABLE_BITS, None
    if not lifted and not kept:
        return "default", recipe.weights, recipe.activations
    bits = LIFTED_BITS if lifted else bits
    # What the recipe leaves in floating point stays there: a rule only says how many bits, where
    # there are any.
    weight_bits = None if recipe.weights is None else bits
    input_bits = None if recipe.activations is None else bits
    return "lifted" if lifted else "kept", weight_bits, input_bits
