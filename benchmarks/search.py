"""Compare the exact search with brute force, and time it on a UNet of Stable Diffusion 1.5's size.

    python benchmarks/search.py            both parts, about five minutes on two cores
    python benchmarks/search.py --part 1   a million samples, exact search against brute force
    python benchmarks/search.py --part 2   860 M random weights, one maximum per output channel

`--num-samples 1000` and `--width 32` make the two parts small.
"""

import argparse
import platform
import resource
import time
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.search import SearchSpace, SortedRows, search_rows
from msfp_cli.layers.replace import find_layers

SPACE = SearchSpace()
SD15_WIDTH = 320  # channels of the UNet's first level


class Comparison(NamedTuple):
    """The errors of a format's candidates by both ways, ``(candidates,)``, and the seconds."""

    exact: Tensor
    exact_seconds: float
    brute: Tensor
    brute_seconds: float

    def difference(self) -> float:
        """Return the greatest relative difference between the two."""
        return float(((self.exact - self.brute).abs() / self.brute).max())


def brute_force(x: Tensor, fmt: FloatFormat, max_value: float, zero_point: float) -> float:
    """Round every sample to one grid and return the squared error, all in float64."""
    levels = torch.tensor(fmt.levels, dtype=torch.float64) / fmt.largest * max_value + zero_point
    borders = (levels[1:] + levels[:-1]) / 2
    return float((levels[torch.bucketize(x, borders)] - x).square().sum())


def candidates(x: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Return the maxima and zero points to compare, each ``(1, candidates)``.

    They are 100 maxima, combined with 13 zero points if the format is unsigned.
    """
    fractions = torch.linspace(SPACE.low, SPACE.high, SPACE.num_maxima, dtype=torch.float64)
    if fmt.signed:
        maxima = fractions * x.abs().max()
        return maxima[None], torch.zeros_like(maxima)[None]
    zeros = torch.linspace(float(x.min()), 0, SPACE.num_zero_points, dtype=torch.float64)
    maxima = fractions * (x.max() - x.min())
    return maxima.repeat_interleave(len(zeros))[None], zeros.repeat(len(maxima))[None]


def silu_samples(num_samples: int) -> Tensor:
    """Return what SiLU makes of a heavy-tailed distribution, drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(num_samples, generator=generator)
    spread = torch.exp(0.6 * torch.randn(num_samples, generator=generator))
    return torch.nn.functional.silu(normal * spread)


def compare_format(x: Tensor, rows: SortedRows, fmt: FloatFormat) -> Comparison:
    """Compute the error of every candidate of a format both ways."""
    maxima, zeros = candidates(x, fmt)
    start = time.perf_counter()
    exact = rows.error(fmt.magnitudes, maxima, None if fmt.signed else zeros)[0]
    exact_seconds = time.perf_counter() - start
    x64 = x.double()
    start = time.perf_counter()
    errors = []
    for max_value, zero_point in zip(maxima[0].tolist(), zeros[0].tolist(), strict=True):
        errors.append(brute_force(x64, fmt, max_value, zero_point))
    brute_seconds = time.perf_counter() - start
    return Comparison(
        exact, exact_seconds, torch.tensor(errors, dtype=torch.float64), brute_seconds
    )


def compare(num_samples: int) -> None:
    """Print the lowest error of each format by both ways, and the time that a candidate takes."""
    x = silu_samples(num_samples)
    start = time.perf_counter()
    rows = SortedRows(x[None])
    magnitudes = SortedRows(x.abs()[None])
    sorting = time.perf_counter() - start
    grid = f"{SPACE.num_maxima} maxima x {SPACE.num_zero_points} zero points"
    print(f"1. {num_samples:,} samples of SiLU, 4 bits, {grid}")
    titles = f"{'exact search':>14} {'brute force':>14} {'greatest relative difference':>30}"
    print(f"{'format':8} {'candidates':>10} {titles}")
    results = []
    for fmt in formats_of_width(4, signed=True) + formats_of_width(4, signed=False):
        result = compare_format(x, magnitudes if fmt.signed else rows, fmt)
        lowest = (
            f"{result.exact.min() / num_samples:14.6e} {result.brute.min() / num_samples:14.6e}"
        )
        line = f"{fmt.name:8} {len(result.exact):10} {lowest} {result.difference():20.1e}"
        print(line, flush=True)
        results.append(result)
    summarize(results, sorting)


def summarize(results: list[Comparison], sorting: float) -> None:
    """Print the greatest difference and the times per candidate."""
    count = sum(len(result.exact) for result in results)
    worst = max(result.difference() for result in results)
    exact = (sorting + sum(result.exact_seconds for result in results)) / count
    brute = sum(result.brute_seconds for result in results) / count
    print(f"greatest relative difference over all {count} candidates: {worst:.1e} (target 1e-9)")
    share = f"with its share of sorting once, {sorting:.2f} s"
    print(f"a candidate: exact {exact * 1e6:.0f} us ({share}), brute force {brute * 1e3:.1f} ms")
    print(f"ratio {brute / exact:.0f} (target 100)")


def search_large(width: int) -> None:
    """Search every weight of a UNet like Stable Diffusion 1.5's, with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
    )
    layers = find_layers(unet)
    weights = sum(layer.weight.numel() for layer in layers.values())
    before = peak_gib()
    start = time.perf_counter()
    formats: Counter[str] = Counter()
    for layer in layers.values():
        result = search_rows(layer.weight, formats_of_width(4, signed=True), SPACE)
        formats[result.winner.format.name] += 1
    seconds = time.perf_counter() - start
    size = f"{weights / 1e6:.0f} M weights in {len(layers)} layers"
    print(f"2. UNet of Stable Diffusion 1.5's configuration, {width} channels: {size}")
    print(f"searched per output channel in {seconds:.0f} s (target 240); formats {dict(formats)}")
    model = f"{before:.2f} GiB of it before the search, the model itself"
    print(f"peak memory {peak_gib():.2f} GiB (target 12), {model}")


def peak_gib() -> float:
    """Return this process's peak memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Run one part, or both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="only this part")
    parser.add_argument("--num-samples", type=int, default=1_000_000, help="of part 1")
    parser.add_argument(
        "--width", type=int, default=SD15_WIDTH, help="channels of part 2's first level"
    )
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}, seed 0")
    if arguments.part != 2:
        compare(arguments.num_samples)
    if arguments.part != 1:
        search_large(arguments.width)


if __name__ == "__main__":
    main()
