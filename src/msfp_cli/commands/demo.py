"""`msfp demo`: the whole chain on the built-in pipeline."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.options import DeviceOption, JsonOption

HELP = """Run the whole chain on the built-in pipeline: no network, a few minutes on two cores.

It ends with a report (one HTML page) and a picture with four rows of the same seeds: full
precision, plain signed FP4, MSFP after calibration, and MSFP after a short fine-tuning.

Examples:

    msfp demo

    msfp demo --out my-demo --json
"""


def demo(
    out: Annotated[
        Path, typer.Option(help="Run directory of the demo; it is replaced if it exists.")
    ] = Path("msfp-demo"),
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Walk the whole chain."""
    from msfp_cli.demo import run_demo

    console.quiet_libraries()
    report = run_demo(out, device=device, progress=console.ConsoleProgress())
    errors = ", ".join(f"{title} {error:.4f}" for title, error in report.errors.items())
    console.note(
        f"error of the denoiser's output (relative, squared): {errors}\n"
        f"denoiser on disk: {report.export.ratio:.3f} of half precision\n"
        f"pictures: {report.picture}"
    )
    console.result(report.page, asdict(report), as_json=json_)
