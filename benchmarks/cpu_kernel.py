"""What the CPU kernel rests on: rounding in pieces, equal pictures, and the formats it needs.

    python benchmarks/cpu_kernel.py [--only rounding|pictures|candidates] [--markdown FILE]

Rounding: 2.6 million values (a 320-channel picture of 64x64, twice) are rounded to bytes in pieces,
as the kernel does, as one piece, and in one pass compiled by inductor; the median of 15 counts.
Pictures: every kernel draws four prompts with the built-in pipeline, 20 steps, guidance 3; the
table shows the mean and the greatest difference between each two, in units of 1/255. Candidates:
the error of a calibration on held-out calls if inputs may have integers of one byte, of two, and
any; and with the first and the last convolution at 8 bits. Leave the machine alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from material import add_size_options, record_options, source_of
from torch import Tensor, nn

from msfp_cli.calibration import recipe
from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.layers.kernels import to_bytes
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.pipelines.loading import BUILT_IN_GUIDANCE, load_pipeline
from msfp_cli.recording.record import record_both
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

PROMPTS = ["a red dress", "a blue sneaker", "a green bag", "a yellow t-shirt"]


def milliseconds(function: Callable[[], object]) -> float:
    """Return the median of 15 calls after two."""
    seconds = []
    for _ in range(17):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) * 1e3


def rounding(arguments: argparse.Namespace) -> Iterator[str]:
    """Time ways to round an input."""

    def fused(x: Tensor, grid: Grid, shift: int) -> Tensor:
        return to_bytes.round_compiled(x, [grid], torch.tensor(False), shift)[0]

    side = arguments.side
    x = torch.randn(2, 320, side, side, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    yield "| format | threads | in pieces, ms | as one piece, ms | one pass by inductor, ms |"
    yield "|---|---|---|---|---|"
    size = to_bytes._PIECE
    most = torch.get_num_threads()
    for name in arguments.formats.split(","):
        fmt = FloatFormat.parse(name)
        grid = Grid(fmt, 0.1, 0.0 if fmt.signed else -0.25)
        shift = fmt.largest if fmt.signed else 0
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            compiled = torch.compile(fused)
            pieces = milliseconds(lambda g=grid, s=shift: to_bytes.round_to_bytes(x, g, s))
            to_bytes._PIECE = x.numel()
            whole = milliseconds(lambda g=grid, s=shift: to_bytes.round_to_bytes(x, g, s))
            to_bytes._PIECE = size
            one_pass = milliseconds(lambda c=compiled, g=grid, s=shift: c(x, g, s))
            yield f"| {name} | {threads} | {pieces:.1f} | {whole:.1f} | {one_pass:.1f} |"
        torch.set_num_threads(most)


def sum_in_float64_(layer: nn.Module) -> None:
    """Let a layer compute what `simulated` does, but add up in float64."""
    bias = None if layer.bias is None else layer.bias.double()

    def forward(x: Tensor) -> Tensor:
        grid = layer.scheme.input
        rounded = (x if grid is None else fake_quantize(x, grid)).double()
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(rounded, layer.weight.double(), bias).float()
        return layer._conv_forward(rounded, layer.weight.double(), bias).float()

    layer.forward = forward


def draw(calibration: Calibration, steps: int, kernel: str, *, float64: bool = False) -> np.ndarray:
    """Return the pictures of a kernel."""
    pipe = load_calibrated(calibration, "cpu")
    prepare_(pipe.unet, kernel)
    if float64:
        for layer in quantized_layers(pipe.unet).values():
            sum_in_float64_(layer)
    generator = torch.Generator().manual_seed(0)
    options = {
        "num_inference_steps": steps,
        "guidance_scale": BUILT_IN_GUIDANCE,
        "generator": generator,
    }
    pictures = pipe(PROMPTS, **options).images
    return np.stack([np.asarray(picture).astype(float) for picture in pictures])


Calls = tuple[Recording, Recording]


def record(arguments: argparse.Namespace, work: Path) -> Calls:
    """Record the calls to calibrate on, and the held-out ones."""
    source = source_of(arguments)
    return record_both(load_pipeline(source, "cpu"), Run(work), source, record_options(arguments))


def pictures(arguments: argparse.Namespace, calls: Calls) -> Iterator[str]:
    """Compare the pictures that kernels draw."""
    pipe = load_pipeline(source_of(arguments), "cpu")
    calibration = calibrate_denoisers_(pipe, *calls, CalibrateRecipe())
    rows = {
        "kernel `cpu`": {"kernel": "cpu"},
        "kernel `reference`": {"kernel": "reference"},
        "kernel `simulated`": {"kernel": "simulated"},
        "the same, sums in float64": {"kernel": "simulated", "float64": True},
    }
    drawings = {}
    for title, options in rows.items():
        drawings[title] = draw(calibration, arguments.steps, **options)
    yield "| against | " + " | ".join(rows) + " |"
    yield "|---|" + "---|" * len(rows)
    for title, drawing in drawings.items():
        cells = []
        for other in drawings.values():
            difference = np.abs(drawing - other)
            cells.append(f"{difference.mean():.2f}, {difference.max():.0f}")
        yield f"| {title} | {' | '.join(cells)} |"


@contextmanager
def widest_input(bits: int) -> Iterator[None]:
    """Let inputs have integers of so many bits."""
    usual = recipe.INPUT_INTEGER_BITS
    recipe.INPUT_INTEGER_BITS = bits
    try:
        yield
    finally:
        recipe.INPUT_INTEGER_BITS = usual


def candidates(arguments: argparse.Namespace, calls: Calls) -> Iterator[str]:
    """Measure what narrower integers of inputs cost, and 8 bits for the outermost convolutions."""
    widths = [int(width) for width in arguments.widths.split(",")]
    titles = [f"W{width}A{width}" for width in widths]
    yield f"| integers of inputs, bits | first and last convolution | {' | '.join(titles)} |"
    yield "|---" * (2 + len(widths)) + "|"
    rows = (("8", 8, None), ("16 (default)", 16, None), ("any", 64, None), ("16", 16, 8))
    for title, bits, outermost in rows:
        errors = []
        keep = tuple(f"{name}:{outermost}" for name in ("conv_in", "conv_out")) if outermost else ()
        for width in widths:
            with widest_input(bits):
                settings = CalibrateRecipe(weights=width, activations=width, keep=keep)
                pipe = load_pipeline(source_of(arguments), "cpu")
                calibration = calibrate_denoisers_(pipe, *calls, settings)
            errors.append(f"{calibration.held_out_error['unet']:.5f}")
        kept = f"{outermost} bits" if outermost else "floating point"
        yield f"| {title} | {kept} | {' | '.join(errors)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=["rounding", "pictures", "candidates"], help="just one of the tables"
    )
    parser.add_argument("--side", type=int, default=64, help="of the picture that is rounded")
    parser.add_argument("--formats", default="ue2m2,ue1m3,e2m1", help="to round to")
    parser.add_argument("--widths", default="4,6,8", help="bits of the candidates")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    add_size_options(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    lines = [f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads", ""]
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        if arguments.only in (None, "rounding"):
            lines += [*rounding(arguments), ""]
        for table in (pictures, candidates):
            if arguments.only in (None, table.__name__):
                lines += [*table(arguments, record(arguments, Path(work))), ""]
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
