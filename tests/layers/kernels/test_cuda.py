"""The GPU's kernel against the formula in float64.

It runs as torch's operators on a CPU, as interpreted Triton, and on a GPU.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layers.kernels.test_kernels import (
    CONVOLUTIONS,
    INPUTS,
    WEIGHTS,
    call,
    close,
    conv,
    draw,
    grid_of,
    in_float64,
    layer_of,
    linear,
    unet,
)
from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.rounding import Grid, quantize
from msfp_cli.layers.kernels import cuda, int8
from msfp_cli.layers.kernels.cuda import Cuda
from msfp_cli.layers.kernels.cuda_fp8 import CudaFp8, e4m3_exponent
from msfp_cli.layers.kernels.geometry import num_window_kinds, taps_of_kinds, window_kinds
from msfp_cli.layers.kernels.registry import AUTO, KERNELS, MEASURED, choose_kernel
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import Route

GPU = torch.cuda.is_available()
INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
TRITON = INTERPRETED or (find_spec("triton") is not None and GPU)
without_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device")
without_triton = pytest.mark.skipif(
    not TRITON, reason="needs Triton, and a GPU or TRITON_INTERPRET=1 from the start"
)
without_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1 from the start"
)
PATHS = [
    pytest.param("torch"),
    pytest.param("triton", marks=[without_interpreter]),
    pytest.param("gpu", marks=[without_gpu]),
]
FORMATS = ["e1m2", "e2m1", "e3m0", "ue1m3", "ue2m2", "ue3m1", "ue4m0", "e2m5", "ue3m5", "ue1m7"]
every_path = pytest.mark.parametrize("path", PATHS)


def bytes_of(kernel: Cuda | CudaFp8) -> Cuda:
    """The kernel on bytes: this one, or the one that it holds."""
    return kernel.cuda if isinstance(kernel, CudaFp8) else kernel


def weights_of(kernel: Cuda | CudaFp8) -> Tensor:
    """The weights that a kernel holds."""
    is_float8 = isinstance(kernel, CudaFp8) and kernel.product is not None
    return kernel.product.weights if is_float8 else bytes_of(kernel).tensors.weights


def prepare(
    layer: Any,  # noqa: ANN401
    path: str,
    kind: type[Cuda | CudaFp8] = Cuda,
    *,
    keep_packed: bool = False,
) -> Any:  # noqa: ANN401
    """Give a layer the kernel, whatever device it is on."""
    if path == "gpu":
        layer.cuda()
    layer.take_kernel_(kind(layer, keep_packed=keep_packed))
    kernel = bytes_of(layer.kernel)
    kernel.fused = kernel.fused and path != "torch"
    assert kernel.fused == (path != "torch")
    return layer


def run(layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    with torch.no_grad():
        y: Tensor = layer(x.to(layer.weight_scale.device))
    assert y.dtype == x.dtype
    return y.cpu()


def check(layer: Any, x: Tensor, path: str, kind: type[Cuda | CudaFp8] = Cuda) -> None:  # noqa: ANN401
    expected = in_float64(layer, x)
    close(run(prepare(layer, path, kind), x), expected)


@every_path
@pytest.mark.parametrize(("make", "shape"), [(linear, (3, 6)), (linear, ()), (conv, (1, 3, 5, 5))])
def test_input_of_another_shape_is_refused(
    make: Callable[..., Any], shape: tuple[int, ...], path: str
) -> None:
    """It has fewer channels than the layer, which the product would fill up with zeros."""
    layer = prepare(make(grid=grid_of(INPUTS["ue2m2"])), path)
    with pytest.raises(RuntimeError, match=r"shape|1D|channels"):
        run(layer, torch.ones(shape))


@every_path
@pytest.mark.parametrize("weight", ["e1m2", "e2m1", "e3m0", "e1m6", "e2m3"])
@pytest.mark.parametrize("fmt", list(INPUTS))
def test_linear_equals_the_formula_for_all_formats(fmt: str, weight: str, path: str) -> None:
    check(linear(weight=WEIGHTS[weight], grid=grid_of(INPUTS[fmt])), draw(3, 7, 12), path)


@every_path
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("options", list(CONVOLUTIONS.values()), ids=list(CONVOLUTIONS))
def test_convolution_equals_the_formula(options: dict[str, Any], fmt: str, path: str) -> None:
    check(conv(grid=grid_of(INPUTS[fmt]), **options), draw(2, 4, 9, 6), path)


pair = st.tuples(st.integers(1, 4), st.integers(1, 3))


@every_path
@given(
    pair, pair, st.tuples(st.integers(0, 5), st.integers(0, 3)), pair,
    st.sampled_from([1, 2, 4]), st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["ue2m2", "ue3m1"]),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_convolution_equals_the_formula(
    path: str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, int],
    fmt: str,
) -> None:
    if any(
        n + 2 * p < d * (k - 1) + 1
        for n, p, d, k in zip(size, padding, dilation, kernel_size, strict=True)
    ):
        return  # torch refuses it, too
    options = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    check(conv(grid=grid_of(INPUTS[fmt]), groups=groups, **options), draw(1, 4, *size), path)


@every_path
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 65, 7), (16, 33, 40), (17, 16, 8), (150, 130, 129)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_sizes_that_fill_no_tile_are_exact(
    shape: tuple[int, int, int], bias: bool, path: str
) -> None:
    rows, inputs, outputs = shape
    layer = layer_of(nn.Linear, inputs, outputs, bias=bias, grid=grid_of(INPUTS["ue3m1"]))
    check(layer, draw(rows, inputs), path)


@every_path
@pytest.mark.parametrize("fmt", ["e2m1", "ue2m2", "ue3m1"])
def test_sums_are_exact(fmt: str, path: str) -> None:
    layer = layer_of(
        nn.Linear, 1024, 8, bias=False, weight=WEIGHTS["e3m0"], grid=Grid(INPUTS[fmt], 1.0)
    )
    layer.weight_scale.fill_(1.0)
    x = draw(16, 1024) * layer.scheme.input.format.largest
    expected = in_float64(layer, x)
    assert torch.equal(run(prepare(layer, path), x).double(), expected.float().double())


@every_path
@pytest.mark.parametrize("exponent", [None, 0, -2], ids=["bytes", "float8", "float8 in quarters"])
@pytest.mark.parametrize("name", list(INPUTS))
def test_bytes_are_the_integers_of_the_codes(name: str, exponent: int | None, path: str) -> None:
    grid, device = grid_of(INPUTS[name]), "cuda" if path == "gpu" else "cpu"
    if exponent is not None and (e4m3_exponent(grid.format) or -99) < exponent:
        exponent = e4m3_exponent(grid.format)
    ends = torch.tensor([0.0, -0.0, 1e9, -1e9, float("inf"), -float("inf"), 1e-40, -1e-40])
    levels = torch.tensor(grid.format.levels) * grid.scale + grid.zero_point
    x = torch.cat([draw(8000), ends, levels, (levels[1:] + levels[:-1]) / 2]).view(1, -1, 1, 1)
    expected = torch.tensor(grid.format.code_book)[quantize(x, grid).long()].permute(0, 2, 3, 1)
    numbers = torch.tensor([grid.scale, grid.zero_point], device=device)
    if path == "torch":
        planes = int8.round_to_bytes(x, numbers, grid.format, exponent)
    else:
        ops, member = (
            cuda.triton_ops(numbers.device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        assert ops is not None
        planes = ops.round_to_bytes(x.to(device), numbers[None], member, grid.format, exponent)
    if exponent is not None:
        assert torch.equal(planes[0].cpu().double(), expected.double() * 2.0**exponent)
        return
    assert len(planes) == 1 + int8.is_wide(grid.format) and all(
        plane.dtype == torch.int8 for plane in planes
    )
    got = sum(plane.cpu().int() * 256**i for i, plane in enumerate(planes)) + int8.shift_of(
        grid.format
    )
    assert torch.equal(got, expected.int())


@every_path
@pytest.mark.parametrize(
    "layout", ["lines", "channels last", "sliced", "transposed", "every other"]
)
def test_input_may_lie_in_any_order_and_the_output_takes_it(layout: str, path: str) -> None:
    x = draw(2, 4, 5, 6)
    laid = {
        "lines": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], dim=3)[..., :6],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": torch.stack([x, x], dim=1).flatten(1, 2)[:, :4],
    }[layout]
    layer = conv(grid=grid_of(INPUTS["ue2m2"]), padding=1)
    expected = in_float64(layer, laid.contiguous())
    y = run(prepare(layer, path), laid)
    close(y, expected)
    assert y.is_contiguous(
        memory_format=torch.channels_last if layout == "channels last" else torch.contiguous_format
    )


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["ue2m2", "ue3m5"])
def test_output_has_the_type_of_the_input(fmt: str, dtype: torch.dtype, path: str) -> None:
    layer, x = conv(grid=grid_of(INPUTS[fmt]), padding=1), draw(2, 4, 5, 5).to(dtype)
    expected = in_float64(layer, x)
    y = run(prepare(layer, path), x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-5)


@every_path
@pytest.mark.parametrize("keep_packed", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("kind", [Cuda, CudaFp8])
def test_hub_runs_the_member_that_its_route_names(
    kind: type[Cuda | CudaFp8], as_tensor: bool, keep_packed: bool, path: str
) -> None:
    first, second = grid_of(INPUTS["ue2m2"]), Grid(INPUTS["ue2m2"], 0.05, 0.0)
    x, outputs = draw(2, 4, 5, 5), []
    layer = conv(grid=first, further=(second,), hub=2, padding=1)
    layer.route = Route[Any]()
    expected = [in_float64(layer, x, member) for member in (0, 1)]
    prepare(layer, path, kind, keep_packed=keep_packed)
    for member in (0, 1):
        at = torch.tensor(member, device=layer.weight_scale.device)
        layer.route.open([at if as_tensor else member])
        outputs.append(run(layer, x))
        close(outputs[-1], expected[member])
    assert not torch.allclose(*outputs)


@every_path
@pytest.mark.parametrize("keep_packed", [False, True])
@pytest.mark.parametrize("kind", [Cuda, CudaFp8])
@pytest.mark.parametrize("make", [linear, conv])
def test_weight_is_held_once_and_comes_back(
    make: Callable[..., Any], kind: type[Cuda | CudaFp8], keep_packed: bool, path: str
) -> None:
    layer = make(grid=grid_of(INPUTS["ue2m2"]))
    weight, state = (
        layer.weight.clone(),
        {name: tensor.clone() for name, tensor in layer.state_dict().items()},
    )
    prepare(layer, path, kind, keep_packed=keep_packed)
    assert (
        ("weight_codes" in dict(layer.named_buffers()))
        == keep_packed
        == (weights_of(layer.kernel).numel() == 0)
    )
    torch.testing.assert_close(layer.weight.cpu(), weight, rtol=0, atol=0)
    assert all(
        torch.equal(layer.state_dict()[name].cpu(), tensor) for name, tensor in state.items()
    )
    twin = copy.deepcopy(layer)
    assert twin.kernel is None and torch.equal(twin.packed_codes(), layer.packed_codes())
    layer.restore_()
    assert torch.equal(layer.weight_codes.cpu(), state["weight_codes"])


def test_gradients_are_simulated() -> None:
    layer, x = prepare(linear(grid=grid_of(INPUTS["ue2m2"])), "torch"), draw(3, 12).requires_grad_()
    layer(x).sum().backward()
    other = x.detach().clone().requires_grad_()
    layer.prepare_("simulated")
    layer(other).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, other.grad) and bool(x.grad.any())


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (4, 5, 5)], ids=["empty batch", "no batch"])
def test_convolution_takes_what_the_float_layer_takes(shape: tuple[int, ...]) -> None:
    layer, x = conv(grid=grid_of(INPUTS["ue2m2"]), padding=1), draw(*shape)
    y = run(prepare(layer, "torch"), x)
    layer.prepare_("simulated")
    assert torch.equal(y, run(layer, x))


# float8


def test_four_bits_are_exact_in_float8() -> None:
    """Every code of every 4-bit grid, times our power of two, survives the trip through e4m3."""
    for signed in (True, False):
        for fmt in formats_of_width(4, signed=signed):
            exponent = e4m3_exponent(fmt)
            assert exponent is not None and exponent <= 0
            values = torch.tensor(fmt.code_book).double() * 2.0**exponent
            assert torch.equal(values.float().to(torch.float8_e4m3fn).double(), values)
            assert values.abs().max() <= 448
    assert (
        e4m3_exponent(FloatFormat.parse("ue4m0")) == -6
        and e4m3_exponent(FloatFormat.parse("e2m1")) == 0
    )


def test_format_is_exact_in_float8_or_has_no_exponent() -> None:
    for bits in range(2, 9):
        for signed in (True, False):
            for fmt in formats_of_width(bits, signed=signed):
                book, fits = torch.tensor(fmt.code_book).double(), False
                for power in range(-40, 1):
                    values = book * 2.0**power
                    exact = torch.equal(values.float().to(torch.float8_e4m3fn).double(), values)
                    fits |= exact
                    assert not exact or values.abs().max() <= 448
                exponent = e4m3_exponent(fmt)
                assert (exponent is not None) == fits, fmt
                if exponent is not None:
                    values = book * 2.0**exponent
                    assert torch.equal(values.float().to(torch.float8_e4m3fn).double(), values), fmt


@every_path
@pytest.mark.parametrize("weight", ["e1m2", "e2m1", "e3m0", "e1m6"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_float8_equals_the_formula_where_sums_are_small(fmt: str, weight: str, path: str) -> None:
    layer = layer_of(nn.Linear, 23, 9, weight=WEIGHTS[weight], grid=grid_of(INPUTS[fmt]))
    check(layer, draw(5, 3, 23), path, CudaFp8)
    wanted = e4m3_exponent(INPUTS[fmt]) is not None and e4m3_exponent(WEIGHTS[weight]) is not None
    assert (weights_of(layer.kernel).dtype == torch.float8_e4m3fn) == wanted


@every_path
def test_float8_leaves_convolutions_in_bytes(path: str) -> None:
    layer = conv(grid=grid_of(INPUTS["ue2m2"]), padding=1)
    check(layer, draw(2, 4, 5, 5), path, CudaFp8)
    assert weights_of(layer.kernel).dtype == torch.int8


# the kinds of window


@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3)
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_kind_of_a_window_says_which_taps_are_inside(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if count < 1:
        return
    positions = torch.arange(count)
    where = positions[:, None] * stride - padding + torch.arange(kernel) * dilation
    kinds = taps_of_kinds(kernel)
    assert kinds.shape == (num_window_kinds(kernel), kernel) and len(
        set(map(tuple, kinds.tolist()))
    ) == len(kinds)
    found = kinds[window_kinds(positions, size, kernel, stride, padding, dilation)]
    assert torch.equal(found.bool(), (where >= 0) & (where < size))


# who gets it


class FakeGpu:
    """A layer that says it is on a GPU."""

    def __init__(
        self,
        layer: nn.Module,
        monkeypatch: pytest.MonkeyPatch,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        self.layer = layer
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        buffer = torch.empty(1)
        fake = type("Scale", (), {"device": torch.device("cuda:0")})()
        monkeypatch.setattr(
            layer, "get_buffer", lambda name: fake if name == "weight_scale" else buffer
        )


REFUSED = {
    "the weight is in floating point": lambda: linear(weight=None, grid=grid_of(INPUTS["e2m1"])),
    "the input is in floating point": lambda: linear(),
    "e2m5 takes integers up to 252": lambda: linear(
        weight=FloatFormat.parse("e2m5"), grid=grid_of(INPUTS["e2m1"])
    ),
    "e4m3 takes integers up to 245760": lambda: linear(grid=Grid(FloatFormat.parse("e4m3"), 1.0)),
    "ue4m1 takes integers up to 49152": lambda: linear(grid=Grid(FloatFormat.parse("ue4m1"), 1.0)),
    "padding (1, 1) in mode 'reflect'": lambda: conv(
        grid=grid_of(INPUTS["e2m1"]), padding=1, padding_mode="reflect"
    ),
    "padding 'same' in mode 'zeros'": lambda: conv(
        grid=grid_of(INPUTS["e2m1"]), padding="same", kernel_size=4
    ),
    "padding around windows of 9x9": lambda: conv(
        grid=grid_of(INPUTS["ue2m2"]), padding=4, kernel_size=9
    ),
    "the sum could overflow 32 bits": lambda: layer_of(
        nn.Linear, 70_000, 1, weight=WEIGHTS["e1m6"], grid=grid_of(INPUTS["ue1m7"])
    ),
}


def test_groups_of_weights_count_in_the_bound_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"weight": WEIGHTS["e2m1"], "grid": grid_of(INPUTS["ue1m7"])}
    for groups, refused in ((0, False), (3, True)):
        layer = layer_of(nn.Linear, 70_000, 1, weight_groups=groups, **options)
        FakeGpu(layer, monkeypatch)
        reasons = [kernel.refusal(layer) for kernel in (Cuda, CudaFp8)]
        assert [reason == "the sum could overflow 32 bits" for reason in reasons] == [refused] * 2


@pytest.mark.parametrize("reason", list(REFUSED))
def test_refusal_says_why(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = REFUSED[reason]()
    FakeGpu(layer, monkeypatch)
    assert Cuda.refusal(layer) == CudaFp8.refusal(layer) == reason


@pytest.mark.parametrize(
    ("capability", "int8_runs", "fp8_runs"),
    [
        ((7, 0), False, False),
        ((7, 5), True, False),
        ((8, 6), True, False),
        ((8, 9), True, True),
        ((12, 0), True, True),
    ],
)
def test_capability_decides(
    capability: tuple[int, int], int8_runs: bool, fp8_runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear(grid=grid_of(INPUTS["e2m1"]))
    FakeGpu(layer, monkeypatch, capability)
    number = f"{capability[0]}.{capability[1]}"
    for kind, runs, least in (
        (Cuda, int8_runs, "7.5"),
        (CudaFp8, fp8_runs, "8.9" if int8_runs else "7.5"),
    ):
        reason = kind.refusal(layer)
        assert reason == (
            None if runs else f"the GPU has compute capability {number}, below {least}"
        )
    assert choose_kernel(layer)[0].name == (MEASURED if int8_runs else "simulated")
    assert choose_kernel(layer, "cuda")[0].name == ("cuda" if int8_runs else "simulated")
    assert choose_kernel(layer, "cuda-fp8")[0].name == ("cuda-fp8" if fp8_runs else "simulated")


def test_layer_on_another_device_does_not_hear_of_it_unless_asked() -> None:
    layer = linear(grid=grid_of(INPUTS["e2m1"]))
    assert choose_kernel(layer, AUTO) == (KERNELS["cpu"], "")
    assert choose_kernel(layer, "cuda") == (KERNELS["simulated"], "cuda: the layer is on cpu")
    with pytest.raises(
        UsageError,
        match="'cuda-fp8' can run none of the 1 layers; 0: cuda-fp8: the layer is on cpu",
    ):
        prepare_(nn.Sequential(layer), "cuda-fp8")


def test_missing_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "msfp_cli.layers.kernels.triton_ops", None)
    device = torch.device("cuda")
    cuda._import_triton_ops.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed"):
            assert cuda.triton_ops(device) is None
        assert cuda.triton_ops(device) is None  # a second warning would be an error
    finally:
        cuda._import_triton_ops.cache_clear()


def test_gpus_before_ampere_are_not_given_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda.triton_ops(torch.device("cuda")) is None
    assert cuda.triton_ops(torch.device("cpu")) is None


def test_kernels_import_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; "
        "from msfp_cli.layers.kernels.registry import KERNELS; print('cuda' in KERNELS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "True"


# torch.compile


@every_path
@pytest.mark.parametrize("hub", [1, 2])
@pytest.mark.parametrize("kind", [Cuda, CudaFp8])
def test_denoiser_compiles_without_a_graph_break(
    kind: type[Cuda | CudaFp8], hub: int, path: str
) -> None:
    denoiser = unet(hub)
    prepare_(denoiser, "reference")
    timesteps = (10, 900)
    expected = [call(denoiser, timestep) for timestep in timesteps]
    for layer in quantized_layers(denoiser).values():
        layer.restore_()
        prepare(layer, path, kind)
    if path == "gpu":
        pytest.skip("benchmarks/gpu.py compiles whole denoisers")
    torch.compiler.reset()
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    outputs = [call(compiled, timestep) for timestep in timesteps]
    for got, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert hub == 1 or not torch.allclose(outputs[0], outputs[1])


@every_path
@pytest.mark.parametrize("fmt", ["ue2m2", "ue3m1", "ue3m5"])
@pytest.mark.parametrize("make", [linear, conv])
def test_operator_keeps_the_contract_of_torch(make: Any, fmt: str, path: str) -> None:  # noqa: ANN401
    layer, x = (
        prepare(make(grid=grid_of(INPUTS[fmt])), path),
        draw(2, 4, 5, 5) if make is conv else draw(2, 12),
    )
    kernel, x = layer.kernel, x.to(layer.weight_scale.device)
    planes = kernel.round(x, kernel.members[:1])
    shift = int8.shift_of(kernel.format)
    for channels_last in (False, True):
        arguments = (
            planes,
            *kernel.tensors,
            kernel.members[:1],
            shift,
            kernel.geometry.flat(),
            torch.float32,
        )
        torch.library.opcheck(
            torch.ops.msfp.multiply_int8.default, (*arguments, channels_last, kernel.fused)
        )


# tiles


@without_triton
def test_every_tile_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if GPU else "cpu")
    ops = cuda.triton_ops(device)
    assert ops is not None
    layer = layer_of(nn.Conv2d, 36, 40, kernel_size=3, padding=1, grid=grid_of(INPUTS["ue3m1"]))
    x = draw(2, 36, 9, 8)
    expected = in_float64(layer, x)
    kernel = prepare(layer, "gpu" if GPU else "triton").kernel
    planes = kernel.round(x.to(device), kernel.members)
    for tile in ops.TILES:
        y = torch.full((2, 40, 9, 8), float("nan"), device=device)
        ops.multiply_(y, planes, kernel.tensors, kernel.members, kernel.geometry, 128, tile)
        close(y.cpu(), expected)


@without_triton
@given(st.integers(1, 100_000), st.integers(1, 10_000), st.integers(1, 200))
def test_tile_is_not_much_larger_than_the_output_and_keeps_the_gpu_busy(
    windows: int, outs: int, processors: int
) -> None:
    ops = cuda.triton_ops(torch.device("cuda" if GPU else "cpu"))
    assert ops is not None
    tile = ops.choose_tile(windows, outs, processors)
    least = ops.TILES[-1]
    assert tile.windows < max(2 * windows, least.windows + 1) and tile.outs < max(
        2 * outs, least.outs + 1
    )
    count = -(-windows // tile.windows) * -(-outs // tile.outs)
    others = [other for other in ops.TILES if other.windows < 2 * windows and other.outs < 2 * outs]
    assert count >= 1.5 * processors or tile == (others or [least])[-1]


SHARED = {
    80: 163,
    89: 99,
    90: 227,
    120: 99,
}  # KiB of shared memory that a program may take, by compute capability


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", list(SHARED))
def test_kernels_compile_for_gpus_that_are_not_here(capability: int) -> None:
    script = Path(__file__).with_name("triton_builds.py")
    done = subprocess.run(
        [sys.executable, script, str(capability), "3"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(builds) >= 11
    for built in builds:
        assert built["shared"] <= SHARED[capability] * 1024
        assert built.get("on_units", True) and built.get("exact", True), built
