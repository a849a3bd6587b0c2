import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msfp_cli.errors import MsfpError
from msfp_cli.formats import FloatFormat, formats_of_width
from msfp_cli.layers import QuantConv2d, QuantLinear
from msfp_cli.parameters import LayerParameters
from msfp_cli.recipe import FinetuneRecipe
from msfp_cli.rounding import Grid, dequantize, fake_quantize, quantize
from msfp_cli.routing import TABLE_SIZE, Route, table_index
from msfp_cli.talora import (
    Choice,
    Router,
    TunedLayer,
    _RoundedWeight,
    moved_input,
    tune_layers_,
    tuned_names,
    updated_steps,
)

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
units = st.sampled_from([1.0, 1000.0])
positions = st.floats(0, 1000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def float_layer(kind: str) -> nn.Linear | nn.Conv2d:
    layer = nn.Linear(12, 8, **SHAPES[kind]) if "linear" in kind else nn.Conv2d(4, 8, 3, **SHAPES[kind])
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator(1))
    return layer


def input_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return draw(3, 12) if isinstance(layer, nn.Linear) else draw(2, 4, 7, 6)


def scales_of(weight: Tensor, fmt: FloatFormat = E2M1) -> Tensor:
    return weight.detach().float().abs().flatten(1).amax(dim=1) * 0.8 / fmt.largest


def tuned_layer(
    layer: nn.Linear | nn.Conv2d, grid: Grid | None = None, recipe: FinetuneRecipe = SMALL, seed: int = 0
) -> TunedLayer:
    parameters = LayerParameters(weight=E2M1, input=grid)
    return TunedLayer(layer, parameters, scales_of(layer.weight), Route(), 0, recipe, generator(seed))


def open_(layer: TunedLayer, member: int) -> Tensor:
    """Route to a member, and return the weights of all members, which take gradients."""
    weights = nn.functional.one_hot(torch.tensor(member), SMALL.hub_size).float().requires_grad_()
    layer.route.open([Choice(member, weights)])
    return weights


def quantized_layer(layer: nn.Linear | nn.Conv2d, grids: Sequence[Grid | None], hub: int) -> QuantLinear | QuantConv2d:
    """A layer with one grid of the input for each member, or one for all."""
    first, *further = grids
    parameters = LayerParameters(weight=E2M1, input=first, hub=hub, further_inputs=tuple(g for g in further if g))
    return QuantLinear(layer, parameters) if isinstance(layer, nn.Linear) else QuantConv2d(layer, parameters)


def stir_(layer: TunedLayer) -> None:
    """Give every trained number a value that training could have given it."""
    for k, parameter in enumerate([*layer.lora_a, *layer.lora_b]):
        nn.init.normal_(parameter, generator=generator(k))
    for shift, numbers in zip(layer.input_shift or (), [(0.2, -0.7), (0.0, 0.0), (-0.3, 0.4)], strict=False):
        shift.data.copy_(torch.tensor(numbers))


def steps_of(layer: TunedLayer, k: int) -> Tensor:
    """The updated weight of a member, in steps of its grid."""
    return updated_steps(layer.layer.weight, layer.scale, layer.lora_a[k].detach(), layer.lora_b[k].detach())


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
        export.store_steps_(steps_of(tuned, k), tuned.scale, k)
    outputs = []
    for member in range(SMALL.hub_size):
        open_(tuned, member)
        export.route.open([member])
        outputs.append(tuned(x))
        assert torch.equal(outputs[-1], export(x))
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@each_kind
def test_update_counts_in_steps_of_the_weights_grid(kind: str) -> None:
    layer = float_layer(kind)
    tuned = tuned_layer(layer)
    stir_(tuned)
    open_(tuned, 1)
    wanted = layer.weight.detach().flatten(1) / tuned.scale[:, None] + (tuned.lora_b[1] @ tuned.lora_a[1]).detach()
    rounded = dequantize(quantize(wanted, Grid(E2M1, 1.0)), Grid(E2M1, tuned.scale[:, None]))
    torch.testing.assert_close(tuned.rounded_weight().detach(), rounded.view(layer.weight.shape))


@pytest.mark.parametrize("rank", [1, 3, 8, 50])
@each_kind
def test_svd_leaves_of_the_rounding_error_what_a_truncated_svd_leaves(kind: str, rank: int) -> None:
    layer = float_layer(kind)
    tuned = tuned_layer(layer, recipe=FinetuneRecipe(hub_size=2, rank=rank, init="svd"))
    steps = layer.weight.detach().flatten(1) / tuned.scale[:, None]
    error = steps - fake_quantize(steps, Grid(E2M1, 1.0))
    left_out = torch.linalg.svdvals(error)[rank:]
    for a, b in zip(tuned.lora_a, tuned.lora_b, strict=True):
        assert a.shape[0] == b.shape[1] == min(rank, *error.shape)
        assert float((error - b @ a).detach().norm()) == pytest.approx(float(left_out.norm()), abs=1e-4)
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
    weights = open_(tuned, 2)
    tuned(input_of(tuned.layer)).square().sum().backward()
    trained = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{kind}.{k}" for kind in ("lora_a", "lora_b", "input_shift") for k in range(3)}
    assert weights.grad is not None and weights.grad.all()
    for name, grad in trained.items():
        assert grad.any() if name.endswith("2") else grad is None  # type: ignore[union-attr]


@pytest.mark.parametrize(("grid", "rate"), [(None, 1e-3), (INPUTS["ue2m2"], 0.0)], ids=["float input", "no rate"])
def test_inputs_grid_stands_still_where_there_is_nothing_to_train(grid: Grid | None, rate: float) -> None:
    tuned = tuned_layer(float_layer("linear"), grid, FinetuneRecipe(input_learning_rate=rate))
    assert tuned.input_shift is None
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {f"{kind}.{k}" for kind in ("lora_a", "lora_b") for k in range(2)}


@pytest.mark.parametrize("hub", [1, 2, 4])
@pytest.mark.parametrize("routed", [True, False], ids=["with router", "without router"])
def test_gradient_of_the_weight_is_that_of_the_mixture_where_rounding_did_not_clip(hub: int, routed: bool) -> None:
    weight, scale, upstream = 2 * draw(7, 5, 2, seed=4), draw(7, seed=5).abs() + 0.1, draw(7, 10, seed=6)
    for member in range(hub):
        a, b = (
            [draw(*shape, seed=9 * n + k).requires_grad_() for k in range(hub)]
            for n, shape in ((1, (3, 10)), (2, (7, 3)))
        )
        members = nn.functional.one_hot(torch.tensor(member), hub).float().requires_grad_(routed)
        steps = weight.flatten(1) / scale[:, None] + sum(members[k] * (b[k] @ a[k]) for k in range(hub))
        straight = steps.clamp(-E2M1.largest, E2M1.largest) * scale[:, None]
        rounded = _RoundedWeight.apply(weight, scale, E2M1, member, members, *a, *b)
        torch.testing.assert_close(rounded, fake_quantize(steps.detach(), Grid(E2M1, 1.0)) * scale[:, None])
        leaves = [a[member], b[member], *([members] if routed else [])]
        got = torch.autograd.grad(rounded, leaves, upstream, retain_graph=True)
        for one, other in zip(got, torch.autograd.grad(straight, leaves, upstream), strict=True):
            assert one.any()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        others = [parameter for k in range(hub) if k != member for parameter in (a[k], b[k])]
        assert not others or set(torch.autograd.grad(rounded, others, upstream, allow_unused=True)) == {None}
    assert (steps.abs() > E2M1.largest).any()


float32s = st.floats(2.0**-20, 2.0**20, width=32)
input_grids = st.builds(
    lambda fmt, scale, zero: Grid(fmt, scale, 0.0 if fmt.signed else zero),
    st.sampled_from([fmt for signed in (True, False) for fmt in formats_of_width(4, signed=signed)]),
    float32s,
    st.floats(-100, 0, width=32),
)


@given(input_grids)
@few
def test_input_that_was_not_moved_has_the_calibrated_numbers_exactly(grid: Grid) -> None:
    assert moved_input(grid, 0.0, 0.0) == grid


@given(input_grids, st.floats(-1, 1, width=32), st.floats(-4, 4, width=32))
@few
def test_input_moves_by_a_factor_and_by_calibrated_steps(grid: Grid, growth: float, steps: float) -> None:
    moved = moved_input(grid, growth, steps)
    assert moved.scale == pytest.approx(math.exp(growth) * grid.scale, rel=1e-6)
    expected = 0.0 if grid.format.signed else grid.zero_point + grid.scale * steps
    assert moved.zero_point == pytest.approx(expected, abs=1e-6 * (abs(grid.zero_point) + 4 * grid.scale))
    for number in (moved.scale, moved.zero_point):
        assert torch.tensor(number, dtype=torch.float32).item() == number


def router(hub: int = 3, unit: float = 1.0, num_layers: int = 4, seed: int = 0) -> Router:
    return Router(num_layers, hub, unit, generator(seed))


def members(choices: list[Choice]) -> list[int]:
    return [choice.member for choice in choices]


def plain_softmax(model: Router, timestep: float) -> Tensor:
    """The router's formula, ``(layers, hub)``."""
    row = torch.tensor([float(table_index(timestep, model.unit))])
    hidden = nn.functional.silu(model.hidden(get_timestep_embedding(row, model.hidden.in_features)))
    return model.logits(hidden).view(model.num_layers, model.hub_size).softmax(dim=-1)


@given(st.lists(positions, min_size=1, max_size=5), units)
@few
def test_same_timestep_routes_the_same_way(asked: list[float], unit: float) -> None:
    timesteps = [position / unit for position in asked]
    one, other = router(unit=unit), router(unit=unit)
    first = {timestep: members(one(timestep)) for timestep in timesteps}
    assert {timestep: members(one(timestep)) for timestep in timesteps} == first
    assert {timestep: members(other(timestep)) for timestep in reversed(timesteps)} == first


def test_other_timesteps_route_other_ways() -> None:
    model = router()
    table = model.table([float(t) for t in range(0, 1001, 10)])
    assert all(len(set(column.tolist())) > 1 for column in table.t())
    assert len({tuple(column.tolist()) for column in table.t()}) > 1
    assert not torch.equal(router(seed=1).table([0.0, 500.0]), model.table([0.0, 500.0]))


@given(positions, units)
@few
def test_choice_is_one_hot_in_value_and_softmax_in_gradient(position: float, unit: float) -> None:
    model, upstream = router(unit=unit), draw(4, 3, seed=4)
    choices, soft = model(position / unit), plain_softmax(model, position / unit)
    weights = torch.stack([choice.weights for choice in choices])
    assert members(choices) == soft.argmax(dim=-1).tolist()
    assert torch.equal(weights, nn.functional.one_hot(soft.argmax(dim=-1), 3).float())
    parameters = list(model.parameters())
    got = torch.autograd.grad(weights, parameters, upstream)
    expected = torch.autograd.grad(soft, parameters, upstream)
    for one, other in zip(got, expected, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


@given(st.lists(positions, min_size=1, max_size=8), units)
@few
def test_table_is_the_routers_own_choice_at_the_timesteps_and_the_nearest_ones_between(
    asked: list[float], unit: float
) -> None:
    model, timesteps = router(unit=unit), [position / unit for position in asked]
    table = model.table(timesteps)
    assert table.dtype == torch.uint8 and table.shape == (TABLE_SIZE, 4)
    own = {table_index(timestep, unit): members(model(timestep)) for timestep in timesteps}
    for row, choice in enumerate(table.tolist()):
        distance = min(abs(row - known) for known in own)
        assert choice in [own[known] for known in own if abs(row - known) == distance]


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_router_begins_as_it_is_told_and_can_be_overturned(unit: float) -> None:
    model = router(unit=unit)
    told = {t / unit: k for t, k in zip(range(980, -1, -49), [0] * 6 + [1] * 9 + [2] * 6, strict=True)}
    model.begin_(told)
    for timestep, member in told.items():
        assert members(model(timestep)) == [member] * 4
        soft = plain_softmax(model, timestep)
        assert (soft[:, member] > 0.4).all() and (soft < 0.9).all()
    assert all(parameter.requires_grad for parameter in model.parameters())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = float_layer("conv")
        self.blocks = nn.ModuleList([float_layer("linear"), float_layer("linear without bias")])


WEIGHT = LayerParameters(weight=E2M1, input=INPUTS["e2m1"])
TABLE = {"conv": WEIGHT, "blocks.0": LayerParameters(input=INPUTS["e2m1"]), "blocks.1": WEIGHT}


def tuned_net() -> tuple[Net, dict[str, TunedLayer], Route[Choice]]:
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
    route.open(router(num_layers=2)(500.0))
    for layer in layers.values():
        grid = Grid(E2M1, layer.scale[:, None])
        rounded = dequantize(quantize(steps_of(layer, route.of(layer.slot).member), Grid(E2M1, 1.0)), grid)
        assert torch.equal(layer.rounded_weight(), rounded.view(layer.layer.weight.shape))


def test_tuned_layer_outside_the_route_says_so() -> None:
    _, layers, route = tuned_net()
    for layer in layers.values():
        with pytest.raises(MsfpError, match="ran outside its denoiser"):
            layer(input_of(layer.layer))
    route.open(router(num_layers=2)(500.0))
    for layer in layers.values():
        layer(input_of(layer.layer))
    route.close()
    with pytest.raises(MsfpError, match="ran outside its denoiser"):
        layers["conv"](input_of(layers["conv"].layer))
