from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msfp_cli.files.documents import Json
from msfp_cli.files.typed import Kind, read_fields, read_value


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: float
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int
    inner: Inner
    pairs: tuple[tuple[float, int], ...] = ()
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    known: object = None


INNER = {"size": 1, "note": None}
OUTER = {
    "name": "a",
    "count": 2,
    "inner": INNER,
    "pairs": [[0.5, 1], [2, 3]],
    "by_name": {"x": INNER},
}
SAMPLES: dict[Any, Any] = {
    bool: True,
    int: 1,
    float: 1.5,
    str: "x",
    type(None): None,
    list[int]: [[1]],
    dict[str, int]: {"a": "b"},
}


def test_document_becomes_what_it_stands_for() -> None:
    outer = read_fields(Outer, OUTER, known=Path())
    assert outer == Outer(
        name="a",
        count=2,
        inner=Inner(size=1.0),
        pairs=((0.5, 1), (2.0, 3)),
        by_name={"x": Inner(size=1.0)},
        known=Path(),
    )
    assert type(outer.inner.size) is float


@pytest.mark.parametrize("kind", (bool, int, float, str, type(None)))
@pytest.mark.parametrize("other", SAMPLES)
def test_value_of_another_type_is_refused(kind: Kind, other: Kind) -> None:
    if kind is other or (kind is float and other is int):
        assert read_value(kind, SAMPLES[other]) == SAMPLES[other]
        return
    with pytest.raises(ValueError, match="is not of type"):
        read_value(kind, SAMPLES[other])
    assert read_value(kind | other, SAMPLES[kind]) == SAMPLES[kind]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "^name: 3 is not of type str$"),
        ({"count": True}, "^count: True is not of type int$"),
        ({"inner": {"size": 1, "odd": 2}}, "^inner: key 'odd' is unknown$"),
        ({"inner": {}}, "^inner: key 'size' is missing$"),
        ({"inner": []}, "^inner: .. is not of type dict$"),
        ({"pairs": [[1.0]]}, "^pairs: .1.0. does not have 2 items$"),
        ({"pairs": {}}, "^pairs: .. is not of type list$"),
        ({"by_name": {"x": {"size": "9" * 99}}}, "^by_name: x: size: '9+... is not of type float$"),
        ({"known": 3}, "^key 'known' is unknown$"),
    ],
)
def test_error_names_the_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_fields(Outer, {**OUTER, **change}, known=None)


@pytest.mark.parametrize("key", OUTER)
def test_missing_field_is_refused_unless_its_default_is_none(key: str) -> None:
    without = {name: value for name, value in OUTER.items() if name != key}
    with pytest.raises(ValueError, match=f"^key '{key}' is missing$"):
        read_fields(Outer, without)
    assert read_fields(Inner, {"size": 2}).note is None


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(anything)
def test_whatever_does_not_fit_is_one_kind_of_error(value: Json) -> None:
    for kind in (Outer, list[Inner], tuple[int, str], dict[str, float], float | None, Path):
        try:
            read_value(kind, value)
        except (ValueError, OverflowError):
            pass
