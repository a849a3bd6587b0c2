"""The part of `gpu.py` that checks: every path of the GPU's kernels against the formula in float64.

Each check makes a layer on the CPU, computes its output from its codes in float64 there, moves it
to the device, and runs it by one path: Triton, torch's operators, float8, several sets of weights,
packed weights, compiled. The error is the largest difference over the largest output. Run through
``python benchmarks/gpu.py``.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid, quantize
from msfp_cli.layers.kernels import cuda
from msfp_cli.layers.kernels.cuda import Cuda
from msfp_cli.layers.kernels.cuda_fp8 import CudaFp8
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.routing import Route
from msfp_cli.layers.scheme import LayerScheme

FORMATS = ("e1m2", "e2m1", "e3m0", "ue1m3", "ue2m2", "ue3m1", "ue4m0", "e2m5", "ue3m5", "ue1m7")
LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": ((1280, 640), {}, (300, 1280)),
    "odd linear": ((37, 21), {}, (3, 5, 37)),
    "one row": ((320, 1280), {}, (1, 320)),
    "3x3": ((64, 96), {"kernel_size": 3, "padding": 1}, (2, 64, 17, 16)),
    "3x3, few channels": ((4, 320), {"kernel_size": 3, "padding": 1}, (2, 4, 16, 16)),
    "stride": ((64, 64), {"kernel_size": 3, "padding": 1, "stride": 2}, (2, 64, 16, 15)),
    "dilation": ((32, 32), {"kernel_size": 3, "padding": 2, "dilation": 2}, (1, 32, 9, 11)),
    "groups": ((64, 32), {"kernel_size": 3, "padding": 1, "groups": 4}, (2, 64, 8, 8)),
    "1x1": ((320, 640), {"kernel_size": 1}, (2, 320, 16, 16)),
    "patches": ((4, 64), {"kernel_size": 2, "stride": 2}, (2, 4, 32, 32)),
    "wide padding": ((16, 24), {"kernel_size": (1, 5), "padding": (3, 4)}, (1, 16, 3, 7)),
}
FLOAT8_LIMIT = 2e-3  # products are exact; the accumulator of some units is not


class Check(NamedTuple):
    """A layer to run, and how."""

    path: str
    layer: str
    format: str
    dtype: torch.dtype = torch.float32
    hub: int = 1

    def limit(self) -> float:
        """Return the error that is allowed."""
        limit = FLOAT8_LIMIT if self.path == "float8" else 1e-5
        return (
            max(limit, float(torch.finfo(self.dtype).eps)) if self.dtype != torch.float32 else limit
        )


def checks() -> Iterator[Check]:
    """Yield all checks; they need few enough variants of the kernels to compile in two minutes."""
    for fmt in FORMATS:
        for path in ("Triton", "torch", "float8"):
            yield Check(path, "odd linear", fmt)
    for path, layer in itertools.product(("Triton", "torch"), LAYERS):
        yield Check(path, layer, "ue3m1")
        yield Check(path, layer, "e2m1")
    for layer in ("linear", "one row"):
        yield Check("float8", layer, "ue2m2")
    for dtype, layer in itertools.product((torch.float16, torch.bfloat16), ("linear", "3x3")):
        yield Check("Triton", layer, "ue2m2", dtype)
        yield Check("compiled", layer, "ue2m2", dtype)
    for path, layer in itertools.product(
        ("Triton", "torch", "packed", "compiled"), ("odd linear", "3x3")
    ):
        yield Check(path, layer, "ue2m2", hub=2)


def make_layer(check: Check) -> Any:  # noqa: ANN401 (one of two classes)
    """Return a layer with random weights, on the CPU; its grid clips a few values at both ends."""
    sizes, options, _ = LAYERS[check.layer]
    generator = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(*sizes, **options) if options else nn.Linear(*sizes)
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    fmt, weight = FloatFormat.parse(check.format), FloatFormat.parse("e2m1")
    zero_point = 0.0 if fmt.signed else -0.71875
    first, *further = (
        Grid(
            fmt,
            float(torch.tensor((2.0 if fmt.signed else 3.0) / fmt.largest)),
            zero_point / (member + 1),
        )
        for member in range(check.hub)
    )
    scheme = LayerScheme(weight=weight, input=first, hub=check.hub, further_inputs=tuple(further))
    layer = (QuantConv2d if options else QuantLinear)(plain, scheme)  # type: ignore[operator]
    for member in range(check.hub):
        values = plain.weight.detach() * (
            1 if member == 0 else torch.randn(plain.weight.shape, generator=generator)
        )
        layer.store_(
            values,
            plain.weight.detach().abs().flatten(1).amax(dim=1) * 0.8 / weight.largest,
            member,
        )
    return layer.requires_grad_(False)


def formula(layer: Any, x: Tensor, member: int) -> Tensor:  # noqa: ANN401
    """Compute a layer's output from its codes in float64."""
    grid, weights = layer.scheme.input_of(member), layer.weight_grid()
    book = torch.tensor(grid.format.code_book, dtype=torch.float64)
    values = book[quantize(x, grid).long()] * grid.scale + grid.zero_point
    weight, bias = layer.integers(member).double() * weights.scale.double(), layer.bias.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(values, weight, bias)
    y: Tensor = layer._conv_forward(values, weight, bias)
    return y


@torch.no_grad()
def error_of(check: Check, device: str) -> float:
    """Run a check, and return its largest error relative to the largest output."""
    layer, largest = make_layer(check), 0.0
    x = torch.randn(LAYERS[check.layer][2], generator=torch.Generator().manual_seed(1)).to(
        check.dtype
    )
    expected = [formula(layer, x, member) for member in range(check.hub)]
    layer.to(device)
    kind = CudaFp8 if check.path == "float8" else Cuda
    kernel = kind(layer, keep_packed=check.path == "packed")
    on_bytes = kernel.cuda if check.path == "float8" else kernel
    on_bytes.fused = on_bytes.fused and check.path != "torch"
    layer.take_kernel_(kernel)
    layer.route = Route[Any]()
    torch.compiler.reset()
    called = torch.compile(layer, fullgraph=True) if check.path == "compiled" else layer
    for member, wanted in enumerate(expected):
        layer.route.open(
            [torch.tensor(member, device=device) if check.path == "compiled" else member]
        )
        y = called(x.to(device))
        if y.dtype != check.dtype or y.shape != wanted.shape:
            return float("inf")
        largest = max(largest, float((y.cpu().double() - wanted).abs().max() / wanted.abs().max()))
    return largest


def print_checks(device: str = "cuda", limited_to: int | None = None) -> None:
    """Run the checks, and print lines of JSON: one for each path, and one for each that fails."""
    errors: dict[str, list[float]] = {}
    for check in itertools.islice(checks(), limited_to):
        if (
            check.path == "float8"
            and device == "cuda"
            and torch.cuda.get_device_capability() < (8, 9)
        ):
            continue
        if check.path == "Triton" and cuda.triton_ops(torch.device(device)) is None:
            continue
        try:
            error, why = error_of(check, device), ""
        except Exception as raised:  # noqa: BLE001 (reported, and the next check is worth running)
            error, why = float("inf"), f", {type(raised).__name__}: {raised}".splitlines()[0][:200]
        errors.setdefault(check.path, []).append(error)
        if not error <= check.limit():
            description = f"{check.path}, {check.layer}, {check.format}, {check.dtype}"
            failure = f"{description}, hub of {check.hub}: {error:.1e}{why}"
            print(json.dumps({"wrong": failure}), flush=True)
    for path, found in errors.items():
        print(json.dumps({"path": path, "count": len(found), "largest": max(found)}), flush=True)


# Which tile is best.

SHAPES = (  # rows, height, width, channels, outs, kernel
    (2, 64, 64, 320, 320, 3),
    (2, 32, 32, 640, 640, 3),
    (2, 16, 16, 1280, 1280, 3),
    (2, 8, 8, 1280, 1280, 3),
    (2, 128, 128, 320, 320, 3),
    (1, 8192, 1, 320, 320, 1),
    (1, 8192, 1, 320, 2560, 1),
    (1, 2048, 1, 1280, 10240, 1),
    (1, 2048, 1, 1152, 4608, 1),
    (1, 154, 1, 2048, 1280, 1),
    (1, 2, 1, 1280, 1280, 1),
)


@torch.no_grad()
def print_tiles() -> None:
    """Time every tile on the products that denoisers have, beside what `choose_tile` takes."""
    from triton.testing import do_bench

    ops = cuda.triton_ops(torch.device("cuda"))
    if ops is None:
        raise SystemExit("--tiles needs Triton, and a GPU from Ampere on")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    print(
        "| product | " + " | ".join("x".join(map(str, tile)) for tile in ops.TILES) + " | chosen |"
    )
    print("|---" * (len(ops.TILES) + 2) + "|")
    for batch, height, width, channels, outs, taps in SHAPES:
        plain = nn.Conv2d(channels, outs, taps, padding=taps // 2, device="cuda")
        grid = Grid(FloatFormat.parse("ue2m2"), 0.125, -0.25)
        layer = QuantConv2d(plain, LayerScheme(weight=FloatFormat.parse("e2m1"), input=grid))
        layer.store_(plain.weight, torch.full((outs,), 0.01, device="cuda"))
        kernel = Cuda(layer, keep_packed=False)
        x = torch.randn(batch, channels, height, width, device="cuda")
        planes = kernel.round(x, kernel.members)
        y = torch.empty(batch, outs, height, width, device="cuda", dtype=torch.bfloat16)
        cells = []
        for tile in ops.TILES:
            arguments = (y, planes, kernel.tensors, kernel.members, kernel.geometry, 0, tile)
            cells.append(f"{do_bench(lambda arguments=arguments: ops.multiply_(*arguments)):.3f}")
        chosen = ops.choose_tile(batch * height * width, outs, processors)
        shape = f"{batch}x{height}x{width}x{channels} to {outs}, {taps}x{taps}"
        print(
            f"| {shape} | " + " | ".join(cells) + f" | {'x'.join(map(str, chosen))} |", flush=True
        )
