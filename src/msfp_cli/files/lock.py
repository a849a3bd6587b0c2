"""One writer at a time: a lock that the kernel releases when the process ends, however it ends.

The lock is `flock` on a small file, so a process that was killed leaves no lock behind; the text in
the file only tells who holds it. The file is deleted when the lock is released. Where a file system
has no locks (some network ones), or on a system without `flock`, nothing is locked.
"""

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from msfp_cli.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Set for processes that share a lock with the one that started them.
_SHARED = "MSFP_LOCK"
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# What this thread holds: path of the lock's file, and its descriptor.
_held: ContextVar[tuple[tuple[str, int], ...]] = ContextVar("_held", default=())


@contextmanager
def only_writer(path: Path, lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Be the only process that writes to `path` while the context is open.

    A thread may enter it again. Of the processes that share a task (`RANK`), the first holds it for
    all. Yields whether the lock was taken now, so that nobody else is at work there.

    Arguments:
        path: what is written, for the message.
        lock: the file that is locked; it lies in an existing directory.
        wait: until the other writer ends; then each of the processes that share a task has its
            turn, too.

    Raises:
        RunError: another process or thread holds the lock.
    """
    name = os.path.realpath(lock)
    is_of_task = os.environ.get("RANK", "0") != "0" or os.environ.get(_SHARED) == name
    shared = is_of_task and not wait
    if shared or any(name == held for held, _ in _held.get()):
        yield False
        return
    descriptor = _take(path, lock, wait=wait)
    token = _held.set((*_held.get(), (name, descriptor)))
    try:
        yield True
    finally:
        _held.reset(token)
        lock.unlink(missing_ok=True)  # before the lock is released: then it is still ours
        os.close(descriptor)


def beside(path: Path) -> Path:
    """Return the file that is locked to write `path`, where nothing else is said.

    Raises:
        RunError: `path` is the root of the file system, beside which there is nothing.
    """
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    if not path.name:
        raise RunError(f"{path} is the root of the file system; choose another path")
    return path.with_name(f".{path.name}.msfp-lock")


def remove_stale(lock: Path) -> None:
    """Delete the lock of a process that was killed, if there is one; leave one that is held."""
    if lock.exists():
        with suppress(RunError), only_writer(lock, lock):
            pass


def remove_stale_in(directory: Path) -> None:
    """Delete the locks of killed processes that wrote something in a directory."""
    for lock in directory.glob(beside(directory / "*").name):
        remove_stale(lock)


def inherited() -> tuple[dict[str, str], tuple[int, ...]]:
    """Return what a child process needs to share this thread's lock: environment, descriptors.

    The lock is released when the last process that has the descriptor is gone.
    """
    held = _held.get()
    if not held:
        return {}, ()
    name, descriptor = held[-1]
    return {_SHARED: name}, (descriptor,)


def _take(path: Path, lock: Path, *, wait: bool) -> int:
    """Return the descriptor of the lock's file, locked, with this process's name in it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, wait=wait)
            if _is_same_file(descriptor, lock):
                os.truncate(descriptor, 0)
                os.write(descriptor, _name_of_this_process().encode())
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise RunError(f"{path} is being written by {holder}; wait until it ends") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has just deleted it


def _flock(descriptor: int, *, wait: bool) -> None:
    """Lock a file.

    Raises:
        BlockingIOError: another holds the lock, and `wait` is not set.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _name_of_this_process() -> str:
    command = Path(sys.argv[0]).name if sys.argv[0] else "python"
    if command == "__main__.py":
        command = "msfp"
    words = " ".join([command, *sys.argv[1:2]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"`{words}` (process {os.getpid()} on {socket.gethostname()} since {since})"
