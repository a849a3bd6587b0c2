"""`msfp report`: the evaluation as one page."""

from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.commands.options import JsonOption, OverwriteOption, RunOption
from msfp_cli.run import DEFAULT_RUN, Run

_HELP = """Write the run's evaluation as one self-contained HTML page, with PNG plots beside it.

Pictures of the same seeds side by side, error by timestep, every layer with the formats it could have had, which hub
member serves when, size and speed, and all settings. The page needs no network.

Examples:

    msfp report

    msfp report my-evaluation --out my-report --pictures 12
"""


def report(
    evaluation: Annotated[
        Path | None, typer.Argument(help="Evaluation directory; the run's own by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; the run's report directory by default.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Prompts to show.")] = 8,
    run: RunOption = DEFAULT_RUN,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Write the evaluation as a page."""
    from msfp_cli.evaluation.result import Evaluation
    from msfp_cli.report.document import write_report

    state = Run(run)
    if evaluation is None:
        state.require()
    found = Evaluation.load(evaluation or state.evaluation)
    written = write_report(
        state, found, out or state.report, pictures=pictures, overwrite=overwrite
    )
    for line in written.notes:
        console.note(f"note: {line}")
    data = {"page": str(written.page), "plots": [str(plot) for plot in written.plots]}
    console.result(str(written.page), data, as_json=json_)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("report", help=_HELP)(console.guarded(report))
