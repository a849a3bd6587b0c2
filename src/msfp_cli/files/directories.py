"""A directory is written whole or not at all, and replaced only if msfp wrote it."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from msfp_cli.errors import RunError

# One of these lies in every directory that we write.
_MARKS = (
    "recording.json",
    "calibration.json",
    "model_index.json",
    "sheet.png",
    "report.html",
)


def is_ours(directory: Path, parts: Collection[str] | None = None) -> bool:
    """Say whether a directory may be replaced: it is empty, or msfp wrote it.

    Arguments:
        parts: names of all that msfp writes into such a directory; anything else in it makes it
            somebody else's. None allows anything beside a file that only msfp writes (people put
            a README into an export).
    """
    if not directory.is_dir():
        return False
    names = [path.name for path in directory.iterdir()]
    if parts is None:
        return not names or any(mark in names for mark in _MARKS)
    temporary = tuple(f".{part}" for part in parts)  # left behind by a process that was killed
    return all(name in parts or name.startswith(temporary) for name in names)


def refuse_foreign(directory: Path, parts: Collection[str] | None = None) -> None:
    """Refuse to replace what msfp did not write, see `is_ours`.

    Raises:
        RunError: something is there, and it is not ours.
    """
    if directory.exists() and not is_ours(directory, parts):
        raise RunError(
            f"{directory} was not written by msfp and is not replaced; choose another path"
        )


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output that is already there, before any work is done for it.

    Raises:
        RunError: it exists and `overwrite` is not set, or msfp did not write it.
    """
    if directory.exists() and not overwrite:
        raise RunError(
            f"{directory} exists already; use --overwrite to replace it, or choose another path"
        )
    refuse_foreign(directory)


@contextmanager
def replace_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of `directory` when the block ends well.

    Raises:
        RunError: `directory` exists and `overwrite` is not set.
    """
    refuse_existing(directory, overwrite=overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if directory.exists():
            old = temporary.with_name(f"{temporary.name}-old")
            os.replace(directory, old)
            os.replace(temporary, directory)
            shutil.rmtree(old)
        else:
            os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
