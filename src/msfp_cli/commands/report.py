"""`msfp report`: the evaluation as one page."""

from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.options import DEFAULT_RUN, JsonOption, OverwriteOption, RunOption

HELP = """Write the run's evaluation as one self-contained HTML page, with PNG plots beside it.

It shows pictures of the same seeds side by side, the error at each timestep, the formats of every
layer with their errors, the hub member that is used at each timestep, size and speed, and all
settings. The page loads nothing from the network.

Examples:

    msfp report

    msfp report my-evaluation --out my-report --pictures 12
"""


def report(
    evaluation: Annotated[
        Path | None,
        typer.Argument(help="Evaluation directory. Default: evaluation in the run directory."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write. Default: report in the run directory.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Prompts whose pictures are shown.")] = 8,
    run: RunOption = DEFAULT_RUN,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write the evaluation as a page."""
    from msfp_cli.report.report import report_run

    written = report_run(run, evaluation, out, pictures=pictures, overwrite=overwrite)
    for line in written.notes:
        console.note(f"note: {line}")
    console.result(str(written.page), written.to_json(), as_json=json_)
