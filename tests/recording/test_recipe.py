from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msfp_cli.errors import UsageError
from msfp_cli.recording.recipe import RecordRecipe, recorded_conditions, split_held_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": ()}, "no prompts"),
        ({"conditions": ("a",), "batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"conditions": ("a",), "num_inference_steps": 0}, "--steps must be at least 1, got 0"),
    ],
)
def test_record_recipe_refuses_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecordRecipe(**arguments)


@pytest.mark.parametrize(
    ("images", "batch", "shards"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (5, 1, 5)]
)
def test_shards_cover_all_images(images: int, batch: int, shards: int) -> None:
    assert RecordRecipe(conditions=(None,) * images, batch_size=batch).num_shards == shards


@given(st.integers(1, 60), st.integers(1, 200))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_conditions_that_are_not_held_out_come_again_where_more_pictures_are_asked_for(
    known: int, asked: int
) -> None:
    conditions = tuple(str(i) for i in range(known))
    chosen, held_out = recorded_conditions(conditions, asked)
    distinct, same = split_held_out(conditions)
    assert held_out == same
    assert len(chosen) == max(len(distinct), asked - len(held_out))
    assert {chosen.count(condition) for condition in distinct} <= {
        len(chosen) // len(distinct) + i for i in (0, 1)
    }
    assert chosen[: len(distinct)] == distinct


@given(st.integers(1, 400))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_held_out_conditions_are_a_fifth_or_a_few_and_others(count: int) -> None:
    conditions = tuple(str(i) for i in range(count))
    chosen, held_out = split_held_out(conditions)
    assert chosen and held_out
    assert set(chosen) | set(held_out) == set(conditions)
    if count == 1:
        assert chosen == held_out
    else:
        assert not set(chosen) & set(held_out)
    if 5 <= count < 144:
        assert len(held_out) == count // 5
    if count >= 144:
        assert 24 <= len(held_out) <= 28
