"""`msfp evaluate`: an export against full precision, in numbers."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msfp_cli.commands import console
from msfp_cli.commands.launch import ProcessesOption, is_main, share_out
from msfp_cli.commands.options import (
    MAX_SEED,
    BatchOption,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    RunOption,
)
from msfp_cli.progress import SILENT
from msfp_cli.run import DEFAULT_RUN, Run

if TYPE_CHECKING:
    from msfp_cli.evaluation.result import Evaluation

_HELP = """Measure the latest export, or any exported directory, against full precision from the same prompts and seeds.

Error of the denoiser's output, of the final latents, PSNR, SSIM and a distance of deep features; distances between sets
of pictures; time and memory of both. Signed FP4 and the state before fine-tuning are measured beside it where the run
directory has what that takes. Nothing is downloaded. An interrupted evaluation goes on with the same command.

Examples:

    msfp evaluate

    msfp evaluate my-model-fp4 --prompts prompts.txt --num-images 200 --reference photos/

    msfp evaluate --compare none --no-layers --no-cost
"""


def evaluate(
    export: Annotated[
        Path | None, typer.Argument(help="Exported directory; the run's latest by default.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Full-precision model; the one that the export names by default."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with prompts or class labels, one a line.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Pictures of each model.")] = 32,
    num_trajectories: Annotated[
        int, typer.Option(help="Of these, how many are followed through the denoiser.")
    ] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler; as calibrated by default.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance; as calibrated by default.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Picture i is drawn with seed + i.")
    ] = None,
    batch_size: BatchOption = 8,
    reference: Annotated[
        Path | None,
        typer.Option(help="Real pictures: a directory, or an npz file with uint8 `images`."),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="Features for distances: squeezenet, fashion, inception, or module:factory."
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP model (directory or hub id) to score prompts with.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Steps before to measure as well: signed,calibrated or none; all by default."
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers/--no-layers", help="Measure each layer (both denoisers in memory)."),
    ] = True,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Measure time and memory, in fresh processes.")
    ] = True,
    num_processes: ProcessesOption = 1,
    out: Annotated[
        Path | None, typer.Option(help="Where to work; the run's evaluation directory by default.")
    ] = None,
    run: RunOption = DEFAULT_RUN,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Measure an export."""
    share_out(num_processes)

    from msfp_cli.evaluation.evaluate import evaluate_run
    from msfp_cli.evaluation.recipe import EvaluateRecipe
    from msfp_cli.pipelines.conditions import read_prompts
    from msfp_cli.pipelines.loading import quiet_libraries, resolve_model
    from msfp_cli.pipelines.source import ModelSource

    state = Run(run)
    options = EvaluateRecipe(
        prompts=read_prompts(prompts) if prompts else None,
        num_images=num_images,
        num_trajectories=num_trajectories,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        **({} if seed is None else {"seed": seed}),
        batch_size=batch_size,
        extractor=extractor,
        reference=reference,
        clip=clip,
        compare=_names(compare),
        layers=layers,
        cost=cost,
    )
    directory = export or state.latest_export()
    quiet_libraries()
    evaluation = evaluate_run(
        state,
        directory,
        options,
        against=None if against is None else ModelSource(model=resolve_model(against)[0]),
        directory=out,
        device=device,
        overwrite=overwrite,
        progress=console.ConsoleProgress() if is_main() else SILENT,
    )
    if is_main():
        show(evaluation)
        console.result(
            str(evaluation.directory / "evaluation.json"), evaluation.to_json(), as_json=json_
        )
        console.note(f"next: {_next(out, run)}")


def _next(out: Path | None, run: Path) -> str:
    """Return what to type next."""
    place = [] if out is None else [str(out)]
    option = [] if run == DEFAULT_RUN else ["--run", str(run)]
    return shlex.join(["msfp", "report", *place, *option])


def _names(text: str | None) -> tuple[str, ...] | None:
    """Read the names of the steps before."""
    from msfp_cli.errors import UsageError
    from msfp_cli.evaluation.recipe import STEPS_BEFORE

    names = (
        None
        if text is None
        else tuple(part.strip() for part in text.split(",") if part.strip() != "none")
    )
    if odd := [name for name in names or () if name not in STEPS_BEFORE]:
        raise UsageError(
            f"unknown --compare {odd[0]!r}; choose from {', '.join(STEPS_BEFORE)}, or none"
        )
    return names


def show(evaluation: "Evaluation") -> None:
    """Print the figures as a table, models in columns."""
    from msfp_cli.evaluation.metrics import FIGURES

    models = evaluation.models
    rows = []
    for figure in FIGURES:
        values: list[Any] = [figure.value(model) for model in models]
        if any(value is not None for value in values):
            rows.append(
                [figure.title, *("" if value is None else figure.text(value) for value in values)]
            )
    count, extractor = (
        len(evaluation.settings["record"]["conditions"]),
        evaluation.settings["extractor"],
    )
    reference = evaluation.settings["reference"]
    title = f"{count} pictures from the same seeds; distances by {extractor!r} features"
    title += "" if reference is None else f"; reference: {reference}"
    console.table(title, ["", *(model.title for model in models)], rows)
    for line in evaluation.notes:
        console.note(f"note: {line}")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("evaluate", help=_HELP)(console.guarded(evaluate))
