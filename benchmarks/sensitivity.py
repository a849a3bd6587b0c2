"""How many recorded calls it takes to tell which layers to lift.

    python benchmarks/sensitivity.py --work DIR [--num-images N] [--activations 4] [--markdown FILE]

A layer's part of the error is measured by quantizing it alone and repeating recorded calls from it
on. Each row measures on so many calls, of so many rows each, and says how well that ranks the
layers (Spearman's correlation with the first row), and the error of the denoiser's output on
held-out calls with the layers lifted that it names. Weights are rounded to the nearest, so that
nothing else changes. Time is that of the processor.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from material import add_size_options, denoiser_of, record_options, source_of
from page import put

from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.calibration.sensitivity import choose_lifted, quantized_alone
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.pipelines.prefix import RepeatedCall
from msfp_cli.recording.compare import OutputError, spread_calls
from msfp_cli.recording.record import record_both
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

PLANS = ((16, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 2), (1, 1))  # calls, rows of each
COLUMNS = "| calls | rows of each | seconds | rank correlation | layers lifted | output error |"


def calibrated(
    arguments: argparse.Namespace, recordings: tuple[Recording, Recording], lifted: list[str]
) -> Calibration:
    """Calibrate with these layers lifted and no others."""
    recipe = CalibrateRecipe(
        activations=arguments.activations,
        lift=0.0,
        rounding="nearest",
        keep=tuple(f"{name}:8" for name in lifted),
    )
    return calibrate_denoisers_(load_pipeline(source_of(arguments), "cpu"), *recordings, recipe)


def measured(
    arguments: argparse.Namespace,
    recording: Recording,
    calibration: Calibration,
    num_calls: int,
    rows: int,
) -> dict[str, float]:
    """Return the error of the denoiser's output with each layer quantized alone."""
    component, denoiser = denoiser_of(load_pipeline(source_of(arguments), "cpu"))
    layers = find_layers(denoiser)
    choices = calibration.layers[component].items()
    errors = {name: OutputError() for name, choice in choices if choice.reason == "default"}
    for call in spread_calls(recording, component, num_calls, rows):
        repeated = RepeatedCall(denoiser, call)
        for name, error in errors.items():
            scheme = calibration.layers[component][name].scheme
            scale = calibration.scales[component].get(name)
            with quantized_alone(layers[name], scheme, scale):
                error.add(call.timestep, repeated.from_layer(name), call.output)
    return {name: error.relative() for name, error in errors.items()}


def rank_correlation(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return Spearman's correlation of two values of each layer."""
    ranks = [
        torch.tensor([values[name] for name in one]).argsort().argsort().double()
        for values in (one, other)
    ]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def table(arguments: argparse.Namespace) -> str:
    """Measure all rows and return the table."""
    pipe = load_pipeline(source_of(arguments), "cpu")
    component, _ = denoiser_of(pipe)
    run = Run(arguments.work)
    recordings = record_both(pipe, run, source_of(arguments), record_options(arguments))
    plain = calibrated(arguments, recordings, [])
    lift = CalibrateRecipe().lift
    reference: dict[str, float] = {}
    lines = [COLUMNS, "|---" * 6 + "|"]
    for num_calls, rows in PLANS:
        began = time.process_time()
        found = measured(arguments, recordings[0], plain, num_calls, rows)
        seconds = time.process_time() - began
        reference = reference or found
        choices = {
            name: replace(choice, sensitivity=found.get(name))
            for name, choice in plain.layers[component].items()
        }
        lifted = choose_lifted(choices, lift)
        error = calibrated(arguments, recordings, lifted).held_out_error[component]
        correlation = rank_correlation(reference, found)
        lines.append(
            f"| {num_calls} | {rows} | {seconds:.1f} | {correlation:.3f} | {len(lifted)} "
            f"| {error:.5f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the recording is kept")
    parser.add_argument("--activations", type=int, default=4, help="bits of the inputs")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    add_size_options(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    text = (
        f"{arguments.num_images} pictures recorded, a fifth of them held out, inputs of "
        f"{arguments.activations} bits, torch {torch.__version__}, CPU.\n\n{table(arguments)}"
    )
    print(text)
    if arguments.markdown:
        put(arguments.markdown, "sensitivity.py", text)


if __name__ == "__main__":
    main()
