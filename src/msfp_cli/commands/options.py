"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.pipelines.source import DTYPES
from msfp_cli.run import DEFAULT_RUN

RunOption = Annotated[
    Path,
    typer.Option(
        "--run", help=f"Run directory that chains the commands; {DEFAULT_RUN} here by default."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Device, such as cpu or cuda; an accelerator if there is one.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help=f"Type to compute in: {', '.join(DTYPES)}; float32 on a CPU, bfloat16 elsewhere."
    ),
]
MAX_SEED = 2**62  # torch takes 64 bits; pictures count on from here
SeedOption = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="Picture i is drawn with seed + i.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Pictures per call of the pipeline.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
