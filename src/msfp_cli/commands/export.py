"""`msfp export`: write the calibrated pipeline as a diffusers directory."""

from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.commands.options import DeviceOption, JsonOption, OverwriteOption, RunOption
from msfp_cli.recipe import DEFAULT_RUN

_HELP = """Write the calibrated (and fine-tuned) pipeline as a diffusers directory with packed 4-bit weights.

It reloads with `import msfp_cli; DiffusionPipeline.from_pretrained(DIR)`.

Examples:

    msfp export

    msfp export --out dresses-fp4 --overwrite
"""


def export(
    run: RunOption = DEFAULT_RUN,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; the run's own export directory by default.")
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Leave the run's fine-tuning out.")
    ] = False,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write the calibrated and fine-tuned pipeline."""
    from msfp_cli.checkpoint.export import export_
    from msfp_cli.files import refuse_existing
    from msfp_cli.pipelines.loading import quiet_libraries
    from msfp_cli.run import Run

    state = Run(run)
    directory = out or state.directory / "export"
    calibration = state.load_calibration()
    tuned = {} if calibrated else state.load_tuned(calibration)
    refuse_existing(directory, overwrite=overwrite)
    quiet_libraries()
    report = export_(calibration, directory, tuned=tuned, device=device, overwrite=overwrite)
    state.remember("export", directory)
    size, half = report.denoiser_bytes / 2**20, report.half_precision_bytes / 2**20
    console.note(
        f"denoiser: {size:.2f} MiB, {report.ratio:.3f} of its {half:.2f} MiB in half precision"
    )
    for component, learned in tuned.items():
        console.note(
            f"{component}: fine-tuned, best of {learned.step} updates; held-out error "
            f"{learned.history[0].error:.5f} -> {learned.best.error:.5f}"
        )
    if report.switching_layers:
        console.note(
            f"hub: {report.switching_layers} layers switch between sets of weights, which takes "
            f"{report.hub_bytes / 2**20:.2f} MiB of that"
        )
    console.result(str(directory), report.to_json(), as_json=json_)
    console.note(f"next: {state.next_command()}")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("export", help=_HELP)(console.guarded(export))
