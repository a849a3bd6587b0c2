"""Compare ways to calibrate the built-in pipeline: relative error of the denoiser's output on held-out prompts.

    python benchmarks/calibration.py [--work DIR] [--markdown FILE]

Every row has the same policy (first and last convolution in floating point, time embedding at 8
bits), weights and activations at 4 bits, and is measured on the full-precision trajectories of 20
prompts and seeds that no calibration has seen, 20 DDIM steps, guidance 3. Takes about ten minutes
on two cores; --work keeps the recordings for the next run.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from material import RECORD, UNSEEN

from msfp_cli.calibration.calibrate import calibrate_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.pipelines.loading import BUILT_IN, BUILT_IN_GUIDANCE, load_pipeline, quiet_libraries
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls, record_recipes
from msfp_cli.recording.result import Recording

SOURCE = ModelSource(model=BUILT_IN)
HELD_OUT_SEED, NUM_HELD_OUT = 9_000_000, 20
SILU_MINIMUM = -0.27847  # of x * sigmoid(x)


def make_recordings(work: Path) -> tuple[Recording, Recording]:
    """Record the calibration calls, and those of 20 prompts that are not among its forty."""
    pipe = load_pipeline(SOURCE, "cpu")
    calibration, _ = record_recipes(pipe, SOURCE, RECORD)
    unseen = UNSEEN[:NUM_HELD_OUT]
    held_out = RecordRecipe(
        conditions=unseen,
        num_inference_steps=20,
        guidance_scale=BUILT_IN_GUIDANCE,
        seed=HELD_OUT_SEED,
        batch_size=10,
    )
    return record_calls(pipe, SOURCE, calibration, work / "recording"), record_calls(
        pipe, SOURCE, held_out, work / "held-out"
    )


def calibrate(recording: Recording, held_out: Recording, formats: str, lift: float) -> Calibration:
    """Calibrate a fresh copy of the pipeline."""
    return calibrate_(
        load_pipeline(SOURCE, "cpu"),
        recording,
        held_out,
        CalibrateRecipe(formats=formats, lift=lift),
    )


def table(recording: Recording, held_out: Recording) -> tuple[list[str], Calibration]:
    """Return the table's lines and the calibration of the default recipe."""
    lines = ["| formats | no lift | lift 5 % |", "|---|---|---|"]
    default: Calibration | None = None
    for formats in ("signed", "unsigned", "integer", "mixed"):
        plain, lifted = (calibrate(recording, held_out, formats, lift) for lift in (0.0, 0.05))
        errors = [calibration.held_out_error["unet"] for calibration in (plain, lifted)]
        lines.append(f"| {formats} | {errors[0]:.4f} | {errors[1]:.4f} |")
        print(lines[-1], flush=True)
        default = lifted
    assert default is not None
    return lines, default


def silu_layers(calibration: Calibration) -> list[str]:
    """List the layers whose input was bounded below by SiLU's minimum, with what was chosen for it."""
    lines = [
        "| layer fed by SiLU | input | zero point | error | best signed | error | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, layer in calibration.layers["unet"].items():
        grid = layer.scheme.input
        if grid is None or not SILU_MINIMUM <= layer.minimum < -0.2:
            continue
        signed = next(score for score in layer.input_scores if not score.format.startswith("u"))
        zero = f"{grid.zero_point:.3f}" if not grid.format.signed else ""
        chosen, best_signed = (
            f"{grid.format} | {zero} | {layer.input_error:.2e}",
            f"{signed.format} | {signed.error:.2e}",
        )
        lines.append(f"| {name} | {chosen} | {best_signed} | {layer.reason} |")
    return lines


def main() -> None:
    """Record, calibrate eight times, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="keep the recordings here")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        recording, held_out = make_recordings(arguments.work or Path(temporary))
        lines, default = table(recording, held_out)
    lines += ["", *silu_layers(default)]
    text = "\n".join(lines)
    print(text)
    if arguments.markdown:
        head = f"Seed 0; {NUM_HELD_OUT} held-out prompts, seeds from {HELD_OUT_SEED}; torch {torch.__version__}, CPU.\n\n"
        arguments.markdown.write_text(head + text + "\n")


if __name__ == "__main__":
    main()
