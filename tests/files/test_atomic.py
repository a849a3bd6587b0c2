import errno
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from msfp_cli.files.atomic import follow_umask_, replace_file, write_text


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


def test_error_without_a_name_gets_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match=re.escape(f"too large: {str(path)!r}")), replace_file(path):
        raise OSError(errno.EFBIG, "too large")
    with pytest.raises(OSError, match="too large: 'mine'"), replace_file(path):
        raise OSError(errno.EFBIG, "too large", "mine")
    with pytest.raises(SafetensorError) as raised, replace_file(path):
        raise SafetensorError("I/O error: File too large (os error 27)")
    assert raised.value.filename == str(path)


@pytest.mark.parametrize("is_told", [True, False])
def test_threads_that_write_at_once_leave_the_mask_of_new_files_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """The system has no call that only asks for it."""
    umask = os.umask

    def umask_and_let_others_run(mask: int) -> int:
        before = umask(mask)
        time.sleep(0.001)
        return before

    monkeypatch.setattr(os, "umask", umask_and_let_others_run)
    if not is_told:  # a system without /proc
        monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError))
    paths = [tmp_path / str(number) for number in range(40)]
    before = umask(0o027)
    try:
        for path in paths:
            path.touch()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(follow_umask_, paths))
    finally:
        after = umask(before)
    assert after == 0o027
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o640}
