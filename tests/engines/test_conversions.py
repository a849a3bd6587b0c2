"""Conversions on disk: complete or absent, and few."""

import os
from pathlib import Path

import pytest

from msfp_cli.engines import conversions


def save(path: Path) -> None:
    path.write_text("<net/>")
    path.with_suffix(".bin").write_bytes(bytes(100))


def test_key_depends_on_the_denoiser_and_on_the_tree() -> None:
    keys = {conversions.key_of(c, t) for c in ("a", "b") for t in ({"x": 1}, {"x": 2})}
    assert len(keys) == 4
    assert conversions.key_of("a", {"x": 1, "y": 2}) == conversions.key_of("a", {"y": 2, "x": 1})


def test_what_was_written_is_found_in_the_first_place_that_has_it(tmp_path: Path) -> None:
    places = [tmp_path / "export", tmp_path / "cache"]
    assert conversions.find("0a", places) is None
    path = conversions.write(places[1], "0a", save)
    assert conversions.find("0a", places) == path
    first = conversions.write(places[0], "0a", save)
    assert conversions.find("0a", places) == first


@pytest.mark.parametrize("damage", ["cut", "missing", "unsealed"])
def test_damaged_conversion_is_as_good_as_none(tmp_path: Path, damage: str) -> None:
    path = conversions.write(tmp_path, "0a", save)
    weights = path.with_suffix(".bin")
    if damage == "cut":
        weights.write_bytes(bytes(99))
    elif damage == "missing":
        weights.unlink()
    else:
        (path.parent / "msfp.json").unlink()
    assert conversions.find("0a", [tmp_path]) is None


def test_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        save(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversions.write(tmp_path, "0a", fail)
    assert not list(tmp_path.iterdir())


def test_cache_keeps_those_that_were_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversions, "_MOST", 2)
    for i, key in enumerate(("0a", "0b")):
        path = conversions.write(tmp_path, key, save)
        os.utime(path.parent, (i, i))
    conversions.find("0a", [tmp_path])
    conversions.write(tmp_path, "0c", save)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0a", "0c"]


def test_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSFP_CACHE", "/somewhere")
    assert conversions.cache_directory() == Path("/somewhere/openvino")
    monkeypatch.delenv("MSFP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert conversions.cache_directory() == Path("/elsewhere/msfp/openvino")
