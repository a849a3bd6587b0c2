"""The whole chain on the built-in pipeline, ending in one picture: full precision, plain FP4, MSFP, fine-tuned."""

from dataclasses import dataclass
from pathlib import Path

from msfp_cli.calibrate import calibrate_
from msfp_cli.chain import RecordOptions, calibrate_run
from msfp_cli.export import ExportReport, export_, load_calibrated
from msfp_cli.finetune import finetune_run
from msfp_cli.generation import Sampling
from msfp_cli.loading import BUILT_IN, BUILT_IN_GUIDANCE, BUILT_IN_STEPS, load_pipeline
from msfp_cli.pipeline import MSFPPipeline
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recipe import CalibrateRecipe, FinetuneRecipe, ModelSource
from msfp_cli.recording import Recording
from msfp_cli.run import Run
from msfp_cli.sample import make_pictures, save_pictures

_UPDATES = 200
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
        picture: the sheet with four rows.
        export: what was exported.
        signed_error, msfp_error, tuned_error: relative squared error of the denoiser's output on held-out calls, of
            signed formats alone, as calibrated, and fine-tuned.
    """

    picture: str
    export: ExportReport
    signed_error: float
    msfp_error: float
    tuned_error: float


def run_demo(directory: Path, *, device: str | None = None, progress: Progress = SILENT) -> DemoReport:
    """Calibrate, fine-tune shortly, export, reload and sample the built-in pipeline, and compare.

    Plain FP4 means signed formats only and no lifted layers; its first and last layers are kept at 8 bits alike.
    """
    run, source = Run(directory), ModelSource(model=BUILT_IN)
    calibration = calibrate_run(
        run, source, RecordOptions(), CalibrateRecipe(), device=device, overwrite=True, progress=progress
    )
    recipe = FinetuneRecipe(steps=_UPDATES, evaluate_every=_UPDATES // 2)
    tuned = finetune_run(run, recipe, device=device, restart=True, progress=progress)
    export = directory / "export"
    report = export_(calibration, export, tuned=run.load_tuned(calibration), device=device, overwrite=True)
    run.remember("export", export)

    sampling = Sampling(num_inference_steps=BUILT_IN_STEPS, guidance_scale=BUILT_IN_GUIDANCE, seed=0)
    full = load_pipeline(source, device)
    sheets = [make_pictures(full, _PROMPTS, sampling, title="full precision", progress=progress)]
    plain = CalibrateRecipe(formats="signed", lift=0.0)
    signed = calibrate_(full, Recording(run.recording), Recording(run.held_out), plain, progress=progress)
    sheets.append(make_pictures(full, _PROMPTS, sampling, title="signed FP4", progress=progress))
    calibrated = load_calibrated(calibration, device)
    sheets.append(make_pictures(calibrated, _PROMPTS, sampling, title="MSFP W4A4", progress=progress))
    msfp = MSFPPipeline.from_pretrained(export, device=device)
    sheets.append(make_pictures(msfp.pipe, _PROMPTS, sampling, title="MSFP fine-tuned", progress=progress))
    picture = save_pictures(sheets, _PROMPTS, sampling, directory / "demo", overwrite=True)
    return DemoReport(
        picture=str(picture),
        export=report,
        signed_error=max(signed.held_out_error.values()),
        msfp_error=max(calibration.held_out_error.values()),
        tuned_error=max(report.after for report in tuned),
    )
