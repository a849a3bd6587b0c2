"""Which kernel was fastest for a layer on a card: a small JSON file in the user's cache.

What it holds is true of the card, the versions, the layer's geometry and the size of its input,
which are the key. A file that is damaged or cannot be written is as good as none.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from msfp_cli.errors import MsfpError
from msfp_cli.files.directories import cache_directory
from msfp_cli.files.documents import Json, read_json

_FILE = "kernels.json"
_MOST = 4000  # entries; the oldest go
_SCHEMA = 1
# What this process knows, by the file.
_known: dict[Path, dict[str, "Winner"]] = {}


class Winner(NamedTuple):
    """The kernel that won, and the seconds that each way to run the layer took, by its name."""

    kernel: str
    seconds: Mapping[str, float]


def find(key: str) -> Winner | None:
    """Return what won before, if that is known."""
    place = _place()
    if place not in _known:
        _known[place] = _read(place)
    return _known[place].get(key)


def keep(key: str, winner: Winner, *, lasting: bool = True) -> None:
    """Remember what won.

    Arguments:
        lasting: in the file, too, beside what other processes have written there meanwhile.
    """
    place = _place()
    _known.setdefault(place, {})[key] = winner
    if not lasting:
        return
    stored = _read(place)
    stored.pop(key, None)
    stored[key] = winner
    newest = list(stored.items())[-_MOST:]
    document = {"schema": _SCHEMA, "winners": {key: list(each) for key, each in newest}}
    temporary = place.with_name(f".{place.name}.{os.getpid()}")  # processes may write at once
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document, indent=1), "utf-8")
        temporary.replace(place)
    except OSError:  # a full disk, or a home that is not ours
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _place() -> Path:
    return cache_directory() / _FILE


def _read(place: Path) -> dict[str, Winner]:
    try:
        return read_json(place, _winners, redo="", schema=_SCHEMA)
    except (OSError, MsfpError):
        return {}


def _winners(document: Json) -> dict[str, Winner]:
    """Read the entries; what is not as it should be raises."""
    found = {}
    for key, (kernel, seconds) in document["winners"].items():
        found[key] = Winner(str(kernel), {name: float(took) for name, took in seconds.items()})
    return found
