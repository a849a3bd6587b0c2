"""Calibrate a pipeline: the workflow behind `msfp calibrate`.

The denoiser's calls are recorded, `search_denoiser` chooses a format, maximum and zero point for
every layer, `compensate` rounds the weights, and the whole is quantized and measured on held-out
calls.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from msfp_cli.calibration.compensate import RoundedWeight, compensate
from msfp_cli.calibration.denoiser_search import (
    choices_of,
    held_out_error,
    multipliers_of,
    observed_shards,
    rest_of,
    scales_of,
    search_denoiser,
)
from msfp_cli.calibration.estimate import check_layers, estimate
from msfp_cli.calibration.quantize import print_of, quantize_, refuse_other_weights
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration as Calibration  # for callers
from msfp_cli.calibration.result import LayerChoice as LayerChoice
from msfp_cli.files.directories import refuse_existing
from msfp_cli.pipelines.loading import ModelSource, Pipeline, choose_device, load_pipeline
from msfp_cli.processes import ALONE, Processes, meeting
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recording.recipe import RecordOptions, RecordRecipe
from msfp_cli.recording.record import record_both, record_recipes
from msfp_cli.recording.result import Recording, refuse_other_recordings
from msfp_cli.run import Run


def calibrate_denoisers_(
    pipe: Pipeline,
    recording: Recording,
    held_out: Recording,
    recipe: CalibrateRecipe,
    *,
    processes: Processes = ALONE,
    work: Path | None = None,
    max_memory: int | None = None,
) -> Calibration:
    """Calibrate every denoiser of a pipeline, and leave them quantized, but not marked as such.

    Arguments and errors are those of `checkpoint.in_memory.calibrate_`, which marks them.
    """
    check_layers(pipe, recipe, SILENT)
    return _calibrate_checked(pipe, recording, held_out, recipe, processes, work, max_memory)


def _calibrate_checked(
    pipe: Pipeline,
    recording: Recording,
    held_out: Recording,
    recipe: CalibrateRecipe,
    processes: Processes,
    work: Path | None,
    max_memory: int | None,
) -> Calibration:
    """Calibrate a pipeline that was checked, which reads all of its weights."""
    denoisers = {name: pipe.components[name] for name in recording.clocks() or {}}
    record = RecordRecipe.from_json(recording.recipe["record"])
    prints = {component: print_of(denoiser) for component, denoiser in denoisers.items()}
    results = {}
    lifts = {}
    for component in denoisers:
        layers, lift = search_denoiser(component, pipe, recording, record, recipe, processes)
        if layers:
            results[component] = layers
        if lift:
            lifts[component] = lift
    rests = {name: rest_of(denoisers[name], layers) for name, layers in results.items()}
    calibration = Calibration(
        source=ModelSource.from_json(recording.recipe["source"]),
        record=record,
        recipe=recipe,
        clocks=recording.clocks(),
        layers={component: choices_of(layers) for component, layers in results.items()},
        scales={component: scales_of(layers) for component, layers in results.items()},
        multipliers={component: multipliers_of(layers) for component, layers in results.items()},
        input_lifts=lifts,
        unused={name: rest.unused for name, rest in rests.items()},
        others={name: rest.others for name, rest in rests.items()},
        fingerprints={component: prints[component] for component in results},
    )
    if recipe.rounding == "compensated" and recipe.weights is not None:
        calibration = _compensated(calibration, denoisers, recording, processes, work, max_memory)
    errors = {}
    for component in results:
        is_bounded = max_memory is not None
        quantize_(denoisers[component], calibration, component, keep_packed=is_bounded)
        errors[component] = held_out_error(denoisers[component], held_out, component, processes)
    return replace(calibration, held_out_error=errors)


def _compensated(
    calibration: Calibration,
    denoisers: Mapping[str, nn.Module],
    recording: Recording,
    processes: Processes,
    work: Path | None,
    max_memory: int | None,
) -> Calibration:
    """Round every weight for the output of its layer."""
    shards = observed_shards(recording)
    rounded = {
        component: compensate(
            component,
            denoisers[component],
            recording,
            shards,
            calibration,
            processes,
            work,
            max_memory,
        )
        for component in calibration.layers
    }
    return replace(
        calibration,
        codes={component: _codes(weights) for component, weights in rounded.items()},
        layers={
            component: _with_compensation(layers, rounded[component])
            for component, layers in calibration.layers.items()
        },
    )


def _codes(weights: Mapping[str, RoundedWeight]) -> dict[str, Tensor]:
    return {name: each.codes for name, each in weights.items() if each.codes is not None}


def _with_compensation(
    layers: Mapping[str, LayerChoice], weights: Mapping[str, RoundedWeight]
) -> dict[str, LayerChoice]:
    """Note in the layers' choices how their weights were rounded."""
    return {
        name: replace(layer, compensation=weights[name].compensation if name in weights else None)
        for name, layer in layers.items()
    }


def calibrate_run(
    run: Run,
    source: ModelSource,
    options: RecordOptions,
    recipe: CalibrateRecipe,
    *,
    device: str | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Calibration:
    """Record and calibrate a model into a run directory.

    Processes that were started together share the work; the first of them writes the calibration.

    Arguments:
        max_memory: bytes that this process may take; None loads the model whole, which is faster.

    Raises:
        RunError: the run holds a calibration already, or a recording of other settings, and
            `overwrite` is not set.
        ModelError, CalibrationError: as said by what they wrap.
    """
    with run.lock(create=True), meeting(choose_device(device), progress) as processes:
        processes.refuse_apart(run.directory)
        refuse_existing(run.calibration, overwrite=overwrite, work=run.unfinished_codes)
        words = [*recipe.words(), *options.words(), *source.words()]
        options = options.with_prompts()  # before the model is loaded
        pipe = load_pipeline(source, device, streamed=max_memory is not None)
        check_layers(pipe, recipe, progress)
        recipes = record_recipes(pipe, source, options)
        for line in estimate(pipe, *recipes, recipe, max_memory, processes.count).lines():
            progress.log(line)
        command = ["msfp", "calibrate", source.model, *words]
        recording, held_out = record_both(
            pipe,
            run,
            source,
            options,
            overwrite=overwrite,
            processes=processes,
            accepted=partial(run.remember_calibration, command, options.images, device, max_memory),
        )
        work = run.unfinished_codes
        calibration = _calibrate_checked(
            pipe, recording, held_out, recipe, processes, work, max_memory
        )
        calibration = replace(calibration, options=words)
        if processes.is_first:
            calibration.save(run.calibration, overwrite=overwrite)
            shutil.rmtree(run.unfinished_codes, ignore_errors=True)
        return calibration


def recordings_of(run: Run, calibration: Calibration) -> tuple[Recording, Recording]:
    """Return the recordings that a calibration of the run was made from and measured on.

    Raises:
        RunError: one is missing, incomplete, or another.
    """
    recordings = Recording(run.recording), Recording(run.held_out)
    made_from = calibration.source.to_json(), calibration.record.to_json()
    refuse_other_recordings(*recordings, *made_from)
    return recordings


def load_signed(run: Run, calibration: Calibration, place: Path, device: str | None) -> Pipeline:
    """Load the model in signed formats, to the nearest, no layer lifted: plain FP4 of these bits.

    Arguments:
        run: has the recordings to search on.
        calibration: gives the bits.
        place: where its calibration is kept.

    Raises:
        RunError: the model was changed since it was calibrated, or as said by `recordings_of`.
    """
    recipe = replace(
        calibration.recipe,
        formats="signed",
        lift=0.0,
        input_lift=0.0,
        rounding="nearest",
        weight_groups=0,
        input_scales="tensor",
        rotate="none",
    )
    pipe = load_pipeline(calibration.source, device)
    refuse_other_weights(pipe.components, calibration)
    signed = Calibration.load(place) if place.exists() else None
    if signed is None or (signed.recipe, signed.record) != (recipe, calibration.record):
        calibrate_denoisers_(pipe, *recordings_of(run, calibration), recipe).save(
            place, overwrite=True
        )
        return pipe
    for component in signed.layers:
        quantize_(pipe.components[component], signed, component)
    return pipe
