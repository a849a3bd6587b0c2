import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PurePath

import pytest

from msfp_cli.errors import RunError
from msfp_cli.files import directories
from msfp_cli.files.atomic import exchange
from msfp_cli.files.directories import (
    EVALUATION,
    RECORDING,
    claim,
    recover,
    refuse_existing,
    refuse_foreign,
    refuse_other_kind,
    remove_ours,
    replace_directory,
)
from msfp_cli.files.lock import beside
from msfp_cli.files.seal import MARK, Seal


class Stopped(BaseException):
    """What ends a process from outside."""


def existing(directory: Path) -> Path:
    """A directory that msfp wrote."""
    with replace_directory(directory) as temporary:
        (temporary / "calibration.json").write_text("old")
    return directory


def test_directory_is_replaced_whole(tmp_path: Path) -> None:
    directory = existing(tmp_path / "out")
    with replace_directory(directory, overwrite=True) as temporary:
        (temporary / "sheet.png").write_text("new")
        assert names_of(directory) == ["calibration.json", MARK]
    assert names_of(directory) == [MARK, "sheet.png"]
    assert list(tmp_path.iterdir()) == [directory]


def test_old_directory_stays_and_nothing_is_left_when_the_block_raises(tmp_path: Path) -> None:
    directory = existing(tmp_path / "out")
    with pytest.raises(Stopped), replace_directory(directory, overwrite=True) as temporary:
        (temporary / "sheet.png").write_text("half")
        raise Stopped
    assert names_of(directory) == ["calibration.json", MARK]
    assert list(tmp_path.iterdir()) == [directory]


def names_of(directory: Path) -> list[str]:
    """List the files of a directory and those below."""
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
    )


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


def written(directory: Path, files: dict[str, str]) -> Path:
    """Write files as somebody else would."""
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


# Directories as they were before msfp marked its own.
UNMARKED = {
    "recording": {"recording.json": '{"num_shards": 1}', "00000.safetensors": ""},
    "calibration": {"calibration.json": '{"scales_digest": ""}', "scales.safetensors": ""},
    "evaluation": {"asked.json": '{"num_trajectories": 8}', "pictures/full/00000.safetensors": ""},
    "export": {
        "model_index.json": "{}",
        "unet/config.json": '{"quantization_config": {"quant_method": "msfp"}}',
        "vae/config.json": "{}",
    },
}
# What has the names of our files, but nothing of ours in them.
COMMON_NAMES = {
    "pipeline": {"model_index.json": "{}", "unet/config.json": "{}", "unet/model.safetensors": ""},
    "calibration": {"calibration.json": "{}"},
    "pictures": {"sheet.png": ""},
    "page": {"report.html": "<html>"},
    "recording": {"recording.json": "{}", "00000.safetensors": ""},
    "evaluation": {"pictures/holiday/00000.safetensors": "", "measured/pulse.json": "{}"},
    "leftover": {".calibration.json.msfp-tmp": ""},
}


@pytest.mark.parametrize("kind", UNMARKED)
def test_directories_of_earlier_versions_may_be_replaced(tmp_path: Path, kind: str) -> None:
    directory = written(tmp_path / "out", UNMARKED[kind])
    refuse_foreign(directory)
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"out/thesis.txt was not written by msfp and is not repl"):
        refuse_foreign(directory)


@pytest.mark.parametrize("kind", COMMON_NAMES)
def test_a_common_name_does_not_make_a_directory_ours(tmp_path: Path, kind: str) -> None:
    directory = written(tmp_path / "out", COMMON_NAMES[kind])
    with pytest.raises(RunError, match="was not written by msfp and is not replaced; move it away"):
        with replace_directory(directory, overwrite=True):
            pytest.fail("the block ran")
    with pytest.raises(RunError, match="was not written by msfp"):
        claim(directory, RECORDING)
    assert names_of(directory) == sorted(COMMON_NAMES[kind])


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".notes", "calibration.json/x"])
def test_a_file_beside_ours_is_not_deleted(tmp_path: Path, name: str) -> None:
    directory = existing(tmp_path / "out")
    if name.startswith("calibration.json"):
        (directory / "calibration.json").unlink()
    written(directory, {name: "years of work"})
    with pytest.raises(RunError, match=f"out/{name} was not written by msfp"):
        with replace_directory(directory, overwrite=True):
            pytest.fail("the block ran")
    (directory / name).rename(tmp_path / "moved away")  # as the message says
    with replace_directory(directory, overwrite=True):
        pass
    assert (tmp_path / "moved away").read_text() == "years of work"


def test_a_pipeline_saved_over_an_export_is_not_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "export"
    with replace_directory(directory) as temporary:
        written(temporary, UNMARKED["export"])
    refuse_foreign(directory)
    written(directory, {"unet/config.json": "{}"})
    with pytest.raises(RunError, match="model_index.json was not written by msfp"):
        refuse_foreign(directory)


@pytest.mark.parametrize("content", ["", "{", None])
def test_an_export_whose_config_is_damaged_may_be_replaced(
    tmp_path: Path, content: str | None
) -> None:
    directory = tmp_path / "export"
    with replace_directory(directory) as temporary:
        written(temporary, {**UNMARKED["export"], "unet/model.safetensors": "codes"})
    config = directory / "unet" / "config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    refuse_foreign(directory)
    (directory / "unet" / "model.safetensors").write_text("someone's")
    with pytest.raises(RunError, match="model_index.json was not written by msfp"):
        refuse_foreign(directory)


def test_an_empty_directory_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with replace_directory(tmp_path / "out") as temporary:
        (temporary / "sheet.png").write_text("new")
    assert names_of(tmp_path / "out") == [MARK, "sheet.png"]


@pytest.mark.parametrize("seconds", [-1, 1])
def test_parts_go_with_the_output_they_were_made_for(tmp_path: Path, seconds: int) -> None:
    directory = existing(tmp_path / "out")
    work = written(tmp_path / ".parts", {"unet/00000.safetensors": ""})
    when = (directory / MARK).stat().st_mtime + seconds
    os.utime(work / "unet" / "00000.safetensors", (when, when))
    with pytest.raises(RunError, match="exists already"):
        refuse_existing(directory, overwrite=False, work=work)
    assert work.exists() == (seconds > 0)  # they are of another command, which may go on with them


def test_damaged_files_of_ours_may_be_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "calibration"
    with replace_directory(directory) as temporary:
        written(temporary, UNMARKED["calibration"])
    written(directory, {"scales.safetensors": "altered"})
    refuse_foreign(directory)
    (directory / "scales.safetensors").unlink()
    (directory / MARK).write_text("{")
    refuse_foreign(directory)


@pytest.mark.parametrize(
    ("patterns", "name"),
    [
        (RECORDING, "00000.safetensors"),
        (RECORDING, ".00012.safetensors.msfp-tmp"),
        (EVALUATION, "pictures/full/00000.safetensors"),
        (EVALUATION, "measured/.full.json.msfp-tmp"),
        (EVALUATION, ".signed.msfp-tmp/scales.safetensors"),
        (EVALUATION, ".signed.msfp-old/calibration.json"),
        (EVALUATION, f"trajectories/{MARK}"),
    ],
)
def test_files_of_a_growing_directory_are_ours(
    tmp_path: Path, patterns: tuple[str, ...], name: str
) -> None:
    claim(tmp_path / "out", patterns)
    refuse_foreign(written(tmp_path / "out", {name: ""}))
    claim(tmp_path / "out", patterns)
    with pytest.raises(RunError, match="years.txt was not written by msfp"):
        refuse_foreign(
            written(tmp_path / "out", {name.replace(PurePath(name).name, "years.txt"): ""})
        )


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replace_directory(tmp_path / "out") as temporary:
            (temporary / "unet").mkdir()
            (temporary / "unet" / "x").touch(0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    directory, file = 0o777 & ~mask, 0o666 & ~mask
    assert modes == {"out": directory, "unet": directory, "x": file, MARK: file}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_old_directory_is_there_whole_whenever_a_swap_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(directories, "exchange", lambda one, other: False)
    for last in range(8):
        directory = existing(tmp_path / str(last))
        calls = iter(range(last))

        def dying(*arguments: object, calls: Iterator[int] = calls, **rest: object) -> None:
            if next(calls, None) is None:
                raise Stopped

        with monkeypatch.context() as patch, suppress(Stopped):
            for owner, name in ((os, "rename"), (directories, "delete")):
                real = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, real=real: (dying(), real(*a))[1])
            with replace_directory(directory, overwrite=True) as temporary:
                (temporary / "sheet.png").write_text("new")
        recover(directory)
        assert names_of(directory) in (["calibration.json", MARK], [MARK, "sheet.png"])
        assert [path.name for path in tmp_path.iterdir()] == [directory.name]
        (directory).rename(tmp_path.parent / f"done-{can_exchange}-{last}")


def test_two_directories_exchange_their_names(tmp_path: Path) -> None:
    one = existing(tmp_path / "one")
    other = foreign(tmp_path / "other")
    if exchange(one, other):
        assert (one / "thesis.txt").exists()
        assert (other / "calibration.json").exists()
    assert not exchange(one, tmp_path / "nowhere")


def test_a_directory_whose_marking_was_killed_is_marked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in (f".{MARK}.msfp-tmp", ".signed.msfp-lock"):
        (tmp_path / "out" / name).write_text("{")
    claim(tmp_path / "out", EVALUATION)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARK]


@pytest.mark.parametrize("name", [MARK, "sheet.png"])
def test_what_a_killed_process_was_writing_is_ours(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    if name != MARK:
        (directory / name).write_text("old")
        (directory / MARK).write_text(Seal.of(directory).to_text())
    (directory / f".{name}.msfp-tmp").write_text("{")
    refuse_foreign(directory)


@pytest.mark.parametrize("name", [".", "..", "inside/..", "/", "../out"])
def test_working_directory_and_those_above_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is the working directory or above it"):
            refuse_existing(Path(name), overwrite=overwrite)
    refuse_existing(Path("inside"), overwrite=False)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel renames none, so that the work of hours could not get its name."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    message = f"^{tmp_path}/out is a mount point, .*; choose a path in it, such as {tmp_path}/out/"
    with pytest.raises(RunError, match=message):
        refuse_existing(tmp_path / "out", overwrite=False)
    with pytest.raises(RunError, match=message), replace_directory(tmp_path / "out"):
        pytest.fail("work is done in vain")
    refuse_existing(tmp_path / "out" / "new", overwrite=False)


@pytest.mark.parametrize("is_empty", [True, False])
def test_link_stays_and_the_directory_behind_it_is_replaced(tmp_path: Path, is_empty: bool) -> None:
    """Else the old files would stay on the disk behind it, and the new ones fill this one."""
    (tmp_path / "disk").mkdir()
    behind = tmp_path / "disk" / "out"
    behind.mkdir() if is_empty else existing(behind)
    link = tmp_path / "out"
    link.symlink_to(behind)
    with replace_directory(link, overwrite=True) as temporary:
        assert temporary.parent == tmp_path / "disk"
        (temporary / "sheet.png").write_text("new")
    assert link.readlink() == behind
    assert names_of(behind) == [MARK, "sheet.png"]
    remove_ours(link)
    assert link.readlink() == behind
    assert names_of(behind) == []
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "disk"}
    remove_ours(behind)
    assert not behind.exists()


def test_lock_lies_beside_a_directory_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "inside")
    lock = tmp_path / "out" / ".inside.msfp-lock"
    assert {
        beside(Path(name)).resolve() for name in (".", "../inside", "x/..", lock.parent / "inside")
    } == {lock}
    assert beside(Path("..")).resolve() == tmp_path / ".out.msfp-lock"
    with pytest.raises(RunError, match="/ is the root of the file system"):
        beside(Path("/"))


def test_what_grows_is_not_mixed_with_something_else_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds something else that msfp wrote; choose another path"):
        refuse_other_kind(existing(tmp_path / "calibration"), EVALUATION)
    claim(empty(tmp_path / "evaluation"), EVALUATION)
    with pytest.raises(RunError, match="holds something else"):
        refuse_other_kind(tmp_path / "evaluation", RECORDING)
    for name in ("evaluation", "nothing", "empty"):
        empty(tmp_path / "empty")
        refuse_other_kind(tmp_path / name, EVALUATION)


def empty(directory: Path) -> Path:
    """A directory without files."""
    directory.mkdir(exist_ok=True)
    return directory
