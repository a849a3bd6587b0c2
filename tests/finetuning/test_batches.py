import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import msfp_cli.finetuning.batches
from msfp_cli.errors import RunError
from msfp_cli.finetuning.batches import Batches
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.recording.result import Recording

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
    return DenoiserCall(
        component=component, timestep=timestep, arguments=arguments, output=rows[:, None] + timestep
    )


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Six shards of five timesteps, the last one only in two; a second denoiser is called, too."""
    made = Recording.create(
        tmp_path_factory.mktemp("batches") / "recording", {"source": {"model": "x"}}, NUM_SHARDS
    )
    for shard in range(NUM_SHARDS):
        calls = [call(shard, timestep) for timestep in TIMESTEPS if timestep > 1 or shard in (0, 2)]
        made.write_shard(shard, [*calls, call(shard, 77.0, "prior")])
    return made


def batches(recording: Recording, *, lanes: int = 2, seed: int = 0, batch_size: int = 2) -> Batches:
    return Batches(recording, "unet", batch_size=batch_size, calls_per_update=lanes, seed=seed)


def drawn(
    source: Batches, asked: list[tuple[int, int]]
) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """What each (step, lane) sees: the timestep and the name of each row."""
    seen = {}
    for step, lane in asked:
        (batch,) = source.batch(step, lane)
        seen[step, lane] = list(
            zip(batch.timesteps, batch.arguments["sample"].flatten().tolist(), strict=True)
        )
    return seen


def shards_seen(source: Batches, lane: int, steps: int = 60) -> set[int]:
    """The shards of what a lane sees, but for the timestep that few shards have."""
    found = drawn(source, [(step, lane) for step in range(steps)])
    return {
        int(row // 100) - 1 for rows in found.values() for timestep, row in rows if timestep > 1
    }


@given(st.permutations(ASKED), st.integers(0, 2**40))
@few
def test_draw_is_a_function_of_seed_step_and_lane(
    recording: Recording, order: list[tuple[int, int]], seed: int
) -> None:
    assert drawn(batches(recording, seed=seed), order) == drawn(
        batches(recording, seed=seed), ASKED
    )


def test_draw_does_not_depend_on_what_is_kept_in_memory(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn(batches(recording), ASKED)
    monkeypatch.setattr(msfp_cli.finetuning.batches, "_MAX_CACHED_BYTES", 0)
    small = batches(recording)
    assert drawn(small, ASKED) == expected
    assert len(small._cache) == 1


def test_other_seeds_draw_otherwise(recording: Recording) -> None:
    found = [drawn(batches(recording, seed=seed), ASKED) for seed in range(4)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def visits(source: Batches, steps: range, lanes: int) -> Counter[float]:
    return Counter(
        timestep
        for step in steps
        for lane in range(lanes)
        for timestep in source.timesteps_of(step, lane)
    )


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(1, 3), st.integers(1, 7))
@few
def test_every_timestep_is_visited_again_and_again(
    recording: Recording, seed: int, first: int, lanes: int, rows: int
) -> None:
    source = batches(recording, lanes=lanes, seed=seed, batch_size=rows)
    steps = range(first, first + 3 * len(TIMESTEPS))
    assert set(visits(source, steps, lanes)) == set(TIMESTEPS) == set(source.timesteps)


@given(st.integers(0, 1000))
@few
def test_rows_of_a_call_go_from_noisy_to_clean(recording: Recording, step: int) -> None:
    source = batches(recording, batch_size=9)
    source.share_out_({801.0: 6.0, 601.0: 3.0, 401.0: 0.5, 201.0: 0.5, 1.0: 0.0})
    for lane in range(2):
        assert source.timesteps_of(step, lane) == sorted(
            source.timesteps_of(step, lane), reverse=True
        )
        (batch,) = source.batch(step, lane)
        assert list(batch.timesteps) == source.timesteps_of(step, lane)


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes_part_the_schedule_and_take_turns(recording: Recording, lanes: int) -> None:
    source = batches(recording, lanes=lanes, batch_size=5)
    together = batches(recording, lanes=1, batch_size=5 * lanes)
    for step in range(12):
        stretches = [source.timesteps_of(step, (k - step) % lanes) for k in range(lanes)]
        assert sum(stretches, []) == together.timesteps_of(step, 0)


weights = st.lists(st.floats(0, 100), min_size=len(TIMESTEPS), max_size=len(TIMESTEPS)).filter(
    lambda w: sum(w) > 1e-3
)


@given(weights)
@few
def test_half_of_the_shares_is_equal_and_half_follows_the_weights(
    recording: Recording, parts: list[float]
) -> None:
    source = batches(recording, lanes=1)
    source.share_out_(dict(zip(TIMESTEPS, parts, strict=True)))
    assert list(source.shares.values()) == pytest.approx(
        [0.1 + 0.5 * part / sum(parts) for part in parts]
    )
    assert sum(source.shares.values()) == pytest.approx(1)


@given(weights, st.integers(2, 8))
@few
def test_shares_hardly_depend_on_the_number_of_lanes(
    recording: Recording, parts: list[float], lanes: int
) -> None:
    source, plain = batches(recording, lanes=lanes), batches(recording, lanes=1)
    for each in (source, plain):
        each.share_out_(dict(zip(TIMESTEPS, parts, strict=True)))
    assert sum(source.shares.values()) == pytest.approx(1)
    assert all(source.shares[t] == pytest.approx(plain.shares[t], rel=0.2) for t in TIMESTEPS)


@given(st.integers(0, 100))
@few
def test_lanes_do_not_part_a_timestep_where_that_takes_little(
    recording: Recording, step: int
) -> None:
    source = batches(recording, lanes=2, batch_size=9)
    source.share_out_(
        dict(zip(TIMESTEPS, (3, 2, 0, 2, 3), strict=True))
    )  # 0.25, 0.2, 0.1, 0.2, 0.25
    shares = [0.25 / 0.45 / 2, 0.2 / 0.45 / 2, 0.1 / 0.55 / 2, 0.2 / 0.55 / 2, 0.25 / 0.55 / 2]
    assert list(source.shares.values()) == pytest.approx(shares)
    noisy, clean = (set(source.timesteps_of(step, (lane - step) % 2)) for lane in range(2))
    assert noisy == set(TIMESTEPS[:2]) and clean == set(TIMESTEPS[2:])


@given(weights, st.integers(0, 1000), st.integers(1, 3), st.integers(1, 40))
@few
def test_rows_of_an_update_follow_the_shares_to_the_next_whole_number(
    recording: Recording, parts: list[float], step: int, lanes: int, rows: int
) -> None:
    source = batches(recording, lanes=lanes, batch_size=rows)
    source.share_out_(dict(zip(TIMESTEPS, parts, strict=True)))
    seen = visits(source, range(step, step + 1), lanes)
    for timestep, share in source.shares.items():
        assert abs(seen[timestep] - lanes * rows * share) < 1 + 1e-9


@given(weights, st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3))
@few
def test_rows_of_many_updates_follow_the_shares_to_a_few(
    recording: Recording, parts: list[float], first: int, lanes: int, rows: int
) -> None:
    source, steps = batches(recording, lanes=lanes, batch_size=rows), 200
    source.share_out_(dict(zip(TIMESTEPS, parts, strict=True)))
    seen = visits(source, range(first, first + steps), lanes)
    for timestep, share in source.shares.items():
        assert abs(seen[timestep] - steps * lanes * rows * share) < 6


@pytest.mark.parametrize("weight", [0.0, math.inf, math.nan])
def test_weights_that_say_nothing_leave_the_shares_equal(
    recording: Recording, weight: float
) -> None:
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
    found = drawn(batches(recording), [(step, 1) for step in range(40)])
    rare = [row for rows in found.values() for timestep, row in rows if timestep == 1.0]
    assert rare and {int(row // 100) - 1 for row in rare} == {0, 2}


@pytest.mark.parametrize("batch_size", [1, 3, ROWS])
def test_rows_are_distinct_and_of_one_shard(recording: Recording, batch_size: int) -> None:
    source, seen = batches(recording, lanes=1, batch_size=batch_size), set[float]()
    source.share_out_({801.0: 1.0, 601.0: 1.0, 401.0: 1.0, 201.0: 1.0, 1.0: 0.0})
    for step in range(40):
        (batch,) = source.batch(step, 0)
        rows = batch.arguments["sample"].flatten()
        assert len(set((rows % 100).tolist())) == len(rows) == batch_size
        assert (
            len({int(row // 100) for t, row in zip(batch.timesteps, rows, strict=True) if t > 1})
            <= 1
        )
        seen |= set((rows % 100).tolist())
    assert seen == set(range(ROWS))


def test_more_rows_than_a_shard_has_come_again(recording: Recording) -> None:
    (batch,) = batches(recording, batch_size=3 * ROWS).batch(0, 0)
    sample, timesteps = batch.arguments["sample"], torch.tensor(batch.timesteps)
    assert Counter((sample.flatten() % 100).tolist()) == dict.fromkeys(range(ROWS), 3)
    assert torch.equal(batch.output, sample + timesteps[:, None])
    assert torch.equal(batch.arguments["timestep"], timesteps) and batch.arguments["scale"] == 0.5


def test_rows_that_cannot_be_one_call_are_several(tmp_path: Path) -> None:
    """As if the denoiser were called for prompt and negative prompt, of different lengths."""
    calls = [
        replace(call(0, t), arguments=call(0, t).arguments | {"scale": t}) for t in (801.0, 1.0)
    ]
    made = Recording.create(tmp_path, {"source": {"model": "x"}}, 1)
    made.write_shard(0, calls)
    parts = batches(made, lanes=1, batch_size=4).batch(0, 0)
    assert [part.timesteps for part in parts] == [(801.0, 801.0), (1.0, 1.0)]
    assert [part.arguments["scale"] for part in parts] == [801.0, 1.0]


def test_only_the_components_own_calls_are_drawn(recording: Recording) -> None:
    prior = Batches(recording, "prior", batch_size=2, calls_per_update=1, seed=0)
    assert list(prior.timesteps) == [77.0]
    for step in range(5):
        (batch,) = prior.batch(step, 0)
        assert set(batch.timesteps) == {77.0} and (batch.arguments["sample"] < 0).all()


def test_component_that_was_not_recorded_is_refused_by_name(recording: Recording) -> None:
    with pytest.raises(
        RunError,
        match="holds no call of transformer; run the same `msfp calibrate` again, with --overwrite",
    ):
        Batches(recording, "transformer", batch_size=2, calls_per_update=1, seed=0)


def test_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    incomplete = Recording.create(tmp_path, {"source": {"model": "x"}}, 2)
    incomplete.write_shard(0, [call(0, 1.0)])
    with pytest.raises(RunError, match="00001.safetensors is missing"):
        batches(incomplete)
