"""The command line as a whole: its help, its version, and every command."""

from typing import Annotated

import typer

from msfp_cli.commands import (
    calibrate,
    console,
    demo,
    evaluate,
    export,
    finetune,
    inspect,
    launch,
    quantize,
    report,
    sample,
    status,
)
from msfp_cli.version import __version__

# Each module has a function of its own name, and its help as `HELP`; this is the order of `--help`.
COMMANDS = (
    quantize,
    calibrate,
    finetune,
    inspect,
    export,
    sample,
    evaluate,
    report,
    status,
    demo,
)

app = typer.Typer(
    name="msfp",
    help="Quantize diffusers pipelines to 4-bit floating point, weights and activations.\n\n"
    "The chain: msfp calibrate MODEL, msfp finetune, msfp export, msfp sample --prompt '...'. "
    "Each command reads the results of those before it from the run directory (--run).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _print_version(is_set: bool) -> None:
    if is_set:
        typer.echo(f"msfp {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Act on the options that come before a command."""
    console.hear_interrupts()
    launch.end_with_launcher()
    if debug:
        console.show_tracebacks()


for _module in COMMANDS:
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, help=_module.HELP)(console.guarded(getattr(_module, _name)))
