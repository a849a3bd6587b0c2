"""Run commands where nothing, or only a little, can be written, and again when they may.

``python -m tests.troubles`` does so with each command of the chain on a tiny pipeline: on a disk
that is full or has a quota, with a limit on the size of files, in a read-only place, and without
rights. The command has to end in one line, and to lose nothing; the same command then has to leave
what it leaves without the trouble, byte for byte. It prints one line for each command.
"""

import argparse
import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

from kills import Harness  # noqa: E402

_CAPABILITIES = 0x20080522  # the version of `capset`'s layout, see capset(2)


def limit_file_size(limit: int) -> None:
    """Let this process write no file of more bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def drop_rights() -> None:
    """Make this process heed the modes of files and directories, even if it belongs to root."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


def fail_at(number: int, code: int) -> None:
    """Let a step of writing fail, and all after it: new names and flushed content, in order."""
    count = iter(range(1_000_000))

    def failing(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **options: object) -> object:
            if next(count) >= number:
                named = [] if isinstance(arguments[0], int) else [str(arguments[0])]
                raise OSError(code, os.strerror(code), *named)
            return function(*arguments, **options)

        return wrapper

    for name in ("mkdir", "rename", "replace", "fsync"):
        setattr(os, name, failing(getattr(os, name)))


@contextmanager
def locked_up(run: Path) -> Iterator[None]:
    """Take away the right to write into a run's directories, and give it back."""
    directories = [run, *(path for path in run.rglob("*") if path.is_dir())]
    modes = [path.stat().st_mode for path in directories]
    for path in directories:
        path.chmod(0o555)
    yield
    for path, mode in zip(directories, modes, strict=True):
        if path.exists():  # an empty run is deleted
            path.chmod(mode)


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """Yield a directory on a disk of a few bytes.

    Raises:
        PermissionError: this process may not mount one.
    """
    with tempfile.TemporaryDirectory() as place:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "msfp-test", place]
        if subprocess.run(command, capture_output=True).returncode:
            raise PermissionError
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


def remount(place: Path, option: str) -> None:
    """Make a mounted disk ``ro``, ``rw``, or another size."""
    subprocess.run(["mount", "-o", f"remount,{option}", "msfp-test", str(place)], check=True)


Trouble = Callable[[Harness], str | None]


def _armed(arm: Callable[[], None], harness: Harness) -> str | None:
    return harness.trouble(arm)


def _without_rights(harness: Harness) -> str | None:
    return harness.trouble(drop_rights, locked_up)


TROUBLES: dict[str, Trouble] = {
    "files of at most 0 bytes": partial(_armed, partial(limit_file_size, 0)),
    "files of at most 20,000 bytes": partial(_armed, partial(limit_file_size, 20_000)),
    "a full disk": partial(_armed, partial(fail_at, 1, errno.ENOSPC)),
    "a quota": partial(_armed, partial(fail_at, 5, errno.EDQUOT)),
    "a read-only place": partial(_armed, partial(fail_at, 0, errno.EROFS)),
    "no rights": _without_rights,
}


def on_small_disk(titles: Sequence[str] | None = None) -> Iterator[str]:
    """Run commands on a real disk that is full, and then read-only; yield what is wrong.

    Raises:
        PermissionError: this process may not mount one.
    """
    with small_disk(64 << 20) as place:
        harness = Harness(place)
        for title in harness.commands if titles is None else titles:
            harness.begin(title)
            for trouble in (_filled, _read_only):
                outcome = harness.trouble(lambda: None, partial(trouble, place))
                if outcome is not None:
                    yield outcome and f"{title}, {trouble.__name__}: {outcome}"
            harness.end()


@contextmanager
def _filled(place: Path, run: Path) -> Iterator[None]:
    """Fill the disk, and empty it again."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    yield
    ballast.unlink()


@contextmanager
def _read_only(place: Path, run: Path) -> Iterator[None]:
    remount(place, "ro")
    yield
    remount(place, "rw")


def main() -> int:
    """Print how many troubles ended well for each command; return 1 if any did not."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    outcomes = list[str]()
    with tempfile.TemporaryDirectory() as place:
        harness = Harness(Path(place))
        for title in harness.commands:
            harness.begin(title)
            for name, trouble in TROUBLES.items():
                outcome = trouble(harness)
                if outcome is not None:
                    outcomes.append(outcome and f"{title}, {name}: {outcome}")
            harness.end()
    try:
        outcomes += on_small_disk()
    except PermissionError:
        print("no small disk could be mounted")
    print(*filter(None, outcomes), sep="\n")
    print(f"{outcomes.count('')} of {len(outcomes)} troubles ended in one line, and then well")
    return int(any(outcomes))


if __name__ == "__main__":
    sys.exit(main())
