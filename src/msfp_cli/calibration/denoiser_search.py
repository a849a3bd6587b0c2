"""Choose a format for every layer of one denoiser: observe its inputs, search, and lift the worst.

1. `observe` replays recorded calls, of some 80 pictures, through the float denoiser and samples
   every layer's input.
2. `search_layer` finds the best grids for each layer.
3. Each layer is quantized alone on a few calls; how much that moves the denoiser's output is its
   sensitivity. The worst layers per multiply-add are lifted to 8 bits until the budget is spent. A
   handful of layers makes most of the error, so a few per cent of the arithmetic buys back more
   than half of it (ours). Where inputs have 8 bits anyway, a lifted layer takes more bytes but the
   same products, so the worst layers per weight are lifted, within that share of the weights; the
   share of the multiply-adds is for those among them whose input may take two bytes.

Several processes share 1 by pictures, 2 and 3 by layers, and come to what one comes to, bit for
bit: minima, maxima and sorted samples depend on no order.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from msfp_cli.calibration.layer_search import (
    LIFTED_BITS,
    CalibratedLayer,
    PlannedLayer,
    is_mostly_linear,
    search_layer,
    views_of,
)
from msfp_cli.calibration.lift_inputs import lift_inputs
from msfp_cli.calibration.observe import LayerObservation, observe
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import LayerChoice
from msfp_cli.calibration.sensitivity import (
    by_multiply_adds,
    by_weights,
    choose_lifted,
    quantized_alone,
)
from msfp_cli.layers.input_lift import InputLift
from msfp_cli.layers.replace import find_layers
from msfp_cli.layers.streamed import weight_in_memory
from msfp_cli.pipelines.prefix import REPEATED_SHARE, RepeatedCall
from msfp_cli.processes import ALONE, Processes
from msfp_cli.recording.compare import (
    OutputError,
    SquaredError,
    calls_and_rows,
    output_error,
    spread_calls,
)
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.result import Recording

_OBSERVED_PICTURES = 80


def search_denoiser(
    component: str,
    pipe: DiffusionPipeline,
    recording: Recording,
    record: RecordRecipe,
    recipe: CalibrateRecipe,
    processes: Processes,
) -> tuple[dict[str, CalibratedLayer], InputLift | None]:
    """Choose a format for every layer that runs; the denoiser stays in floating point.

    Arguments:
        component: the denoiser's name in the pipeline.
        record: how the recording was made.
        processes: those that share the work; all of them get all that is found.

    Returns:
        The layers by name, and the timesteps whose inputs are lifted; None if there are none.

    Raises:
        CalibrationError: an activation holds a NaN or infinity.
    """
    layers = _search_layers(component, pipe.components[component], recording, recipe, processes)
    clock = recording.clock(component)
    choices = choices_of(layers)
    lift = lift_inputs(component, pipe, clock, choices, record, recipe.input_lift, processes)
    return layers if lift else _without_lifted_inputs(layers), lift


def _search_layers(
    component: str,
    denoiser: nn.Module,
    recording: Recording,
    recipe: CalibrateRecipe,
    processes: Processes,
) -> dict[str, CalibratedLayer]:
    """Choose a format for every layer, and lift the worst to 8 bits."""
    recipe = recipe.settled(mostly_linear=is_mostly_linear(find_layers(denoiser).values()))
    observations = _observe(component, denoiser, recording, recipe, processes)
    names = [name for name in find_layers(denoiser) if name in observations]
    results = _search(component, denoiser, names, observations, recipe, processes)
    if recipe.lift == 0 or _narrowest(recipe) >= LIFTED_BITS:
        return results
    results = _measure_sensitivity(component, denoiser, recording, recipe, results, processes)
    choices = choices_of(results)
    price = by_weights if recipe.has_wide_inputs else by_multiply_adds
    chosen = choose_lifted(choices, recipe.lift, price)
    wide = choose_lifted(choices, recipe.lift, by_multiply_adds, chosen)
    lifted = _search(component, denoiser, chosen, observations, recipe, processes, wide)
    for name, layer in lifted.items():
        choice = replace(layer.choice, sensitivity=choices[name].sensitivity)
        results[name] = replace(layer, choice=choice)
    return results


def _search(
    component: str,
    denoiser: nn.Module,
    names: Sequence[str],
    observations: Mapping[str, LayerObservation],
    recipe: CalibrateRecipe,
    processes: Processes,
    wide: Collection[str] | None = None,
) -> dict[str, CalibratedLayer]:
    """Search some layers at the bits that the recipe gives them.

    Arguments:
        wide: where the layers are lifted to 8 bits: those whose inputs may take two bytes.
    """
    layers = find_layers(denoiser)
    own = processes.part(names, lambda name: layers[name].weight.numel())
    results = dict[str, CalibratedLayer]()
    with processes.progress.task(f"Searching {component}", len(own)) as advance:
        for name in own:
            with weight_in_memory(layers[name]):
                results[name] = search_layer(
                    name,
                    layers[name],
                    observations[name],
                    recipe,
                    is_lifted=wide is not None,
                    wide=wide is None or name in wide,
                )
            advance(1)
    results = processes.gather(results, CalibratedLayer)
    return {name: results[name] for name in names}


def _observe(
    component: str,
    denoiser: nn.Module,
    recording: Recording,
    recipe: CalibrateRecipe,
    processes: Processes,
) -> dict[str, LayerObservation]:
    """Observe the layers' inputs over a share of the recording."""
    shards = observed_shards(recording)
    own = processes.part(shards)
    num_calls = recording.num_calls(component, shards)
    parts = dict[str, dict[str, LayerObservation]]()
    with processes.progress.task(
        f"Observing {component}", recording.num_calls(component, own)
    ) as advance:
        for shard in own:
            parts[str(shard)] = observe(
                denoiser,
                recording.calls(component, [shard]),
                num_calls,
                max_samples=recipe.max_samples,
                generator=torch.Generator().manual_seed(recipe.seed + shard),
                advance=advance,
                views=partial(views_of, recipe=recipe),
            )
    parts = processes.gather(parts, dict[str, LayerObservation])
    observations = dict[str, LayerObservation]()
    for shard in shards:
        for name, new in parts[str(shard)].items():
            before = observations.get(name)
            observations[name] = new if before is None else before + new
    return observations


def observed_shards(recording: Recording) -> list[int]:
    """Spread shards of some 80 pictures over the recording: the search needs no more of them."""
    count = num_observed(recording.num_shards, recording.recipe["record"]["batch_size"])
    return [i * recording.num_shards // count for i in range(count)]


def num_observed(num_shards: int, batch_size: int) -> int:
    """Return how many shards of a recording are observed."""
    return min(num_shards, math.ceil(_OBSERVED_PICTURES / batch_size))


def planned_layers(
    denoiser: nn.Module, recipe: CalibrateRecipe, role_of: Callable[[str], str | None]
) -> dict[str, PlannedLayer]:
    """Return what will be done to each layer of a denoiser.

    Arguments:
        role_of: says of a layer's name which role the layer will turn out to have.
    """
    layers = find_layers(denoiser)
    return {
        name: PlannedLayer.of(name, layer, recipe, role_of(name)) for name, layer in layers.items()
    }


def calls_to_measure(recipe: CalibrateRecipe, denoiser: nn.Module, rows: int) -> float:
    """Return how many calls of so many rows measuring a layer's part of the error is worth."""
    is_measured = recipe.lift > 0 and _narrowest(recipe) < LIFTED_BITS
    count, max_rows = _measured_calls(recipe, denoiser)
    return is_measured * count * min(max_rows, rows) / rows * REPEATED_SHARE


def _measured_calls(recipe: CalibrateRecipe, denoiser: nn.Module) -> tuple[int, int]:
    """Return on how many calls a layer's part of the error is measured, and of how many rows."""
    num_weights = sum(layer.weight.numel() for layer in find_layers(denoiser).values())
    return calls_and_rows(num_weights, recipe.sensitivity_calls)


def _narrowest(recipe: CalibrateRecipe) -> int:
    """Return the smaller of the bits of weights and inputs."""
    return min(recipe.weights or LIFTED_BITS, recipe.activations or LIFTED_BITS)


def _measure_sensitivity(
    component: str,
    denoiser: nn.Module,
    recording: Recording,
    recipe: CalibrateRecipe,
    results: Mapping[str, CalibratedLayer],
    processes: Processes,
) -> dict[str, CalibratedLayer]:
    """Add the sensitivity of every layer at the default bits."""
    calls = spread_calls(recording, component, *_measured_calls(recipe, denoiser))
    candidates = [name for name, each in results.items() if each.choice.reason == "default"]
    errors = {name: OutputError() for name in processes.part(candidates)}
    with processes.progress.task(f"Measuring {component}", len(errors) * len(calls)) as advance:
        for call in calls:
            _add_errors(errors, RepeatedCall(denoiser, call), results, advance)
    relative = processes.gather({name: each.relative() for name, each in errors.items()}, float)
    return {
        name: replace(each, choice=replace(each.choice, sensitivity=relative.get(name)))
        for name, each in results.items()
    }


def _add_errors(
    errors: Mapping[str, OutputError],
    repeated: RepeatedCall,
    results: Mapping[str, CalibratedLayer],
    advance: Callable[[int], None],
) -> None:
    """Add the error of the denoiser's output in one call, with each layer quantized alone."""
    call = repeated.call
    layers = find_layers(repeated.denoiser)
    for name, error in errors.items():
        each = results[name]
        with quantized_alone(layers[name], each.choice.scheme, each.scale, each.multipliers):
            error.add(call.timestep, repeated.from_layer(name), call.output)
        advance(1)


def _without_lifted_inputs(layers: Mapping[str, CalibratedLayer]) -> dict[str, CalibratedLayer]:
    """Return the layers without the grids for timesteps at which inputs would be lifted."""
    plain = {}
    for name, layer in layers.items():
        scheme = replace(layer.choice.scheme, lifted_input=None)
        plain[name] = replace(layer, choice=replace(layer.choice, scheme=scheme))
    return plain


def choices_of(layers: Mapping[str, CalibratedLayer]) -> dict[str, LayerChoice]:
    """Return what was chosen for each layer."""
    return {name: layer.choice for name, layer in layers.items()}


def scales_of(layers: Mapping[str, CalibratedLayer]) -> dict[str, Tensor]:
    """Return the weight scales of the layers whose weight is quantized."""
    return {name: layer.scale for name, layer in layers.items() if layer.scale is not None}


def multipliers_of(layers: Mapping[str, CalibratedLayer]) -> dict[str, Tensor]:
    """Return the multipliers of the layers whose weights have groups."""
    found = {name: layer.multipliers for name, layer in layers.items()}
    return {name: each for name, each in found.items() if each is not None}


class Rest(NamedTuple):
    """What of a denoiser no format was chosen for.

    Arguments:
        unused: layers that never ran.
        others: elements of the parameters that are not the weight of a layer that ran, by the name
            of the parameter; those of one dimension, biases and norms, together under an empty
            name.
    """

    unused: tuple[str, ...]
    others: dict[str, int]


def rest_of(denoiser: nn.Module, layers: Container[str]) -> Rest:
    """Return what no format was chosen for.

    Arguments:
        layers: those that one was chosen for.
    """
    unused = tuple(name for name in find_layers(denoiser) if name not in layers)
    counts = Counter[str]()
    for name, parameter in denoiser.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in layers:
            counts[name if parameter.ndim > 1 else ""] += parameter.numel()
    return Rest(unused, dict(counts))


def held_out_error(
    denoiser: nn.Module, recording: Recording, component: str, processes: Processes = ALONE
) -> float:
    """Return the relative error of a denoiser's output over a full-precision recording."""
    shards = range(recording.num_shards)
    own = processes.part(shards)
    errors = dict[str, SquaredError]()
    with processes.progress.task(
        f"Checking {component} on held-out calls", recording.num_calls(component, own)
    ) as advance:
        for shard in own:
            calls = recording.calls(component, [shard])
            errors[str(shard)] = output_error(denoiser, calls, advance).total()
    errors = processes.gather(errors, SquaredError)
    return sum((errors[str(shard)] for shard in shards), SquaredError()).relative
