import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError, MsfpError, UsageError
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.packing import packed_size
from msfp_cli.formats.rounding import Grid, fake_quantize, quantize
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.replace import store_layers_
from msfp_cli.layers.routing import Route
from msfp_cli.layers.scheme import LayerScheme

E2M1, UE2M2 = FloatFormat.parse("e2m1"), FloatFormat.parse("ue2m2")
INPUTS = {
    "e2m1": Grid(E2M1, 0.25),
    "ue2m2": Grid(UE2M2, 0.125, -0.28125),
    "ue1m3": Grid(FloatFormat.parse("ue1m3"), 0.1, -0.3),
    "e4m3": Grid(FloatFormat.parse("e4m3"), 2.0**-14),
}
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
    "oblong": {"kernel_size": (1, 5), "padding": (0, 2)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "replicate": {"padding": (2, 1), "padding_mode": "replicate"},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def redraw(layer: nn.Module, seed: int = 1) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    return layer


def linear(*, bias: bool = True, seed: int = 1) -> nn.Linear:
    layer = redraw(nn.Linear(6, 5, bias=bias), seed)
    assert isinstance(layer, nn.Linear)
    return layer


def conv(*, bias: bool = True, seed: int = 1, **arguments: Any) -> nn.Conv2d:  # noqa: ANN401 (as torch's)
    layer = redraw(nn.Conv2d(4, 8, **({"kernel_size": 3} | arguments), bias=bias), seed)
    assert isinstance(layer, nn.Conv2d)
    return layer


def scales_of(weight: Tensor, fmt: FloatFormat) -> Tensor:
    return weight.detach().abs().flatten(1).amax(dim=1) * 0.8 / fmt.largest


def quantized(layer: nn.Linear | nn.Conv2d, scheme: LayerScheme) -> QuantLinear | QuantConv2d:
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    new = kind(layer, scheme)
    if scheme.weight is not None:
        new.store_(layer.weight.detach(), scales_of(layer.weight, scheme.weight))
    return new


def integers(x: Tensor, grid: Grid) -> Tensor:
    """The integers that the codes of `x` stand for, float64."""
    return torch.tensor(grid.format.code_book, dtype=torch.float64)[quantize(x, grid).long()]


def reals(x: Tensor, grid: Grid) -> Tensor:
    return integers(x, grid) * grid.scale + grid.zero_point


def reals_of_weight(weight: Tensor, fmt: FloatFormat) -> Tensor:
    scale = scales_of(weight, fmt).view(-1, *[1] * (weight.ndim - 1))
    return integers(weight.detach(), Grid(fmt, scale)) * scale.double()


def double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().double()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", list(INPUTS))
@pytest.mark.parametrize("weight", ["e2m1", "e1m2", "e3m0", "e2m3", "e4m3"])
def test_linear_equals_the_formula(weight: str, grid: str, bias: bool) -> None:
    layer, x, fmt = linear(bias=bias), draw(3, 2, 6), FloatFormat.parse(weight)
    new = quantized(layer, LayerScheme(weight=fmt, input=INPUTS[grid]))
    close(
        new(x),
        F.linear(reals(x, INPUTS[grid]), reals_of_weight(layer.weight, fmt), double(layer.bias)),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", ["e2m1", "ue2m2"])
@pytest.mark.parametrize("arguments", list(CONVOLUTIONS.values()), ids=list(CONVOLUTIONS))
def test_convolution_rounds_then_pads_then_sums(
    arguments: dict[str, Any], grid: str, bias: bool
) -> None:
    layer, x = conv(bias=bias, **arguments), draw(2, 4, 9, 8)
    new = quantized(layer, LayerScheme(weight=E2M1, input=INPUTS[grid]))
    padding = {"same": (1, 1), "valid": (0, 0)}.get(str(layer.padding)) or layer.padding
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
    padded = F.pad(
        reals(x, INPUTS[grid]), (padding[1], padding[1], padding[0], padding[0]), mode=mode
    )
    weight = reals_of_weight(layer.weight, E2M1)
    expected = F.conv2d(
        padded,
        weight,
        double(layer.bias),
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    assert new(x).shape == layer(x).shape
    close(new(x), expected)


def test_convolution_pads_with_zeros_and_not_with_the_zero_point() -> None:
    layer = conv(padding=1)
    grid = Grid(
        UE2M2, 0.2, -0.3
    )  # no level of this grid is 0, so padding before rounding would show too
    x = draw(2, 4, 1, 1)
    new = quantized(layer, LayerScheme(weight=E2M1, input=grid))
    centre = reals_of_weight(layer.weight, E2M1)[:, :, 1, 1]
    expected = reals(x, grid)[:, :, 0, 0] @ centre.T + layer.bias.detach().double()
    close(new(x)[:, :, 0, 0], expected)


@pytest.mark.parametrize("grid", list(INPUTS))
def test_linear_is_an_integer_product_plus_a_zero_point_term(grid: str) -> None:
    layer, x, a = linear(), draw(7, 6), INPUTS[grid]
    new = quantized(layer, LayerScheme(weight=E2M1, input=a))
    s_w = new.weight_scale.double()
    q_a, q_w = integers(x, a), integers(layer.weight.detach(), new.weight_grid())
    assert torch.equal(q_a, q_a.round()) and torch.equal(q_w, q_w.round())
    y = (
        a.scale * s_w * (q_a @ q_w.T)
        + a.zero_point * s_w * q_w.sum(dim=1)
        + layer.bias.detach().double()
    )
    close(new(x), y)


def test_convolution_is_an_integer_product_plus_the_zero_point_inside_the_picture() -> None:
    layer, x, a = conv(padding=1, stride=2), draw(2, 4, 6, 5), INPUTS["ue2m2"]
    new = quantized(layer, LayerScheme(weight=E2M1, input=a))
    q_a, q_w = integers(x, a), integers(layer.weight.detach(), new.weight_grid())
    s_w = new.weight_scale.double().view(1, -1, 1, 1)
    product_of_codes, inside = (
        F.conv2d(t, q_w, stride=2, padding=1) for t in (q_a, torch.ones_like(q_a))
    )
    y = (
        a.scale * s_w * product_of_codes
        + a.zero_point * s_w * inside
        + layer.bias.detach().double().view(1, -1, 1, 1)
    )
    close(new(x), y)


def test_weight_may_stay_in_floating_point() -> None:
    layer, x = linear(), draw(3, 6)
    new = quantized(layer, LayerScheme(input=INPUTS["e2m1"]))
    assert new.weight is layer.weight
    assert set(new.state_dict()) == {"weight", "bias"}
    close(
        new(x),
        F.linear(reals(x, INPUTS["e2m1"]), layer.weight.detach().double(), double(layer.bias)),
    )


def test_input_may_stay_in_floating_point() -> None:
    layer, x = conv(), draw(2, 4, 5, 5)
    new = quantized(layer, LayerScheme(weight=E2M1))
    close(new(x), F.conv2d(x.double(), reals_of_weight(layer.weight, E2M1), double(layer.bias)))


@pytest.mark.parametrize("layer", [linear(), conv(padding=1)], ids=["linear", "conv"])
def test_neither_quantized_is_the_float_layer(layer: nn.Linear | nn.Conv2d) -> None:
    x = draw(2, 6) if isinstance(layer, nn.Linear) else draw(2, 4, 5, 5)
    assert torch.equal(quantized(layer, LayerScheme())(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m3"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_state_is_packed_codes_scales_and_the_bias(kind: str, name: str, bias: bool) -> None:
    fmt, layer = FloatFormat.parse(name), linear(bias=bias) if kind == "linear" else conv(bias=bias)
    state = quantized(layer, LayerScheme(weight=fmt, input=INPUTS["ue2m2"])).state_dict()
    assert set(state) == {"weight_codes", "weight_scale"} | ({"bias"} if bias else set())
    assert state["weight_codes"].dtype == torch.uint8
    assert state["weight_codes"].shape == (1, packed_size(layer.weight.numel(), fmt.bits))
    assert state["weight_scale"].dtype == torch.float32
    assert state["weight_scale"].shape == layer.weight.shape[:1]


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m3"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_state_of_one_layer_makes_another_equal(kind: str, name: str) -> None:
    make, shape = (linear, (3, 6)) if kind == "linear" else (conv, (2, 4, 5, 5))
    scheme = LayerScheme(weight=FloatFormat.parse(name), input=INPUTS["ue2m2"])
    one, other = quantized(make(seed=1), scheme), quantized(make(seed=2), scheme)
    x = draw(*shape)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(x), other(x))
    assert torch.equal(copy.deepcopy(one)(x), one(x))


def test_layer_made_on_the_meta_device_is_filled_by_loading() -> None:
    scheme = LayerScheme(weight=E2M1, input=INPUTS["ue2m2"])
    for real, x in ((linear(), draw(3, 6)), (conv(padding=1), draw(2, 4, 5, 5))):
        filled = quantized(real, scheme)
        empty = type(filled)(copy.deepcopy(real).to("meta"), scheme)
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        assert empty.weight_shape == real.weight.shape
        empty.load_state_dict(filled.state_dict(), assign=True)
        assert torch.equal(empty(x), filled(x))


def test_layers_pass_for_torch_layers() -> None:
    scheme = LayerScheme(weight=E2M1, input=INPUTS["e2m1"])
    new_linear, new_conv = (
        quantized(linear(), scheme),
        quantized(conv(stride=2, groups=2), scheme),
    )
    assert isinstance(new_linear, nn.Linear) and (
        new_linear.in_features,
        new_linear.out_features,
    ) == (6, 5)
    assert isinstance(new_conv, nn.Conv2d) and (new_conv.stride, new_conv.groups) == ((2, 2), 2)
    for layer in (new_linear, new_conv):
        assert "weight=e2m1, input=e2m1" in repr(layer)
        assert isinstance(layer.bias, nn.Parameter)


def test_weight_reads_as_the_rounded_float_weight() -> None:
    for layer in (linear(), conv()):
        new = quantized(layer, LayerScheme(weight=E2M1))
        assert new.weight.shape == layer.weight.shape and new.weight.dtype == torch.float32
        assert torch.equal(new.weight, fake_quantize(layer.weight.detach(), new.weight_grid()))
        assert torch.equal(new.codes(), quantize(layer.weight.detach(), new.weight_grid()))


def test_training_mode_is_taken_over() -> None:
    assert not QuantLinear(linear().eval(), LayerScheme(weight=E2M1)).training
    assert QuantLinear(linear().train(), LayerScheme(weight=E2M1)).training


def test_gradients_reach_the_input_and_the_bias_but_not_the_codes() -> None:
    new = quantized(linear(), LayerScheme(weight=E2M1, input=INPUTS["e2m1"]))
    x = torch.tensor([[0.1, -0.2, 0.3, 9.0, -9.0, 0.0]], requires_grad=True)
    new(x).sum().backward()
    assert x.grad is not None and new.bias is not None and new.bias.grad is not None
    inside = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(x.grad, new.weight.sum(dim=0) * inside)
    assert [name for name, _ in new.named_parameters()] == ["bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_layer_answers_in_16_bits_on_the_same_grid(dtype: torch.dtype) -> None:
    fmt = FloatFormat.parse("e5m2")  # its smallest step lies far below the smallest float16
    layer = linear().to(dtype)
    new = quantized(layer, LayerScheme(weight=fmt, input=INPUTS["ue2m2"]))
    weight = new.weight.clone()
    new.to(dtype)
    assert new.weight_scale.dtype == torch.float32
    assert torch.equal(new.weight, weight)
    x = draw(3, 6).to(dtype)
    y = new(x)
    assert y.dtype == dtype
    expected = F.linear(fake_quantize(x, INPUTS["ue2m2"]), weight.to(dtype), layer.bias)
    assert torch.equal(y, expected)


HUB = 3
each_hub_layer = pytest.mark.parametrize(
    "make", [linear, lambda **a: conv(padding=1, **a)], ids=["linear", "conv"]
)


def hub_layer(
    make: Callable[..., nn.Linear | nn.Conv2d], fmt: FloatFormat = E2M1, *grids: Grid
) -> tuple[QuantLinear | QuantConv2d, list[Tensor], Tensor]:
    """A layer of three members out of order, their float weights, and the scale that they share."""
    weights = [make(seed=seed).weight.detach() for seed in range(HUB)]
    first, *further = grids or (None,)
    scheme = LayerScheme(
        weight=fmt, input=first, hub=HUB, further_inputs=tuple(g for g in further if g)
    )
    layer, scale = quantized(make(), scheme), scales_of(torch.stack(weights).amax(dim=0), fmt)
    for member in (2, 0, 1):
        layer.store_(weights[member], scale, member)
    return layer, weights, scale


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m3"])
@each_hub_layer
def test_members_are_stored_and_read_independently(
    make: Callable[..., nn.Linear | nn.Conv2d], name: str
) -> None:
    fmt = FloatFormat.parse(name)
    layer, weights, scale = hub_layer(make, fmt)
    assert layer.weight_codes.shape == (HUB, packed_size(weights[0].numel(), fmt.bits))
    assert layer.weight_scale.shape == scale.shape
    for member, weight in enumerate(weights):
        assert torch.equal(layer.codes(member), quantize(weight, layer.weight_grid()))
    before = [layer.codes(member) for member in range(HUB)]
    layer.store_(-weights[1], scale, 1)
    assert torch.equal(layer.codes(1), quantize(-weights[1], layer.weight_grid()))
    assert torch.equal(layer.codes(0), before[0]) and torch.equal(layer.codes(2), before[2])


@each_hub_layer
def test_weight_follows_the_route(make: Callable[..., nn.Linear | nn.Conv2d]) -> None:
    layer, weights, scale = hub_layer(make, E2M1, INPUTS["e2m1"])
    layer.route, layer.slot = Route[int](), 1
    x = draw(3, 6) if isinstance(layer, nn.Linear) else draw(2, 4, 5, 5)
    for member in (1, 2, 0):
        layer.route.open([HUB, member])
        alone = quantized(make(), LayerScheme(weight=E2M1, input=INPUTS["e2m1"]))
        alone.store_(weights[member], scale)
        assert layer.member() == member
        assert torch.equal(layer.weight, fake_quantize(weights[member], layer.weight_grid()))
        assert torch.equal(layer(x), alone(x))


@each_hub_layer
def test_input_follows_the_route_where_members_have_grids_of_their_own(
    make: Callable[..., nn.Linear | nn.Conv2d],
) -> None:
    grids = (Grid(UE2M2, 0.125, -0.25), Grid(UE2M2, 0.25, -0.5), Grid(UE2M2, 0.0625, 0.0))
    layer, weights, scale = hub_layer(make, E2M1, *grids)
    layer.route = Route[int]()
    x = draw(3, 6) if isinstance(layer, nn.Linear) else draw(2, 4, 5, 5)
    for member, grid in enumerate(grids):
        layer.route.open([member])
        alone = quantized(make(), LayerScheme(weight=E2M1, input=grid))
        alone.store_(weights[member], scale)
        assert layer.scheme.input_of(member) == grid
        assert torch.equal(layer(x), alone(x))


def test_members_share_the_input_where_there_are_no_further_ones() -> None:
    scheme = LayerScheme(weight=E2M1, input=INPUTS["e2m1"], hub=HUB)
    assert [scheme.input_of(member) for member in range(HUB)] == [INPUTS["e2m1"]] * HUB
    assert LayerScheme(weight=E2M1, hub=HUB).input_of(2) is None


@each_hub_layer
def test_hub_outside_the_denoiser_says_so(make: Callable[..., nn.Linear | nn.Conv2d]) -> None:
    layer, *_ = hub_layer(make)
    layer.route = Route[int]()
    with pytest.raises(MsfpError, match="ran outside its denoiser"):
        layer(draw(3, 6))


def test_layer_without_a_route_is_served_by_its_first_member() -> None:
    layer, weights, _ = hub_layer(linear)
    assert layer.member() == 0
    assert torch.equal(layer.weight, fake_quantize(weights[0], layer.weight_grid()))


def test_state_of_a_hub_makes_another_equal() -> None:
    one, *_ = hub_layer(linear)
    other = quantized(linear(seed=7), one.scheme)
    other.load_state_dict(one.state_dict(), strict=True)
    assert all(torch.equal(one.codes(member), other.codes(member)) for member in range(HUB))


float32s = st.floats(2.0**-100, 2.0**100, width=32)


unsigned_grids = st.builds(
    Grid, st.just(FloatFormat.parse("ue2m2")), float32s, st.floats(-100, 0, width=32)
)
signed_formats = st.sampled_from(["e2m1", "e4m3"]).map(FloatFormat.parse)
input_grids = unsigned_grids | st.builds(Grid, signed_formats, float32s)


@given(st.sampled_from([E2M1, None]), input_grids, st.lists(input_grids, max_size=3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_parameters_survive_json_exactly(
    weight: FloatFormat | None, grid: Grid, further: list[Grid]
) -> None:
    shared = LayerScheme(weight=weight, input=grid, hub=3)
    for scheme in (
        shared,
        replace(shared, hub=1 + len(further), further_inputs=tuple(further)),
    ):
        assert LayerScheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


@pytest.mark.parametrize(("hub", "further"), [(0, 0), (1, 1), (3, 1)])
def test_parameters_refuse_inputs_that_do_not_fit_the_hub(hub: int, further: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LayerScheme(
            weight=E2M1, input=INPUTS["ue2m2"], hub=hub, further_inputs=(INPUTS["ue2m2"],) * further
        )


def test_parameters_that_name_no_hub_have_one_member() -> None:
    scheme = LayerScheme(weight=E2M1, input=INPUTS["ue2m2"])
    data = {key: value for key, value in scheme.to_json().items() if key in ("weight", "input")}
    assert scheme.hub == 1
    assert LayerScheme.from_json(data) == scheme


def test_scale_of_a_search_survives_json_exactly() -> None:
    grid = Grid.with_maximum(UE2M2, torch.tensor(0.1), -0.1)
    scheme = LayerScheme(input=grid)
    again = LayerScheme.from_json(json.loads(json.dumps(scheme.to_json())))
    assert again == scheme
    x = draw(100)
    assert again.input is not None
    assert torch.equal(fake_quantize(x, again.input), fake_quantize(x, grid))


def test_scheme_of_nothing_survives_json() -> None:
    assert LayerScheme.from_json(json.loads(json.dumps(LayerScheme().to_json()))) == LayerScheme()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"weight": "fp4", "input": None}, UsageError),
        ({"weight": None}, ValueError),
        ({"weight": None, "input": {"format": "e2m1", "scale": 1.0}}, ValueError),
        (
            {"weight": None, "input": {"format": "e2m1", "scale": None, "zero_point": 0.0}},
            ValueError,
        ),
        (
            {
                "weight": "e2m1",
                "input": None,
                "hub": 2,
                "further_inputs": [{"format": "e2m1", "scale": 1.0}],
            },
            ValueError,
        ),
    ],
)
def test_damaged_parameters_are_refused(data: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        LayerScheme.from_json(data)


def test_a_layer_of_torch_without_a_row_is_left_alone() -> None:
    net = nn.Sequential(nn.Bilinear(4, 6, 3))
    with pytest.raises(CheckpointError, match="Sequential has no layer '0'"):
        store_layers_(net, {"0": LayerScheme(weight=E2M1)}, {})
