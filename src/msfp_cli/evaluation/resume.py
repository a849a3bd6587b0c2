"""Whether an interrupted evaluation may go on: only with the settings that it was begun with.

The settings lie in ``asked.json`` from the first moment on. What is finished (pictures, recorded
calls, measurements) is kept, so a directory is never continued with settings that would mix two
evaluations.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from msfp_cli.errors import RunError
from msfp_cli.files.directories import (
    EVALUATION,
    claim,
    refuse_around,
    refuse_other_kind,
    remove_ours,
)
from msfp_cli.files.documents import Json, read_json, write_json

_SETTINGS = "asked.json"
# Settings that no picture depends on: they may change until the first model is measured.
_OF_MEASUREMENTS = ("extractor", "reference", "clip", "layers", "cost")
_T = TypeVar("_T")


def refuse_other_settings(place: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse a directory that holds something else, before anything is written.

    Arguments:
        settings: as JSON values.
        overwrite: whether another evaluation may be there.

    Raises:
        RunError: the directory was not written by msfp, or holds something else, or an evaluation
            with other settings.
        CheckpointError: its settings cannot be read.
    """
    refuse_other_kind(place, EVALUATION)
    if overwrite and (place / _SETTINGS).exists():
        refuse_around(place)
    if overwrite or not (place / _SETTINGS).exists():
        return
    begun, asked = _flat(read_document(place / _SETTINGS, dict)), _flat(settings)
    differing = [key for key in {**asked, **begun} if begun.get(key) != asked.get(key)]
    if not any((place / "measured").glob("*.json")):
        differing = [key for key in differing if key not in _OF_MEASUREMENTS]
    if differing:
        raise RunError(
            f"{place} holds an evaluation with other settings ({differing[0]!r} differs); "
            "use --overwrite"
        )


def begin(place: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Write the settings; keep what an earlier evaluation with them has, unless `overwrite`."""
    if overwrite and (place / _SETTINGS).exists():
        remove_ours(place)
    claim(place, EVALUATION)
    write_json(place / _SETTINGS, settings)


def read_document(path: Path, parse: Callable[[Json], _T]) -> _T:
    """Read a JSON file of an unfinished evaluation.

    Raises:
        CheckpointError: it is damaged.
    """
    return read_json(path, parse, redo="use --overwrite to evaluate again")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of the pictures beside the rest, so that each difference has its own key.

    Where the export lies is left out, as a run may be moved: its pictures say which model it is.
    """
    rest = {key: value for key, value in settings.items() if key not in ("record", "export")}
    return {**rest, **settings.get("record", {})}
