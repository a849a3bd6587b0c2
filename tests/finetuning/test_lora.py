import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msfp_cli.errors import MsfpError
from msfp_cli.finetuning.lora import (
    TunedLayer,
    _RoundedWeight,
    moved_input,
    tune_layers_,
    tuned_names,
    updated_steps,
)
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.router import Choice
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.rounding import Grid, dequantize, fake_quantize, quantize
from msfp_cli.layers.quantized import QuantConv2d, QuantLinear
from msfp_cli.layers.routing import Route
from msfp_cli.layers.scheme import LayerScheme

E2M1, UE2M2 = FloatFormat.parse("e2m1"), FloatFormat.parse("ue2m2")
INPUTS = {"float": None, "e2m1": Grid(E2M1, 0.25), "ue2m2": Grid(UE2M2, 0.125, -0.28125)}
SHAPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear without bias": {"bias": False},
    "conv": {"padding": 1, "stride": 2},
    "conv without bias": {"padding": 1, "padding_mode": "circular", "bias": False},
    "grouped conv": {"groups": 2},
}
SMALL = FinetuneRecipe(hub_size=3, rank=2)
each_kind = pytest.mark.parametrize("kind", SHAPES)
each_input = pytest.mark.parametrize("grid", INPUTS)
few = settings(max_examples=25, deadline=None, derandomize=True)
positions = st.floats(0, 1000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def float_layer(kind: str) -> nn.Linear | nn.Conv2d:
    layer = (
        nn.Linear(12, 8, **SHAPES[kind]) if "linear" in kind else nn.Conv2d(4, 8, 3, **SHAPES[kind])
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator(1))
    return layer


def input_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return draw(3, 12) if isinstance(layer, nn.Linear) else draw(2, 4, 7, 6)


def scales_of(weight: Tensor, fmt: FloatFormat = E2M1) -> Tensor:
    return weight.detach().float().abs().flatten(1).amax(dim=1) * 0.8 / fmt.largest


def tuned_layer(
    layer: nn.Linear | nn.Conv2d,
    grid: Grid | None = None,
    recipe: FinetuneRecipe = SMALL,
    seed: int = 0,
) -> TunedLayer:
    scheme = LayerScheme(weight=E2M1, input=grid)
    sizes = scales_of(layer.weight)[:, None]
    return TunedLayer(layer, scheme, sizes, Route(), 0, recipe, generator(seed))


def open_(layer: TunedLayer, member: int) -> None:
    """Route to a member."""
    layer.route.open([[Choice(member)]])


def quantized_layer(
    layer: nn.Linear | nn.Conv2d, grids: Sequence[Grid | None], hub: int
) -> QuantLinear | QuantConv2d:
    """A layer with one grid of the input for each member, or one for all."""
    first, *further = grids
    scheme = LayerScheme(
        weight=E2M1, input=first, hub=hub, further_inputs=tuple(g for g in further if g)
    )
    return (
        QuantLinear(layer, scheme) if isinstance(layer, nn.Linear) else QuantConv2d(layer, scheme)
    )


def stir_(layer: TunedLayer) -> None:
    """Give every trained number a value that training could have given it."""
    for k, parameter in enumerate([*layer.lora_a, *layer.lora_b]):
        nn.init.normal_(parameter, generator=generator(k))
    for shift, numbers in zip(
        layer.input_shift or (), [(0.2, -0.7), (0.0, 0.0), (-0.3, 0.4)], strict=False
    ):
        shift.data.copy_(torch.tensor(numbers))


def steps_of(layer: TunedLayer, k: int) -> Tensor:
    """The updated weight of a member, in steps of its grid."""
    return updated_steps(
        layer.layer.weight, layer.sizes, layer.lora_a[k].detach(), layer.lora_b[k].detach()
    )


def moved_inputs(layer: TunedLayer) -> list[Grid | None]:
    """The grid of the input for each member."""
    if layer.input is None or layer.input_shift is None:
        return [layer.input]
    return [moved_input(layer.input, *shift.tolist()) for shift in layer.input_shift]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_input
@each_kind
def test_zero_initialised_hub_is_the_identity(kind: str, grid: str, dtype: torch.dtype) -> None:
    layer = float_layer(kind).to(dtype)
    expected = quantized_layer(layer, [INPUTS[grid]], hub=1)
    expected.store_(layer.weight.detach(), scales_of(layer.weight))
    expected.prepare_("simulated")
    tuned, x = tuned_layer(layer, INPUTS[grid]), input_of(layer).to(dtype)
    for member in range(SMALL.hub_size):
        open_(tuned, member)
        assert torch.equal(tuned(x), expected(x))
        assert tuned(x).dtype == dtype


@each_input
@each_kind
def test_trained_member_computes_what_its_export_will(kind: str, grid: str) -> None:
    layer = float_layer(kind)
    tuned, x = tuned_layer(layer, INPUTS[grid]), input_of(layer)
    stir_(tuned)
    export = quantized_layer(layer, moved_inputs(tuned), SMALL.hub_size)
    export.route = Route[int]()
    export.prepare_("simulated")
    for k in range(SMALL.hub_size):
        export.store_steps_(steps_of(tuned, k), tuned.sizes[:, 0], k)
    outputs = []
    for member in range(SMALL.hub_size):
        open_(tuned, member)
        export.route.open([member])
        outputs.append(tuned(x))
        assert torch.equal(outputs[-1], export(x))
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


GIVEN = {
    "in order": [(0, 1), (2,), (3, 4)],
    "mixed up": [(0, 3), (1, 4), (2,)],
    "alone": [(0, 1, 2, 3, 4)],
}


@pytest.mark.parametrize("folded", [1, 3], ids=["rows", "folded"])
@pytest.mark.parametrize("rows", GIVEN.values(), ids=GIVEN)
@each_input
@each_kind
def test_every_row_is_computed_with_its_own_member(
    kind: str, grid: str, rows: list[tuple[int, ...]], folded: int
) -> None:
    tuned = tuned_layer(float_layer(kind), INPUTS[grid])
    stir_(tuned)
    x = draw(5 * folded, *input_of(tuned.layer).shape[1:])
    expected = torch.empty(5, 0)
    for member, own in enumerate(rows):
        open_(tuned, member)
        y = tuned(x)
        expected = expected if expected.numel() else torch.zeros_like(y)
        places = [row * folded + i for row in own for i in range(folded)]
        expected = expected.index_put((torch.tensor(places),), y[places])
    upstream = draw(*expected.shape, seed=3)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, trained, upstream, allow_unused=True)
    tuned.route.open([[Choice(member, own) for member, own in enumerate(rows)]])
    y = tuned(x)
    torch.testing.assert_close(y, expected)
    for one, other in zip(
        torch.autograd.grad(y, trained, upstream, allow_unused=True), wanted, strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_input_without_the_rows_of_the_call_is_refused_only_where_members_part_them() -> None:
    tuned = tuned_layer(float_layer("linear"))
    tuned.route.open([[Choice(0, (0, 1))]])
    assert tuned(draw(3, 12)).shape == (3, 8)
    tuned.route.open([[Choice(0, (0,)), Choice(1, (1,))]])
    with pytest.raises(
        MsfpError, match=r"of shape \(3, 12\) does not begin with the 2 rows.*--hub-size 1"
    ):
        tuned(draw(3, 12))


@each_kind
def test_update_counts_in_steps_of_the_weights_grid(kind: str) -> None:
    layer = float_layer(kind)
    tuned = tuned_layer(layer)
    stir_(tuned)
    wanted = (
        layer.weight.detach().flatten(1) / tuned.sizes
        + (tuned.lora_b[1] @ tuned.lora_a[1]).detach()
    )
    rounded = dequantize(quantize(wanted, Grid(E2M1, 1.0)), Grid(E2M1, tuned.sizes))
    torch.testing.assert_close(tuned.rounded_weight(1).detach(), rounded.view(layer.weight.shape))


@pytest.mark.parametrize("rank", [1, 3, 8, 50])
@each_kind
def test_svd_leaves_of_the_rounding_error_what_a_truncated_svd_leaves(kind: str, rank: int) -> None:
    layer = float_layer(kind)
    tuned = tuned_layer(layer, recipe=FinetuneRecipe(hub_size=2, rank=rank, init="svd"))
    steps = layer.weight.detach().flatten(1) / tuned.sizes
    error = steps - fake_quantize(steps, Grid(E2M1, 1.0))
    left_out = torch.linalg.svdvals(error)[rank:]
    for a, b in zip(tuned.lora_a, tuned.lora_b, strict=True):
        assert a.shape[0] == b.shape[1] == min(rank, *error.shape)
        assert float((error - b @ a).detach().norm()) == pytest.approx(
            float(left_out.norm()), abs=1e-4
        )
    assert float(left_out.norm()) < float(error.norm())


@each_kind
def test_members_begin_alike_with_b_at_zero(kind: str) -> None:
    layer = float_layer(kind)
    one, same, other = (tuned_layer(layer, seed=seed) for seed in (0, 0, 1))
    assert len(one.lora_a) == len(one.lora_b) == 3
    for a, b in zip(one.lora_a, one.lora_b, strict=True):
        assert a.shape == (2, layer.weight[0].numel()) and b.shape == (8, 2)
        assert torch.equal(a, one.lora_a[0]) and a.any() and not b.any()
    assert torch.equal(one.lora_a[0], same.lora_a[0])
    assert not torch.equal(one.lora_a[0], other.lora_a[0])


@each_kind
def test_only_the_hub_and_the_inputs_grid_are_trained(kind: str) -> None:
    tuned = tuned_layer(float_layer(kind), INPUTS["ue2m2"])
    stir_(tuned)
    open_(tuned, 2)
    tuned(input_of(tuned.layer)).square().sum().backward()
    trained = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert set(trained) == {
        f"{kind}.{k}" for kind in ("lora_a", "lora_b", "input_shift") for k in range(3)
    }
    for name, grad in trained.items():
        assert grad.any() if name.endswith("2") else grad is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("grid", "rate"), [(None, 1e-3), (INPUTS["ue2m2"], 0.0)], ids=["float input", "no rate"]
)
def test_inputs_grid_stands_still_where_there_is_nothing_to_train(
    grid: Grid | None, rate: float
) -> None:
    tuned = tuned_layer(float_layer("linear"), grid, FinetuneRecipe(input_learning_rate=rate))
    assert tuned.input_shift is None
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {f"{kind}.{k}" for kind in ("lora_a", "lora_b") for k in range(2)}


def test_gradient_of_the_weight_is_straight_through_where_rounding_did_not_clip() -> None:
    weight, scale, upstream = (
        2 * draw(7, 5, 2, seed=4),
        draw(7, seed=5).abs() + 0.1,
        draw(7, 10, seed=6),
    )
    a, b = draw(3, 10, seed=1).requires_grad_(), draw(7, 3, seed=2).requires_grad_()
    steps = weight.flatten(1) / scale[:, None] + b @ a
    straight = steps.clamp(-E2M1.largest, E2M1.largest) * scale[:, None]
    rounded = _RoundedWeight.apply(weight, scale[:, None], E2M1, a, b)
    torch.testing.assert_close(
        rounded, fake_quantize(steps.detach(), Grid(E2M1, 1.0)) * scale[:, None]
    )
    got = torch.autograd.grad(rounded, (a, b), upstream)
    for one, other in zip(got, torch.autograd.grad(straight, (a, b), upstream), strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (steps.abs() > E2M1.largest).any()


@pytest.mark.parametrize("folded", [1, 3], ids=["rows", "folded"])
@pytest.mark.parametrize("rows", [[(0, 1), (2,)], [(0, 2), (1,)], [(0, 1, 2)]], ids=str)
@each_input
@each_kind
def test_router_is_told_what_each_member_would_do_to_each_row(
    kind: str, grid: str, rows: list[tuple[int, ...]], folded: int
) -> None:
    """Against the gradient of the mixture of members, one row at a time."""
    tuned = tuned_layer(float_layer(kind), INPUTS[grid])
    stir_(tuned)
    x = draw(3 * folded, *input_of(tuned.layer).shape[1:])
    told = torch.zeros(3, SMALL.hub_size, requires_grad=True)
    tuned.route.open([[Choice(member, own, told[list(own)]) for member, own in enumerate(rows)]])
    y = tuned(x)
    upstream = draw(*y.shape, seed=3)
    (got,) = torch.autograd.grad(y, told, upstream)
    tuned.route.open([[Choice(member, own) for member, own in enumerate(rows)]])
    assert torch.equal(tuned(x), y)
    for member, own in enumerate(rows):
        inside = steps_of(tuned, member).abs() <= E2M1.largest
        for row in own:
            places = slice(row * folded, (row + 1) * folded)
            weights = torch.zeros(SMALL.hub_size, requires_grad=True)
            update = sum(
                weights[k] * (tuned.lora_b[k] @ tuned.lora_a[k]).detach()
                for k in range(SMALL.hub_size)
            )
            mixed = (update * inside * tuned.sizes).view(tuned.layer.weight.shape)
            with torch.no_grad():
                rounded = tuned.rounded_input(x[places], Choice(member))
            (expected,) = torch.autograd.grad(
                tuned._run(rounded, mixed, None), weights, upstream[places]
            )
            assert expected.all()
            torch.testing.assert_close(got[row], expected, rtol=1e-3, atol=1e-3)


@each_kind
def test_output_may_be_added_to_in_place(kind: str) -> None:
    """A UNet does so with what an adapter gives."""
    tuned = tuned_layer(float_layer(kind), INPUTS["e2m1"])
    stir_(tuned)
    x = input_of(tuned.layer)
    told = torch.zeros(len(x), SMALL.hub_size, requires_grad=True)
    tuned.route.open([[Choice(1, tuple(range(len(x))), told)]])
    y = tuned(x)
    upstream = draw(*y.shape, seed=3)
    trained = (told, tuned.lora_a[1])
    expected = torch.autograd.grad(y, trained, upstream)
    y = tuned(x)
    y += 1
    for one, other in zip(torch.autograd.grad(y, trained, upstream), expected, strict=True):
        assert one.any() and torch.equal(one, other)


float32s = st.floats(2.0**-20, 2.0**20, width=32)
input_grids = st.builds(
    lambda fmt, scale, zero: Grid(fmt, scale, 0.0 if fmt.signed else zero),
    st.sampled_from(
        [fmt for signed in (True, False) for fmt in formats_of_width(4, signed=signed)]
    ),
    float32s,
    st.floats(-100, 0, width=32),
)


@given(input_grids)
@few
def test_input_that_was_not_moved_has_the_calibrated_numbers_exactly(grid: Grid) -> None:
    assert moved_input(grid, 0.0, 0.0) == grid


@given(input_grids, st.floats(-1, 1, width=32), st.floats(-4, 4, width=32))
@few
def test_input_moves_by_a_factor_and_by_calibrated_steps(
    grid: Grid, growth: float, steps: float
) -> None:
    moved = moved_input(grid, growth, steps)
    assert moved.scale == pytest.approx(math.exp(growth) * grid.scale, rel=1e-6)
    expected = 0.0 if grid.format.signed else grid.zero_point + grid.scale * steps
    assert moved.zero_point == pytest.approx(
        expected, abs=1e-6 * (abs(grid.zero_point) + 4 * grid.scale)
    )
    for number in (moved.scale, moved.zero_point):
        assert torch.tensor(number, dtype=torch.float32).item() == number


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = float_layer("conv")
        self.blocks = nn.ModuleList([float_layer("linear"), float_layer("linear without bias")])


WEIGHT = LayerScheme(weight=E2M1, input=INPUTS["e2m1"])
TABLE = {"conv": WEIGHT, "blocks.0": LayerScheme(input=INPUTS["e2m1"]), "blocks.1": WEIGHT}


def tuned_net() -> tuple[Net, dict[str, TunedLayer], Route[Sequence[Choice]]]:
    net = Net()
    scales = {name: scales_of(net.get_submodule(name).weight) for name in TABLE}
    return net, *tune_layers_(net, TABLE, scales, SMALL, generator())


def test_layers_with_a_quantized_weight_are_tuned_in_place() -> None:
    net, layers, _ = tuned_net()
    assert list(layers) == tuned_names(TABLE) == ["conv", "blocks.1"]
    assert all(net.get_submodule(name) is layer for name, layer in layers.items())
    assert type(net.blocks[0]) is nn.Linear


def test_tuned_layers_share_one_route_and_read_their_own_rows() -> None:
    _, layers, route = tuned_net()
    assert all(layer.route is route for layer in layers.values())
    assert [layer.slot for layer in layers.values()] == [0, 1]
    for layer in layers.values():
        stir_(layer)
    route.open([[Choice(1)], [Choice(2)]])
    for layer in layers.values():
        grid = Grid(E2M1, layer.sizes)
        (choice,) = route.of(layer.slot)
        assert choice.member == layer.slot + 1
        rounded = dequantize(quantize(steps_of(layer, choice.member), Grid(E2M1, 1.0)), grid)
        assert torch.equal(
            layer.rounded_weight(choice.member), rounded.view(layer.layer.weight.shape)
        )


def test_tuned_layer_outside_the_route_says_so() -> None:
    _, layers, route = tuned_net()
    for layer in layers.values():
        with pytest.raises(MsfpError, match="ran outside its denoiser"):
            layer(input_of(layer.layer))
    route.open([[Choice(1)], [Choice(2)]])
    for layer in layers.values():
        layer(input_of(layer.layer))
    route.close()
    with pytest.raises(MsfpError, match="ran outside its denoiser"):
        layers["conv"](input_of(layers["conv"].layer))


@pytest.mark.parametrize("growth", [-1e4, 1e4, 1e308])
def test_grid_that_ran_away_is_still_a_number(growth: float) -> None:
    """The training loss says that it diverged."""
    moved = moved_input(Grid(FloatFormat.parse("ue2m2"), 0.1, -0.2), growth, 0.0)
    assert 0 <= moved.scale < math.inf


def test_layer_in_training_has_the_weight_of_its_float_layer() -> None:
    layer = tuned_layer(nn.Linear(6, 5))
    assert layer.weight is layer.layer.weight
