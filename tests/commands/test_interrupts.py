"""Ctrl-C is answered in one line from the first moment on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msfp_cli.commands.console import stop_on_interrupt

# Presses Ctrl-C when a module is about to be imported.
PRESS = """
import os, signal, sys

class Press:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, {handler})
sys.meta_path.insert(0, Press())
sys.argv = ["msfp", *{command!r}.split()]
from msfp_cli.__main__ import main
main()
"""
HEARD = "signal.default_int_handler"
BEFORE = "error: stopped before anything was done"
LATER = "error: stopped; what was finished is kept, run the same command to go on"


def press(module: str, command: str, place: Path, handler: str = HEARD) -> tuple[int, list[str]]:
    """Return the exit code of a command that was interrupted, and what it said."""
    code = PRESS.format(module=module, command=command, handler=handler)
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("module", "command", "line"),
    [
        ("typer", "finetune", BEFORE),
        ("msfp_cli.commands.app", "finetune", BEFORE),
        ("msfp_cli.commands.app", "calibrate", BEFORE),
        ("torch", "finetune", LATER),
        ("torch", "export", LATER),
        ("torch", "calibrate", LATER),
    ],
)
def test_command_that_is_interrupted_at_once_says_so(
    module: str, command: str, line: str, tmp_path: Path
) -> None:
    assert press(module, command, tmp_path) == (1, [line])


def test_command_that_ignores_interrupts_goes_on(tmp_path: Path) -> None:
    code, lines = press("torch", "export", tmp_path, "signal.SIG_IGN")
    assert code == 1
    assert lines[0].startswith("error: no run directory msfp-run here")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_work_that_ignores_a_signal_goes_on(number: signal.Signals) -> None:
    """So a shell starts what it lets go on in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_interrupt() as is_asked:
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert not is_asked()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
