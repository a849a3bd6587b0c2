"""Write so that a file or directory is there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from msfp_cli.errors import RunError

Json: TypeAlias = Any  # what a JSON file holds: a tree of dicts, lists, strings and numbers

_OURS = (
    "model_index.json",
    "calibration.json",
    "sheet.png",
    "report.html",
)  # one of them lies in every directory that we write


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output that is already there, before any work is done for it.

    Raises:
        RunError: it exists and `overwrite` is not set, or it is nothing that msfp wrote and must
            not be deleted.
    """
    if not directory.exists():
        return
    if not overwrite:
        raise RunError(
            f"{directory} exists already; use --overwrite to replace it, or choose another place"
        )
    if not directory.is_dir() or (
        any(directory.iterdir()) and not any((directory / n).exists() for n in _OURS)
    ):
        raise RunError(
            f"{directory} is nothing that msfp wrote, so it is not replaced; choose another place"
        )


@contextmanager
def replace_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `directory` that takes its place when the block ends well.

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


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    with replace_file(path) as temporary:
        temporary.write_text(text, "utf-8")
