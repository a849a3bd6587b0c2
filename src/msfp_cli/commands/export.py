"""`msfp export`: write the calibrated pipeline as a diffusers directory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.errors import UsageError
from msfp_cli.options import (
    DEFAULT_RUN,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    RunOption,
)

if TYPE_CHECKING:
    from msfp_cli.checkpoint.export import ExportReport

HELP = """Write the calibrated and fine-tuned pipeline as a diffusers directory of 4-bit weights.

To load it in Python: `import msfp_cli; DiffusionPipeline.from_pretrained(DIR)`.

Examples:

    msfp export

    msfp export --out dresses-fp4 --overwrite

    msfp export --engine openvino

    msfp export --reseal dresses-fp4
"""


def export(
    run: RunOption = DEFAULT_RUN,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write. Default: export in the run directory.")
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated", help="Export the calibrated model, without the run's fine-tuning."
        ),
    ] = False,
    reseal: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write nothing new, but accept the files of the export DIR as they are now, after "
            "they were changed on purpose.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option(
            help="Size of the tensors in a file, at most; a larger part has several files."
        ),
    ] = "10GB",
    engine: Annotated[
        str | None,
        typer.Option(
            help="Convert the denoiser for an engine, too, and store it in the export, so that it "
            "is loaded at once: openvino."
        ),
    ] = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write the calibrated and fine-tuned pipeline."""
    if reseal is not None and (out or engine or calibrated or overwrite):
        raise UsageError("--reseal writes nothing but the seal of DIR; leave the other options out")

    from msfp_cli.checkpoint.export import export_run
    from msfp_cli.status import next_command

    console.quiet_libraries()
    if reseal is not None:
        from msfp_cli.checkpoint.reseal import reseal as seal_again

        seal_again(reseal)
        console.result(str(reseal), {"directory": str(reseal)}, as_json=json_)
        return
    report = export_run(
        run,
        out,
        with_finetuning=not calibrated,
        device=device,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        complete=_converter(engine),
    )
    _show(report)
    console.result(report.directory, report.to_json(), as_json=json_)
    console.note(f"next: {next_command(run, Path(report.directory))}")


def _show(report: "ExportReport") -> None:
    """Print how large the denoiser is, and what was fine-tuned."""
    size = report.denoiser_bytes / 2**20
    half = report.half_precision_bytes / 2**20
    console.note(
        f"denoiser: {size:.2f} MiB, {report.ratio:.3f} of its {half:.2f} MiB in half precision"
    )
    for component, summary in report.finetunings.items():
        console.note(f"{component}: fine-tuned, {summary}")
    if report.switching_layers:
        console.note(
            f"hub: {report.switching_layers} layers have several members, which take "
            f"{report.hub_bytes / 2**20:.2f} MiB of that"
        )


def _converter(engine: str | None) -> Callable[[Path], None]:
    """Return what stores a conversion in a written export; it stores nothing without an engine.

    Raises:
        UsageError: there is no such engine, or it is not installed.
    """
    if engine is None:
        return lambda directory: None

    from msfp_cli.checkpoint.convert import convert_export
    from msfp_cli.checkpoint.engine import require_engine

    require_engine(engine)
    return partial(convert_export, engine=engine, progress=console.ConsoleProgress())
