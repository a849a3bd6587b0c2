"""`msfp evaluate`: an export against full precision, in numbers."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.commands.launch import ProcessesOption, is_main, progress, share_out
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.options import (
    DEFAULT_RUN,
    DeviceOption,
    JsonOption,
    Options,
    OverwriteOption,
    RunOption,
    with_options,
)
from msfp_cli.pipelines.loading import ModelSource

if TYPE_CHECKING:
    from msfp_cli.evaluation.result import Evaluation

HELP = """Measure the latest export, or any exported directory, against full precision.

Both draw pictures from the same prompts and seeds. Measured are the error of the denoiser's output
and of the final latents; PSNR, SSIM and a distance of deep features of each picture; distances
between sets of pictures; time and memory. Plain signed FP4 and the calibrated model without
fine-tuning are measured as well if the run can rebuild them. No data are downloaded. An interrupted
evaluation goes on with the same command.

Examples:

    msfp evaluate

    msfp evaluate my-model-fp4 --prompts prompts.txt --num-images 200 --reference photos/

    msfp evaluate --compare none --no-layers --no-cost
"""
ExportArgument = Annotated[
    Path | None, typer.Argument(help="Exported directory. Default: the run's latest export.")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        help="Full-precision model, as directory or hub id. Default: the one that was exported."
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Directory to work in. Default: evaluation in the run directory."),
]


@with_options(EvaluateRecipe)
def evaluate(
    options: Options,
    export: ExportArgument = None,
    against: AgainstOption = None,
    num_processes: ProcessesOption = 1,
    out: OutOption = None,
    run: RunOption = DEFAULT_RUN,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Measure an export."""
    recipe = options.recipe(EvaluateRecipe)
    run.refuse_read_only(out)
    share_out(num_processes, run.lock(out, create=True))

    from msfp_cli.evaluation.evaluate import evaluate_run
    from msfp_cli.pipelines.loading import resolve_model

    console.quiet_libraries()
    if export is None and is_main() and (line := run.say_outdated()):
        console.note(f"note: {line}")
    lost = run.say_lost_images() if export is None and recipe.images is None else ""
    if lost and is_main():
        console.note(f"note: {lost}")
    evaluation = evaluate_run(
        run,
        export or run.latest_export(),
        recipe,
        against=None if against is None else ModelSource(model=resolve_model(against)[0]),
        directory=out,
        device=device,
        overwrite=overwrite,
        progress=progress(),
    )
    if is_main():
        show(evaluation)
        path = evaluation.directory / "evaluation.json"
        console.result(str(path), evaluation.to_json(), as_json=json_)
        place = "" if out is None else f" {shlex.quote(str(out))}"
        console.note(f"next: msfp report{place}{run.option}")


def show(evaluation: "Evaluation") -> None:
    """Print the metrics as a table, models in columns."""
    from msfp_cli.evaluation.metrics.table import metrics_for

    models = evaluation.models
    rows = []
    for metric in metrics_for(models):
        values = [model.value(metric.key) for model in models]
        rows.append([metric.title, *map(metric.text, values)])
    count = len(evaluation.settings["record"]["conditions"])
    extractor = evaluation.settings["extractor"]
    reference = evaluation.settings["reference"]
    title = f"{count} pictures from the same seeds; distances by {extractor!r} features"
    title += "" if reference is None else f"; reference: {reference}"
    console.table(title, ["", *(model.title for model in models)], rows)
    for line in evaluation.notes:
        console.note(f"note: {line}")
