"""Search the formats of one layer: the best grid for its weight and for its input.

A weight gets one scale per output channel, an input one grid for the whole tensor. How many bits
they get is said by the recipe's rules, or by a lift to 8 bits. Where the recipe lets the inputs of
Linear layers be transformed, each way to do so is searched, and the one of least error is taken.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from msfp_cli.calibration.observe import LayerObservation
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import LayerChoice, Score
from msfp_cli.formats.multipliers import GroupedScale, search_groups
from msfp_cli.formats.search import SearchResult, SearchSpace, search_rows, search_tensor
from msfp_cli.formats.transform import InputTransform, block_of
from msfp_cli.layers.quantized import FloatLayer, kind_of
from msfp_cli.layers.scheme import LayerScheme

LIFTED_BITS = TABLE_BITS = 8
_SPACE = SearchSpace()
# How much less error each part of a transform has to bring: it takes time at each call.
_GAIN = 0.05


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer's choice, and the steps of its weight.

    Arguments:
        choice: formats, grids and errors.
        scale: ``(out_features,)``; None where the weight is not quantized.
        multipliers: uint8 ``(out_features, groups)``; None where a channel has one step.
    """

    choice: LayerChoice
    scale: Tensor | None
    multipliers: Tensor | None = None


def search_layer(
    name: str,
    layer: FloatLayer,
    observation: LayerObservation,
    recipe: CalibrateRecipe,
    space: SearchSpace = _SPACE,
    *,
    is_lifted: bool = False,
    wide: bool = True,
) -> CalibratedLayer:
    """Search one layer at the bits that the recipe gives it.

    Arguments:
        is_lifted: whether it gets 8 bits at all timesteps.
        wide: whether the integers of a lifted layer's input may take two bytes.
    """
    role = observation.role
    reason, weight_bits, input_bits = bits_of(name, layer, recipe, role, lifted=is_lifted)
    weight = inputs = None
    transform = InputTransform()
    if input_bits is not None:
        # In the layers that take most of the time, inputs of two bytes would double the products.
        candidates = recipe.input_formats(input_bits, wide=wide and reason != "default")
        transforms = transforms_of(layer, recipe) if weight_bits is not None else [transform]
        search = partial(search_tensor, formats=candidates, space=space.for_bits(input_bits))
        transform, inputs = _search_input(observation, transforms, search)
    rotated = transform.rotate(layer.weight)
    if weight_bits is not None:
        formats = recipe.weight_formats(weight_bits)
        weight = search_rows(rotated, formats, space.for_bits(weight_bits))
    groups = _grouped(layer, rotated, weight, recipe) if weight else None
    grid = inputs.winner.grid() if inputs else None
    lifted = None
    if grid is not None and reason == "default" and recipe.input_lift > 0:
        candidates = recipe.lifted_formats(signed=grid.format.signed)
        search = partial(search_tensor, formats=candidates, space=space.for_bits(LIFTED_BITS))
        _, lifted = _search_input(observation, [transform], search)
    choice = LayerChoice(
        kind=kind_of(layer).name,
        reason=reason,
        role=role,
        num_weights=layer.weight.numel(),
        multiply_adds=observation.multiply_adds,
        minimum=observation.minimum,
        maximum=observation.maximum,
        scheme=LayerScheme(
            weight=groups.format if groups else weight.winner.format if weight else None,
            input=grid,
            lifted_input=lifted.winner.grid() if lifted else None,
            lookup=kind_of(layer).is_table,
            weight_groups=groups.multipliers.shape[1] if groups else 0,
            transform=transform,
        ),
        weight_scores=_with_groups(_scores(weight), groups),
        input_scores=_scores(inputs),
    )
    if groups:
        return CalibratedLayer(choice, groups.scale.cpu(), groups.multipliers.cpu())
    scale = weight.winner.max_value.cpu() / weight.winner.format.largest if weight else None
    return CalibratedLayer(choice, scale)


def views_of(layer: FloatLayer, x: Tensor, recipe: CalibrateRecipe) -> Tensor:
    """Return what is observed of a layer's input: what its transforms are made of, if it has any.

    Arguments:
        x: the input, any shape.

    Returns:
        ``(views, *x.shape)``, the input first, see `InputTransform.views`.
    """
    *_, last = transforms_of(layer, recipe)
    return x[None] if last.is_identity else last.views(x)


def is_mostly_linear(layers: Collection[FloatLayer]) -> bool:
    """Whether most weights are in layers whose inputs can be transformed: in Linear ones."""
    linear = sum(each.weight.numel() for each in layers if kind_of(each).transforms_inputs)
    return bool(2 * linear > sum(each.weight.numel() for each in layers))


def transforms_of(layer: FloatLayer, recipe: CalibrateRecipe) -> list[InputTransform]:
    """Return the ways in which a layer's input may be transformed: from not at all to all at once.

    They differ in whether it is rotated, and in whether tokens have scales.

    Arguments:
        recipe: settled for the denoiser.
    """
    if not kind_of(layer).transforms_inputs:
        return [InputTransform()]
    block = block_of(layer.in_features) if recipe.rotate == "hadamard" else 0
    rotations = [0, block] if block else [0]
    ways = [InputTransform(rotation=rotation) for rotation in rotations]
    if recipe.input_scales == "token":
        ways += [InputTransform(rotation=rotation, token_scales=True) for rotation in rotations]
    return ways


def _search_input(
    observation: LayerObservation,
    transforms: Sequence[InputTransform],
    search: Callable[[Tensor], SearchResult],
) -> tuple[InputTransform, SearchResult]:
    """Return the transform of an input whose best grid has the least error, and that grid.

    Arguments:
        transforms: the identity, and others.
        search: finds the best grid for a tensor.
    """
    plain, *others = transforms
    results = {plain: search(observation.values())}
    for transform in others:
        results[transform] = search(transform.of_views(observation.views())[0])

    def error(transform: InputTransform) -> float:
        relative = transform.error(observation.views(), results[transform].winner.grid())
        return relative * (1 + _GAIN) ** transform.num_parts

    best = min(results, key=error) if others else plain
    return best, results[best]


def _with_groups(scores: tuple[Score, ...], groups: GroupedScale | None) -> tuple[Score, ...]:
    """Return scores in which the chosen format has the error that it has in groups, best first."""
    if groups is None:
        return scores
    chosen = Score(format=groups.format.name, error=groups.error)
    return (chosen, *(score for score in scores if score.format != chosen.format))


def _grouped(
    layer: FloatLayer, weight: Tensor, search: SearchResult, recipe: CalibrateRecipe
) -> GroupedScale | None:
    """Return steps for groups of weights, if that lowers the error of the weight.

    Arguments:
        weight: of the layer, rotated where inputs are.
        search: of the weight, without groups.
    """
    if not recipe.group_weights or kind_of(layer).is_table:
        return None
    formats = [score.format for score in search.scores]
    groups = search_groups(weight, formats, recipe.group_weights)
    return groups if groups and groups.error < search.winner.error else None


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
    name: str,
    layer: FloatLayer,
    recipe: CalibrateRecipe,
    role: str | None,
    *,
    lifted: bool = False,
) -> tuple[str, int | None, int | None]:
    """Return why a layer gets its bits, those of its weight, and those of its input.

    Arguments:
        role: of the layer, where it has one, see `recording.flow`.
        lifted: whether it gets 8 bits because of its sensitivity.
    """
    kept, bits = recipe.kept_bits(name, role)
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


@dataclass(frozen=True)
class PlannedLayer:
    """A layer as the recipe sees it, before anything is known of its input.

    Arguments:
        layer: the float layer.
        is_tried: whether its part of the error may be measured.
        is_rounded: whether its weight will be quantized, and multiplied.
    """

    layer: FloatLayer
    is_tried: bool
    is_rounded: bool

    @classmethod
    def of(
        cls, name: str, layer: FloatLayer, recipe: CalibrateRecipe, role: str | None
    ) -> "PlannedLayer":
        """Return what the recipe says of a layer, if it has this role."""
        reason, weight_bits, _ = bits_of(name, layer, recipe, role)
        is_rounded = weight_bits is not None and not kind_of(layer).is_table
        return cls(layer, reason == "default", is_rounded)
