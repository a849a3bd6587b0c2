"""A file is written whole or not at all: under a temporary name, which is then renamed.

So a killed process leaves the old file or none. The content is on the disk before it gets its name,
and so it is after a power cut. What a killed process leaves under a temporary name is deleted by
the next writer of the same name, or by `clean`.
"""

import ctypes
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_TEMPORARY = ".msfp-tmp"  # how all temporary names end, so that nobody else's file is taken for one
_AT_FDCWD = -100  # of Linux, as the next
_RENAME_EXCHANGE = 2
_ASKING = threading.Lock()


def follow_umask_(path: Path) -> None:
    """Give a file or a directory the mode of any new one; safetensors makes its files private."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    """Return what modes of new files lack.

    The system call that tells it sets it, too, for all threads: one that makes a file meanwhile
    would let everybody write it, and of two that ask at once, the later would leave none behind.
    """
    with suppress(OSError):  # of Linux
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    with _ASKING:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there becomes `path` when the block ends well.

    Raises:
        OSError, SafetensorError: it cannot be written; ``filename`` is `path`, unless the system
            names another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        follow_umask_(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        # Python prints a filename in the place of what a library says without the system's number.
        if getattr(error, "filename", None) is None and getattr(error, "errno", 0) is not None:
            error.filename = str(path)  # type: ignore[union-attr]
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    with replace_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def temporary_of(path: Path) -> Path:
    """Return the name under which `path` is written."""
    return path.with_name(f".{path.name}{_TEMPORARY}")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or directories in one step, if that is possible.

    Most file systems of Linux can (``RENAME_EXCHANGE``, see renameat2(2)).

    Returns:
        Whether they were exchanged.
    """
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:  # an old C library
        return False
    first = os.fsencode(one)
    second = os.fsencode(other)
    return bool(rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0)


def remove(path: Path) -> None:
    """Delete a file or a directory, whose name is gone at once or not at all."""
    temporary = temporary_of(path)
    delete(temporary)
    if os.path.lexists(path):
        os.replace(path, temporary)
        delete(temporary)


def clean(directory: Path) -> None:
    """Delete what killed processes have left in a directory under temporary names."""
    for path in directory.glob(f".*{_TEMPORARY}"):
        delete(path)


def remove_if_empty(directory: Path) -> None:
    """Delete a directory with nothing in it; leave any other."""
    with suppress(OSError):
        directory.rmdir()


def delete(path: Path) -> None:
    """Delete a file or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
