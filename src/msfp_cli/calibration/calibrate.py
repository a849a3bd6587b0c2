"""Calibrate a pipeline: the workflow behind `msfp calibrate`.

The denoiser's calls are recorded, `search_denoiser` chooses a format, maximum and zero point for
every layer, and the whole is quantized and measured on held-out calls.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from msfp_cli.calibration.denoiser_search import held_out_error, search_denoiser, unused_layers
from msfp_cli.calibration.layer_search import CalibratedLayer
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration, LayerChoice, quantize_
from msfp_cli.files.directories import refuse_existing
from msfp_cli.pipelines.conditions import prompts_of
from msfp_cli.pipelines.denoiser import find_denoisers, refuse_changed
from msfp_cli.pipelines.loading import ModelSource, Pipeline, load_pipeline
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recording.recipe import RecordOptions, RecordRecipe
from msfp_cli.recording.record import record_both
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run


def calibrate_(
    pipe: Pipeline,
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
        UsageError: a denoiser has adapters or is offloaded.
    """
    denoisers = find_denoisers(pipe)
    for component, denoiser in denoisers.items():
        refuse_changed(component, denoiser)
    results: dict[str, dict[str, CalibratedLayer]] = {}
    for component, denoiser in denoisers.items():
        layers = search_denoiser(component, denoiser, recording, recipe, progress)
        if layers:
            results[component] = layers
    calibration = Calibration(
        source=ModelSource.from_json(recording.recipe["source"]),
        record=RecordRecipe.from_json(recording.recipe["record"]),
        recipe=recipe,
        layers={component: _choices(layers) for component, layers in results.items()},
        scales={component: _scales(layers) for component, layers in results.items()},
        unused={
            component: unused_layers(denoisers[component], layers)
            for component, layers in results.items()
        },
    )
    errors = {}
    for component in results:
        quantize_(denoisers[component], calibration, component)
        errors[component] = held_out_error(denoisers[component], held_out, component, progress)
    return replace(calibration, held_out_error=errors)


def _choices(layers: Mapping[str, CalibratedLayer]) -> dict[str, LayerChoice]:
    return {name: layer.choice for name, layer in layers.items()}


def _scales(layers: Mapping[str, CalibratedLayer]) -> dict[str, Tensor]:
    return {name: layer.scale for name, layer in layers.items() if layer.scale is not None}


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
    with run.lock(create=True):
        refuse_existing(run.calibration, overwrite=overwrite)
        words = [*recipe.words(), *options.words(), *source.words()]
        prompts = prompts_of(options.prompts)  # before the model is loaded
        options = replace(options, prompts=prompts)
        pipe = load_pipeline(source, device)
        recording, held_out = record_both(
            pipe, run, source, options, overwrite=overwrite, progress=progress
        )
        calibration = calibrate_(pipe, recording, held_out, recipe, progress=progress)
        calibration = replace(calibration, options=words)
        calibration.save(run.calibration, overwrite=overwrite)
        return calibration
