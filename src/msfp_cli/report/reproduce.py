"""The settings of a run, and the commands that make it again from what its results remember."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from msfp_cli.calibration.result import Calibration
from msfp_cli.evaluation.features.reference import BUILT_IN_REFERENCE
from msfp_cli.evaluation.provenance import Provenance
from msfp_cli.evaluation.recipe import STEPS_BEFORE, EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.files.documents import Json
from msfp_cli.recording.recipe import RecordOptions, RecordRecipe


def commands_of(provenance: Provenance, evaluation: Evaluation) -> list[str]:
    """Return the commands that led to an evaluation, as far as they are known."""
    calibration = provenance.calibration
    commands = list[list[str]]()
    if calibration is not None:
        commands.append(["calibrate", calibration.source.model, *_calibrate_words(calibration)])
    finetunings = list(provenance.finetunings.values())
    if finetunings:  # all denoisers were trained by one command
        commands.append(["finetune", *finetunings[0].recipe.words()])
    if calibration is not None:
        commands.append(["export"])
    place = [] if calibration is not None else [str(evaluation.export)]
    commands.append(["evaluate", *place, *_evaluate_words(evaluation)])
    return [shlex.join(["msfp", *words]) for words in [*commands, ["report"]]]


def _calibrate_words(calibration: Calibration) -> Sequence[str]:
    """Return the options that made a calibration.

    One of an earlier version remembers its recording only. How many pictures were asked for is not
    in it: those that are held out come on top.
    """
    if calibration.options is not None:
        return calibration.options
    record = calibration.record
    options = RecordOptions(
        **record.settings(), prompts=_prompts(record), num_images=len(record.conditions)
    )
    return [*calibration.recipe.words(), *options.words(), *calibration.source.words()]


def _evaluate_words(evaluation: Evaluation) -> Sequence[str]:
    """Return the options that made an evaluation; one of an earlier version has its settings."""
    if evaluation.options is not None:
        return evaluation.options
    settings = evaluation.settings
    record = RecordRecipe.from_json(settings["record"])
    has_own_reference = settings["reference"] not in (None, BUILT_IN_REFERENCE)
    recipe = EvaluateRecipe(
        **record.settings(),
        prompts=_prompts(record),
        num_images=len(record.conditions),
        num_trajectories=settings["num_trajectories"],
        extractor=settings["extractor"],
        reference=Path(settings["reference"]) if has_own_reference else None,
        clip=settings["clip"],
        compare=tuple(key for key in settings["models"] if key in STEPS_BEFORE),
        layers=settings["layers"],
        cost=settings["cost"],
    )
    return recipe.words()


def _prompts(record: RecordRecipe) -> tuple[str, ...] | None:
    """Return the prompts of a recording, None if its pipeline takes none."""
    return tuple(condition for condition in record.conditions if condition is not None) or None


def settings_of(provenance: Provenance, evaluation: Evaluation) -> list[Json]:
    """Return every setting in groups of (name, value)."""
    calibration = provenance.calibration
    groups = list[tuple[str, dict[str, Json]]]()
    if calibration is not None:
        groups += [
            ("model", calibration.source.to_json()),
            ("recording", calibration.record.to_json()),
            ("calibration", calibration.recipe.to_json()),
        ]
    for component, state in provenance.finetunings.items():
        groups.append((f"fine-tuning of {component}", state.recipe.to_json()))
    settings = dict(evaluation.settings)
    groups.append(("evaluation", {**settings.pop("record"), **settings}))
    groups.append(("machine", evaluation.machine))
    return [{"title": title, "rows": _rows(group)} for title, group in groups]


def _rows(group: dict[str, Json]) -> list[list[str]]:
    """Return pairs of name and value."""
    return [[key, _text(value)] for key, value in group.items()]


def _text(value: Json) -> str:
    """Return a JSON value as it is read."""
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    return "–" if value is None else str(value)
