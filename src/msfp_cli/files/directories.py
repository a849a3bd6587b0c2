"""A directory is written whole or not at all, and replaced only if msfp wrote all that is in it.

`replace_directory` seals what it writes (`seal`), and `claim` marks a directory that grows. Both
begin with `refuse_foreign`, the one place that decides whether something may be replaced.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msfp_cli.errors import MsfpError, RunError
from msfp_cli.files.atomic import (
    delete,
    exchange,
    flush,
    follow_umask_,
    remove,
    temporary_of,
    write_text,
)
from msfp_cli.files.lock import beside, only_writer, remove_stale, remove_stale_in
from msfp_cli.files.seal import MARK, Seal

# The files of directories that grow.
RECORDING = ("recording.json", "[0-9]*.safetensors")
EVALUATION = (
    "asked.json",
    "evaluation.json",
    *(f"trajectories/{name}" for name in (*RECORDING, MARK)),
    "pictures/*/gallery.json",
    "pictures/*/[0-9]*.safetensors",
    "measured/*.json",
    "signed/calibration.json",
    "signed/scales.safetensors",
    "signed/multipliers.safetensors",
    f"signed/{MARK}",
)
_EXPORT = ("*/config.json", b'"quant_method": "msfp"')
# Before msfp marked its directories: a file, words in it that only msfp writes, and all the files.
_UNMARKED = (
    ("recording.json", b'"num_shards"', RECORDING),
    ("calibration.json", b'"scales_digest"', ("calibration.json", "scales.safetensors")),
    ("asked.json", b'"num_trajectories"', EVALUATION),
    (*_EXPORT, ("model_index.json", "*/*", MARK)),
)


def cache_directory() -> Path:
    """Return where what can be made again is kept: ``$MSFP_CACHE``, or ``~/.cache/msfp``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get("MSFP_CACHE") or f"{home}/msfp").expanduser()
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / "msfp"


def refuse_foreign(directory: Path) -> None:
    """Refuse to replace what msfp did not write; an empty directory may be replaced.

    Raises:
        RunError: something there is not ours; the message names it.
    """
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise _foreign(directory)
    contents = _contents(directory)
    stranger = next(contents.strangers(directory), None)
    if stranger is not None:
        raise _foreign(directory / stranger)
    if (directory / "model_index.json").exists() and not _is_export(directory, contents):
        raise _foreign(directory / "model_index.json")


def refuse_other_kind(directory: Path, patterns: tuple[str, ...]) -> None:
    """Refuse to let something grow in a directory of ours that holds something else.

    Arguments:
        patterns: of the paths of all files that are to be in it, the first one being always there.

    Raises:
        RunError: the directory is not empty, and not of this kind.
    """
    refuse_foreign(directory)
    contents = _contents(directory)
    if contents != Seal() and patterns[0] not in contents.patterns:
        raise RunError(f"{directory} holds something else that msfp wrote; choose another path")


def _is_export(directory: Path, contents: Seal) -> bool:
    """Whether a pipeline is an export, and was not saved in the place of one.

    It has a config of ours or, if that is damaged, all the weights that we wrote.
    """
    return _mentions(directory, *_EXPORT) or contents.has_weights_in(directory)


def _foreign(path: Path) -> RunError:
    return RunError(
        f"{path} was not written by msfp and is not replaced; move it away, or choose another path"
    )


def _contents(directory: Path) -> Seal:
    """Return what msfp wrote into a directory: by its mark, or as versions without marks did."""
    try:
        seal = Seal.load(directory, redo="")
    except MsfpError:  # a damaged mark is as good as none
        seal = None
    if seal is not None:
        return seal
    for pattern, words, names in _UNMARKED:
        if _mentions(directory, pattern, words):
            return Seal(patterns=names)
    return Seal()


def _mentions(directory: Path, pattern: str, words: bytes) -> bool:
    """Whether a file whose name fits holds these words."""
    files = (path for path in directory.glob(pattern) if path.is_file())
    return any(words in path.read_bytes() for path in files)


def refuse_existing(directory: Path, *, overwrite: bool, work: Path | None = None) -> None:
    """Refuse an output that is already there, before any work is done for it.

    If the process that wrote it was killed at the very end, what it has left goes.

    Arguments:
        work: a directory with finished parts of the output, for whoever goes on with it.

    Raises:
        RunError: it exists and `overwrite` is not set, or something in it is not ours, or whoever
            runs the command is in it.
    """
    refuse_around(directory)
    if _is_there(directory) and not overwrite:
        remove_stale(beside(directory))
        if work is not None and not _is_later(work, directory):
            remove(work)
        raise RunError(
            f"{directory} exists already; use --overwrite to replace it, or choose another path"
        )
    refuse_foreign(directory)


def refuse_around(directory: Path) -> None:
    """Refuse to replace the directory that the process is in, which would be nowhere then.

    No system renames a mount point either, which is better said before hours of work than after.

    Raises:
        RunError: it is the working directory, or above it, or a mount point.
    """
    place = directory.resolve()
    if _is_in(place):
        raise RunError(
            f"{directory} is the working directory or above it, which msfp does not replace; "
            "choose another path"
        )
    if os.path.ismount(place):
        raise RunError(
            f"{directory} is a mount point, which msfp cannot replace; choose a path in it, such "
            f"as {directory / 'new'}"
        )


def _is_in(place: Path) -> bool:
    """Whether the process is in a directory, or below it."""
    try:
        return Path.cwd().resolve().is_relative_to(place)
    except FileNotFoundError:  # it was deleted, so nothing can be above it
        return False


def _is_there(directory: Path) -> bool:
    """Whether a name is taken; an empty directory is as good as none."""
    return directory.exists() and not (
        directory.is_dir() and next(directory.iterdir(), None) is None
    )


def _is_later(work: Path, directory: Path) -> bool:
    """Whether parts were made after a directory, which is then not the one they were made for."""
    mark = directory / MARK
    since = mark.stat().st_mtime_ns if mark.exists() else 0
    files = (path for path in work.rglob("*") if path.is_file())  # deleting changes directories
    return any(path.stat().st_mtime_ns > since for path in files)


def claim(directory: Path, patterns: tuple[str, ...]) -> None:
    """Mark a directory that grows as ours; files that are there already have to be ours.

    Arguments:
        patterns: of the paths of all files that will be in it.

    Raises:
        RunError: something there is not ours.
    """
    delete(temporary_of(directory / MARK))  # of a process that was killed in its first moment
    refuse_foreign(directory)
    remove_stale_in(directory)
    if not (directory / MARK).exists():
        write_text(directory / MARK, Seal(patterns=patterns).to_text())


@contextmanager
def replace_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of `directory` when the block ends well.

    One process at a time may do so. What a killed one has left is put right before the block runs.
    A link to a directory, on another disk say, stays: the directory that it leads to is replaced.

    Raises:
        RunError: `directory` exists and `overwrite` is not set, something in it is not ours, or
            another process writes it.
    """
    refuse_around(directory)
    directory = behind(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(directory, beside(directory)):
        recover(directory)
        refuse_existing(directory, overwrite=overwrite)
        temporary = temporary_of(directory)
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                follow_umask_(path)
            (temporary / MARK).write_text(Seal.of(temporary).to_text())
            for path in temporary.rglob("*"):
                flush(path)
            _swap(temporary, directory)
            flush(directory.parent)
        finally:
            delete(temporary)


def behind(directory: Path) -> Path:
    """Return the path of a directory or, if it is a link, of what it leads to."""
    return Path(os.path.realpath(directory)) if directory.is_symlink() else directory


def remove_ours(directory: Path) -> None:
    """Delete a directory that `refuse_foreign` accepts; one that a link leads to becomes empty."""
    if not directory.is_symlink():
        remove(directory)
        return
    new = temporary_of(behind(directory))
    delete(new)
    new.mkdir()
    _swap(new, behind(directory))
    delete(new)


def recover(directory: Path) -> None:
    """Put right what a process has left that was killed while it replaced a directory.

    To be called by whoever may write it, and by nobody else.
    """
    old = _old(directory)
    if directory.exists():
        delete(old)
    elif old.exists():  # killed between two renames
        os.rename(old, directory)
    delete(temporary_of(directory))


def _swap(new: Path, directory: Path) -> None:
    """Give a directory the name of another, whose content then has the new one's, if any."""
    if not directory.exists():
        os.rename(new, directory)
    elif not exchange(new, directory):
        os.rename(directory, _old(directory))
        os.rename(new, directory)
        delete(_old(directory))


def _old(directory: Path) -> Path:
    """Return the name of the old directory while it is replaced by two renames."""
    return directory.with_name(f".{directory.name}.msfp-old")
