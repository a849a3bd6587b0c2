"""The plain format that everything is compared with: signed, to the nearest, every layer alike."""

from dataclasses import replace
from pathlib import Path

from msfp_cli.calibration.calibrate import calibrate_
from msfp_cli.calibration.quantize import quantize_
from msfp_cli.calibration.result import Calibration
from msfp_cli.pipelines.denoiser import find_denoisers
from msfp_cli.pipelines.loading import Pipeline, load_pipeline
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run


def load_signed(run: Run, calibration: Calibration, place: Path, device: str | None) -> Pipeline:
    """Load the model in signed formats, to the nearest, no layer lifted: plain FP4 of these bits.

    Arguments:
        run: has the recordings to search on.
        calibration: gives the bits.
        place: where its calibration is kept.
    """
    recipe = replace(
        calibration.recipe, formats="signed", lift=0.0, rounding="nearest", weight_groups=0
    )
    pipe = load_pipeline(calibration.source, device)
    signed = Calibration.load(place) if place.exists() else None
    if signed is None or (signed.recipe, signed.record) != (recipe, calibration.record):
        recordings = Recording(run.recording), Recording(run.held_out)
        calibrate_(pipe, *recordings, recipe).save(place, overwrite=True)
        return pipe
    for component, denoiser in find_denoisers(pipe).items():
        if component in signed.layers:
            quantize_(denoiser, signed, component)
    return pipe
