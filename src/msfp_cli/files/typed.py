"""JSON values as typed ones: a dataclass is read by the types of its fields, and nothing else is.

JSON tells numbers, texts, lists and objects apart, and a document that a faulty writer has signed
may hold any of them anywhere. So whatever enters from a document is compared with the type that the
program says it has: an unknown field, a missing one, or a text where a number belongs is a
`ValueError` that names the place, which `documents` turns into one line about the file.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from msfp_cli.files.documents import Json

Kind: TypeAlias = Any  # a type, or what `typing` makes of types
T = TypeVar("T")

_PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    NoneType: (NoneType,),
}


def read_value(kind: Kind, value: Json) -> Json:
    """Return a JSON value as a value of a type.

    Arguments:
        kind: a plain type, a path, a dataclass, or a class with ``from_json``; a tuple, list or
            mapping of such, or several of them joined by ``|``. `Any` takes everything.

    Raises:
        ValueError: the value is of another type.
    """
    if kind is Any:
        return value
    if kind in _PLAIN:
        return _read_plain(kind, value)
    if kind is Path:
        return Path(_read_plain(str, value))
    origin: Kind = get_origin(kind)
    if origin in (Union, UnionType):
        return _read_first(get_args(kind), value)
    if origin in (tuple, list):
        return origin(_read_items(origin, get_args(kind), value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _read_mapping(get_args(kind), value)
    if hasattr(kind, "from_json"):
        return kind.from_json(_require(dict, value))
    return (read_fields if is_dataclass(kind) else _require)(kind, value)


def read_fields(kind: type[T], document: Json, **known: object) -> T:
    """Return a dataclass whose fields are the keys of a JSON object.

    Only a field whose default is None may be missing, as in files of versions that did not have it.

    Arguments:
        known: fields that the document does not hold.

    Raises:
        ValueError: a key is unknown or missing, or its value is of another type.
    """
    assert is_dataclass(kind)
    hints = _hints(kind)
    values = dict[str, Any](known)
    for key, value in _require(dict, document).items():
        if key not in hints or key in known:
            raise ValueError(f"key {key!r} is unknown")
        try:
            values[key] = read_value(hints[key], value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    for each in fields(kind):
        if each.name not in values and each.default is not None:
            raise ValueError(f"key {each.name!r} is missing")
    return kind(**values)


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _require(kind: type, value: Json) -> Json:
    if not isinstance(value, kind):
        raise ValueError(f"{_shown(value)} is not of type {kind.__name__}")
    return value


def _read_plain(kind: Kind, value: Json) -> Json:
    """Return a number, a text, a truth value or nothing; a truth value is not a number."""
    fits: bool = isinstance(value, _PLAIN[kind])
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{_shown(value)} is not of type {kind.__name__}")
    return float(value) if kind is float else value


def _shown(value: Json) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _read_first(kinds: tuple[Kind, ...], value: Json) -> Json:
    """Return a value as one of the first type that it is of."""
    errors = list[ValueError]()
    for kind in kinds:
        try:
            return read_value(kind, value)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _read_items(kind: type, kinds: tuple[Kind, ...], value: Json) -> list[Any]:
    """Read a list; a tuple without ``...`` has a type for each of its items."""
    items = list(value) if isinstance(value, tuple) else _require(list, value)
    if kind is list or kinds[1:] == (...,):
        return [read_value(kinds[0], item) for item in items]
    if len(items) != len(kinds):
        raise ValueError(f"{_shown(value)} does not have {len(kinds)} items")
    return [read_value(own, item) for own, item in zip(kinds, items, strict=True)]


def _read_mapping(kinds: tuple[Kind, ...], value: Json) -> dict[str, Any]:
    values = dict[str, Any]()
    for key, item in _require(dict, value).items():
        try:
            values[key] = read_value(kinds[1], item)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return values
