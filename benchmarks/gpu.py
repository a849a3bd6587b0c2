"""Check the kernels for NVIDIA GPUs, and time denoisers with them, in under 8 minutes.

    python benchmarks/gpu.py [--models a,b] [--rows a,b] [--budget SECONDS] [--calls N] [--markdown
    FILE] [--tiles]

First every path of the kernels runs layers of all kinds against the formula in float64 on the CPU;
the largest error of each path is shown, and the exit status is 1 where one is too large. Then come
a UNet with the configuration of Stable Diffusion 1.5, 2 and 16 rows; one with that of SDXL, 1024
pixels, 2 rows; and a transformer with that of DiT-XL/2 at 512 pixels, 2 rows. Weights are random
and the formats are given by rule of thumb, e2m1 and ue2m2 by turns, first and last layers and time
embedding at 8 bits: speed does not depend on values. Times are medians of CUDA events around a
call; the peak is torch's, from the first call on, compilation included, but not what ``msfp auto``
tries. ``compiled`` is
``torch.compile(fullgraph=True)`` with CUDA graphs (``--mode reduce-overhead``), for bf16 and for
ours alike. ``msfp auto`` is what a user gets who says nothing: each layer has measured which kernel
is exact and fastest; the other rows of ours have one kernel for all layers.

A model is a process of its own, so that a failure costs its rows only. What does not fit the budget
is left out, and the table says so; ``--models`` and ``--rows`` measure it alone. ``--tiles`` times
every tile of the product instead.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from execution import DIT_XL, SD15, inputs_of
from torch import Tensor, nn

Figures = dict[str, Any]
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class Model(NamedTuple):
    """A denoiser to time, and its share of the budget."""

    title: str
    kind: Any
    config: dict[str, Any]
    rows: int
    share: float


MODELS = {
    "sd15": Model("SD 1.5-sized UNet, 2 rows", UNet2DConditionModel, SD15, 2, 1.0),
    "dit-xl": Model("DiT-XL/2, 2 rows", DiTTransformer2DModel, DIT_XL, 2, 0.7),
    "sdxl": Model("SDXL-sized UNet, 2 rows", UNet2DConditionModel, SDXL, 2, 1.6),
    "sd15-16": Model("SD 1.5-sized UNet, 16 rows", UNet2DConditionModel, SD15, 16, 1.0),
}
CHECKS = "checks"
CHECKS_SHARE = 1.2
ROWS = (
    "bf16",
    "bf16 compiled",
    "msfp int8",
    "msfp int8 compiled",
    "msfp auto",
    "msfp auto compiled",
    "msfp fp8",
    "msfp fp8 compiled",
)
BASE = "bf16 compiled"
AUTO = "msfp auto"
KERNELS = {AUTO: "auto", "msfp int8": "cuda", "msfp fp8": "cuda-fp8"}
OUT_OF_TIME = "out of time"


# What is timed.


def arguments_of(name: str, denoiser: Any, rows: int) -> dict[str, Any]:  # noqa: ANN401 (a diffusers model)
    """Return the arguments of one call, on the CPU, drawn with seed 0."""
    arguments = inputs_of(name, denoiser)
    if name == "sdxl":
        generator = torch.Generator().manual_seed(1)
        text = torch.randn(2, 1280, generator=generator)
        arguments["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.zeros(2, 6)}
    return {key: _several(value, rows // 2) for key, value in arguments.items()}


def _several(value: Any, times: int) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _several(inner, times) for key, inner in value.items()}
    return (
        value.repeat_interleave(times, dim=0) if isinstance(value, Tensor) and value.ndim else value
    )


def to_gpu(value: Any) -> Any:  # noqa: ANN401
    """Move tensors to the GPU; floating-point ones become bfloat16."""
    if isinstance(value, dict):
        return {key: to_gpu(inner) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to("cuda", torch.bfloat16 if value.is_floating_point() else None)


@torch.no_grad()
def quantize_(denoiser: nn.Module) -> None:
    """Quantize a denoiser by rule of thumb, where it is."""
    from msfp_cli.formats.float_format import FloatFormat
    from msfp_cli.formats.rounding import Grid
    from msfp_cli.layers.replace import find_layers, store_layers_
    from msfp_cli.layers.scheme import LayerScheme

    grids = [("e2m1", 4.0, 0.0), ("ue2m2", 4.0, -0.25), ("e2m5", 4.0, 0.0)]
    signed, unsigned, wide = (
        Grid(FloatFormat.parse(n), top / FloatFormat.parse(n).largest, z) for n, top, z in grids
    )
    table, scales = {}, {}
    for i, (name, layer) in enumerate(find_layers(denoiser).items()):
        is_table = isinstance(layer, torch.nn.Embedding)
        is_edge = name.startswith(
            ("conv_in", "conv_out", "time_embedding", "pos_embed", "proj_out")
        )
        fmt = FloatFormat.parse("e1m6" if is_edge or is_table else "e2m1")
        grid = None if is_table else wide if is_edge else (signed, unsigned)[i % 2]
        table[name] = LayerScheme(weight=fmt, input=grid, lookup=is_table)
        scales[name] = (
            layer.weight.float().abs().flatten(1).amax(dim=1).clamp(min=1e-6) * 0.8 / fmt.largest
        )
    store_layers_(denoiser, table, scales)


def time_calls(called: Callable[..., Any], arguments: dict[str, Any], calls: int) -> Figures:
    """Return the median milliseconds of a call, and the peak of memory since before the first."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    called(**arguments)
    torch.cuda.synchronize()
    print(f"first call: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    for _ in range(3):  # record CUDA graphs, and replay them
        called(**arguments)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(calls)
    ]
    for start, end in events:
        start.record()
        called(**arguments)
        end.record()
        end.synchronize()
    milliseconds = statistics.median(start.elapsed_time(end) for start, end in events)
    return {"milliseconds": milliseconds, "peak_bytes": torch.cuda.max_memory_allocated()}


def rows_in_time(
    rows: Sequence[str], seconds: float, clock: Callable[[], float]
) -> Iterator[tuple[str, bool]]:
    """Yield each row, and whether there is time for it.

    As much as the longest row of its kind took has to be left. Rows that measure kernels are a kind
    of their own.
    """
    started = clock()
    longest: dict[tuple[bool, bool], float] = {}
    for row in rows:
        begun = clock()
        kind = (row.endswith("compiled"), row == AUTO)
        yield row, seconds - (begun - started) >= longest.get(kind, 0.0)
        longest[kind] = max(longest.get(kind, 0.0), clock() - begun)


def measured(denoiser: nn.Module, arguments: dict[str, Any]) -> dict[str, int]:
    """Let each layer measure its kernels, and count the layers by the kernel that they chose."""
    from msfp_cli.layers.prepare import kernels_in

    denoiser(**arguments)
    return dict(Counter(kernel for kernel, _ in kernels_in(denoiser).values()))


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> None:
    """Time the rows of a model, and print each as a line of JSON."""
    import msfp_cli

    model = MODELS[name]
    with torch.device("cuda"):
        torch.manual_seed(0)
        denoiser = model.kind(**model.config).to(torch.bfloat16).eval().requires_grad_(False)
    arguments = to_gpu(arguments_of(name.removesuffix("-16"), denoiser, model.rows))
    prepared = "bf16"
    for row, in_time in rows_in_time(options.rows.split(","), options.seconds, time.perf_counter):
        if not in_time:
            print(json.dumps({"row": row, "failed": OUT_OF_TIME}), flush=True)
            continue
        kernel = row.removesuffix(" compiled")
        try:
            if kernel != prepared:
                if prepared == "bf16":
                    quantize_(denoiser)
                prepared = kernel
                msfp_cli.prepare_(denoiser, KERNELS[kernel])
                if kernel == AUTO:
                    print(
                        f"auto chose {measured(denoiser, arguments)}", file=sys.stderr, flush=True
                    )
            torch.compiler.reset()
            compile_ = row.endswith("compiled")
            called = (
                torch.compile(denoiser, fullgraph=True, mode=options.mode) if compile_ else denoiser
            )
            figures = time_calls(called, arguments, options.calls)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next row is worth trying)
            figures = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
        print(json.dumps({"row": row, **figures}), flush=True)


# The processes and the table.


def seconds_for(name: str, left: float, waiting: Sequence[str]) -> float:
    """Return the seconds that the next part may take of those left to it and later parts."""
    shares = {CHECKS: CHECKS_SHARE, **{key: model.share for key, model in MODELS.items()}}
    return left * shares[name] / sum(shares[part] for part in (name, *waiting))


def run_part(name: str, seconds: float, options: argparse.Namespace) -> list[Figures]:
    """Run a part in a process of its own, and return what it printed within its time."""
    command = [sys.executable, __file__, "--measure", name, "--seconds", str(seconds)]
    command += ["--rows", options.rows, "--calls", str(options.calls), "--mode", options.mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, complaints = process.communicate(timeout=seconds)
        reason = (complaints.strip().splitlines() or ["killed"])[-1][:160]
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        reason = OUT_OF_TIME
    found: list[Figures] = []
    for line in printed.splitlines():
        if line.startswith("{") and line.endswith("}"):
            found.append(json.loads(line))
    if process.returncode:
        found.append({"ended": reason})
    return found


def table(results: dict[str, list[Figures]], wanted: Sequence[str] = ROWS) -> list[str]:
    """Return the table of all models; a row that is missing says why."""
    lines = [
        "| denoiser | | milliseconds a call | times bf16 compiled | peak, MB |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        rows = {figures["row"]: figures for figures in found if "row" in figures}
        ended = next((figures["ended"] for figures in found if "ended" in figures), OUT_OF_TIME)
        base = rows.get(BASE, {}).get("milliseconds")
        for row in wanted:
            figures = rows.get(row, {"failed": ended})
            if "failed" in figures:
                lines.append(f"| {MODELS[name].title} | {row} | {figures['failed']} | | |")
                continue
            milliseconds, peak = figures["milliseconds"], figures["peak_bytes"] / 1e6
            ratio = f"{base / milliseconds:.2f}" if base else ""
            lines.append(
                f"| {MODELS[name].title} | {row} | {milliseconds:.2f} | {ratio} | {peak:.0f} |"
            )
    return lines


def check_lines(found: list[Figures]) -> tuple[list[str], bool]:
    """Return what the checks found, and whether all is well."""
    lines, well = [], bool(found)
    for figures in found:
        if "ended" in figures:
            lines.append(f"checks: {figures['ended']}")
            well = False
        elif "path" in figures:
            lines.append(
                f"{figures['path']}: {figures['count']} layers, "
                f"largest error {figures['largest']:.1e}"
            )
        else:
            lines.append(f"WRONG: {figures['wrong']}")
            well = False
    return lines, well


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="which of them")
    parser.add_argument("--rows", default=",".join(ROWS), help="which of the table's rows")
    parser.add_argument("--no-checks", action="store_true", help="leave the checks out")
    parser.add_argument("--budget", type=float, default=460, help="seconds in all")
    parser.add_argument("--calls", type=int, default=20, help="timed calls")
    parser.add_argument("--mode", default="reduce-overhead", help="of torch.compile")
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    parser.add_argument(
        "--tiles", action="store_true", help="time every tile of the product instead"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=460, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for what, chosen, known in (("model", options.models, MODELS), ("row", options.rows, ROWS)):
        unknown = [name for name in chosen.split(",") if name not in known]
        if unknown:
            parser.error(f"unknown {what} {unknown[0]!r}; choose from {', '.join(known)}")
    return options


def main() -> int:
    """Check, measure, print."""
    options = parse()
    if not torch.cuda.is_available():
        print("gpu.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    if options.measure or options.tiles:
        import gpu_checks

        parts: dict[str, Callable[[], None]] = {CHECKS: gpu_checks.print_checks}
        parts |= {name: lambda name=name: measure(name, options) for name in MODELS}  # type: ignore[misc]
        (gpu_checks.print_tiles if options.tiles else parts[options.measure])()
        return 0
    end, well = time.perf_counter() + options.budget, True
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"medians of {options.calls} calls",
        "",
    ]
    waiting = ([] if options.no_checks else [CHECKS]) + options.models.split(",")
    results: dict[str, list[Figures]] = {}
    while waiting:
        name = waiting.pop(0)
        found = run_part(name, seconds_for(name, end - time.perf_counter(), waiting), options)
        print(name, *found, sep="\n  ", file=sys.stderr, flush=True)
        if name == CHECKS:
            checked, well = check_lines(found)
            lines += [*checked, ""]
        else:
            results[name] = found
    lines += table(results, options.rows.split(","))
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
