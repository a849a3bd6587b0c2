"""Write docs/reference.md from what the program knows: `python tests/reference.py`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from msfp_cli.calibration.recipe import FORMAT_SETS
from msfp_cli.commands.app import app
from msfp_cli.evaluation.metrics.table import METRICS
from msfp_cli.layers.kernels.registry import KERNELS

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
HEAD = """# Reference

Every option of every command, and every name that an option takes. This page is made by
`python tests/reference.py` from the program itself; `msfp COMMAND --help` says the same.
"""
FORMATS = {
    "mixed": "signed and unsigned formats; each layer's input gets the one with the least error",
    "signed": "signed formats only",
    "unsigned": "unsigned formats with a zero point only",
    "integer": "integers only: the formats with one exponent bit",
}


def options() -> Iterator[tuple[str, str, str]]:
    """Yield command, option and help of everything that can be typed."""
    root = typer.main.get_command(app)
    for name, command in sorted(root.commands.items()):  # type: ignore[attr-defined]
        for parameter in command.params:
            names = [*parameter.opts, *parameter.secondary_opts]
            if "--help" not in names:
                yield name, ", ".join(names), shown_help(parameter)


def shown_help(parameter: object) -> str:
    """Return a help text with its default."""
    text = str(getattr(parameter, "help", None) or "")
    default = getattr(parameter, "default", None)
    is_shown = "Default:" in text or default in (None, False) or callable(default)
    return text if is_shown else f"{text} Default: {default}."


def first_sentence(text: str | None) -> str:
    """Return the first line of a docstring."""
    return (text or "").strip().splitlines()[0]


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of Markdown; names in the first column are code."""
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in rows]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for command in dict.fromkeys(name for name, _, _ in options()):
        rows = [(names, text) for name, names, text in options() if name == command]
        parts.append(f"## msfp {command}\n\n{table(('option', 'what it does'), rows)}")
    kernels = [(name, first_sentence(kernel.__doc__)) for name, kernel in KERNELS.items()]
    parts.append(f"## Kernels\n\n{table(('--kernel', 'what it is'), kernels)}")
    sets = [(name, FORMATS[name]) for name in FORMAT_SETS]
    parts.append(f"## Sets of formats\n\n{table(('--formats', 'what it allows'), sets)}")
    metrics = [
        (each.key, f"{each.help} {(each.better or 'neither').capitalize()} is better.")
        for each in METRICS
    ]
    parts.append(f"## Metrics of an evaluation\n\n{table(('key', 'what it is'), metrics)}")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
