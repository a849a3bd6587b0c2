import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import msfp_cli.batches
from msfp_cli.batches import Batches
from msfp_cli.denoiser import DenoiserCall
from msfp_cli.errors import RunError
from msfp_cli.recording import Recording

TIMESTEPS = (801.0, 601.0, 401.0, 201.0, 1.0)
NUM_SHARDS, ROWS = 6, 4
ASKED = [(step, lane) for step in range(12) for lane in range(2)]
few = settings(max_examples=25, deadline=None, derandomize=True)


def rows_of(shard: int, component: str = "unet") -> Tensor:
    """Numbers that name the shard and the row, and (by their sign) the component."""
    return (100.0 * (shard + 1) + torch.arange(ROWS)) * (1 if component == "unet" else -1)


def call(shard: int, timestep: float, component: str = "unet") -> DenoiserCall:
    rows = rows_of(shard, component)
    arguments = {"sample": rows[:, None], "timestep": torch.tensor(timestep), "scale": 0.5}
    return DenoiserCall(component=component, timestep=timestep, arguments=arguments, output=rows[:, None] + timestep)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Six shards of five timesteps; the last timestep is missing in all but two, and a second denoiser is called."""
    made = Recording.create(tmp_path_factory.mktemp("batches") / "recording", {"source": "x"}, NUM_SHARDS)
    for shard in range(NUM_SHARDS):
        calls = [call(shard, timestep) for timestep in TIMESTEPS if timestep > 1 or shard in (0, 2)]
        made.write_shard(shard, [*calls, call(shard, 77.0, "prior")])
    return made


def batches(recording: Recording, *, lanes: int = 2, seed: int = 0, batch_size: int = 2) -> Batches:
    return Batches(recording, "unet", batch_size=batch_size, lanes=lanes, seed=seed)


def drawn(source: Batches, asked: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[float, list[float]]]:
    """What each (step, lane) sees: the timestep, and the rows."""
    seen = {}
    for step, lane in asked:
        batch = source.batch(step, lane)
        seen[step, lane] = (batch.timestep, batch.arguments["sample"].flatten().tolist())
    return seen


def shards_seen(source: Batches, lane: int, steps: int = 60) -> set[int]:
    found = drawn(source, [(step, lane) for step in range(steps) if source.timestep(step, lane) > 1])
    return {int(row // 100) - 1 for _, rows in found.values() for row in rows}


@given(st.permutations(ASKED), st.integers(0, 2**40))
@few
def test_draw_is_a_function_of_seed_step_and_lane(
    recording: Recording, order: list[tuple[int, int]], seed: int
) -> None:
    assert drawn(batches(recording, seed=seed), order) == drawn(batches(recording, seed=seed), ASKED)


def test_draw_does_not_depend_on_what_is_kept_in_memory(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(batches(recording), ASKED)
    monkeypatch.setattr(msfp_cli.batches, "_MAX_CACHED_BYTES", 0)
    small = batches(recording)
    assert drawn(small, ASKED) == expected
    assert len(small._cache) == 1


def test_other_seeds_draw_otherwise(recording: Recording) -> None:
    found = [drawn(batches(recording, seed=seed), ASKED) for seed in range(4)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_lanes_of_an_update_take_the_timesteps_one_after_another(recording: Recording, lanes: int) -> None:
    """However calls are grouped into updates, they come in the same order of timesteps."""
    alone, source = batches(recording, lanes=1), batches(recording, lanes=lanes)
    seen = [source.batch(step, lane).timestep for step in range(20) for lane in range(lanes)]
    assert seen == [alone.timestep(step, 0) for step in range(20 * lanes)]
    assert seen == [source.timestep(step, lane) for step in range(20) for lane in range(lanes)]


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000))
@few
def test_each_timestep_comes_once_a_round(recording: Recording, seed: int, turn: int) -> None:
    source, count = batches(recording, lanes=1, seed=seed), len(TIMESTEPS)
    seen = [source.timestep(turn * count + position, 0) for position in range(count)]
    assert sorted(seen, reverse=True) == list(TIMESTEPS) == list(source.timesteps)


def test_rounds_are_in_different_orders(recording: Recording) -> None:
    source, count = batches(recording, lanes=1), len(TIMESTEPS)
    rounds = {tuple(source.timestep(turn * count + position, 0) for position in range(count)) for turn in range(30)}
    assert len(rounds) > 20


weights = st.lists(st.floats(0, 100), min_size=len(TIMESTEPS), max_size=len(TIMESTEPS)).filter(lambda w: sum(w) > 1e-3)


@given(weights)
@few
def test_half_of_the_shares_is_equal_and_half_follows_the_weights(recording: Recording, parts: list[float]) -> None:
    source = batches(recording)
    source.share_out_(dict(zip(TIMESTEPS, parts, strict=True)))
    assert list(source.shares.values()) == pytest.approx([0.1 + 0.5 * part / sum(parts) for part in parts])
    assert sum(source.shares.values()) == pytest.approx(1)


@given(weights, st.integers(0, 1000))
@few
def test_visits_of_a_round_follow_the_shares_to_the_next_whole_number(
    recording: Recording, parts: list[float], turn: int
) -> None:
    source, count = batches(recording, lanes=1), len(TIMESTEPS)
    source.share_out_(dict(zip(TIMESTEPS, parts, strict=True)))
    visits = Counter(source.timestep(turn * count + position, 0) for position in range(count))
    for timestep, share in source.shares.items():
        assert abs(visits[timestep] - count * share) < 1 + 1e-9


def test_visits_of_many_rounds_are_the_shares(recording: Recording) -> None:
    source, steps = batches(recording, lanes=1), 400 * len(TIMESTEPS)
    source.share_out_({801.0: 6.0, 601.0: 3.0, 401.0: 0.5, 201.0: 0.5, 1.0: 0.0})
    visits = Counter(source.timestep(step, 0) for step in range(steps))
    for timestep, share in source.shares.items():
        assert visits[timestep] / steps == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("weight", [0.0, math.inf, math.nan])
def test_weights_that_say_nothing_leave_the_shares_equal(recording: Recording, weight: float) -> None:
    source = batches(recording)
    source.share_out_(dict.fromkeys(TIMESTEPS, weight))
    assert source.shares == dict.fromkeys(TIMESTEPS, 1 / len(TIMESTEPS))


@pytest.mark.parametrize("lanes", [1, 2, 3, 6])
def test_lanes_read_disjoint_shards(recording: Recording, lanes: int) -> None:
    source = batches(recording, lanes=lanes)
    for lane in range(lanes):
        assert shards_seen(source, lane) == set(range(lane, NUM_SHARDS, lanes))


def test_lanes_without_a_shard_of_their_own_read_any(recording: Recording) -> None:
    source = batches(recording, lanes=NUM_SHARDS + 1)
    assert shards_seen(source, NUM_SHARDS, steps=150) == set(range(NUM_SHARDS))
    assert shards_seen(source, NUM_SHARDS - 1) == {NUM_SHARDS - 1}


def test_lanes_whose_shards_lack_the_timestep_read_any_that_has_it(recording: Recording) -> None:
    source = batches(recording)
    for step in (step for step in range(40) if source.timestep(step, 1) == 1.0):
        timestep, rows = drawn(source, [(step, 1)])[step, 1]
        assert timestep == 1.0 and int(rows[0] // 100) - 1 in (0, 2)


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 1), (3, 3), (ROWS, ROWS), (100, ROWS)])
def test_rows_are_distinct_whole_and_at_most_the_batch_size(recording: Recording, batch_size: int, rows: int) -> None:
    source, seen = batches(recording, batch_size=batch_size), set[float]()
    for step in range(30):
        batch = source.batch(step, 0)
        sample = batch.arguments["sample"]
        assert sample.shape == (rows, 1) and len(set(sample.flatten().tolist())) == rows
        assert torch.equal(batch.output, sample + batch.timestep)
        assert (batch.arguments["timestep"], batch.arguments["scale"]) == (batch.timestep, 0.5)
        seen |= {float(row) % 100 for row in sample}
    assert seen == set(range(ROWS))


def test_only_the_components_own_calls_are_drawn(recording: Recording) -> None:
    prior = Batches(recording, "prior", batch_size=2, lanes=1, seed=0)
    assert list(prior.timesteps) == [77.0]
    for step in range(5):
        assert prior.batch(step, 0).component == "prior"
        assert (prior.batch(step, 0).arguments["sample"] < 0).all()


def test_component_that_was_not_recorded_is_refused_by_name(recording: Recording) -> None:
    with pytest.raises(RunError, match="holds no call of transformer; run `msfp calibrate --overwrite`"):
        Batches(recording, "transformer", batch_size=2, lanes=1, seed=0)


def test_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    incomplete = Recording.create(tmp_path, {"source": "x"}, 2)
    incomplete.write_shard(0, [call(0, 1.0)])
    with pytest.raises(RunError, match="00001.safetensors is missing"):
        batches(incomplete)
