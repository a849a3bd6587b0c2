"""Choose a format, maximum and zero point for every layer of a denoiser: the workflow behind `msfp calibrate`.

1. `observe` replays recorded calls, of some 80 pictures, through the float denoiser and samples
   every layer's input.
2. `search` finds the best grid for each weight (per output channel) and each input (per tensor).
3. Each layer is quantized alone on a few calls; how much that moves the denoiser's output is its
   sensitivity. The worst layers per multiply-add are lifted to 8 bits until the budget is spent. A
   handful of layers makes most of the error, so a few per cent of the arithmetic buys back more
   than half of it (ours).
4. The whole is quantized and measured on held-out calls.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.calibration.observe import LayerObservation, observe
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration, LayerChoice, Score, quantize_
from msfp_cli.calibration.sensitivity import choose_lifted, quantized_alone
from msfp_cli.errors import CalibrationError
from msfp_cli.files import refuse_existing
from msfp_cli.formats.rounding import Grid
from msfp_cli.formats.search import SearchResult, SearchSpace, search_rows, search_tensor
from msfp_cli.layers.base import FloatLayer
from msfp_cli.layers.quantized import kind_of
from msfp_cli.layers.replace import find_layers
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.conditions import prompts_of
from msfp_cli.pipelines.denoiser import DenoiserCall, find_denoisers
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recording.compare import output_error, spread_calls
from msfp_cli.recording.recipe import RecordOptions, RecordRecipe
from msfp_cli.recording.record import record_both
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

LIFTED_BITS = TABLE_BITS = 8
_OBSERVED_PICTURES = 80
_SPACE = SearchSpace()


@dataclass(frozen=True)
class Searched:
    """One layer's choice and the scales of its weight."""

    choice: LayerChoice
    scale: Tensor | None


def calibrate_(
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
    recording: Recording,
    held_out: Recording,
    recipe: CalibrateRecipe,
    *,
    progress: Progress = SILENT,
) -> Calibration:
    """Calibrate every denoiser of a pipeline, and leave them quantized in place.

    Arguments:
        recording: calls to choose on.
        held_out: calls to measure on.

    Raises:
        CalibrationError: a weight or an activation holds a NaN or infinity.
    """
    denoisers = find_denoisers(pipe)
    searched = {
        name: _calibrate_one(name, module, recording, recipe, progress)
        for name, module in denoisers.items()
    }
    used = {component: layers for component, layers in searched.items() if layers}
    calibration = Calibration(
        source=ModelSource.from_json(recording.recipe["source"]),
        record=RecordRecipe.from_json(recording.recipe["record"]),
        recipe=recipe,
        layers={
            component: {name: s.choice for name, s in layers.items()}
            for component, layers in used.items()
        },
        scales={
            component: {name: s.scale for name, s in layers.items() if s.scale is not None}
            for component, layers in used.items()
        },
        unused={
            component: tuple(
                name for name in find_layers(denoisers[component]) if name not in layers
            )
            for component, layers in used.items()
        },
    )
    errors = {}
    for component in used:
        quantize_(denoisers[component], calibration, component)
        errors[component] = held_out_error(denoisers[component], held_out, component, progress)
    return replace(calibration, held_out_error=errors)


def _calibrate_one(
    component: str,
    denoiser: nn.Module,
    recording: Recording,
    recipe: CalibrateRecipe,
    progress: Progress,
) -> dict[str, Searched]:
    """Observe, search, measure and lift one denoiser."""
    _refuse_damaged(denoiser)
    shards = observed_shards(recording)
    num_calls = recording.num_calls(component, shards)
    generator = torch.Generator().manual_seed(recipe.seed)
    with progress.task(f"Observing {component}", num_calls) as advance:
        seen = observe(
            denoiser,
            recording.calls(component, shards),
            num_calls,
            max_samples=recipe.max_samples,
            generator=generator,
            advance=advance,
        )
    layers = {name: layer for name, layer in find_layers(denoiser).items() if name in seen}
    searched: dict[str, Searched] = {}
    with progress.task(f"Searching {component}", len(layers)) as advance:
        for name, layer in layers.items():
            searched[name] = search_layer(name, layer, seen[name], recipe)
            advance(1)
    if recipe.lift == 0:
        return searched
    return _lift(component, denoiser, recording, recipe, seen, searched, progress)


def observed_shards(recording: Recording) -> list[int]:
    """Spread shards of so many pictures over the recording: fine-tuning wants more, the search does not."""
    batch_size = recording.recipe["record"]["batch_size"]
    count = min(recording.num_shards, math.ceil(_OBSERVED_PICTURES / batch_size))
    return [i * recording.num_shards // count for i in range(count)]


def search_layer(
    name: str,
    layer: FloatLayer,
    seen: LayerObservation,
    recipe: CalibrateRecipe,
    space: SearchSpace = _SPACE,
    *,
    lifted: bool = False,
) -> Searched:
    """Search one layer at the bits that the recipe gives it."""
    reason, weight_bits, input_bits = _bits(name, layer, recipe, lifted=lifted)
    weight = inputs = None
    if weight_bits is not None:
        weight = search_rows(
            layer.weight, recipe.weight_formats(weight_bits), space.for_bits(weight_bits)
        )
    if input_bits is not None:
        inputs = search_tensor(
            seen.values(), recipe.input_formats(input_bits), space.for_bits(input_bits)
        )
    best = inputs.winner if inputs else None
    grid = Grid.with_maximum(best.format, best.max_value[0], best.zero_point) if best else None
    choice = LayerChoice(
        kind=kind_of(layer).name,
        reason=reason,
        num_weights=layer.weight.numel(),
        multiply_adds=seen.multiply_adds,
        minimum=seen.minimum,
        maximum=seen.maximum,
        scheme=LayerScheme(
            weight=weight.winner.format if weight else None,
            input=grid,
            lookup=kind_of(layer).is_table,
        ),
        weight_scores=_scores(weight),
        input_scores=_scores(inputs),
    )
    scale = weight.winner.max_value.cpu() / weight.winner.format.largest if weight else None
    return Searched(choice, scale)


def _bits(
    name: str, layer: FloatLayer, recipe: CalibrateRecipe, *, lifted: bool
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
    weight_bits, input_bits = (
        None if asked is None else bits for asked in (recipe.weights, recipe.activations)
    )
    return "lifted" if lifted else "kept", weight_bits, input_bits


def _refuse_damaged(denoiser: nn.Module) -> None:
    """Refuse a weight that is not finite, before its NaN shows up in some other layer's input."""
    for name, layer in find_layers(denoiser).items():
        if not torch.isfinite(layer.weight).all():
            raise CalibrationError(
                f"the weight of layer {name!r} holds a NaN or infinity; the model's file is damaged"
            )


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


def _lift(
    component: str,
    denoiser: nn.Module,
    recording: Recording,
    recipe: CalibrateRecipe,
    seen: Mapping[str, LayerObservation],
    searched: Mapping[str, Searched],
    progress: Progress,
) -> dict[str, Searched]:
    """Measure the sensitivity of every layer left at the default bits, and lift the worst within the budget."""
    layers = find_layers(denoiser)
    calls = spread_calls(recording, component, recipe.sensitivity_calls)
    result = dict(searched)
    candidates = [name for name, s in searched.items() if s.choice.reason == "default"]
    if min(recipe.weights or LIFTED_BITS, recipe.activations or LIFTED_BITS) >= LIFTED_BITS:
        return result
    with progress.task(f"Measuring {component}", len(candidates)) as advance:
        for name in candidates:
            with quantized_alone(layers[name], searched[name].choice.scheme, searched[name].scale):
                error = output_error(denoiser, calls).relative()
            result[name] = Searched(
                replace(searched[name].choice, sensitivity=error), searched[name].scale
            )
            advance(1)
    for name in choose_lifted({name: s.choice for name, s in result.items()}, recipe.lift):
        lifted = search_layer(name, layers[name], seen[name], recipe, lifted=True)
        choice = replace(lifted.choice, sensitivity=result[name].choice.sensitivity)
        result[name] = Searched(choice, lifted.scale)
    return result


def held_out_error(
    denoiser: nn.Module, recording: Recording, component: str, progress: Progress = SILENT
) -> float:
    """Return the relative squared error of a denoiser's output over a recording of the full-precision one."""

    def counted() -> Iterator[DenoiserCall]:
        for call in recording.calls(component):
            yield call
            advance(1)

    with progress.task(
        f"Checking {component} on held-out calls", recording.num_calls(component)
    ) as advance:
        return output_error(denoiser, counted()).relative()


def calibrate_run(
    run: Run,
    source: ModelSource,
    options: RecordOptions,
    recipe: CalibrateRecipe,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Calibration:
    """Record and calibrate a model into a run directory.

    Raises:
        RunError: the run holds a calibration already, or a recording of other settings, and
            `overwrite` is not set.
        ModelError, CalibrationError: as said by what they wrap.
    """
    refuse_existing(run.calibration, overwrite=overwrite)
    words = [*recipe.words(), *options.words(), *source.words()]
    options = replace(options, prompts=prompts_of(options.prompts))  # before the model is loaded
    pipe = load_pipeline(source, device)
    recording, held_out = record_both(
        pipe, run, source, options, overwrite=overwrite, progress=progress
    )
    calibration = calibrate_(pipe, recording, held_out, recipe, progress=progress)
    calibration = replace(calibration, options=words)
    calibration.save(run.calibration, overwrite=overwrite)
    return calibration
