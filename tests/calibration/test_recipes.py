import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.errors import UsageError
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.recipe import Recipe
from msfp_cli.recording.recipe import RecordRecipe, recorded_conditions, split_held_out

RECIPES: list[Recipe] = [
    ModelSource(model="a/b"),
    ModelSource(model="msfp:fashion", revision="main", variant="fp16", dtype="bfloat16"),
    RecordRecipe(
        conditions=("a cat", None),
        num_inference_steps=None,
        guidance_scale=7.5,
        seed=3,
        batch_size=2,
    ),
    CalibrateRecipe(),
    CalibrateRecipe(
        weights=None,
        activations=6,
        formats="e2m3,ue2m4",
        keep=("conv_in:none", "*attn*:6"),
        lift=0.5,
    ),
    FinetuneRecipe(),
    FinetuneRecipe(
        steps=5,
        batch_size=2,
        lanes=3,
        hub_size=1,
        rank=4,
        init="svd",
        loss="plain",
        timesteps="uniform",
        learning_rate=0.1,
        router_learning_rate=1e-7,
        input_learning_rate=0.0,
        mixed_precision="bf16",
        seed=9,
        evaluate_every=1,
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_json_and_back_is_equal(recipe: Recipe) -> None:
    again = type(recipe).from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert hash(again) == hash(recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_unknown_and_missing_keys_are_named(recipe: Recipe) -> None:
    data = recipe.to_json()
    with pytest.raises(ValueError, match="'frobnicate'"):
        type(recipe).from_json({**data, "frobnicate": 1})
    for missing in data:
        with pytest.raises(ValueError, match=f"'{missing}'"):
            type(recipe).from_json({key: value for key, value in data.items() if key != missing})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": 1}, "--weights 1 "),
        ({"weights": 9}, "--weights 9 "),
        ({"activations": 1}, "--activations 1 "),
        ({"activations": 9}, "--activations 9 "),
        ({"weights": None, "activations": None}, "neither"),
        ({"lift": 2.0}, "--lift 2.0"),
        ({"lift": -0.1}, "--lift -0.1"),
        ({"lift": float("nan")}, "--lift nan"),
        ({"max_samples": 0}, "samples must be at least 1, got 0"),
        ({"sensitivity_calls": 0}, "at least 1, got 0"),
        ({"keep": ("conv_in",)}, "PATTERN:BITS"),
        ({"keep": (":8",)}, "PATTERN:BITS"),
        ({"keep": ("conv_in:8", "conv_out:9")}, "--keep '9'"),
        ({"keep": ("conv_in:",)}, "--keep ''"),
        ({"keep": ("conv_in:many",)}, "--keep 'many'"),
        ({"formats": "best"}, "'best'"),
        ({"formats": ""}, "unknown format"),
        ({"formats": "e2m1,"}, "unknown format"),
        ({"formats": "e2m1;ue2m2"}, "unknown format"),
        ({"formats": "e9m9"}, "e9m9"),
    ],
)
def test_calibrate_recipe_refuses_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrateRecipe(**arguments)


def test_list_of_formats_of_no_asked_width_is_refused() -> None:
    with pytest.raises(UsageError, match="e4m3"):
        CalibrateRecipe(weights=4, activations=4, formats="e4m3")
    with pytest.raises(UsageError, match="e2m1"):
        CalibrateRecipe(weights=6, activations=None, formats="e2m1,e1m2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": ()}, "no prompts"),
        ({"conditions": ("a",), "batch_size": 0}, "batch size"),
        ({"conditions": ("a",), "num_inference_steps": 0}, "steps"),
    ],
)
def test_record_recipe_refuses_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecordRecipe(**arguments)


NOT_POSITIVE = [0.0, -1e-3, float("inf"), float("nan")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"lanes": 0}, "--gradient-accumulation must be at least 1, got 0"),
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


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(UsageError, match="'int4'.*float32, float16, bfloat16"):
        ModelSource(model="x", dtype="int4")


@pytest.mark.parametrize(
    ("images", "batch", "shards"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (5, 1, 5)]
)
def test_shards_cover_all_images(images: int, batch: int, shards: int) -> None:
    assert RecordRecipe(conditions=(None,) * images, batch_size=batch).num_shards == shards


def test_last_matching_rule_wins_and_default_comes_first() -> None:
    recipe = CalibrateRecipe(keep=("*:6", "conv_*:none", "conv_in:5"))
    assert recipe.kept_bits("conv_in") == (True, 5)
    assert recipe.kept_bits("conv_out") == (True, None)
    assert recipe.kept_bits("time_embedding.linear_1") == (True, 6)
    assert CalibrateRecipe(keep=("conv_in:5", "*:6")).kept_bits("conv_in") == (True, 6)


@pytest.mark.parametrize(
    "name", ["conv_in", "conv_out", "x_embedder", "proj_out", "proj_out_2", "pos_embed.proj"]
)
def test_default_policy_keeps_first_and_last_layers_in_floating_point(name: str) -> None:
    assert CalibrateRecipe().kept_bits(name) == (True, None)


@pytest.mark.parametrize(
    "name",
    [
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "context_embedder",
        "norm_out.linear",
        "proj_out_1",
    ]
    + ["adaln_single.linear", "time_text_embed.timestep_embedder.linear_1"],
)
def test_default_policy_keeps_layers_on_timestep_and_text_at_8_bits(name: str) -> None:
    assert CalibrateRecipe().kept_bits(name) == (True, 8)


@pytest.mark.parametrize(
    "name",
    [
        "mid_block.resnets.0.conv1",
        "down_blocks.0.resnets.0.time_emb_proj",
        "mid.attentions.0.proj_out",
        "mid.conv_in",
    ],
)
def test_default_policy_leaves_inner_layers_to_the_search(name: str) -> None:
    assert CalibrateRecipe().kept_bits(name) == (False, None)


@pytest.mark.parametrize(
    ("formats", "inputs", "weights"),
    [
        ("mixed", "e1m2 e2m1 e3m0 ue1m3 ue2m2 ue3m1 ue4m0", "e1m2 e2m1 e3m0"),
        ("signed", "e1m2 e2m1 e3m0", "e1m2 e2m1 e3m0"),
        ("unsigned", "ue1m3 ue2m2 ue3m1 ue4m0", "e1m2 e2m1 e3m0"),
        ("integer", "ue1m3", "e1m2"),
        ("e2m1", "e2m1", "e2m1"),
        ("ue2m2,e2m1", "ue2m2 e2m1", "e2m1"),
        ("ue2m2", "ue2m2", "e1m2 e2m1 e3m0"),
        ("ue2m2, e3m0,e2m3", "ue2m2 e3m0", "e3m0"),
    ],
)
def test_formats_restrict_the_candidates(formats: str, inputs: str, weights: str) -> None:
    recipe = CalibrateRecipe(formats=formats)
    assert [fmt.name for fmt in recipe.input_formats(4)] == inputs.split()
    assert [fmt.name for fmt in recipe.weight_formats(4)] == weights.split()


def test_list_of_4_bit_formats_leaves_8_bit_layers_a_free_choice() -> None:
    recipe = CalibrateRecipe(formats="e2m1,ue2m2")
    assert recipe.input_formats(8) == CalibrateRecipe().input_formats(8)
    assert recipe.weight_formats(8) == CalibrateRecipe().weight_formats(8)


@pytest.mark.parametrize(
    ("bits", "inputs", "weights"),
    [
        (8, "e1m6 e2m5 e3m4 ue1m7 ue2m6 ue3m5", "e1m6"),
        (6, "e1m4 e2m3 e3m2 ue1m5 ue2m4 ue3m3", "e1m4 e2m3"),
        (4, "e1m2 e2m1 e3m0 ue1m3 ue2m2 ue3m1 ue4m0", "e1m2 e2m1 e3m0"),
    ],
)
def test_free_choice_is_among_formats_that_8_bit_units_hold(
    bits: int, inputs: str, weights: str
) -> None:
    recipe = CalibrateRecipe(weights=bits, activations=bits)
    assert [fmt.name for fmt in recipe.input_formats(bits)] == inputs.split()
    assert [fmt.name for fmt in recipe.weight_formats(bits)] == weights.split()


def test_formats_asked_for_by_name_may_be_any() -> None:
    recipe = CalibrateRecipe(weights=8, activations=8, formats="e4m3")
    assert (
        [fmt.name for fmt in recipe.input_formats(8)]
        == [fmt.name for fmt in recipe.weight_formats(8)]
        == ["e4m3"]
    )


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
