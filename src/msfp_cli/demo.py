"""The whole chain on the built-in pipeline, ending in a report and a sheet of pictures.

The models side by side are full precision, plain signed FP4, MSFP, and MSFP fine-tuned.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.checkpoint.export import ExportReport, export_run
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.finetuning.finetune import finetune_run
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.pipelines.loading import BUILT_IN, ModelSource
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.report.report import report_run
from msfp_cli.run import Run
from msfp_cli.sample import contact_sheet

_RECORDED, _UPDATES, _PICTURES = 40, 75, 24
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
        page: the report.
        picture: a sheet of pictures, one row a model.
        export: what was exported.
        errors: relative squared error of the denoiser's output, by the model's title.
    """

    page: str
    picture: str
    export: ExportReport
    errors: dict[str, float]


def run_demo(
    directory: Path, *, device: str | None = None, progress: Progress = SILENT
) -> DemoReport:
    """Calibrate, fine-tune shortly, export, evaluate and report the built-in pipeline."""
    run = Run(directory)
    with run.lock(create=True):
        return _run_demo(run, device, progress)


def _run_demo(run: Run, device: str | None, progress: Progress) -> DemoReport:
    """Walk the chain in a run that nobody else writes to."""
    source = ModelSource(model=BUILT_IN)
    few = RecordOptions(num_images=_RECORDED)
    calibrate_run(
        run, source, few, CalibrateRecipe(), device=device, overwrite=True, progress=progress
    )
    # The defaults are made for thousands of updates: so few want a lower rate, and weights that
    # look at the picture.
    recipe = FinetuneRecipe(
        steps=_UPDATES,
        batch_size=8,
        calls_per_update=1,
        learning_rate=0.005,
        loss_power=1.0,
        evaluate_every=_UPDATES,
    )
    finetune_run(run, recipe, device=device, restart=True, progress=progress)
    report = export_run(run, device=device, overwrite=True)
    options = EvaluateRecipe(prompts=_PROMPTS, num_images=_PICTURES)
    evaluation = evaluate_run(
        run, run.export, options, device=device, overwrite=True, progress=progress
    )
    written = report_run(run, pictures=len(_PROMPTS), overwrite=True)
    sheet = run.directory / "demo.png"
    galleries = [evaluation.gallery(model.key).pictures() for model in evaluation.models]
    rows = [_images(pictures[: len(_PROMPTS)]) for pictures in galleries]
    contact_sheet(rows, titles=[model.title for model in evaluation.models]).save(sheet)
    return DemoReport(
        page=str(written.page),
        picture=str(sheet),
        export=report,
        errors={
            model.title: error
            for model in evaluation.models
            if (error := model.value("output")) is not None
        },
    )


def _images(pictures: Tensor) -> list[Image.Image]:
    """Return pictures, uint8 ``(pictures, 3, height, width)``, as images."""
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
