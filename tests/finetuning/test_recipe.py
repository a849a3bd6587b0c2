from typing import Any

import pytest

from msfp_cli.errors import UsageError
from msfp_cli.finetuning.recipe import FinetuneRecipe

NOT_POSITIVE = [0.0, -1e-3, float("inf"), float("nan")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"calls_per_update": 0}, "--calls-per-update must be at least 1, got 0"),
        ({"hub_size": 0}, "--hub-size must be at least 1, got 0"),
        ({"hub_size": 256}, "--hub-size must be at most 255, got 256"),
        ({"rank": -1}, "--rank must be at least 1, got -1"),
        ({"evaluate_every": 0}, "--evaluate-every must be at least 1, got 0"),
        ({"init": "best"}, "init.* 'best'; choose one of zero, svd"),
        ({"loss": "best"}, "loss 'best'; choose one of dfa, plain"),
        ({"timesteps": "best"}, "timesteps 'best'; choose one of error, uniform"),
        ({"mixed_precision": "fp16"}, "--mixed-precision 'fp16'; choose one of no, bf16"),
        *(
            ({"learning_rate": rate}, f"^--learning-rate must be positive, got {rate:g}")
            for rate in NOT_POSITIVE
        ),
        *(
            ({"router_learning_rate": rate}, f"--router-learning-rate must .*, got {rate:g}")
            for rate in NOT_POSITIVE
        ),
        *(
            ({"input_learning_rate": rate}, f"--input-learning-rate must .*, got {rate:g}")
            for rate in NOT_POSITIVE[1:]
        ),
    ],
)
def test_finetune_recipe_refuses_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneRecipe(**arguments)


def test_largest_hub_and_untrained_inputs_are_allowed() -> None:
    assert FinetuneRecipe(hub_size=255, input_learning_rate=0.0).hub_size == 255


def test_states_of_earlier_versions_say_lanes() -> None:
    data = FinetuneRecipe(calls_per_update=3).to_json()
    data["lanes"] = data.pop("calls_per_update")
    assert FinetuneRecipe.from_json(data) == FinetuneRecipe(calls_per_update=3)
