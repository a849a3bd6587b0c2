import torch
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msfp_cli.finetuning.router import Router, equal_stretches
from msfp_cli.layers.routing import TABLE_SIZE, table_index

few = settings(max_examples=25, deadline=None, derandomize=True)
positions = st.floats(0, 1000)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def router(hub: int = 3, num_layers: int = 4, seed: int = 0) -> Router:
    return Router(num_layers, hub, torch.Generator().manual_seed(seed))


def members(model: Router, timestep: float) -> list[int]:
    """The member of each layer at a timestep."""
    return [choice.member for (choice,) in model([timestep])]


def plain_softmax(model: Router, timestep: float) -> Tensor:
    """The router's formula, ``(layers, hub)``."""
    row = torch.tensor([float(table_index(timestep))])
    hidden = nn.functional.silu(model.hidden(get_timestep_embedding(row, model.hidden.in_features)))
    return model.logits(hidden).view(model.num_layers, model.hub_size).softmax(dim=-1)


@given(st.lists(positions, min_size=1, max_size=5))
@few
def test_same_timestep_routes_the_same_way(timesteps: list[float]) -> None:
    one, other = router(), router()
    first = {timestep: members(one, timestep) for timestep in timesteps}
    assert {timestep: members(one, timestep) for timestep in timesteps} == first
    assert {timestep: members(other, timestep) for timestep in reversed(timesteps)} == first


def test_other_timesteps_route_other_ways() -> None:
    model = router()
    table = model.table([float(t) for t in range(0, 1001, 10)])
    assert all(len(set(column.tolist())) > 1 for column in table.t())
    assert len({tuple(column.tolist()) for column in table.t()}) > 1
    assert not torch.equal(router(seed=1).table([0.0, 500.0]), model.table([0.0, 500.0]))


@given(st.lists(positions, min_size=1, max_size=8))
@few
def test_each_row_gets_its_own_timesteps_member(timesteps: list[float]) -> None:
    model = router()
    own = [plain_softmax(model, timestep).argmax(dim=-1).tolist() for timestep in timesteps]
    for slot, choices in enumerate(model(timesteps)):
        assert [choice.rows[0] for choice in choices] == sorted(
            choice.rows[0] for choice in choices
        )
        given_ = {row: choice.member for choice in choices for row in choice.rows}
        assert given_ == {row: of_row[slot] for row, of_row in enumerate(own)}
        assert all(list(choice.rows) == sorted(choice.rows) for choice in choices)


@given(st.lists(positions, min_size=1, max_size=8))
@few
def test_every_row_passes_its_own_gradient_on(timesteps: list[float]) -> None:
    model, upstream = router(), draw(len(timesteps), 4, 3, seed=4)
    parameters = list(model.parameters())
    got = torch.zeros(())
    for slot, choices in enumerate(model(timesteps, learning=True)):
        for choice in choices:
            assert choice.weights is not None and not choice.weights.any()
            got = got + (choice.weights * upstream[list(choice.rows), slot]).sum()
    expected = sum(
        (plain_softmax(model, t) * upstream[row]).sum() for row, t in enumerate(timesteps)
    )
    for one, other in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_is_passed_on_where_the_router_does_not_learn() -> None:
    assert all(choice.weights is None for choices in router()([500.0, 1.0]) for choice in choices)


@given(st.lists(positions, min_size=1, max_size=8))
@few
def test_table_is_the_routers_own_choice_at_the_timesteps_and_the_nearest_ones_between(
    timesteps: list[float],
) -> None:
    model = router()
    table = model.table(timesteps)
    assert table.dtype == torch.uint8 and table.shape == (TABLE_SIZE, 4)
    own = {table_index(timestep): members(model, timestep) for timestep in timesteps}
    for row, choice in enumerate(table.tolist()):
        distance = min(abs(row - known) for known in own)
        assert choice in [own[known] for known in own if abs(row - known) == distance]


def test_router_begins_as_it_is_told_and_can_be_overturned() -> None:
    model = router()
    told = dict(zip(range(980, -1, -49), [0] * 6 + [1] * 9 + [2] * 6, strict=True))
    model.begin_(told)
    for timestep, member in told.items():
        assert members(model, timestep) == [member] * 4
        soft = plain_softmax(model, timestep)
        assert (soft[:, member] > 0.4).all() and (soft < 0.9).all()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_each_member_begins_with_a_stretch_of_an_equal_share_of_the_rows() -> None:
    even = dict.fromkeys((801.0, 601.0, 401.0, 201.0), 0.25)
    assert list(equal_stretches(even, 2).values()) == [0, 0, 1, 1]
    heavy_end = {801.0: 0.1, 601.0: 0.1, 401.0: 0.3, 201.0: 0.5}
    assert list(equal_stretches(heavy_end, 2).values()) == [0, 0, 0, 1]
    assert set(equal_stretches(even, 1).values()) == {0}
