"""The whole chain on the built-in pipeline, ending in one picture: full precision, plain signed FP4, MSFP."""

from dataclasses import dataclass
from pathlib import Path

from msfp_cli.calibrate import calibrate_
from msfp_cli.chain import RecordOptions, calibrate_run
from msfp_cli.export import ExportReport, export_
from msfp_cli.generation import Sampling
from msfp_cli.loading import BUILT_IN, BUILT_IN_GUIDANCE, BUILT_IN_STEPS, load_pipeline
from msfp_cli.pipeline import MSFPPipeline
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recipe import CalibrateRecipe, ModelSource
from msfp_cli.recording import Recording
from msfp_cli.run import Run
from msfp_cli.sample import make_pictures, save_pictures

_PROMPTS = (
    "a red dress",
    "a photo of a blue sneaker",
    "a green bag",
    "a yellow t-shirt",
    "a photo of purple trousers",
    "an orange coat",
    "a cyan boot",
    "a white sandal",
)


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What the demo made and measured.

    Arguments:
        picture: the sheet with three rows.
        export: what was exported.
        signed_error, msfp_error: relative squared error of the denoiser's output on held-out calls.
    """

    picture: str
    export: ExportReport
    signed_error: float
    msfp_error: float


def run_demo(directory: Path, *, device: str | None = None, progress: Progress = SILENT) -> DemoReport:
    """Calibrate, export, reload and sample the built-in pipeline, and compare with full precision and plain FP4.

    Plain FP4 means signed formats only and no lifted layers; its first and last layers are kept at 8 bits alike.
    """
    run, source = Run(directory), ModelSource(model=BUILT_IN)
    calibration = calibrate_run(
        run, source, RecordOptions(), CalibrateRecipe(), device=device, overwrite=True, progress=progress
    )
    export = directory / "export"
    report = export_(calibration, export, device=device, overwrite=True)
    run.remember("export", export)

    sampling = Sampling(num_inference_steps=BUILT_IN_STEPS, guidance_scale=BUILT_IN_GUIDANCE, seed=0)
    full = load_pipeline(source, device)
    sheets = [make_pictures(full, _PROMPTS, sampling, title="full precision", progress=progress)]
    plain = CalibrateRecipe(formats="signed", lift=0.0)
    signed = calibrate_(full, Recording(run.recording), Recording(run.held_out), plain, progress=progress)
    sheets.append(make_pictures(full, _PROMPTS, sampling, title="signed FP4", progress=progress))
    msfp = MSFPPipeline.from_pretrained(export, device=device)
    sheets.append(make_pictures(msfp.pipe, _PROMPTS, sampling, title="MSFP W4A4", progress=progress))
    picture = save_pictures(sheets, _PROMPTS, sampling, directory / "demo", overwrite=True)
    return DemoReport(
        picture=str(picture),
        export=report,
        signed_error=max(signed.held_out_error.values()),
        msfp_error=max(calibration.held_out_error.values()),
    )
