"""The CPU kernel against the reference, bit for bit, and both against the formula in float64."""

import copy
import re
import shutil
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.multipliers import largest_multiplier
from msfp_cli.formats.rounding import Grid, quantize
from msfp_cli.formats.transform import InputTransform
from msfp_cli.layers.kernels.cpu import Cpu
from msfp_cli.layers.kernels.geometry import Geometry
from msfp_cli.layers.kernels.registry import AUTO, KERNELS, choose_kernel
from msfp_cli.layers.kernels.to_bytes import (
    can_be_looked_up,
    look_up_bytes,
    round_to_bytes,
    tables_of_bytes,
)
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.replace import find_layers, quantized_layers, replace_layers_
from msfp_cli.layers.routing import ROUTER, Route
from msfp_cli.layers.scheme import LayerScheme
from tiny_pipelines import build_tiny

RECIPE = CalibrateRecipe()
PLAIN = InputTransform()
INPUTS = {fmt.name: fmt for bits in (2, 4, 6, 8) for fmt in RECIPE.input_formats(bits)}
WEIGHTS = {fmt.name: fmt for bits in (2, 4, 6, 8) for fmt in RECIPE.weight_formats(bits)}
TRANSFORMS = (
    InputTransform(rotation=16),
    InputTransform(token_scales=True),
    InputTransform(rotation=16, token_scales=True),
)
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding": 1},
    "stride": {"stride": 2, "padding": (2, 1)},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "1x1": {"kernel_size": 1},
    "1x1 stride": {"kernel_size": 1, "stride": 2},
    "1x1 padding": {"kernel_size": 1, "padding": 1},
    "oblong": {"kernel_size": (1, 5), "padding": (0, 2)},
    "wide padding": {"padding": (4, 3)},
    "window of padding": {"padding": (5, 1)},
    "windows of padding": {"kernel_size": (4, 1), "stride": (1, 3), "padding": 4, "dilation": 2},
    "even": {"kernel_size": 2, "padding": 1, "stride": 2},
    "patches": {"kernel_size": 2, "stride": 2},
    "one window a row": {"kernel_size": (1, 4), "stride": (1, 4)},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_of(fmt: FloatFormat) -> Grid:
    """A grid that clips a few of `draw`'s values at both ends."""
    scale = (2.0 if fmt.signed else 3.0) / fmt.largest
    return Grid(fmt, float(torch.tensor(scale)), 0.0 if fmt.signed else -0.71875)


def layer_of(
    kind: type[nn.Module],
    *arguments: int,
    weight: FloatFormat | None = WEIGHTS["e2m1"],
    grid: Grid | None = None,
    hub: int = 1,
    further: tuple[Grid, ...] = (),
    lifted: Grid | None = None,
    weight_groups: int = 0,
    transform: InputTransform = PLAIN,
    **options: Any,  # noqa: ANN401 (as torch's)
) -> Any:  # noqa: ANN401 (one of two classes)
    layer = kind(*arguments, **options)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=i) * 0.3
    scheme = LayerScheme(
        weight=weight,
        input=grid,
        hub=hub,
        further_inputs=further,
        lifted_input=lifted,
        weight_groups=weight_groups,
        transform=transform,
    )
    multipliers = None
    if weight_groups and weight:
        generator = torch.Generator().manual_seed(3)
        size = (len(layer.weight), weight_groups)
        highest = largest_multiplier(weight) + 1
        multipliers = torch.randint(1, highest, size, generator=generator).to(torch.uint8)
    new = (QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d)(layer, scheme)
    for member in range(hub if weight else 0):
        values = layer.weight.detach() * (
            1 if member == 0 else draw(*layer.weight.shape, seed=member + 7)
        )
        new.store_(
            values,
            layer.weight.detach().abs().flatten(1).amax(dim=1)
            * 0.8
            / weight.largest
            / (1 + weight_groups),
            member,
            multipliers,
        )
    return new


def linear(**options: Any) -> Any:  # noqa: ANN401
    return layer_of(nn.Linear, 12, 5, **options)


def conv(**options: Any) -> Any:  # noqa: ANN401
    return layer_of(nn.Conv2d, 4, 8, **{"kernel_size": 3, **options})


def by_kernel(layer: Any, x: Tensor, name: str, **options: Any) -> Tensor:  # noqa: ANN401
    layer.prepare_(name, **options)
    assert layer.kernel.name == name
    with torch.no_grad():
        y: Tensor = layer(x)
    return y


def in_float64(layer: Any, x: Tensor, member: int = 0) -> Tensor:  # noqa: ANN401
    """The layer's output computed from codes in float64: no rounding but that of the scales."""
    grid, weight_grid = layer.scheme.input_of(member), layer.weight_grid()
    x, sizes = layer.scheme.transform(x)
    book = torch.tensor(grid.format.code_book, dtype=torch.float64)
    values = book[quantize(x, grid).long()] * grid.scale + grid.zero_point
    if sizes is not None:
        values = values * sizes.double()
    weight = layer.integers(member % layer.scheme.hub).double() * weight_grid.scale.double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        return F.linear(values, weight, bias)
    return layer._conv_forward(values, weight, bias)


def close(got: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest output: single ones may cancel, or see only padding."""
    assert got.shape == expected.shape
    bound = 1e-5 * float(expected.abs().max()) if expected.numel() else 0.0
    bound = max(bound, 1e-6)
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=bound)


def agree(layer: Any, x: Tensor) -> None:  # noqa: ANN401
    """Every kernel computes the formula, and those in integers have the same bits."""
    expected = in_float64(layer, x)
    names = ["simulated", "reference"]
    if "lacks VNNI" not in (Cpu.refusal(layer) or ""):
        names.append("cpu")
    outputs = [by_kernel(layer, x, name) for name in names]
    for output in outputs:
        close(output, expected)
    assert torch.equal(outputs[1], outputs[-1])


@pytest.mark.parametrize("weight", list(WEIGHTS))
@pytest.mark.parametrize("fmt", list(INPUTS))
def test_linear_equals_the_formula_for_all_formats(fmt: str, weight: str) -> None:
    layer = linear(weight=WEIGHTS[weight], grid=grid_of(INPUTS[fmt]))
    x = draw(3, 7, 12)
    agree(layer, x)


@pytest.mark.parametrize("weight", ["e1m2", "e3m0", "e1m6"])
@pytest.mark.parametrize("fmt", ["e2m1", "e3m0", "ue2m2", "ue3m1", "ue4m0", "e2m5", "ue3m5"])
@pytest.mark.parametrize("options", list(CONVOLUTIONS.values()), ids=list(CONVOLUTIONS))
def test_convolution_equals_the_formula(options: dict[str, Any], fmt: str, weight: str) -> None:
    layer = conv(weight=WEIGHTS[weight], grid=grid_of(INPUTS[fmt]), **options)
    x = draw(2, 4, 9, 6)
    agree(layer, x)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from([1, 2, 4]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_convolution_equals_the_formula(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, int],
    batch: int,
    bias: bool,
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
    layer = conv(grid=grid_of(INPUTS["ue2m2"]), groups=groups, bias=bias, **options)
    x = draw(batch, 4, *size)
    agree(layer, x)


@given(
    st.lists(st.integers(0, 4), max_size=3), st.integers(1, 70), st.integers(1, 70), st.booleans()
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_linear_takes_any_leading_shape(
    leading: list[int], inputs: int, outputs: int, bias: bool
) -> None:
    layer = layer_of(nn.Linear, inputs, outputs, bias=bias, grid=grid_of(INPUTS["ue2m2"]))
    x = draw(*leading, inputs)
    agree(layer, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", ["e2m1", "ue2m2", "e1m6", "e2m5", "ue2m6"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_kernels_agree_on_transformed_inputs(
    transform: InputTransform, grid: str, bias: bool
) -> None:
    layer = layer_of(nn.Linear, 48, 5, grid=grid_of(INPUTS[grid]), transform=transform, bias=bias)
    rows = draw(2, 3, 48) * torch.tensor([[[0.1], [1.0], [7.0]], [[0.0], [1e-5], [1e5]]])
    agree(layer, rows)
    agree(layer, rows[0, 0])
    agree(layer, rows[:0])


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (4, 5, 5)], ids=["empty batch", "no batch"])
def test_convolution_takes_what_the_float_layer_takes(shape: tuple[int, ...]) -> None:
    agree(conv(grid=grid_of(INPUTS["ue2m2"]), padding=1), draw(*shape))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layer_of(nn.Linear, 12, 5, grid=grid_of(INPUTS["ue2m2"])), (3, 6)),
        (layer_of(nn.Linear, 12, 5, grid=grid_of(INPUTS["ue2m2"])), ()),
        (conv(grid=grid_of(INPUTS["ue2m2"])), (1, 3, 5, 5)),
        (conv(grid=grid_of(INPUTS["ue2m2"])), (1, 4, 5, 1)),
    ],
    ids=["inputs", "number", "channels", "size"],
)
@torch.no_grad()
def test_cpu_refuses_an_input_of_another_shape_in_torchs_words(
    layer: Any,  # noqa: ANN401
    shape: tuple[int, ...],
) -> None:
    told = []
    for kernel in ("simulated", "cpu"):
        layer.prepare_(kernel)
        with pytest.raises(RuntimeError) as caught:
            layer(torch.ones(shape))
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("fmt", ["e2m1", "ue2m2", "e2m5", "ue4m0"])
@pytest.mark.parametrize("kernel", ["reference", "simulated"])
def test_nan_shows(kernel: str, fmt: str) -> None:
    x = draw(3, 12)
    x[1, 5] = float("nan")
    y = by_kernel(linear(grid=grid_of(INPUTS[fmt])), x, kernel)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("transform", [PLAIN, *TRANSFORMS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_agree_on_shorter_types(dtype: torch.dtype, transform: InputTransform) -> None:
    grid = grid_of(INPUTS["ue2m2"])
    layer = conv(grid=grid, padding=1)
    x = draw(2, 4, 9, 6).to(dtype)
    if not transform.is_identity:
        layer = layer_of(nn.Linear, 32, 5, grid=grid, transform=transform)
        x = draw(3, 32).to(dtype)
    outputs = [by_kernel(layer.to(dtype), x, name) for name in ("cpu", "reference")]
    assert outputs[0].dtype == dtype and torch.equal(*outputs)


@pytest.mark.parametrize("name", list(INPUTS))
def test_bfloat16_is_the_float32_result_rounded_once(name: str) -> None:
    grid = grid_of(INPUTS[name])
    for layer, x in (
        (layer_of(nn.Linear, 48, 37, grid=grid), draw(5, 48)),
        (conv(grid=grid, padding=1), draw(2, 4, 9, 6)),
        (conv(grid=grid), draw(2, 4, 9, 6).contiguous(memory_format=torch.channels_last)),
    ):
        short = x.bfloat16()
        layer.prepare_("cpu")
        assert torch.equal(layer(short), layer(short.float()).bfloat16())


@pytest.mark.parametrize("fmt", ["e2m1", "ue2m2", "ue2m6"])
def test_sums_are_exact(fmt: str) -> None:
    grid = Grid(INPUTS[fmt], 1.0)
    layer = layer_of(nn.Linear, 4096, 8, bias=False, weight=WEIGHTS["e3m0"], grid=grid)
    layer.weight_scale.fill_(1.0)
    x = draw(16, 4096) * grid.format.largest
    y = by_kernel(layer, x, "cpu")
    assert torch.equal(
        y.double(), in_float64(layer, x).float().double()
    )  # integers below 2^24 are exact in float32


@pytest.mark.parametrize("name", list(INPUTS))
def test_bytes_are_the_integers_of_the_codes(name: str) -> None:
    grid = grid_of(INPUTS[name])
    shift = grid.format.largest if grid.format.signed else 0
    x = torch.cat([draw(40_000), torch.tensor([0.0, -0.0, 1e9, -1e9, float("inf"), -float("inf")])])
    expected = torch.tensor(grid.format.code_book)[quantize(x, grid).long()] + shift
    planes = round_to_bytes(x, grid, shift)
    assert len(planes) == 1 + (grid.format.largest + shift > 255)
    assert torch.equal(sum(plane.int() << 8 * i for i, plane in enumerate(planes)), expected.int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(INPUTS))
def test_every_value_of_a_shorter_type_is_looked_up_as_it_is_rounded(
    name: str, dtype: torch.dtype
) -> None:
    grid = grid_of(INPUTS[name])
    shift = grid.format.largest if grid.format.signed else 0
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = x[~x.isnan()].repeat(2)  # more than fit into one piece
    planes = look_up_bytes(numbers, tables_of_bytes(dtype, grid, shift))
    expected = round_to_bytes(numbers.float(), grid, shift)
    assert len(planes) == len(expected) and all(map(torch.equal, planes, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "channels last", "sliced", "transposed"])
def test_bytes_keep_their_places_in_any_layout(layout: str, dtype: torch.dtype) -> None:
    x = draw(2, 6, 5, 4).to(dtype)
    laid = {
        "rows": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], dim=3)[..., :4],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    grid = grid_of(INPUTS["ue2m2"])
    planes = round_to_bytes(laid, grid, 0)
    if can_be_looked_up(dtype):
        planes += look_up_bytes(laid, tables_of_bytes(dtype, grid, 0))
    for plane in planes:
        assert torch.equal(plane, round_to_bytes(x.float(), grid, 0)[0])


def test_edges_are_right_for_every_size_of_picture_and_every_member() -> None:
    first, second = grid_of(INPUTS["ue2m2"]), Grid(INPUTS["ue2m2"], 0.05, -0.5)
    layer = conv(grid=first, further=(second,), hub=2, padding=1)
    layer.route = Route[int]()
    pictures = [draw(1, 4, 3 + size % 7, 3 + size) for size in range(20)]
    outputs = {name: list[Tensor]() for name in ("cpu", "reference")}
    for name, drawn in outputs.items():
        layer.prepare_(name)
        for member in (0, 1, 0):  # more sizes than are remembered
            layer.route.open([member])
            drawn += [layer(picture) for picture in pictures]
            layer.route.close()
    assert all(map(torch.equal, *outputs.values()))


@pytest.mark.parametrize("keep_packed", [False, True])
def test_hub_runs_the_member_that_its_route_names(keep_packed: bool) -> None:
    first, second = grid_of(INPUTS["ue2m2"]), Grid(INPUTS["ue2m2"], 0.05, -0.5)
    layer = conv(grid=first, further=(second,), hub=2, padding=1)
    layer.route, x = Route[int](), draw(2, 4, 5, 5)
    layer.prepare_("cpu", keep_packed=keep_packed)
    outputs = []
    for member in (0, 1):
        layer.route.open([member])
        with torch.no_grad():
            outputs.append(layer(x))
        close(outputs[-1], in_float64(layer, x, member))
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("hub", [1, 2])
@pytest.mark.parametrize(("usual", "lifted"), [("e2m1", "e1m6"), ("ue2m2", "ue1m7")])
@pytest.mark.parametrize("make", [linear, conv])
def test_kernels_agree_on_lifted_inputs(
    make: Callable[..., Any], usual: str, lifted: str, hub: int
) -> None:
    options = {"grid": grid_of(INPUTS[usual]), "lifted": grid_of(INPUTS[lifted]), "hub": hub}
    layer = make(**options) if make is linear else make(padding=1, **options)
    layer.route, x = Route[int](), draw(2, 4, 5, 5) if make is conv else draw(2, 12)
    kernels = ["reference"] if "lacks VNNI" in (Cpu.refusal(layer) or "") else ["reference", "cpu"]
    within = (-2, 2) if layer.scheme.input.format.signed else (-0.71875, 2.28125)
    errors = []
    for variant in range(layer.scheme.variants):
        layer.route.open([variant])
        outputs = [by_kernel(layer, x, kernel) for kernel in kernels]
        assert torch.equal(outputs[0], outputs[-1])
        close(outputs[0], in_float64(layer, x, variant))
        close(by_kernel(layer, x, "simulated"), in_float64(layer, x, variant))
        exact = layer.apply_weight(x.clamp(*within), layer.float_weight()).detach()
        errors.append(float((outputs[0] - exact).square().sum()))
    assert min(errors[:hub]) > 4 * max(errors[hub:])  # 8 bits are nearer than 4


@pytest.mark.parametrize("keep_packed", [False, True])
@pytest.mark.parametrize("make", [linear, conv])
def test_weight_is_held_once(make: Callable[..., Any], keep_packed: bool) -> None:
    layer = make(grid=grid_of(INPUTS["ue2m2"]))
    weight, state = layer.weight.clone(), layer.state_dict()
    layer.prepare_("cpu", keep_packed=keep_packed)
    assert ("weight_codes" in dict(layer.named_buffers())) == keep_packed
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    assert set(layer.state_dict()) == set(state)
    twin = copy.deepcopy(layer)
    x = draw(2, 4, 5, 5) if make is conv else draw(2, 12)
    with torch.no_grad():
        assert torch.equal(twin(x), layer(x))
    layer.restore_()
    assert torch.equal(layer.weight_codes, state["weight_codes"])


def test_other_weights_are_run_after_they_were_stored_or_loaded() -> None:
    grid = grid_of(INPUTS["ue2m2"])
    layer, other, x = linear(grid=grid), linear(grid=grid), draw(3, 12)
    other.store_(draw(5, 12, seed=5), torch.full((5,), 0.2))
    before, wanted = by_kernel(layer, x, "cpu"), by_kernel(other, x, "cpu")
    layer.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(layer(x), wanted.add(layer.bias - other.bias)) and not torch.equal(
            wanted, before
        )
        layer.store_(draw(5, 12, seed=5), torch.full((5,), 0.2))
        assert torch.equal(layer(x), wanted)


def test_moved_layer_chooses_again() -> None:
    layer = linear(grid=grid_of(INPUTS["ue2m2"]))
    layer.prepare_()
    kernel = layer.kernel
    assert layer.to("cpu").kernel is kernel
    assert layer.to("meta").kernel is None
    assert choose_kernel(layer)[0].name == "simulated"


@pytest.mark.parametrize("other_kernel", ["reference", "simulated"])
def test_gradients_are_simulated(other_kernel: str) -> None:
    layer = linear(grid=grid_of(INPUTS["ue2m2"]))
    x = draw(3, 12).requires_grad_()
    layer.prepare_("cpu")
    layer(x).sum().backward()
    other = x.detach().clone().requires_grad_()
    layer.prepare_(other_kernel)
    layer(other).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, other.grad) and bool(x.grad.any())


@pytest.mark.parametrize("kernel", ["cpu", "reference", "simulated"])
@pytest.mark.parametrize("make", [linear, conv])
def test_bias_gets_its_gradient(make: Callable[..., Any], kernel: str) -> None:
    layer = make(grid=grid_of(INPUTS["ue2m2"]))
    x = draw(3, 12) if make is linear else draw(2, 4, 9, 6)
    expected = by_kernel(layer, x, kernel)
    y = layer(x)
    assert torch.equal(y, expected)
    seed = draw(*y.shape, seed=1)
    y.backward(seed)
    close(layer.bias.grad, seed.sum(dim=0 if make is linear else (0, 2, 3)))


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_pictures_are_laid_out_for_autograd_as_by_the_float_layer(kernel: str) -> None:
    layer = conv(grid=grid_of(INPUTS["ue2m2"]))
    layer.prepare_(kernel)
    x = draw(2, 4, 9, 6)
    norm = nn.GroupNorm(4, 8)
    for bias in (layer.bias, None):
        layer.bias = bias
        assert layer(x).is_contiguous()
        norm(layer(x)).sum().backward()
    assert norm.bias.grad is not None and norm.bias.grad.any()


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_settings_of_a_convolution_count_at_the_next_call(kernel: str) -> None:
    layer = conv(grid=grid_of(INPUTS["ue2m2"]), padding=1)
    x = draw(2, 4, 9, 6)
    by_kernel(layer, x, kernel)
    layer.padding_mode = "circular"
    with torch.no_grad():
        close(layer(x.roll(2, dims=-1)), layer(x).roll(2, dims=-1).double())
        layer.padding_mode = "zeros"
        for padding, stride in (((1, 1), (1, 1)), ((2, 0), (1, 1)), ((2, 0), (2, 1))):
            layer.padding, layer.stride = padding, stride
            close(layer(x), in_float64(layer, x))
            assert layer.kernel.name == kernel
            assert ("weight_codes" in layer._buffers) == (kernel == "reference")


def test_convolution_whose_operator_was_replaced_runs_it() -> None:
    layer = conv(grid=grid_of(INPUTS["ue2m2"]), padding=1)
    x = draw(2, 4, 9, 6)
    by_kernel(layer, x, "cpu")

    def pad_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 0, 0), mode="circular"), weight, bias, padding=(1, 0))

    layer._conv_forward = pad_columns
    with torch.no_grad():
        close(layer(x.roll(2, dims=-1)), layer(x).roll(2, dims=-1).double())
    assert "_conv_forward is not torch's" in layer.prepare_("cpu")


REFUSED = {
    "the weight is in floating point": lambda: linear(weight=None, grid=grid_of(INPUTS["e2m1"])),
    "the input is in floating point": lambda: linear(),
    "e2m5 takes integers of 9 bits": lambda: linear(
        weight=FloatFormat.parse("e2m5"), grid=grid_of(INPUTS["e2m1"])
    ),
    "e4m3 takes integers of 19 bits": lambda: linear(grid=Grid(FloatFormat.parse("e4m3"), 1.0)),
    "padding .1, 1. in mode 'reflect'": lambda: conv(
        grid=grid_of(INPUTS["e2m1"]), padding=1, padding_mode="reflect"
    ),
    "padding 'same'": lambda: conv(grid=grid_of(INPUTS["e2m1"]), padding="same", kernel_size=4),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_layer_that_units_cannot_hold_is_simulated_and_says_why(reason: str) -> None:
    layer = REFUSED[reason]()
    kernel, why = choose_kernel(layer)
    assert kernel.name == "simulated"
    assert re.match(f"cpu: {reason}", why)
    layer.prepare_()
    assert layer.kernel.name == "simulated"


@pytest.mark.parametrize("weight", ["e2m1", "e1m2", "e2m3"])
@pytest.mark.parametrize("fmt", ["e2m1", "ue2m2", "e1m6", "ue2m6"])
@pytest.mark.parametrize("make", [linear, conv])
def test_groups_of_weights_are_exact_in_every_kernel(
    make: Callable[..., Any], fmt: str, weight: str
) -> None:
    layer = make(weight=WEIGHTS[weight], grid=grid_of(INPUTS[fmt]), weight_groups=3)
    integers = layer.integers()
    assert int(integers.abs().max()) > WEIGHTS[weight].largest
    assert torch.equal(integers, layer.multipliers().to(torch.int8) * own_integers(layer))
    x = draw(3, 4, 7, 6) if isinstance(layer, nn.Conv2d) else draw(7, 12)
    agree(layer, x)


def own_integers(layer: Any) -> Tensor:  # noqa: ANN401
    """The integers of the codes themselves."""
    book = torch.tensor(layer.weight_format().code_book, dtype=torch.int8)
    return book[layer.codes().long()]


@pytest.mark.parametrize("keep_packed", [False, True])
def test_groups_survive_a_kernel_that_holds_the_weight(keep_packed: bool) -> None:
    layer = conv(grid=grid_of(INPUTS["ue2m2"]), weight_groups=4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    integers = layer.integers()
    by_kernel(layer, draw(2, 4, 5, 5), "cpu", keep_packed=keep_packed)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert "weight_multipliers" in after
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert torch.equal(copy.deepcopy(layer).integers(), integers)
    before["weight_multipliers"].zero_()  # all are 1
    layer.load_state_dict(before)
    assert torch.equal(layer.integers(), own_integers(layer))
    x = draw(2, 4, 5, 5)
    with torch.no_grad():
        close(layer(x), in_float64(layer, x))


def test_cpu_without_vnni_refuses_groups_that_could_overflow_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert Cpu.refusal(linear(grid=grid_of(INPUTS["ue1m7"]))) is None
    reason = Cpu.refusal(linear(grid=grid_of(INPUTS["ue1m7"]), weight_groups=2))
    assert "lacks VNNI" in (reason or "")


def test_sums_that_could_overflow_are_refused() -> None:
    layer = layer_of(nn.Linear, 70_000, 1, weight=WEIGHTS["e1m6"], grid=grid_of(INPUTS["ue1m7"]))
    assert "overflow 32 bits" in choose_kernel(layer)[1]


def test_cpu_without_vnni_refuses_what_could_overflow_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    wide = linear(weight=WEIGHTS["e1m6"], grid=grid_of(INPUTS["ue1m7"]))
    assert "16-bit sums" in choose_kernel(wide)[1]
    for weight in RECIPE.weight_formats(4):
        for fmt in RECIPE.input_formats(4):
            layer = linear(weight=weight, grid=grid_of(fmt))
            fits = 2 * min(fmt.largest * (2 if fmt.signed else 1), 255) * weight.largest < 2**15
            assert (choose_kernel(layer)[0].name == "cpu") == fits, (fmt, weight)


def test_other_processors_simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(grid=grid_of(INPUTS["ue2m2"]))
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert choose_kernel(layer) == (KERNELS["simulated"], "cpu: it needs oneDNN on an x86 CPU")
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_kernel(layer)[0].name == "simulated"


def test_unknown_kernel_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        UsageError, match="unknown kernel 'gpu'; choose one of auto, .*cpu.*simulated.*openvino"
    ):
        choose_kernel(linear(), "gpu")


def test_kernel_that_refuses_every_layer_says_so() -> None:
    net = nn.Sequential(linear(), linear())
    assert len(quantized_layers(net)) == 2
    with pytest.raises(
        UsageError,
        match="'cpu' can run none of the 2 layers; 0: cpu: the input is in floating point",
    ):
        prepare_(net, "cpu")
    assert {name for name, _ in prepare_(net, AUTO).values()} == {"simulated"}
    able = nn.Sequential(linear(grid=grid_of(INPUTS["ue2m2"])))
    prepare_(able, "cpu")
    with pytest.raises(UsageError, match="'cuda' can run none of the 1 layers"):
        prepare_(able, "cuda")
    assert able[0].kernel.name == "cpu"
    assert prepare_(nn.Sequential(nn.Linear(2, 2)), "cpu") == {}


def test_kernel_of_the_environment_that_refuses_every_layer_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MSFP_KERNEL", "cpu")
    net = nn.Sequential(linear(), linear())
    with pytest.raises(
        UsageError,
        match="MSFP_KERNEL=cpu in the environment can run none of the 2 layers; 0: cpu: the input "
        "is in floating point; unset MSFP_KERNEL",
    ):
        prepare_(net)
    assert net[0].kernel is None
    prepare_(net, "simulated")  # somebody says which
    assert set(prepare_(net, may_be_refused=True).values()) == {
        ("simulated", "cpu: the input is in floating point")
    }
    able = nn.Sequential(linear(grid=grid_of(INPUTS["ue2m2"])), linear())
    assert [name for name, _ in prepare_(able).values()] == ["cpu", "simulated"]


def test_every_format_is_run_or_refused() -> None:
    for bits in range(2, 9):
        for signed in (True, False):
            for fmt in formats_of_width(bits, signed=signed):
                kernel, why = choose_kernel(linear(grid=grid_of(fmt)))
                assert (kernel.name == "cpu") == (fmt.integer_bits <= 16) and bool(why) == (
                    kernel.name == "simulated"
                )


def test_registry_ends_with_what_runs_anything() -> None:
    assert list(KERNELS)[-1] == "simulated"
    assert all(kernel.name == name for name, kernel in KERNELS.items())


@given(st.lists(st.integers(1, 5), min_size=9, max_size=9))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_geometry_survives_the_trip_through_an_operator(numbers: list[int]) -> None:
    geometry = Geometry.from_flat(numbers)
    assert geometry is not None and geometry.flat() == numbers
    assert Geometry.from_flat([]) is None


def unet(
    hub: int = 1,
    *,
    lifts: bool = False,
    transform: InputTransform = PLAIN,
    rounds_inputs: bool = True,
) -> Any:  # noqa: ANN401 (a diffusers model)
    """A tiny UNet quantized by rule of thumb, some layers with a hub, some with lifted inputs.

    Arguments:
        transform: of the inputs of its Linear layers.
    """
    denoiser = build_tiny("StableDiffusionPipeline").unet
    signed, unsigned = (grid_of(INPUTS[name]) for name in ("e2m1", "ue2m2"))
    of_8_bits = {signed: grid_of(INPUTS["e1m6"]), unsigned: grid_of(INPUTS["ue1m7"])}
    table = {}
    for i, (name, layer) in enumerate(find_layers(denoiser).items()):
        grid = unsigned if i % 2 else signed
        table[name] = LayerScheme(
            weight=WEIGHTS["e2m1"],
            input=grid if rounds_inputs else None,
            hub=hub if i % 3 else 1,
            lifted_input=of_8_bits[grid] if lifts and i % 4 else None,
            transform=transform if isinstance(layer, nn.Linear) else PLAIN,
        )
    floats = {name: layer.weight.detach() for name, layer in find_layers(denoiser).items()}
    for name, layer in replace_layers_(denoiser, table).items():
        scale = floats[name].abs().flatten(1).amax(dim=1) / 12
        for member in range(table[name].hub):
            layer.store_(floats[name] * (1 - 0.5 * member), scale, member)
    switching = [table[name] for name in sorted(table) if table[name].variants > 1]
    if switching:
        last = torch.tensor([scheme.variants - 1 for scheme in switching], dtype=torch.uint8)
        denoiser.get_submodule(ROUTER).table[500:] = last
    return denoiser.requires_grad_(False)


def call(denoiser: Any, timestep: int) -> Tensor:  # noqa: ANN401
    sample = draw(2, denoiser.config.in_channels, 16, 16)
    text = draw(2, 7, denoiser.config.cross_attention_dim, seed=1)
    with torch.no_grad():
        y: Tensor = denoiser(sample, torch.tensor(timestep), text, return_dict=False)[0]
    return y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hub", "keep_packed", "transform", "expected"),
    [
        (1, False, PLAIN, [1, 2, 2]),
        (2, True, PLAIN, [2, 3, 3]),
        (1, False, TRANSFORMS[2], [1, 2, 2]),
    ],
)
def test_new_sizes_make_no_more_graphs_than_a_float_denoiser(
    hub: int, keep_packed: bool, transform: InputTransform, expected: list[int]
) -> None:
    # The router's table is read in a graph of its own.
    denoiser = unet(hub, transform=transform)
    channels = denoiser.config.block_out_channels[0]  # pictures are as wide as a layer
    prepare_(denoiser, "cpu", keep_packed=keep_packed)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager", dynamic=True)
    graphs = []
    for size in ((channels, channels), (24, channels), (32, 32)):
        sample = draw(2, denoiser.config.in_channels, *size)
        text = draw(2, 7, denoiser.config.cross_attention_dim, seed=1)
        with torch.no_grad():
            compiled(sample, torch.tensor(500), text)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == expected


@pytest.mark.parametrize(
    ("kernel", "hub", "lifts", "transform"),
    [
        *product(("cpu", "simulated"), (1, 2), (False, True), (PLAIN,)),
        ("reference", 2, True, PLAIN),  # which is simulated there
        ("cpu", 1, False, TRANSFORMS[2]),
    ],
)
def test_denoiser_compiles_without_a_graph_break(
    kernel: str, hub: int, lifts: bool, transform: InputTransform
) -> None:
    denoiser = unet(hub, lifts=lifts, transform=transform)
    timesteps = (10, 900, 20, 800)
    # The reference is simulated under a compiler; its exact sums would fall on other sides of
    # borders now and then.
    prepare_(denoiser, "cpu" if kernel == "cpu" else "simulated")
    expected = [call(denoiser, timestep) for timestep in timesteps]
    prepare_(denoiser, kernel)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    outputs = [call(compiled, timestep) for timestep in timesteps]
    assert (
        counters["stats"]["unique_graphs"] <= 2
    )  # one for all timesteps, and one before the route has been used
    for got, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert (hub == 1 and not lifts) or not torch.allclose(outputs[0], outputs[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_compiled_code_rounds_as_the_reference_does() -> None:
    net = nn.Sequential(
        nn.SiLU(),
        conv(grid=grid_of(INPUTS["ue2m2"]), padding=1),
        nn.SiLU(),
        layer_of(nn.Linear, 6, 5, grid=grid_of(INPUTS["e2m5"])),
    ).requires_grad_(False)
    prepare_(net, "cpu")
    x = draw(2, 4, 7, 6)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True)(x)
    torch.testing.assert_close(compiled, net(x), rtol=1e-5, atol=1e-5)
