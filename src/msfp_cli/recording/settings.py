"""What a recording is of: the model, its samplers, prompts and pictures, as its manifest has it."""

import json
from pathlib import Path
from typing import Any, TypeAlias

from msfp_cli.errors import MsfpError
from msfp_cli.files.directories import refuse_foreign, remove_ours
from msfp_cli.pipelines.denoiser import find_denoisers, fingerprint
from msfp_cli.pipelines.discovery import schedulers_of
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.result import Recording, is_same

Pipeline: TypeAlias = Any  # of diffusers, which is untyped


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
    pictures = recipe.digest_of_images()
    return settings if pictures is None else {**settings, "pictures": {"digest": pictures}}


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
    remove_ours(directory)
