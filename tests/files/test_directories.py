from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from msfp_cli.errors import RunError
from msfp_cli.files.directories import is_ours, replace_directory


class Stopped(BaseException):
    """What ends a process from outside."""


def existing(directory: Path) -> Path:
    """A directory that msfp wrote."""
    directory.mkdir()
    (directory / "calibration.json").write_text("old")
    return directory


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    directory = existing(tmp_path / "out")
    with replace_directory(directory, overwrite=True) as temporary:
        (temporary / "sheet.png").write_text("new")
        assert [p.name for p in directory.iterdir()] == ["calibration.json"]
    assert [p.name for p in directory.iterdir()] == ["sheet.png"]
    assert list(tmp_path.iterdir()) == [directory]


def test_old_directory_stays_and_nothing_is_left_when_the_block_raises(tmp_path: Path) -> None:
    directory = existing(tmp_path / "out")
    with pytest.raises(Stopped), replace_directory(directory, overwrite=True) as temporary:
        (temporary / "sheet.png").write_text("half")
        raise Stopped
    assert [p.name for p in directory.iterdir()] == ["calibration.json"]
    assert list(tmp_path.iterdir()) == [directory]


def foreign(directory: Path) -> Path:
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")
    return directory


def file(path: Path) -> Path:
    path.write_text("a file")
    return path


@pytest.mark.parametrize(
    ("make", "overwrite", "message"),
    [
        (existing, False, "exists already; use --overwrite"),
        (foreign, False, "exists already; use --overwrite"),
        (foreign, True, "was not written by msfp and is not replaced"),
        (file, True, "was not written by msfp and is not replaced"),
    ],
)
def test_existing_output_is_refused_before_the_block_runs(
    tmp_path: Path, make: Callable[[Path], Path], overwrite: bool, message: str
) -> None:
    path = make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    context: AbstractContextManager[Path] = replace_directory(path, overwrite=overwrite)
    with pytest.raises(RunError, match=message), context:
        pytest.fail("the block ran")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "parts", "expected"),
    [
        ([], None, True),
        (["calibration.json", "README.md"], None, True),
        (["recording.json", "00000.safetensors"], None, True),
        (["README.md"], None, False),
        ([".calibration.json.tmp"], None, False),
        ([], ("asked.json", "signed"), True),
        (["asked.json", "signed"], ("asked.json", "signed"), True),
        ([".asked.json.tmp", ".signed-abc123"], ("asked.json", "signed"), True),
        (["asked.json", "README.md"], ("asked.json", "signed"), False),
        (["calibration.json"], ("asked.json", "signed"), False),
    ],
)
def test_only_what_msfp_wrote_may_be_replaced(
    tmp_path: Path, names: list[str], parts: tuple[str, ...] | None, expected: bool
) -> None:
    for name in names:
        (tmp_path / name).write_text("something")
    assert is_ours(tmp_path, parts) is expected


def test_a_file_is_no_directory_of_ours(tmp_path: Path) -> None:
    assert not is_ours(file(tmp_path / "calibration.json"))
