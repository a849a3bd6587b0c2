"""What a recording is of: the model, its samplers, prompts and pictures, as its manifest has it."""

import json
from pathlib import Path
from typing import Any, TypeAlias

from msfp_cli.errors import MsfpError, RunError
from msfp_cli.files.atomic import remove
from msfp_cli.files.directories import refuse_foreign
from msfp_cli.pipelines.denoiser import find_denoisers, fingerprint
from msfp_cli.pipelines.discovery import schedulers_of
from msfp_cli.pipelines.pictures import digest_of_pictures
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.result import Recording, is_same

Pipeline: TypeAlias = Any  # of diffusers, which is untyped

_APART = ("conditions", "seed")  # what the held-out pictures have of their own


def settings_of(pipe: Pipeline, source: dict[str, Any], recipe: RecordRecipe) -> dict[str, Any]:
    """Return the settings that a recording's manifest holds.

    Fingerprints tell models apart. A model's schedulers, and the pictures in a folder, may change
    without another name.

    Arguments:
        source: the model, as JSON values.
    """
    prints = {component: fingerprint(module) for component, module in find_denoisers(pipe).items()}
    schedulers = schedulers_of(pipe).items()
    settings = {
        "source": source,
        "record": recipe.to_json(),
        "fingerprint": prints,
        "schedulers": {name: _scheduler_settings(each) for name, each in schedulers},
    }
    if recipe.images is None:
        return settings
    return {**settings, "pictures": {"digest": digest_of_pictures(recipe.images)}}


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 (diffusers is untyped)
    """Return the class of a scheduler and its config, where it has one, as JSON values."""
    has_config = hasattr(scheduler, "to_json_string")
    config: dict[str, Any] = json.loads(scheduler.to_json_string()) if has_config else {}
    own = {key: value for key, value in config.items() if key[0] != "_"}
    return {"class": type(scheduler).__name__, **own}


def remove_other(directory: Path, settings: dict[str, Any]) -> None:
    """Delete a recording, unless it is of just these settings."""
    try:
        if is_same(Recording(directory).recipe, settings):
            return
    except MsfpError:  # damaged in whatever way: it is replaced, which is what --overwrite asks for
        pass
    refuse_foreign(directory)
    remove(directory)


def refuse_other_recordings(
    recording: Recording, held_out: Recording, source: dict[str, Any], record: dict[str, Any]
) -> None:
    """Refuse recordings that a calibration was not made from, or of which a part is missing.

    Whoever calibrates again is interrupted, or files of two runs are mixed.

    Arguments:
        source, record: of the calibration, as JSON values.

    Raises:
        RunError: the message names the directory.
    """
    for each in (recording, held_out):
        if missing := each.missing_shards():
            raise RunError(
                f"{each.directory} lacks {len(missing)} of {each.num_shards} shards; "
                "run the same `msfp calibrate` again, with --overwrite, to complete it"
            )
    made_from = {"source": source, "record": record}
    is_same_recording = all(recording.recipe.get(key) == made_from[key] for key in made_from)
    if not is_same_recording or _shared(held_out) != _shared(recording):
        other = held_out if is_same_recording else recording
        raise RunError(
            f"{other.directory} is not the recording that the calibration was made from; "
            "run the same `msfp calibrate` again, with --overwrite"
        )


def _shared(recording: Recording) -> list[Any]:
    """Return what the recordings to choose on and to measure on have in common."""
    recipe = recording.recipe
    record = recipe.get("record", {}).items()
    sampling = {key: value for key, value in record if key not in _APART}
    return [recipe.get("source"), recipe.get("fingerprint"), sampling]
