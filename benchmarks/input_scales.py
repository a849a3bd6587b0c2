"""What a scale for each token, and rotated inputs, gain in Linear layers, and what they cost.

    python benchmarks/input_scales.py --work DIR [--model examples/train_flow/flow]
        [--markdown FILE]

The model is calibrated in four ways with inputs of 4 bits, and in four with 8, otherwise by the
defaults. The error is that of the denoiser's output on held-out calls. Then the first of these
calls is repeated by the kernel `cpu`, in one way after the other, in several rounds; the time is
relative to that of the first way in the same round, and the median of the rounds counts.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from material import add_size_options, denoiser_of, part_of_page, record_options, source_of
from page import put
from torch import nn

from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.layers.prepare import prepare_
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.loading import load_pipeline
from msfp_cli.recording.record import record_both
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

WAYS = {
    "one scale": {"rotate": "none", "input_scales": "tensor"},
    "Hadamard": {"rotate": "hadamard", "input_scales": "tensor"},
    "a scale for each token": {"rotate": "none", "input_scales": "token"},
    "both": {"rotate": "hadamard", "input_scales": "token"},
}
ROUNDS = 15


def relative_times(denoisers: Mapping[str, nn.Module], call: DenoiserCall) -> dict[str, float]:
    """Return the time of a call of each denoiser, as a multiple of that of the first one."""
    seconds: dict[str, list[float]] = {way: [] for way in denoisers}
    for _ in range(ROUNDS + 1):
        for way, denoiser in denoisers.items():
            start = time.perf_counter()
            replay(denoiser, call)
            seconds[way].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    ratios = {}
    for way, own in seconds.items():
        rounds = list(zip(own, first, strict=True))[1:]  # the first one warms up
        ratios[way] = statistics.median(time / plain for time, plain in rounds)
    return ratios


def transformed(calibration: Calibration, component: str) -> str:
    """Say how many layers are transformed: rotated, with token scales, and of how many."""
    layers = calibration.layers[component].values()
    transforms = [layer.scheme.transform for layer in layers if layer.kind == "linear"]
    rotated = sum(each.rotation > 0 for each in transforms)
    scaled = sum(each.token_scales for each in transforms)
    return f"{rotated} and {scaled} of {len(transforms)}"


def rows(
    arguments: argparse.Namespace, recordings: tuple[Recording, Recording], bits: int
) -> Iterator[str]:
    """Calibrate in all ways, and yield a row of the table for each."""
    calibrations = {}
    denoisers = {}
    for way, options in WAYS.items():
        pipe = load_pipeline(source_of(arguments), "cpu")
        component, denoisers[way] = denoiser_of(pipe)
        recipe = CalibrateRecipe(activations=bits, rounding=arguments.rounding, **options)
        with torch.no_grad():
            calibrations[way] = calibrate_denoisers_(pipe, *recordings, recipe)
        prepare_(denoisers[way], "cpu")
    call = next(iter(recordings[1].calls(component)))
    times = relative_times(denoisers, call)
    for way, calibration in calibrations.items():
        error = calibration.held_out_error[component]
        counts = transformed(calibration, component)
        yield f"| 4/{bits} | {way} | {error:.5f} | {counts} | {times[way]:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the recording is kept")
    parser.add_argument("--bits", default="4,8", help="of the inputs")
    parser.add_argument("--rounding", default="compensated", help="of the weights")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    add_size_options(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    source = source_of(arguments)
    pipe = load_pipeline(source, "cpu")
    recordings = record_both(pipe, Run(arguments.work), source, record_options(arguments))
    lines = [
        "| bits, weights/inputs | inputs of Linear layers | output error | rotated and with token "
        "scales | time of a call |",
        "|---" * 5 + "|",
    ]
    for bits in arguments.bits.split(","):
        for line in rows(arguments, recordings, int(bits)):
            lines.append(line)
            print(line, flush=True)
    head = f"{arguments.num_images} pictures recorded, torch {torch.__version__}, CPU."
    text = "\n".join([head, "", *lines])
    print(text)
    if arguments.markdown:
        put(arguments.markdown, part_of_page("input_scales.py", arguments), text)


if __name__ == "__main__":
    main()
