import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.errors import UsageError
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.recipe import Recipe, option, options_of
from msfp_cli.recording.recipe import RecordOptions, RecordRecipe

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
        calls_per_update=3,
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


def test_a_file_without_a_later_setting_means_what_held_before_it() -> None:
    data = CalibrateRecipe().to_json()
    del data["rounding"]
    assert CalibrateRecipe.from_json(data) == CalibrateRecipe(rounding="nearest")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_unknown_and_missing_keys_are_named(recipe: Recipe) -> None:
    data = recipe.to_json()
    with pytest.raises(ValueError, match="'frobnicate'"):
        type(recipe).from_json({**data, "frobnicate": 1})
    since = {name for name, each in options_of(type(recipe)).items() if each.before is not None}
    for missing in data.keys() - since:
        with pytest.raises(ValueError, match=f"'{missing}'"):
            type(recipe).from_json({key: value for key, value in data.items() if key != missing})


@dataclass(frozen=True, kw_only=True)
class Toy(Recipe):
    """One field of each kind."""

    required: str
    count: int = option(3, "A number.", at_least=1, at_most=9)
    share: float = option(0.5, "A share.", above=0, at_most=1)
    kind: str = option("a", "A choice.", choices=("a", "b"))
    kinds: tuple[str, ...] = option((), "Choices.", choices=("a", "b"), names=("--kind-of",))
    loud: bool = option(True, "A switch.", names=("--loud/--quiet",))
    hidden: int = option(1, "Not on the command line.", at_least=0, is_typed=False)


@dataclass(frozen=True, kw_only=True)
class Child(Toy):
    """Another default for the same option."""

    count: int = 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"count": 10}, "--count must be at most 9, got 10"),
        ({"share": 0.0}, "--share must be positive, got 0"),
        ({"share": 1.5}, "--share must be at most 1, got 1.5"),
        ({"share": float("nan")}, "--share must be positive, got nan"),
        ({"kind": "c"}, "unknown --kind 'c'; choose one of a, b"),
        ({"kinds": ("a", "c")}, "unknown --kind-of 'c'; choose one of a, b"),
        ({"hidden": -1}, "hidden must be at least 0, got -1"),
    ],
)
def test_values_are_refused_in_the_words_of_their_option(
    arguments: dict[str, Any], message: str
) -> None:
    for recipe in (Toy, Child):
        with pytest.raises(UsageError, match=f"^{message}$"):
            recipe(required="x", **arguments)


def test_another_default_keeps_the_option() -> None:
    assert Child(required="x").count == 4
    assert options_of(Child) == options_of(Toy)
    assert (Toy(required="x", count=4).words(), Child(required="x", count=4).words()) == (
        ["--count", "4"],
        [],
    )


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Toy(required="x"), ""),
        (Toy(required="x", loud=False, hidden=2, share=0.25), "--share 0.25 --quiet"),
        (Toy(required="x", kinds=("a", "b")), "--kind-of a --kind-of b"),
        (
            CalibrateRecipe(weights=None, keep=("a:8", "b:none")),
            "--weights none --keep a:8 --keep b:none",
        ),
        (RecordOptions(prompts=Path("own.txt")), "--prompts own.txt"),
        (
            RecordOptions(prompts=("a cat",), num_inference_steps=5),
            "--steps 5 --prompts prompts.txt",
        ),
        (EvaluateRecipe(compare=()), "--compare none"),
        (
            EvaluateRecipe(compare=("signed", "calibrated"), cost=False),
            "--compare signed,calibrated --no-cost",
        ),
        (FinetuneRecipe(calls_per_update=4), "--calls-per-update 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_words_are_what_was_typed(recipe: Recipe, words: str) -> None:
    assert recipe.words() == words.split()
