"""The settings of a run in the words of the command line, so that it can be run again."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.evaluation.recipe import STEPS_BEFORE
from msfp_cli.evaluation.reference import BUILT_IN_REFERENCE
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.pipelines.loading import default_prompts
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.recording.recipe import (
    MAX_CONDITIONS,
    RecordRecipe,
    recorded_conditions,
    split_held_out,
)

# Fields whose option has another name, or none.
_OPTIONS = {"lanes": "gradient-accumulation", "max_samples": None, "sensitivity_calls": None}
_OPTIONS |= {"num_inference_steps": "steps", "conditions": None, "model": None}


def commands_of(
    calibration: Calibration | None, tuned: Mapping[str, FinetuneState], evaluation: Evaluation
) -> list[str]:
    """Return the commands that led here, as far as they are known; what is usual is left out of recipes."""
    commands = [] if calibration is None else [_calibrate(calibration)]
    for learned in list(tuned.values())[:1]:
        steps = {"steps": learned.recipe.steps}
        commands.append(
            _command(
                "finetune", steps | _changed(learned.recipe, FinetuneRecipe(steps=steps["steps"]))
            )
        )
    if calibration is not None:
        commands.append("msfp export")
    return [*commands, _evaluate(calibration, evaluation), "msfp report"]


def _calibrate(calibration: Calibration) -> str:
    source, record = calibration.source, calibration.record
    total = num_recorded(record.conditions)
    options = {
        **_changed(source, ModelSource(model=source.model)),
        **_changed(calibration.recipe, CalibrateRecipe()),
        "num_images": total,
        **_sampling(record),
    }
    usual = split_held_out(default_prompts(source.model)[: min(total, MAX_CONDITIONS)])[0]
    return _command("calibrate", options | _prompts(record.conditions, usual), source.model)


def num_recorded(conditions: Sequence[str | None]) -> int:
    """Return how many pictures to ask for, so that just these are left to calibrate on."""
    count = len(conditions)
    if set(conditions) == {None}:
        left = {
            n: recorded_conditions([None] * min(n, MAX_CONDITIONS), n)[0]
            for n in range(count, 2 * count + 2)
        }
        return max((n for n, chosen in left.items() if len(chosen) == count), default=count)
    distinct = next(
        n
        for n in range(1, count + 1)
        if all(c == conditions[i % n] for i, c in enumerate(conditions))
    )
    listed = max(
        n
        for n in range(distinct, 2 * distinct + 2)
        if len(split_held_out([None] * n)[0]) == distinct
    )
    return count + len(split_held_out([None] * listed)[1])


def _evaluate(calibration: Calibration | None, evaluation: Evaluation) -> str:
    asked = evaluation.settings
    record, source = (
        RecordRecipe.from_json(asked["record"]),
        ModelSource.from_json(asked["against"]),
    )
    seen = () if calibration is None else calibration.record.conditions
    usual = [
        prompt for prompt in default_prompts(source.model) if prompt not in seen
    ] or default_prompts(source.model)
    options = {
        "against": None
        if calibration is not None and calibration.source == source
        else source.model,
        "num_images": len(record.conditions),
        "num_trajectories": asked["num_trajectories"],
        **_sampling(record),
        "extractor": asked["extractor"],
        "reference": None if asked["reference"] == BUILT_IN_REFERENCE else asked["reference"],
        "clip": asked["clip"],
        "compare": ",".join(key for key in asked["models"] if key in STEPS_BEFORE) or "none",
        **{f"no_{key}": True for key in ("layers", "cost") if not asked[key]},
    }
    place = [] if calibration is not None else [asked["export"]]
    return _command("evaluate", options | _prompts(record.conditions, usual), *place)


def _sampling(record: RecordRecipe) -> dict[str, Any]:
    return {key: value for key, value in record.to_json().items() if key != "conditions"}


def _prompts(conditions: Sequence[str | None], usual: Sequence[str | None]) -> dict[str, str]:
    """Return the option for prompts that are not the built-in ones; the settings list them."""
    if all(
        condition is None or condition == usual[i % len(usual)]
        for i, condition in enumerate(conditions)
    ):
        return {}
    return {"prompts": "prompts.txt"}


def _changed(recipe: Any, default: Any) -> dict[str, Any]:  # noqa: ANN401 (two recipes of a kind)
    """Return the fields that differ from their defaults."""
    usual = default.to_json()
    given = {key: value for key, value in recipe.to_json().items() if value != usual[key]}
    return {key: "none" if value is None else value for key, value in given.items()}


def _command(name: str, options: dict[str, Any], *places: str) -> str:
    """Return a command line; options that are None are left out, True stands alone, lists are given item by item."""
    words = ["msfp", name, *places]
    for key, value in options.items():
        option = _OPTIONS.get(key, key.replace("_", "-"))
        for item in value if isinstance(value, list | tuple) else [value]:
            if option is not None and item is not None:
                words += [f"--{option}"] if item is True else [f"--{option}", _number(item)]
    return shlex.join(words)


def _number(value: Any) -> str:  # noqa: ANN401 (a JSON value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def settings_of(
    calibration: Calibration | None, tuned: Mapping[str, FinetuneState], evaluation: Evaluation
) -> list[dict[str, Any]]:
    """Return every setting in groups of (name, value)."""
    groups = []
    if calibration is not None:
        groups += [
            ("model", calibration.source.to_json()),
            ("recording", calibration.record.to_json()),
            ("calibration", calibration.recipe.to_json()),
        ]
    groups += [
        (f"fine-tuning of {component}", learned.recipe.to_json())
        for component, learned in tuned.items()
    ]
    asked = dict(evaluation.settings)
    groups += [("evaluation", {**asked.pop("record"), **asked}), ("machine", evaluation.machine)]
    return [
        {"title": title, "rows": [[key, _words(value)] for key, value in fields.items()]}
        for title, fields in groups
    ]


def _words(value: Any) -> str:  # noqa: ANN401 (a JSON value)
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items())
    return "–" if value is None else str(value)
