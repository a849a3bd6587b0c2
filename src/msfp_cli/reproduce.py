"""The settings of a run in the words of the command line, so that it can be run again."""

import shlex
from collections.abc import Mapping
from typing import Any

from msfp_cli.calibration import Calibration
from msfp_cli.evaluation import Evaluation
from msfp_cli.recipe import CalibrateRecipe, FinetuneRecipe
from msfp_cli.tuned import Tuned

# Fields whose option has another name, or none.
_OPTIONS = {"lanes": "gradient-accumulation", "max_samples": None, "sensitivity_calls": None}


def commands_of(calibration: Calibration | None, tuned: Mapping[str, Tuned], evaluation: Evaluation) -> list[str]:
    """Return the commands that led here, as far as they are known; options at their defaults are left out."""
    commands = []
    if calibration is not None:
        record = calibration.record
        given = [*_changed(calibration.recipe, CalibrateRecipe()), "--steps", str(record.num_inference_steps)]
        if record.guidance_scale is not None:
            given += ["--guidance-scale", f"{record.guidance_scale:g}"]
        commands.append(shlex.join(["msfp", "calibrate", calibration.source.model, *given]))
    for learned in list(tuned.values())[:1]:
        steps = ["--steps", str(learned.recipe.steps)]
        commands.append(shlex.join(["msfp", "finetune", *steps, *_changed(learned.recipe, FinetuneRecipe())]))
    commands += ["msfp export", "msfp evaluate"]
    asked = evaluation.asked
    commands[-1] += f" --num-images {len(asked['record']['conditions'])} --seed {asked['record']['seed']}"
    return [*commands, "msfp report"]


def _changed(recipe: CalibrateRecipe | FinetuneRecipe, default: CalibrateRecipe | FinetuneRecipe) -> list[str]:
    """Return options for the fields that differ from their defaults."""
    words: list[str] = []
    usual = default.to_json()
    for key, value in recipe.to_json().items():
        option = _OPTIONS.get(key, key.replace("_", "-"))
        if option is None or value == usual[key]:
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{option}", "none" if item is None else str(item)]
    return words


def settings_of(
    calibration: Calibration | None, tuned: Mapping[str, Tuned], evaluation: Evaluation
) -> list[dict[str, Any]]:
    """Return every setting in groups of (name, value)."""
    groups = []
    if calibration is not None:
        groups += [
            ("model", calibration.source.to_json()),
            ("recording", calibration.record.to_json()),
            ("calibration", calibration.recipe.to_json()),
        ]
    groups += [(f"fine-tuning of {component}", learned.recipe.to_json()) for component, learned in tuned.items()]
    asked = dict(evaluation.asked)
    groups += [("evaluation", {**asked.pop("record"), **asked}), ("machine", evaluation.machine)]
    return [
        {"title": title, "rows": [[key, _words(value)] for key, value in fields.items()]} for title, fields in groups
    ]


def _words(value: Any) -> str:  # noqa: ANN401 (a JSON value)
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items())
    return "–" if value is None else str(value)
