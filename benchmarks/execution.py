"""Time and memory of one denoiser call: full precision, msfp, and the peers that run on a CPU.

    python benchmarks/execution.py --work DIR [--models a,b] [--threads 1,2] [--only TEXT]...
        [--skip TEXT] [--calls N] [--rounds N] [--peers PYTHON] [--markdown FILE]

Three denoisers are measured: the built-in pipeline's UNet with 16 rows; a UNet with the
configuration of Stable Diffusion 1.5, latents of 64x64, 2 rows; and a DiTTransformer2DModel with
that of DiT-XL/2 at 512 pixels, 2 rows. (`--models tiny` measures a UNet of a few thousand weights,
to try the script.) All but the first have random weights, and their input grids are chosen on
random inputs: such a model draws nothing, but its speed is the same, as it does not depend on the
values.

Each row of a table is a fresh process that loads the denoiser from disk and calls it. Rows whose
name ends in "bfloat16" compute in that type what is not in bytes. OpenVINO's conversions, and what
NNCF makes of one (post-training quantization to int8, on one call), are made once and kept in
--work; both run here where they are installed (``pip install 'msfp[openvino]' nncf``). A table
shows the median of the calls after the first; the largest resident size of the process, libraries
included; what loading takes, quantizing or laying out included: seconds, and by how much the
largest resident size rose; and the bytes of the weights in memory, tensor by tensor. Peers are
called through their own interface, in an environment where they are installed (`peers.py` makes
one); a row that fails is listed with the reason. Leave the machine alone meanwhile; where others
use it, ``--rounds 3`` measures all rows in turn three times and shows each row's fastest round.
Linux only.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

Arguments = dict[str, Any]
SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # the class's other defaults are SD 1.5's
DIT_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 64,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
TINY = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
CONFIGS = {"sd15": SD15, "dit-xl": DIT_XL, "tiny": TINY}
CLASSES: dict[str, Any] = {
    "built-in": UNet2DConditionModel,
    "sd15": UNet2DConditionModel,
    "dit-xl": DiTTransformer2DModel,
    "tiny": UNet2DConditionModel,
}
TITLES = {
    "built-in": "built-in pipeline, 16 rows",
    "sd15": "SD 1.5-sized UNet, 2 rows",
    "dit-xl": "DiT-XL/2, 2 rows",
    "tiny": "a tiny UNet, 2 rows",
}
DEFAULT_MODELS = "built-in,sd15,dit-xl"
ROWS = (
    "float32",
    "bfloat16",
    "msfp cpu",
    "msfp cpu, bfloat16",
    "msfp cpu, packed",
    "msfp openvino",
    "msfp openvino, bfloat16",
    "msfp openvino-qk8",
    "msfp openvino-qk8, bfloat16",
    "OpenVINO",
    "OpenVINO, bfloat16",
    "NNCF int8",
    "NNCF int8, bfloat16",
    "msfp reference",
    "msfp simulated",
    "msfp cpu, compiled",
    "float32, compiled",
    "bfloat16, compiled",
    "sdnq int8, int8 inputs",
    "sdnq uint4",
    "torchao int8, int8 inputs",
    "torchao int8",
    "quanto qint8",
    "quanto qint4",
)
PEERS = ("sdnq", "torchao", "quanto")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def inputs_of(
    name: str,
    denoiser: Any,  # noqa: ANN401 (a diffusers model)
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Return the arguments of one call, drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    config = denoiser.config
    rows = 16 if name == "built-in" else 2
    sample = torch.randn(
        rows, config.in_channels, config.sample_size, config.sample_size, generator=generator
    ).to(dtype)
    if name == "dit-xl":
        return {
            "hidden_states": sample,
            "timestep": torch.full((rows,), 500),
            "class_labels": torch.arange(rows),
            "return_dict": False,
        }
    text = torch.randn(rows, 77, config.cross_attention_dim, generator=generator).to(dtype)
    return {
        "sample": sample,
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text,
        "return_dict": False,
    }


# What is loaded: made once, kept in --work.


def make_float(name: str, directory: Path) -> None:
    """Write the float32 denoiser."""
    if name == "built-in":
        from msfp_cli.pipelines.loading import BUILT_IN, ModelSource, load_pipeline

        load_pipeline(ModelSource(model=BUILT_IN), "cpu").unet.save_pretrained(directory)
        return
    torch.manual_seed(0)
    CLASSES[name](**CONFIGS[name]).save_pretrained(directory)


@torch.no_grad()
def make_quantized(name: str, source: Path, directory: Path) -> None:
    """Choose W4A4 formats on one call, as by default but without lift, and write the denoiser."""
    from msfp_cli.calibration.layer_search import search_layer
    from msfp_cli.calibration.observe import observe
    from msfp_cli.calibration.recipe import CalibrateRecipe
    from msfp_cli.checkpoint.quantizer import MSFPConfig, mark_quantized_
    from msfp_cli.formats.search import SearchSpace
    from msfp_cli.layers.replace import find_layers, quantized_layers, store_layers_
    from msfp_cli.pipelines.denoiser import DenoiserCall
    from msfp_cli.pipelines.watch import watch_calls

    denoiser = CLASSES[name].from_pretrained(source)
    calls: list[DenoiserCall] = []
    with watch_calls({"denoiser": denoiser}, calls.append):
        denoiser(**inputs_of(name, denoiser))
    generator = torch.Generator().manual_seed(0)
    seen = observe(
        denoiser,
        calls,
        len(calls),
        max_samples=20_000,
        generator=generator,
        advance=lambda steps, note="": None,
    )
    layers = {layer: module for layer, module in find_layers(denoiser).items() if layer in seen}
    space = SearchSpace(num_maxima=20, num_zero_points=5, num_refinements=0)
    table = {}
    scales = {}
    for layer, module in layers.items():
        found = search_layer(layer, module, seen[layer], CalibrateRecipe(lift=0.0), space)
        # The default recipe leaves the first and the last layer in floating point.
        if found.scale is not None:
            table[layer] = found.choice.scheme
            scales[layer] = found.scale
    del layers
    store_layers_(denoiser, table, scales)
    described = {
        layer: quantized.scheme.to_json() for layer, quantized in quantized_layers(denoiser).items()
    }
    mark_quantized_(denoiser, MSFPConfig(layers=described))
    denoiser.save_pretrained(directory)


# One row: load, call, report. Runs in a process of its own.


def load_msfp(
    path: Path,
    name: str,
    kernel: str,
    dtype: torch.dtype = torch.float32,
    *,
    keep_packed: bool = False,
) -> nn.Module:
    """Load a quantized denoiser and prepare its layers."""
    import msfp_cli

    denoiser: nn.Module = CLASSES[name].from_pretrained(path / f"{name}-msfp", torch_dtype=dtype)
    msfp_cli.prepare_(denoiser, kernel, keep_packed=keep_packed)
    return denoiser


def load_peer(path: Path, name: str, row: str) -> nn.Module:
    """Load the float32 denoiser and quantize it with a peer."""
    denoiser: Any = CLASSES[name].from_pretrained(path / f"{name}-float32")
    if row.startswith("sdnq"):
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
        from sdnq import SDNQConfig, sdnq_post_load_quant

        options = {"weights_dtype": "uint4"} if "uint4" in row else {"use_quantized_matmul": True}
        sdnq_post_load_quant(denoiser, quantization_config=SDNQConfig(quant_conv=True, **options))
    elif row.startswith("torchao"):
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        quantize_(
            denoiser,
            Int8DynamicActivationInt8WeightConfig() if "inputs" in row else Int8WeightOnlyConfig(),
        )
    else:
        from optimum.quanto import freeze, quantize

        quantize(denoiser, weights=row.split()[1])
        freeze(denoiser)
    return denoiser


def load_openvino(path: Path, name: str, row: str) -> nn.Module:
    """Load the float32 denoiser, or ours, and let OpenVINO run it."""
    from msfp_cli.engines.openvino import attach_
    from msfp_cli.engines.package import NAME

    engine = row.partition(",")[0]
    kind = "msfp" if row.startswith("msfp") else "float32"
    denoiser: Any = CLASSES[name].from_pretrained(
        path / f"{name}-{kind}", torch_dtype=dtype_of(row)
    )
    kernel = engine.removeprefix("msfp ") if kind == "msfp" else NAME
    place = path / f"{name}-{kind}-openvino"
    attach_(denoiser, f"{name}-{kind}", kernel=kernel, place=place)
    return denoiser


class Compiled(nn.Module):
    """A model of OpenVINO, called as a denoiser."""

    def __init__(self, compiled: Any, config: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.compiled = compiled
        self.config = config

    def forward(self, return_dict: bool, **arguments: Tensor) -> Any:  # noqa: ANN401
        """Return the outputs."""
        return self.compiled([tensor.float().numpy() for tensor in arguments.values()])


def load_nncf(path: Path, name: str, row: str) -> nn.Module:
    """Quantize the converted float32 denoiser with NNCF, unless that was done, and compile it."""
    from msfp_cli.engines.package import core, import_openvino

    config = CLASSES[name].load_config(path / f"{name}-float32")
    kept = path / f"{name}-nncf" / "model.xml"
    inputs = inputs_of(name, argparse.Namespace(config=argparse.Namespace(**config)))
    del inputs["return_dict"]
    arrays = [tensor.float().numpy() for tensor in inputs.values()]
    if not kept.exists():
        import nncf

        converted = next((path / f"{name}-float32-openvino").glob("*/model.xml"))
        model = core().read_model(converted)
        model.reshape({i: list(array.shape) for i, array in enumerate(arrays)})
        quantized = nncf.quantize(
            model, nncf.Dataset([arrays]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER
        )
        import_openvino().save_model(quantized, kept, compress_to_fp16=False)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype_of(row) == torch.bfloat16 else "f32",
    }
    compiled = core().compile_model(core().read_model(kept), "CPU", settings)
    return Compiled(compiled, argparse.Namespace(**config))


def dtype_of(row: str) -> torch.dtype:
    """Return the type in which a row computes what is not in bytes."""
    return torch.bfloat16 if "bfloat16" in row else torch.float32


def load_row(path: Path, name: str, row: str) -> nn.Module:
    """Load the denoiser of a row."""
    if row.startswith(("float32", "bfloat16")):
        plain = CLASSES[name].from_pretrained(path / f"{name}-float32")
        is_picture = name != "dit-xl" and row.startswith("bfloat16")
        layout = torch.channels_last if is_picture else torch.preserve_format
        denoiser: nn.Module = plain.to(dtype_of(row), memory_format=layout)
    elif row.startswith(("OpenVINO", "msfp openvino")):
        denoiser = load_openvino(path, name, row)
    elif row.startswith("NNCF"):
        denoiser = load_nncf(path, name, row)
    elif row.startswith("msfp"):
        kernel = row.removeprefix("msfp ").partition(",")[0]
        denoiser = load_msfp(path, name, kernel, dtype_of(row), keep_packed=row.endswith("packed"))
    else:
        denoiser = load_peer(path, name, row)
    return denoiser


def openvino_bytes(path: Path, name: str, row: str) -> int | None:
    """Count the bytes of a model's constants that OpenVINO reads; None for other rows."""
    kind = {
        "OpenVINO": "float32-openvino/*",
        "msfp openvino": "msfp-openvino/*",
        "msfp openvino-qk8": "msfp-openvino/*",
        "NNCF int8": "nncf",
    }
    place = kind.get(row.partition(",")[0])
    if place is None:
        return None
    return next(path.glob(f"{name}-{place}/model.bin")).stat().st_size


def tensor_bytes(module: nn.Module) -> int:
    """Count the bytes of a model's tensors, what kernels hold among them."""
    held = list(module.parameters()) + list(module.buffers())
    for layer in module.modules():
        kernel = getattr(layer, "kernel", None)
        held += [tensor for tensor in getattr(kernel, "weights", ())]
    return sum(_bytes(tensor) for tensor in held)


def _bytes(tensor: Tensor) -> int:
    """Count one tensor's bytes; those of a tensor that wraps others are theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no VmHWM in /proc/self/status: this needs Linux")


@torch.no_grad()
def measure(path: Path, name: str, row: str, calls: int) -> Arguments:
    """Load, call, and return what it took."""
    before = peak_bytes()
    start = time.perf_counter()
    denoiser = load_row(path, name, row)
    loading = time.perf_counter() - start
    loaded = peak_bytes()
    arguments = inputs_of(name, denoiser, dtype_of(row))
    called: Callable[..., Any] = (
        torch.compile(denoiser, fullgraph=True) if "compiled" in row else denoiser
    )
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        called(**arguments)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),
        "first": seconds[0],
        "loading": loading,
        "loading_bytes": loaded - before,
        "peak_bytes": peak_bytes(),
        "weight_bytes": openvino_bytes(path, name, row) or tensor_bytes(denoiser),
    }


# The table.


def run_row(arguments: argparse.Namespace, name: str, row: str, threads: str) -> Arguments:
    """Measure a row in a fresh process; return its figures, or why there are none."""
    python = arguments.peers if row.startswith(PEERS) else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if python is None:
        return {"failed": "give --peers, a Python where it is installed"}
    command = [python, __file__, "--work", str(arguments.work), "--calls", str(arguments.calls)]
    command += ["--measure", name, "--only", row]
    try:
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=arguments.timeout
        )
    except subprocess.TimeoutExpired:
        return {
            "failed": f"took more than {arguments.timeout:.0f} s for {arguments.calls + 1} calls"
        }
    lines = finished.stdout.strip().splitlines()
    if finished.returncode:
        return {"failed": (finished.stderr.strip().splitlines() or ["killed"])[-1][:160]}
    figures: Arguments = json.loads(lines[-1])
    return figures


def measure_rows(arguments: argparse.Namespace, name: str, threads: str) -> list[str]:
    """Measure a model's rows, float32 first, and return their table."""
    chosen = [
        row
        for row in ROWS
        if any(text in row for text in arguments.only or [""]) and arguments.skip not in row
    ]
    results: dict[str, Arguments] = {}
    for row in [*dict.fromkeys(("float32", *chosen))] * arguments.rounds:
        figures = run_row(arguments, name, row, threads)
        print(name, row, figures, file=sys.stderr, flush=True)
        if row not in results or seconds_of(figures) < seconds_of(results[row]):
            results[row] = figures
    return table(f"{TITLES[name]}; threads: {threads}", results)


def seconds_of(figures: Arguments) -> float:
    """Return the seconds of a call; infinity for a row that failed."""
    seconds: float = figures.get("seconds", math.inf)
    return seconds


COLUMNS = (
    *("", "seconds a call", "times faster", "weights, MB", "of float32"),
    *("peak, MB", "loading, s", "loading adds, MB"),
)


def table(title: str, results: dict[str, Arguments]) -> list[str]:
    """Return a model's table."""
    lines = [f"### {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row, figures in results.items():
        lines.append(f"| {row} | {' | '.join(cells(figures, results['float32']))} |")
    return lines


def cells(figures: Arguments, base: Arguments) -> list[str]:
    """Return a row's cells, compared with those of float32."""
    if "failed" in figures:
        return [figures["failed"], *[""] * (len(COLUMNS) - 2)]
    return [
        f"{figures['seconds']:.3f}",
        f"{base['seconds'] / figures['seconds']:.2f}" if "seconds" in base else "",
        f"{figures['weight_bytes'] / 1e6:.1f}",
        f"{figures['weight_bytes'] / base['weight_bytes']:.3f}" if "weight_bytes" in base else "",
        f"{figures['peak_bytes'] / 1e6:.0f}",
        f"{figures['loading']:.1f}",
        f"{figures['loading_bytes'] / 1e6:.0f}",
    ]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="keep the models here")
    parser.add_argument("--models", default=DEFAULT_MODELS, help="which of them")
    parser.add_argument("--threads", default="1", help="numbers of threads, a table for each")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="rows whose name contains this; repeatable"
    )
    parser.add_argument("--skip", default="nothing", help="leave out rows whose name contains this")
    parser.add_argument("--calls", type=int, default=3, help="counted calls")
    parser.add_argument("--rounds", type=int, default=1, help="the fastest of these is shown")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a row may take")
    parser.add_argument("--peers", help="a Python where the peers are installed")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.models.split(","):
        if name not in CLASSES:
            parser.error(f"unknown model {name!r}; choose from {', '.join(CLASSES)}")
    return arguments


def make(work: Path, name: str) -> None:
    """Write a model in float32 and quantized, unless it is there."""
    plain = work / f"{name}-float32"
    if not plain.exists():
        make_float(name, plain)
    quantized = work / f"{name}-msfp"
    if not quantized.exists():
        make_quantized(name, plain, quantized)


def instruction_sets() -> str:
    """Name what this processor has of what matters here."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return ", ".join(name for name in INSTRUCTION_SETS if name in flags)


def main() -> None:
    """Make what is missing, measure, print."""
    arguments = parse()
    if arguments.measure:
        (row,) = arguments.only
        print(json.dumps(measure(arguments.work, arguments.measure, row, arguments.calls)))
        return
    measured = f"{arguments.calls} calls a row, the fastest of {arguments.rounds} rounds"
    lines = [f"torch {torch.__version__}, {measured}; {instruction_sets()}", ""]
    for name in arguments.models.split(","):
        make(arguments.work, name)
        for threads in arguments.threads.split(","):
            lines += [*measure_rows(arguments, name, threads), ""]
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
