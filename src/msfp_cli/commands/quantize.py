"""`msfp quantize`: quantize the weights of a pipeline at once, without a calibration."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.options import JsonOption, Options, OverwriteOption, with_options
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.recipe import options_of
from msfp_cli.streaming.recipe import QuantizeRecipe

HELP = """Quantize the weights of MODEL at once, without recording anything.

Weights are read, encoded and written part by part, so a model needs far less memory than it has
bytes. Inputs of layers stay in floating point; `msfp calibrate` quantizes them as well, and has
less error. A command that was stopped goes on when it is given again.

Examples:

    msfp quantize black-forest-labs/FLUX.1-schnell --out flux-4bit --also text_encoder_2

    msfp quantize stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --keep '*attn2*:8'
"""
ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Diffusers directory or hub id. Default: the small built-in pipeline."),
]

_SOURCE = options_of(ModelSource)


@with_options(QuantizeRecipe)
def quantize(
    options: Options,
    model: ModelArgument = None,
    revision: Annotated[str | None, typer.Option(help=_SOURCE["revision"].help)] = None,
    variant: Annotated[str | None, typer.Option(help=_SOURCE["variant"].help)] = None,
    pipeline: Annotated[str | None, typer.Option(help=_SOURCE["pipeline"].help)] = None,
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("quantized"),
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Quantize the weights of a pipeline."""
    recipe = options.recipe(QuantizeRecipe)

    from msfp_cli.pipelines.conditions import example_option
    from msfp_cli.pipelines.loading import resolve_model
    from msfp_cli.streaming.quantize import quantize_pipeline

    console.quiet_libraries()
    resolved, line = resolve_model(model)
    if line:
        console.note(line)
    report = quantize_pipeline(
        ModelSource(model=resolved, revision=revision, variant=variant, pipeline=pipeline),
        out,
        recipe,
        overwrite=overwrite,
        progress=console.ConsoleProgress(),
    )
    for name, size in report.components.items():
        console.note(
            f"{name}: {size.after / 2**20:.2f} MiB, {size.after / size.before:.3f} of its "
            f"{size.before / 2**20:.2f} MiB"
        )
    if report.num_parameters:  # none where an earlier, killed command has encoded them all
        console.note(
            f"{report.num_parameters / 1e6:.1f} million parameters in {report.seconds:.1f} s, "
            f"{report.speed / 1e6:.1f} million a second"
        )
    console.result(report.directory, report.to_json(), as_json=json_)
    option = example_option(report.pipeline)
    console.note(f"next: msfp sample {shlex.quote(report.directory)}{option}")
