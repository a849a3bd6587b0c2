from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfp_cli.errors import MsfpError
from msfp_cli.layers.clock import Clock

relaxed = settings(max_examples=100, deadline=None, derandomize=True)
FORMS = {
    "Stable Diffusion": Clock(),
    "Flux": Clock(scale=1000.0),
    "Z-Image": Clock(argument="t", scale=-1000.0, offset=1000.0),
}


@given(st.integers(0, 1000), st.sampled_from(sorted(FORMS)))
@relaxed
def test_every_timestep_is_read_from_its_own_argument(timestep: int, family: str) -> None:
    clock = FORMS[family]
    value = (timestep - clock.offset) / clock.scale
    assert abs(clock.read(value) - timestep) < 1e-9
    single = torch.tensor(value, dtype=torch.float32)
    assert round(clock.read(single)) == round(float(clock.traced(single))) == timestep


@pytest.mark.parametrize(
    "value",
    [
        981,
        981.0,
        torch.tensor(981),
        torch.tensor(981.0),
        torch.tensor([981]),
        torch.tensor([981.0] * 4, dtype=torch.float16),
        torch.tensor([[981.0], [981.0]], requires_grad=True),
        torch.tensor([[0.0, 981.0, 981.0], [981.0, 0.0, 981.0]]),
    ],
    ids=["int", "float", "0-d int", "0-d", "one", "batch", "column", "tokens, some given"],
)
def test_timestep_is_read_from_a_number_or_a_batch_that_shares_it(value: Any) -> None:  # noqa: ANN401 (as passed)
    timestep = Clock().read(value)
    assert timestep == 981.0
    assert type(timestep) is float
    assert Clock().traced(torch.as_tensor(value).detach()).tolist() == [981.0]


@pytest.mark.parametrize("values", [[981, 981, 980], [[981, 0], [980, 0]]], ids=["rows", "tokens"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16], ids=str)
def test_batch_of_several_timesteps_is_refused(values: Any, dtype: torch.dtype) -> None:  # noqa: ANN401 (nested)
    with pytest.raises(MsfpError, match="several timesteps at once"):
        Clock().read(torch.tensor(values, dtype=dtype))


def test_the_noisiest_token_counts_also_where_time_runs_up() -> None:
    tokens: Tensor = torch.tensor([[1.0, 0.25, 0.25]])  # 1 is clean
    assert FORMS["Z-Image"].read(tokens) == 750.0
    assert FORMS["Z-Image"].traced(tokens).tolist() == [750.0]


@pytest.mark.parametrize("clock", FORMS.values(), ids=FORMS)
def test_clock_survives_json(clock: Clock) -> None:
    assert Clock.from_json(clock.to_json()) == clock


@pytest.mark.parametrize(
    "change",
    [{"scale": float("nan")}, {"offset": float("inf")}, {"argument": 3}, {"more": 1}],
    ids=str,
)
def test_damaged_clock_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="finite|type|unknown"):
        Clock.from_json({**Clock().to_json(), **change})


def test_unit_of_earlier_versions_is_a_clock() -> None:
    assert [Clock.of_unit(unit).unit for unit in (1.0, 1000.0)] == [1.0, 1000.0]
    assert FORMS["Z-Image"].unit is None
    with pytest.raises(ValueError, match="neither 1 nor 1000"):
        Clock.of_unit(2.0)
