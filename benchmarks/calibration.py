"""Compare ways to calibrate the built-in pipeline by the relative error of its denoiser's output.

    python benchmarks/calibration.py [--work DIR] [--markdown FILE]

Every row leaves the first and the last convolution in floating point and the time embedding at 8
bits; all other weights and activations have 4 bits. Errors are measured on the full-precision
trajectories of 20 prompts and seeds that no calibration uses, 20 DDIM steps, guidance 3. It takes
about ten minutes on two cores; with --work the recordings are kept for the next run.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from material import UNSEEN, add_size_options, record_options, source_of

from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.pipelines.loading import BUILT_IN_GUIDANCE, ModelSource, load_pipeline
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls, record_recipes
from msfp_cli.recording.result import Recording

ROWS = ("signed", "unsigned", "integer", "mixed")
TEST_SEED = 9_000_000
SILU_MINIMUM = -0.27847  # of x * sigmoid(x)


def make_recordings(arguments: argparse.Namespace, work: Path) -> tuple[Recording, Recording]:
    """Record the calls to calibrate on, and those of prompts that calibration does not use."""
    source = source_of(arguments)
    pipe = load_pipeline(source, "cpu")
    calibration, _ = record_recipes(pipe, source, record_options(arguments))
    tests = RecordRecipe(
        conditions=UNSEEN[: arguments.num_tests],
        num_inference_steps=arguments.steps,
        guidance_scale=BUILT_IN_GUIDANCE,
        seed=TEST_SEED,
        batch_size=10,
    )
    return (
        record_calls(pipe, source, calibration, work / "recording"),
        record_calls(pipe, source, tests, work / "held-out"),
    )


def compare(
    source: ModelSource, recordings: tuple[Recording, Recording], rows: list[str]
) -> tuple[str, Calibration]:
    """Return the table of errors, and the calibration of the last row with lift."""
    lines = ["| formats | no lift | lift 5 % |", "|---|---|---|"]
    for formats in rows:
        cells = [formats]
        for lift in (0.0, 0.05):
            recipe = CalibrateRecipe(formats=formats, lift=lift)
            calibration = calibrate_denoisers_(load_pipeline(source, "cpu"), *recordings, recipe)
            (error,) = calibration.held_out_error.values()
            cells.append(f"{error:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines), calibration


def silu_layers(calibration: Calibration) -> str:
    """Return a table of the layers whose smallest input is SiLU's minimum, with their formats."""
    lines = [
        "| layer fed by SiLU | input | zero point | error | best signed | error | why |",
        "|---|---|---|---|---|---|---|",
    ]
    (layers,) = calibration.layers.values()
    for name, layer in layers.items():
        grid = layer.scheme.input
        if grid is None or not SILU_MINIMUM <= layer.minimum < -0.2:
            continue
        signed = next(score for score in layer.input_scores if not score.format.startswith("u"))
        zero = "" if grid.format.signed else f"{grid.zero_point:.3f}"
        chosen = f"{grid.format} | {zero} | {layer.input_error:.2e}"
        best_signed = f"{signed.format} | {signed.error:.2e}"
        lines.append(f"| {name} | {chosen} | {best_signed} | {layer.reason} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="keep the recordings here")
    parser.add_argument("--rows", default=",".join(ROWS), help="sets of formats to compare")
    parser.add_argument("--num-tests", type=int, default=20, help="prompts to measure on")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    add_size_options(parser)
    return parser.parse_args()


def main() -> None:
    """Record, calibrate eight times, print."""
    arguments = parse()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        recordings = make_recordings(arguments, arguments.work or Path(temporary))
        rows = arguments.rows.split(",")
        table, default = compare(source_of(arguments), recordings, rows)
    text = f"{table}\n\n{silu_layers(default)}\n"
    print(text, end="")
    if arguments.markdown:
        head = (
            f"Seed 0; {arguments.num_tests} held-out prompts, seeds from {TEST_SEED}; "
            f"torch {torch.__version__}, CPU."
        )
        arguments.markdown.write_text(f"{head}\n\n{text}")


if __name__ == "__main__":
    main()
