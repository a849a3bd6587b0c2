"""Show where the time of a denoiser's call goes, with our kernel and in OpenVINO.

    python benchmarks/where_time_goes.py --work DIR [--model sd15] [--threads 1] [--dtype bfloat16]

DIR is the directory of `execution.py`, with the models that it made there. The kernel `cpu` is
observed by torch's profiler, and OpenVINO by its own counters: our engine, and what NNCF made of
the same denoiser, where `execution.py` has measured it. OpenVINO runs neighbouring operations as
one; a group that holds a softmax between two products counts as attention. Leave the machine alone
meanwhile.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from execution import CLASSES, TITLES, inputs_of, load_msfp
from torch import Tensor

from msfp_cli.engines.arguments import Call
from msfp_cli.engines.package import core
from msfp_cli.formats.rounding import Grid

ATTENTION = "attention"
EVERYTHING = "everything else"
CALL = "the whole call"
# What torch's profiler calls a kind of work.
OF_TORCH = {
    "8-bit products": ("onednn::q",),
    "rounding inputs": ("msfp: rounding",),
    ATTENTION: ("aten::scaled_dot_product_attention",),
    "norms": ("aten::group_norm", "aten::layer_norm"),
    "activation functions": ("aten::silu", "aten::gelu"),
}
# What OpenVINO calls it; a "Subgraph" is a group of operations on single elements.
OF_OPENVINO = {
    "8-bit products": ("Convolution", "FullyConnected", "MatMul"),
    "rounding inputs, activation functions, sums": ("Subgraph", "Eltwise", "FakeQuantize"),
    "norms": ("MVN",),
    "moving": ("Reorder", "Transpose", "Split", "Concatenation"),
}


@contextmanager
def named_rounding() -> Iterator[None]:
    """Let the profiler see the rounding of inputs as one thing."""
    from msfp_cli.layers.kernels.cpu import Cpu

    plain = Cpu.round

    def named(kernel: Cpu, x: Tensor, grid: Grid) -> list[Tensor]:
        with torch.profiler.record_function("msfp: rounding inputs"):
            return plain(kernel, x, grid)

    Cpu.round = named  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cpu.round = plain  # type: ignore[method-assign]


def kind_of(name: str, kinds: Mapping[str, tuple[str, ...]]) -> str:
    """Return the kind of work that an operation's name belongs to."""
    return next((kind for kind, names in kinds.items() if name.startswith(names)), EVERYTHING)


@torch.no_grad()
def seconds_of_kernel(work: Path, model: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the seconds of one call with the kernel `cpu`, by kind of work."""
    denoiser = load_msfp(work, model, "cpu", dtype)
    arguments = inputs_of(model, denoiser, dtype)
    denoiser(**arguments)
    with (
        named_rounding(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
    ):
        start = time.perf_counter()
        denoiser(**arguments)
        total = time.perf_counter() - start
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        seconds[kind_of(event.key, OF_TORCH)] += event.cpu_time_total / 1e6
    seconds[EVERYTHING] = 0.0
    return {**seconds, EVERYTHING: total - sum(seconds.values()), CALL: total}


def seconds_of_openvino(
    path: Path, inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Return the seconds of one call of a converted model, by kind of work.

    Arguments:
        path: its ``model.xml``.
        dtype: what it computes in around the products of bytes.
    """
    model = core().read_model(path)
    model.reshape({i: list(tensor.shape) for i, tensor in enumerate(inputs.values())})
    settings = {
        "PERF_COUNT": True,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    arrays = [tensor.numpy() for tensor in inputs.values()]
    request.infer(arrays)
    start = time.perf_counter()
    request.infer(arrays)
    total = time.perf_counter() - start
    operations = compiled.get_runtime_model().get_ops()
    kinds = {each.get_friendly_name(): _kind(each.get_rt_info()) for each in operations}
    seconds: dict[str, float] = defaultdict(float)
    for counter in request.profiling_info:
        kind = kinds.get(counter.node_name, EVERYTHING)
        seconds[kind] += counter.real_time.total_seconds()
    seconds[EVERYTHING] = 0.0
    return {**seconds, EVERYTHING: total - sum(seconds.values()), CALL: total}


def _kind(facts: Any) -> str:  # noqa: ANN401 (OpenVINO's)
    """Return what kind of work an operation does."""
    if "Softmax" in str(facts["originalLayersNames"].value):
        return ATTENTION
    return kind_of(str(facts["layerType"].value), OF_OPENVINO)


def table(title: str, seconds: Mapping[str, float]) -> str:
    """Return the table of where the time goes, the longest first.

    OpenVINO's counters may add up to a little more than the call; then nothing else is left.
    """
    parts = [row for row in seconds.items() if row[0] != CALL and row[1] >= 0]
    parts.sort(key=lambda row: (row[0] == EVERYTHING, -row[1]))
    rows = [*parts, (CALL, seconds[CALL])]
    lines = [f"### {title}", "", "| | seconds | share |", "|---|---|---|"]
    lines += [f"| {kind} | {value:.3f} | {value / seconds[CALL]:.0%} |" for kind, value in rows]
    return "\n".join(lines)


def main() -> None:
    """Print a table for each way to run the denoiser that there is in the directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where execution.py keeps models")
    parser.add_argument("--model", choices=tuple(CLASSES), default="sd15")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, model = arguments.work, arguments.model
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    title = f"{TITLES[model]}, {arguments.dtype}, threads: {arguments.threads}"
    print(table(f"kernel `cpu`, {title}", seconds_of_kernel(work, model, dtype)))
    denoiser = CLASSES[model].from_pretrained(work / f"{model}-msfp")
    given = inputs_of(model, denoiser)
    del given["return_dict"]
    inputs = Call.of(given, "timestep").tensors
    for name, pattern in (("msfp", f"{model}-msfp-openvino/*"), ("NNCF int8", f"{model}-nncf")):
        for path in sorted(work.glob(f"{pattern}/model.xml"))[:1]:
            seconds = seconds_of_openvino(path, inputs, dtype)
            print(f"\n{table(f'{name} in OpenVINO, {title}', seconds)}")


if __name__ == "__main__":
    main()
