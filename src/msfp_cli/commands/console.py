"""The only printer and the only error boundary: results on stdout, everything else on stderr."""

import errno
import functools
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from msfp_cli.errors import MsfpError, RunError
from msfp_cli.processes import LAUNCHED, LEFT_ALONE, LEFT_ALONE_WORDS
from msfp_cli.progress import Advance
from msfp_cli.run import Run

_DEBUG = "MSFP_DEBUG"
STOPPED = "stopped; what was finished is kept, run the same command to go on"
# gloo and NCCL have no exception of their own for a process that is gone, only these words.
_GONE = re.compile("Connection (closed|reset) by peer|remote process exited")
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
# What torch says on an accelerator and on a CPU, and the library of C++ says.
_NO_MEMORY = re.compile("out of memory|not enough memory|allocate memory|bad_alloc")
_NO_THREAD = "can't start new thread"
# What the system refuses whatever the path is, by its number.
_LIMITS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command to go on",
    errno.ENOMEM: "out of memory; give a smaller --batch-size or smaller pictures, or calibrate "
    "with --max-memory",
    errno.EMFILE: "too many open files; raise their limit, as with `ulimit -n 4096`, and run the "
    "same command to go on",
    errno.EAGAIN: "no more threads or processes may be started; raise their limit, as with "
    "`ulimit -u`, or end others, and run the same command to go on",
}
# A polite kill, and what a terminal sends that is closed; Windows does not have the latter.
POLITE = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_STOPPING = (signal.SIGINT, *POLITE)
F = TypeVar("F", bound=Callable[..., Any])


def stderr() -> Console:
    """Return a console on today's stderr (tests replace it)."""
    return Console(stderr=True, soft_wrap=True)


def result(text: str, data: dict[str, Any], *, as_json: bool) -> None:
    """Print a command's result on stdout, as text or as JSON.

    Raises:
        RunError: stdout cannot be written, other than because nobody reads it any more.
    """
    try:
        typer.echo(json.dumps(data, indent=1) if as_json else text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(_unwritten(error)) from None


def _unwritten(error: OSError) -> str:
    """Say that stdout cannot be written, and let what is left of it lead nowhere.

    Python would try once more as it ends.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return (
        f"standard output cannot be written ({error.strerror}); send it elsewhere, "
        "what was finished is kept"
    )


def note(text: str) -> None:
    """Print a hint on stderr."""
    stderr().print(Text(text))


def say_error(text: str) -> None:
    """Print what went wrong on stderr."""
    stderr().print(Text.assemble(("error: ", "bold red"), text))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stderr; the first column is left-aligned, the rest right."""
    built = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        built.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        built.add_row(*row)
    stderr().print(built)


def quiet_libraries() -> None:
    """Silence the notices and bars of diffusers and transformers; msfp has its own progress."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)


class ConsoleProgress:
    """Progress bars with totals and time left; no bars where stderr is no terminal."""

    def __init__(self) -> None:
        self._console = stderr()

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Show one bar while the context is open."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),  # leaves room for a note on a terminal of 80 columns
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=self._console, disable=not self._console.is_terminal) as bars:
            task = bars.add_task(description, total=total, note="")

            def advance(steps: int, note: str = "") -> None:
                if note:
                    bars.update(task, advance=steps, note=note)
                else:
                    bars.update(task, advance=steps)

            yield advance

    def log(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(Text(line))


def guarded(command: F) -> F:
    """Turn what goes wrong in a command into one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (any command)
        try:
            _refuse_lost_directory()
            return command(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):  # whoever reads has enough: typer ends quietly
            raise
        except (Exception, KeyboardInterrupt) as error:
            if is_debugging():
                raise
            if "WORLD_SIZE" in os.environ and _GONE.search(str(error)):
                if LAUNCHED not in os.environ:  # else the launcher shows what that one said
                    say_error(LEFT_ALONE_WORDS)
                raise typer.Exit(LEFT_ALONE) from None
            message, code = _explain(error)
            run = kwargs.get("run")
            say_error(run.in_commands(message) if isinstance(run, Run) else message)
            raise typer.Exit(code) from None

    return wrapper  # type: ignore[return-value]


def _refuse_lost_directory() -> None:
    """Refuse to begin in a working directory that was deleted; torch would end the process.

    Raises:
        RunError: it was.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise RunError("the working directory was deleted; change to one that exists") from None


def hear_interrupts() -> None:
    """Let Ctrl-C interrupt the command, which then says so, unless it is ignored."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the user asked to stop.

    That is by Ctrl-C, by a polite kill, or by closing the terminal.

    The first time it is only remembered, so that work in hand can be finished and saved; the second
    time it interrupts, except where other processes take part, who pass such signals on and would
    send several. A signal that is ignored stays so: a shell starts what goes on behind it that way.
    """
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if asked and "WORLD_SIZE" not in os.environ:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may listen to signals
        return
    heard = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, remember) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_tracebacks() -> None:
    """Let errors through with their traceback, in this process and in those it starts."""
    os.environ[_DEBUG] = "1"


def is_debugging() -> bool:
    """Whether errors are shown with their traceback."""
    return bool(os.environ.get(_DEBUG))


def _errno_of(error: BaseException) -> int | None:
    """Return the system's number for an error; safetensors has it in its text."""
    text = _SYSTEM_ERROR.search(str(error))
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return int(text[1]) if isinstance(error, SafetensorError) and text else None


def _explain_errno(number: int, error: BaseException) -> str:
    """Return one line for an error of the system; a library may have its own words for it."""
    if number in _LIMITS:
        return _LIMITS[number]
    filename = getattr(error, "filename", None)
    place = "" if filename is None else f"{filename}: "
    return (
        f"{place}{getattr(error, 'strerror', None) or os.strerror(number)}; check the path, its "
        "disk and your rights to it, and run the same command to go on"
    )


def explain_outside(error: OSError) -> str:
    """Return one line for an error outside of a command: of stdout, unless it names a file."""
    return _unwritten(error) if error.filename is None else _explain(error)[0]


def _explain(error: BaseException) -> tuple[str, int]:
    """Return one line for an error, and its exit code."""
    if isinstance(error, MsfpError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, 1
    number = _errno_of(error)
    if number is not None:
        return _explain_errno(number, error), 1
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return _LIMITS[errno.ENOMEM], 1
    if _NO_THREAD in str(error):
        return _LIMITS[errno.EAGAIN], 1
    first = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, OSError):  # a library's own, without the system's number
        return (
            f"{first.rstrip('.')}; check the path and its files, and run the same command again",
            1,
        )
    advice = "run `msfp --debug ...` for the traceback, and please report it"
    return f"{type(error).__name__}: {first} ({advice})", 1
