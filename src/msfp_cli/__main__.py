"""``python -m msfp_cli`` and the console script ``msfp``."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    open_missing_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, _stop_before_the_start)
    let_threads_sleep()
    keep_torch_quiet()
    from msfp_cli.commands.app import app  # takes long enough for an impatient user

    try:
        app(prog_name="msfp")
    except OSError as error:  # help, version and completion are no commands of ours
        from msfp_cli.commands.console import explain_outside, is_debugging, say_error

        if is_debugging():
            raise
        say_error(explain_outside(error))
        sys.exit(1)


def _stop_before_the_start(number: int, frame: FrameType | None) -> None:
    """Say what Ctrl-C did while no command has begun."""
    sys.stderr.write("error: stopped before anything was done\n")
    sys.stderr.flush()
    os._exit(1)


def open_missing_streams() -> None:
    """Let the standard streams that a daemon has closed lead nowhere.

    The next files that are opened would get their numbers, a lock or half-written weights among
    them, and take whatever libraries and processes that are started read and print there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def let_threads_sleep() -> None:
    """Let torch's threads sleep while they wait for each other, unless the user chose otherwise.

    By default a thread that waits spins in a busy loop. Beside another busy process it then takes
    the core that the thread it waits for needs, and everything takes several times longer. OpenMP
    reads the variable when torch is imported, which no command has done yet; processes that a
    command starts inherit it. A program that imports msfp as a library keeps its own settings.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def keep_torch_quiet() -> None:
    """Let torch's own log, which goes past Python, tell errors only, unless the user wants more.

    Where one of several processes is killed while another reads from it, torch writes a page of
    addresses beside the one line that says so. It reads the variable when it is imported.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    main()
