"""Compare 4-bit weights without a calibration with calibrated ones, inputs in floating point.

    python benchmarks/weight_only.py --work DIR [--num-tests 40] [--markdown FILE]

`msfp quantize` knows the weights only. A calibration knows what reaches each layer as well, so it
lifts the layers that matter most to 8 bits, and rounds for the output of a layer. The rows are
tested on pictures of prompts that no calibration uses: see `test_set.py`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from material import add_size_options, known_prompts, record_options, source_of
from page import put
from test_set import MAX_TESTS, TestSet

from msfp_cli import MSFPConfig, quantize_
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.pipelines.loading import BUILT_IN, Pipeline, load_pipeline
from msfp_cli.run import Run

COLUMNS = "| weights | output error | final latents' error | PSNR, dB |"


def pipelines(arguments: argparse.Namespace) -> Iterator[tuple[str, Pipeline]]:
    """Yield a pipeline for each row."""
    source = source_of(arguments)
    pipe = load_pipeline(source, "cpu")
    quantize_(pipe.unet, MSFPConfig(weights=4))
    yield "`msfp quantize`", pipe
    options = record_options(arguments)
    if arguments.model == BUILT_IN:
        options = replace(options, prompts=known_prompts(arguments))
    run = Run(arguments.work / "run")
    for title, lift in (("calibrated, no lift", 0.0), ("calibrated", 0.05)):
        recipe = CalibrateRecipe(activations=None, lift=lift)
        calibration = calibrate_run(run, source, options, recipe, device="cpu", overwrite=True)
        yield f"{title}, nearest", load_calibrated(replace(calibration, codes={}), "cpu")
        yield title, load_calibrated(calibration, "cpu")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where recordings are kept")
    parser.add_argument("--num-tests", type=int, default=40, help=f"at most {MAX_TESTS}")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    add_size_options(parser)
    return parser.parse_args()


def main() -> None:
    """Measure all rows and print them."""
    arguments = parse()
    quiet_libraries()
    tests = TestSet(
        source=source_of(arguments),
        directory=arguments.work / "tests",
        num_tests=arguments.num_tests,
        steps=arguments.steps,
    )
    tests.prepare()
    lines = [COLUMNS, "|---" * 4 + "|"]
    for title, pipe in pipelines(arguments):
        figures = tests.measure(pipe)
        errors = f"{figures['output']:.5f} | {figures['latents']:.5f}"
        lines.append(f"| {title} | {errors} | {figures['psnr']:.2f} |")
        print(lines[-1], flush=True)
    if arguments.markdown:
        head = (
            f"{arguments.num_images} pictures recorded, {arguments.num_tests} tests, seed 0, "
            f"torch {torch.__version__}, CPU."
        )
        put(arguments.markdown, "weight_only.py", f"{head}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
