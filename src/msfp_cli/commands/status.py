"""`msfp status`: say what the run directory holds and what to type next."""

import typer

from msfp_cli.commands import console
from msfp_cli.commands.options import JsonOption, RunOption
from msfp_cli.recipe import DEFAULT_RUN

_HELP = """Say what the run directory holds and what to type next.

Examples:

    msfp status

    msfp status --json
"""


def status(run: RunOption = DEFAULT_RUN, json_: JsonOption = False) -> None:
    """Say what the run directory holds."""
    from msfp_cli.run import Run

    rows = Run(run).status()
    following = Run(run).next_command()
    text = "\n".join(f"{what:12} {state}" for what, state in rows)
    console.result(text, {**dict(rows), "next": following}, as_json=json_)
    console.note(f"next: {following}")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("status", help=_HELP)(console.guarded(status))
