"""Documents as a faulty writer would leave them: signed, with a value of another type in them."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msfp_cli.files.documents import Json, to_text

WRONG = [[{}]]  # no field of a document is of this type


def mistyped(document: Json, free: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield copies of a document with one value replaced, and the value's place.

    Of the items of a list, and of objects with the same keys, the first stands for all.

    Arguments:
        free: keys whose value may be anything.
    """
    known = set[str]()
    for place in _places(document):
        if any(key in free for key in place):
            continue
        changed = copy.deepcopy(document)
        container = changed
        for key in place[:-1]:
            container = container[key]
        shape = str((place[-1], _keys(container)))
        if shape not in known:
            known.add(shape)
            container[place[-1]] = WRONG
            yield "/".join(map(str, place)), changed


def _keys(container: Json) -> Json:
    return list(container) if isinstance(container, dict) else len(container)


def _places(value: Json, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value of a tree, but of a list only the first item's."""
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = list(enumerate(value[:1]))
    for key, item in items:
        yield (*place, key)
        yield from _places(item, (*place, key))


def read_unsigned(path: Path) -> Json:
    """Return a JSON document without the digest of itself."""
    document = json.loads(path.read_text())
    document.pop("sha256", None)
    return document


def write_signed(path: Path, document: Json) -> None:
    """Write a document with a digest that fits."""
    path.write_text(to_text(document))
