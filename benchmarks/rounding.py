"""Compare ways to calibrate, without any fine-tuning: rounding of weights, lift of inputs.

    python benchmarks/rounding.py --work DIR [--num-images 200] [--num-tests 100] [--markdown FILE]

Every row is calibrated from one recording and tested on pictures of prompts that the recording does
not hold: see `test_set.py` for what is measured. What was measured is kept in --work, so the script
resumes.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from material import add_size_options, known_prompts, part_of_page, record_options, source_of
from page import put
from test_set import MAX_TESTS, TestSet

from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import ROUNDINGS, CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.files.atomic import write_text
from msfp_cli.run import Run

INPUT_BITS = (4, 8, None)
INPUT_LIFTS = (0.1, 0.2, 0.4)  # of inputs of 4 bits
COLUMNS = (
    "| bits, weights/inputs | calibrated how | output error | final latents' error | PSNR, dB |"
)


def calibrated(
    arguments: argparse.Namespace, bits: int | None, rounding: str, input_lift: float
) -> Calibration:
    """Calibrate, once; all rows share a recording, and both roundings the formats and scales."""
    run = Run(arguments.work / name_of(bits, input_lift))
    if not run.calibration.exists():
        run.directory.mkdir(parents=True, exist_ok=True)
        for name in ("recording", "held-out"):
            shared = (arguments.work / name).resolve()
            shared.mkdir(exist_ok=True)
            if not (run.directory / name).exists():
                (run.directory / name).symlink_to(shared)
        options = replace(record_options(arguments), prompts=known_prompts(arguments))
        recipe = CalibrateRecipe(activations=bits, input_lift=input_lift)
        calibrate_run(run, source_of(arguments), options, recipe, device="cpu")
    calibration = Calibration.load(run.calibration)
    return replace(calibration, codes={}) if rounding == "nearest" else calibration


def name_of(bits: int | None, input_lift: float) -> str:
    """Return the name of a row's run."""
    return f"{bits or 16}" + (f"-lift-{input_lift:g}" if input_lift else "")


def measured(
    arguments: argparse.Namespace,
    tests: TestSet,
    bits: int | None,
    rounding: str,
    input_lift: float = 0.0,
) -> dict[str, float]:
    """Measure a row, once."""
    name = f"{name_of(bits, input_lift)}-{rounding}-{tests.num_tests}.json"
    result = arguments.work / "results" / name
    if not result.exists():
        calibration = calibrated(arguments, bits, rounding, input_lift)
        figures = tests.measure(load_calibrated(calibration, "cpu"))
        (component,) = calibration.layers
        own = {"bits": calibration.input_bits(component)}
        write_text(result, json.dumps({**figures, **own}))
    return dict(json.loads(result.read_text()))


def row(bits: str, way: str, figures: dict[str, float]) -> str:
    """Return a row of the table."""
    errors = f"{figures['output']:.5f} | {figures['latents']:.5f} ± {figures['latents_se']:.5f}"
    return f"| {bits} | {way} | {errors} | {figures['psnr']:.2f} |"


def table(arguments: argparse.Namespace) -> str:
    """Measure all rows and return the table."""
    tests = TestSet(
        source=source_of(arguments),
        directory=arguments.work / "tests",
        num_tests=arguments.num_tests,
        steps=arguments.steps,
    )
    tests.prepare()
    lines = [COLUMNS, "|---" * 5 + "|"]
    for bits in INPUT_BITS:
        for rounding in ROUNDINGS[::-1]:
            figures = measured(arguments, tests, bits, rounding)
            lines.append(row(f"4/{bits or 16}", rounding, figures))
            print(lines[-1], flush=True)
    for lift in INPUT_LIFTS:
        figures = measured(arguments, tests, 4, "compensated", lift)
        way = f"compensated, 8-bit inputs at {lift:.0%} of the steps"
        lines.append(row(f"4/{figures['bits']:.1f}", way, figures))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--num-tests", type=int, default=100, help=f"at most {MAX_TESTS}")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    add_size_options(parser, num_images=200)
    return parser.parse_args()


def main() -> None:
    """Measure all rows and print them."""
    arguments = parse()
    quiet_libraries()
    text = (
        f"{arguments.num_images} pictures recorded, {arguments.num_tests} tests, seed 0, "
        f"torch {torch.__version__}, CPU.\n\n{table(arguments)}"
    )
    print(text)
    if arguments.markdown:
        put(arguments.markdown, part_of_page("rounding.py", arguments), text)


if __name__ == "__main__":
    main()
