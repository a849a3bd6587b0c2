"""Compare the exact search with brute force, and time it on the weights of a UNet of Stable Diffusion 1.5's size.

python benchmarks/search.py            both parts, about five minutes on two cores
python benchmarks/search.py --part 1   one million samples, every candidate, exact against brute
force python benchmarks/search.py --part 2   860 M random weights, one maximum per output channel
"""

import argparse
import platform
import resource
import time

import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.search import SearchSpace, SortedRows, search_rows
from msfp_cli.layers.replace import find_layers

SPACE = SearchSpace()


def brute_force(x: Tensor, fmt: FloatFormat, max_value: float, zero_point: float) -> float:
    """Round every sample to one grid and return the squared error, all in float64."""
    levels = torch.tensor(fmt.levels, dtype=torch.float64) / fmt.largest * max_value + zero_point
    borders = (levels[1:] + levels[:-1]) / 2
    return float((levels[torch.bucketize(x, borders)] - x).square().sum())


def candidates(x: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Return 100 maxima, crossed with 13 zero points where the format is unsigned, each ``(1, candidates)``."""
    fractions = torch.linspace(SPACE.low, SPACE.high, SPACE.num_maxima, dtype=torch.float64)
    if fmt.signed:
        return (fractions * x.abs().max())[None], torch.zeros(
            1, SPACE.num_maxima, dtype=torch.float64
        )
    zeros = torch.linspace(float(x.min()), 0, SPACE.num_zero_points, dtype=torch.float64)
    maxima = fractions * (x.max() - x.min())
    return maxima.repeat_interleave(len(zeros))[None], zeros.repeat(len(maxima))[None]


def compare(num_samples: int = 1_000_000, seed: int = 0) -> None:
    """Print, per format, the best error of both ways, their greatest relative difference, and seconds a candidate."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_samples, generator=generator)
    x = torch.nn.functional.silu(
        normal * torch.exp(0.6 * torch.randn(num_samples, generator=generator))
    )
    start = time.perf_counter()
    rows, magnitudes = SortedRows(x[None]), SortedRows(x.abs()[None])
    sorting, count, worst = time.perf_counter() - start, 0, 0.0
    exact_seconds = brute_seconds = 0.0
    x64 = x.double()
    print(
        f"1. {num_samples:,} samples of SiLU, 4 bits, {SPACE.num_maxima} maxima x {SPACE.num_zero_points} zero points"
    )
    print(
        f"{'format':8} {'candidates':>10} {'exact search':>14} {'brute force':>14} {'greatest relative difference':>30}"
    )
    for fmt in formats_of_width(4, signed=True) + formats_of_width(4, signed=False):
        maxima, zeros = candidates(x, fmt)
        start = time.perf_counter()
        samples = magnitudes if fmt.signed else rows
        errors = samples.error(fmt.magnitudes, maxima, None if fmt.signed else zeros)[0]
        exact_seconds += time.perf_counter() - start
        start = time.perf_counter()
        pairs = zip(maxima[0].tolist(), zeros[0].tolist(), strict=True)
        reference = torch.tensor(
            [brute_force(x64, fmt, *pair) for pair in pairs], dtype=torch.float64
        )
        brute_seconds += time.perf_counter() - start
        difference = float(((errors - reference).abs() / reference).max())
        worst, count = max(worst, difference), count + len(errors)
        best, other = float(errors.min()) / num_samples, float(reference.min()) / num_samples
        print(
            f"{fmt.name:8} {len(errors):10} {best:14.6e} {other:14.6e} {difference:20.1e}",
            flush=True,
        )
    exact, brute = (sorting + exact_seconds) / count, brute_seconds / count
    print(f"greatest relative difference over all {count} candidates: {worst:.1e} (target 1e-9)")
    print(
        f"a candidate: exact {exact * 1e6:.0f} us (with its share of sorting once, {sorting:.2f} s), "
        f"brute force {brute * 1e3:.1f} ms"
    )
    print(f"ratio {brute / exact:.0f} (target 100)")


def search_large() -> None:
    """Search every weight of a UNet with Stable Diffusion 1.5's configuration and random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    layers = find_layers(unet)
    weights = sum(layer.weight.numel() for layer in layers.values())
    before = peak_gib()
    start = time.perf_counter()
    chosen: dict[str, int] = {}
    for layer in layers.values():
        winner = search_rows(layer.weight, formats_of_width(4, signed=True), SPACE).winner
        chosen[winner.format.name] = chosen.get(winner.format.name, 0) + 1
    seconds = time.perf_counter() - start
    print(
        f"2. UNet of Stable Diffusion 1.5's configuration: {weights / 1e6:.0f} M weights in {len(layers)} layers"
    )
    print(f"searched per output channel in {seconds:.0f} s (target 240); chosen {chosen}")
    print(
        f"peak memory {peak_gib():.2f} GiB (target 12), {before:.2f} GiB of it before the search, the model itself"
    )


def peak_gib() -> float:
    """Return this process's peak memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="only this part")
    part = parser.parse_args().part
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, seed 0"
    )
    if part != 2:
        compare()
    if part != 1:
        search_large()


if __name__ == "__main__":
    main()
