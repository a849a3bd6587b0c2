"""Conversions on disk: complete or absent, and few."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from msfp_cli.engines import conversions
from msfp_cli.errors import RunError


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


def test_clock_that_was_put_back_costs_the_conversions_from_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversions, "_MOST", 3)
    for key in ("0a", "0b", "0c"):
        conversions.write(tmp_path, key, save)
    year = 3.2e7
    os.utime(tmp_path / "0a", times=(time.time() - year,) * 2)
    for key in ("0b", "0c"):
        os.utime(tmp_path / key, times=(time.time() + year,) * 2)
    assert conversions.write(tmp_path, "0d", save).exists()
    conversions.write(tmp_path, "0e", save)
    assert {path.name for path in tmp_path.iterdir()} == {"0a", "0d", "0e"}


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


@pytest.mark.parametrize("rank", ["0", "1"])
def test_who_needs_what_another_is_converting_waits_and_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    made = []

    def save_slowly(path: Path) -> None:
        made.append(path)
        time.sleep(0.2)
        save(path)

    with ThreadPoolExecutor(3) as pool:
        writes = [pool.submit(conversions.write, tmp_path, "0a", save_slowly) for _ in range(3)]
    assert {write.result() for write in writes} == {conversions.find("0a", [tmp_path])}
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["0a"]


def test_what_others_delete_or_keep_in_the_cache_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversions, "_MOST", 1)
    (tmp_path / "0b").symlink_to("nothing")  # as if it were deleted after it was listed

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(conversions, "remove", refuse)
    path = conversions.write(tmp_path, "0a", save)
    assert conversions.find("0a", [tmp_path]) == path


def test_cache_without_rights_is_one_line_that_says_how_to_choose_another(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.raises(RunError, match=f"{tmp_path} .Permission denied.; set MSFP_CACHE"):
        conversions.write(tmp_path, "0a", refuse)


def test_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSFP_CACHE", "/somewhere")
    assert conversions.cache_directory() == Path("/somewhere/openvino")
    monkeypatch.delenv("MSFP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert conversions.cache_directory() == Path("/elsewhere/msfp/openvino")
