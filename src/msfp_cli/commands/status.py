"""`msfp status`: say what the run directory holds and what to type next."""

from msfp_cli.commands import console
from msfp_cli.options import DEFAULT_RUN, JsonOption, RunOption

HELP = """Say what the run directory holds and what to type next.

Examples:

    msfp status

    msfp status --json
"""


def status(run: RunOption = DEFAULT_RUN, json_: JsonOption = False) -> None:
    """Say what the run directory holds."""
    from msfp_cli.status import status_of

    current = status_of(run)
    text = "\n".join(f"{stage:12} {state}" for stage, state in current.stages.items())
    console.result(text, current.to_json(), as_json=json_)
    console.note(f"next: {current.next_command}")
