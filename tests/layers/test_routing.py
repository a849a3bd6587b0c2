import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from msfp_cli.errors import MsfpError
from msfp_cli.layers.clock import TRAINING_CLOCK, Clock
from msfp_cli.layers.routing import (
    ROUTER,
    TABLE_SIZE,
    Route,
    RouterTable,
    table_index,
)
from tiny_pipelines import build_tiny

relaxed = settings(max_examples=100, deadline=None, derandomize=True)
clocks = st.sampled_from(
    [Clock(), Clock(scale=1000.0), Clock(scale=-1000.0, offset=1000.0), Clock(scale=250, offset=9)]
)
NUM_LAYERS = 3


class Reader(nn.Module):
    """A layer that answers with its choice."""

    def __init__(self, route: Route[int], slot: int) -> None:
        super().__init__()
        self.route, self.slot = route, slot

    def forward(self) -> int:
        return self.route.of(self.slot)


class Denoiser(nn.Module):
    """Returns what its layers chose, after the arguments of diffusers' denoisers."""

    def __init__(self, clock: Clock = TRAINING_CLOCK) -> None:
        super().__init__()
        router = RouterTable(NUM_LAYERS, clock)
        router.table.copy_(random_table())
        self.readers = nn.ModuleList(Reader(router.route, slot) for slot in range(NUM_LAYERS))
        router.attach_(self)

    def forward(
        self, sample: Tensor | None, timestep: Tensor | float, return_dict: bool = True
    ) -> list[int]:
        if sample is None:
            raise ValueError("no sample")
        return [reader() for reader in self.readers]


def random_table(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (TABLE_SIZE, NUM_LAYERS), generator=generator, dtype=torch.uint8)


def is_closed(denoiser: Denoiser) -> bool:
    with pytest.raises(MsfpError, match="ran outside its denoiser"):
        denoiser.readers[0]()
    return True


@given(st.floats(0, 1000))
@relaxed
def test_row_is_the_nearest(timestep: float) -> None:
    assert abs(table_index(timestep) - timestep) <= 0.5


@given(st.floats(-1e6, 1e6))
@relaxed
def test_row_is_in_the_table_whatever_the_timestep(timestep: float) -> None:
    row = table_index(timestep)
    assert 0 <= row < TABLE_SIZE
    if timestep >= TABLE_SIZE - 1:
        assert row == TABLE_SIZE - 1
    if timestep <= 0:
        assert row == 0


def test_route_answers_only_while_it_is_open() -> None:
    route = Route[str]()
    with pytest.raises(
        MsfpError, match="ran outside its denoiser; call the denoiser, which knows the timestep"
    ):
        route.of(0)
    route.open(["a", "b"])
    assert [route.of(0), route.of(1)] == ["a", "b"]
    route.open(["c", "d"])
    assert route.of(1) == "d"
    route.close()
    with pytest.raises(MsfpError, match="ran outside its denoiser"):
        route.of(0)


@given(st.floats(0, 1000), clocks)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_layers_read_the_tables_row_of_the_called_timestep(position: float, clock: Clock) -> None:
    denoiser = Denoiser(clock)
    timestep = (position - clock.offset) / clock.scale
    expected = random_table()[table_index(clock.read(timestep))].tolist()
    sample = torch.zeros(2, 1)
    assert denoiser(sample, timestep) == expected
    assert denoiser(sample, timestep=timestep) == expected
    assert denoiser(timestep=timestep, sample=sample) == expected
    assert denoiser(sample, torch.tensor(timestep, dtype=torch.float64), False) == expected
    assert denoiser(sample, torch.full((2,), timestep, dtype=torch.float64)) == expected


def test_route_is_closed_after_a_call() -> None:
    denoiser = Denoiser()
    assert is_closed(denoiser)
    denoiser(torch.zeros(1), 7)
    assert is_closed(denoiser)


def test_route_is_closed_after_a_failed_call() -> None:
    denoiser = Denoiser()
    with pytest.raises(ValueError, match="no sample"):
        denoiser(None, 7)
    assert is_closed(denoiser)
    assert denoiser(torch.zeros(1), 8) == random_table()[8].tolist()


def test_batch_of_several_timesteps_is_refused_before_the_denoiser_runs() -> None:
    denoiser = Denoiser()
    with pytest.raises(MsfpError, match="several timesteps at once"):
        denoiser(None, torch.tensor([7, 8]))
    assert is_closed(denoiser)


def test_copy_of_a_denoiser_has_a_router_of_its_own() -> None:
    denoiser, sample = Denoiser(), torch.zeros(1)
    twin = copy.deepcopy(denoiser)
    twin.get_submodule(ROUTER).table.copy_(random_table(seed=1))
    del denoiser.readers[0]
    assert twin(sample, 500) == random_table(seed=1)[500].tolist()
    assert denoiser(sample, 500) == random_table()[500, 1:].tolist()
    assert is_closed(twin)
    twin.readers[0].route.open([5] * NUM_LAYERS)
    assert twin.readers[0]() == 5
    assert is_closed(denoiser)


def test_table_is_part_of_the_state() -> None:
    denoiser, other = Denoiser(), Denoiser()
    state = denoiser.state_dict()
    assert list(state) == [f"{ROUTER}.table"]
    assert state[f"{ROUTER}.table"].dtype == torch.uint8
    assert state[f"{ROUTER}.table"].shape == (TABLE_SIZE, NUM_LAYERS)
    other.get_submodule(ROUTER).table.zero_()
    other.load_state_dict(state)
    assert other(torch.zeros(1), 500) == random_table()[500].tolist()


def test_table_keeps_its_type_when_the_denoiser_is_converted() -> None:
    denoiser = Denoiser().half()
    assert denoiser(torch.zeros(1), 500) == random_table()[500].tolist()


@pytest.mark.parametrize("name", ["DDIMPipeline", "StableDiffusionPipeline"])
def test_hooks_find_the_timestep_among_the_arguments_of_a_stock_denoiser(name: str) -> None:
    unet = build_tiny(name).unet
    router, seen = RouterTable(NUM_LAYERS, TRAINING_CLOCK), list[int]()
    router.table.copy_(random_table())
    router.attach_(unet)
    unet.conv_out.register_forward_hook(lambda *_: seen.append(router.route.of(2)))
    sample = torch.zeros(2, unet.config.in_channels, 16, 16)
    text = (
        {"encoder_hidden_states": torch.zeros(2, 3, 32)}
        if name == "StableDiffusionPipeline"
        else {}
    )
    with torch.no_grad():
        unet(sample, 500, **text)
        unet(sample, timestep=torch.tensor(501), return_dict=False, **text)
        unet(timestep=torch.tensor([502, 502]), sample=sample, **text)
    assert seen == random_table()[500:503, 2].tolist()
    with pytest.raises(MsfpError, match="ran outside its denoiser"):
        router.route.of(2)
