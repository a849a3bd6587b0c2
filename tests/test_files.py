from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from msfp_cli.errors import RunError
from msfp_cli.files import replace_directory, replace_file, write_text


class Stopped(BaseException):
    """What ends a process from outside."""


def test_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_text("old")
    with replace_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("written", [True, False], ids=["written", "not written"])
@pytest.mark.parametrize("old", ["old", None])
def test_old_content_stays_and_nothing_is_left_when_the_block_raises(
    tmp_path: Path, old: str | None, written: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "state.bin"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error), replace_file(path) as temporary:
        if written:
            temporary.write_text("half of the ne")
        raise error
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == (
        {} if old is None else {"state.bin": old}
    )


def test_leftover_of_a_killed_process_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    with pytest.raises(Stopped), replace_file(path) as temporary:
        raise Stopped
    temporary.write_text("a longer leftover of a process that was killed")
    with replace_file(path) as again:
        assert again == temporary
        again.write_text("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"state.bin": "new"}


def test_block_that_writes_nothing_does_not_delete_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replace_file(path):
        pass
    assert path.read_text() == "old"


def test_missing_directories_are_made_for_a_text(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "run.json", "naïve\n")
    assert (tmp_path / "a" / "b" / "run.json").read_bytes() == "naïve\n".encode()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["run.json"]


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
        (foreign, True, "nothing that msfp wrote"),
        (file, True, "nothing that msfp wrote"),
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
