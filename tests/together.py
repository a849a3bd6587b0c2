"""Run something in several processes that know each other, as `accelerate launch` would start them.

They are copies of this process (fork), so that nothing is imported again.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from typer.testing import CliRunner

from msfp_cli.commands.app import app

TIMEOUT = 100  # seconds


@dataclass(frozen=True)
class Ended:
    """How one ended: its exit code, negative for a signal, what it wrote to stderr, when."""

    code: int
    says: str
    seconds: float


def run_together(work: Callable[[int], None], place: Path, count: int = 2) -> list[Ended]:
    """Run `work` with the number of its process in each of several, and wait until all have ended.

    Arguments:
        place: a directory for what they write to stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    children = [_fork(work, index, count, port, place / f"{index}.err") for index in range(count)]
    codes = dict[int, tuple[int, float]]()
    try:
        while len(codes) < count and time.monotonic() < begin + TIMEOUT:
            for child in children:
                if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                    passed = time.monotonic() - begin
                    codes[child] = (os.waitstatus_to_exitcode(ended[1]), passed)
            time.sleep(0.02)
    finally:
        for child in children:
            if child not in codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    assert len(codes) == count, "they do not end"
    return [
        Ended(codes[child][0], (place / f"{index}.err").read_text(), codes[child][1])
        for index, child in enumerate(children)
    ]


def _fork(work: Callable[[int], None], index: int, count: int, port: int, err: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", closefd=False)
        names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        for state in (PartialState, AcceleratorState, GradientState):
            state._reset_state()  # this process may have trained
        work(index)
        os._exit(0)
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(99)


def msfp_together(words: list[str], place: Path, count: int = 2) -> list[Ended]:
    """Run the command line in several processes."""

    def work(index: int) -> None:
        result = CliRunner().invoke(app, words, prog_name="msfp")
        os.write(2, result.stderr.encode())
        raise SystemExit(result.exit_code)

    return run_together(work, place, count)
