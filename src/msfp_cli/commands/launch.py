"""Run a command in several processes of this machine that share its work.

`torch.distributed.run` starts processes, too, and an own launcher is kept for three reasons. A
polite kill (SIGTERM, SIGHUP) is passed on and waited for, so that each saves its work; torch's
launcher kills after a fixed time. The first process alone writes to the terminal, and an error that
several meet is shown once. On a CPU the cores are divided between the processes. `accelerate
launch` and torchrun work as well: whoever sets ``WORLD_SIZE`` has already started the processes.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.errors import UsageError
from msfp_cli.files.lock import inherited
from msfp_cli.processes import LAUNCHED, LEFT_ALONE
from msfp_cli.progress import SILENT, Progress

ProcessesOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Local processes that share the work. Each holds the model. Default: 1.",
        show_default=False,
    ),
]
_LAUNCH_WELL = (
    "unset WORLD_SIZE and RANK, or start the processes with `accelerate launch -m msfp_cli`"
)
_GRACE_SECONDS = 5
_THREADS = "OMP_NUM_THREADS"


def is_main() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def progress() -> Progress:
    """Return what shows progress: bars in the process that speaks for all, nothing elsewhere."""
    return console.ConsoleProgress() if is_main() else SILENT


def share_out(num_processes: int, lock: AbstractContextManager[None]) -> None:
    """Run this command line in several processes if several are requested, and exit as they do.

    Arguments:
        lock: held while they run, and by them until the last is gone.

    Raises:
        UsageError: the environment tells of several processes, but not how they meet.
    """
    _refuse_half_launched()
    if num_processes > 1 and "WORLD_SIZE" in os.environ:
        _say_launched(num_processes)
    elif num_processes > 1:
        with lock:
            code = _launch(num_processes)
        raise typer.Exit(code)


def _say_launched(num_processes: int) -> None:
    """Say that other processes than were asked for do the work, which somebody has started."""
    count = int(os.environ["WORLD_SIZE"])
    if count != num_processes and is_main():
        console.note(
            f"note: --num-processes {num_processes} starts none, as WORLD_SIZE={count} says that "
            "all processes were started already; unset WORLD_SIZE and RANK to have msfp start them"
        )


def _refuse_half_launched() -> None:
    """Refuse variables of a launcher that a cluster or a container has set only in part.

    Raises:
        UsageError: a number is none, or it is not said where several processes meet.
    """
    for name in ("WORLD_SIZE", "RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise UsageError(f"{name}={os.environ[name]!r} is not a number; {_LAUNCH_WELL}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" not in os.environ:
        raise UsageError(
            "WORLD_SIZE says that several processes were started, but MASTER_ADDR does not say "
            f"where they meet; {_LAUNCH_WELL}"
        )


def end_with_launcher() -> None:
    """Exit when the msfp process that started this one is gone, even if it was killed."""
    if LAUNCHED in os.environ:
        threading.Thread(target=_wait_for_the_end_of_input, daemon=True).start()


def _wait_for_the_end_of_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def processes_for(calls: int, device: str | None) -> int:
    """Return how many processes had best share so many calls of a denoiser.

    On a CPU as many as have a core each and equal shares: two processes of one thread do far more
    than one of two, whose threads wait for each other at every layer. On an accelerator one, and so
    for who has chosen the threads.
    """
    from msfp_cli.pipelines.loading import choose_device

    if "WORLD_SIZE" in os.environ or _THREADS in os.environ or choose_device(device) != "cpu":
        return 1
    return max(
        count for count in range(1, calls + 1) if calls % count == 0 and count <= max(1, _cores())
    )


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launch(num_processes: int) -> int:
    """Run this command line in several processes that know each other; return the exit code.

    Only the first process writes to the terminal. What the others wrote to stderr is shown if the
    first one ended well, was killed, or failed only because another process was gone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared: dict[str, object] = {
        "WORLD_SIZE": num_processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    threads = os.environ.get(_THREADS, max(1, _cores() // num_processes))
    command = [sys.executable, *_safe_path(), "-m", "msfp_cli", *sys.argv[1:]]
    # The processes hear of Ctrl-C themselves. Their input ends when this process does: nobody else
    # holds `_held`.
    listening, held = os.pipe()
    with (
        open(listening) as given,
        open(held, "w") as _held,
        tempfile.TemporaryFile() as aside,
        console.stop_on_interrupt(),
    ):
        processes: list[subprocess.Popen[bytes]] = []
        for number in console.POLITE:
            _pass_on(number, processes)
        variables, descriptors = inherited()
        shared |= variables
        for rank in range(num_processes):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank, _THREADS: threads, LAUNCHED: 1}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            out, err = (subprocess.DEVNULL, aside) if rank else (None, None)
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=given,
                    stdout=out,
                    stderr=err,
                    pass_fds=descriptors,
                )
            )
        codes = _wait_for_all(processes)
        if any(codes) and codes[0] in (0, -signal.SIGKILL, LEFT_ALONE):
            aside.seek(0)
            sys.stderr.write(aside.read().decode(errors="replace"))
    failed = [code for code in codes if code > 0 and code != LEFT_ALONE]
    if {-number for number in console.POLITE} & set(codes):
        console.say_error(console.STOPPED)
    elif any(codes) and not failed:
        console.say_error(
            "a process was killed, probably because memory ran out; --num-processes 1 needs less"
        )
    return next(iter(failed), int(any(codes)))


def _safe_path() -> list[str]:
    """Return what keeps Python from looking for modules where the user works, if it does not here.

    `python -m` does, unlike the console script, and a ``random.py`` there would be taken for
    Python's own.
    """
    if sys.flags.isolated:
        return ["-I"]
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]


def _pass_on(number: int, processes: list[subprocess.Popen[bytes]]) -> None:
    """Let processes hear of a signal that this one gets, unless it is ignored, as by `nohup`."""
    if signal.getsignal(number) is signal.SIG_IGN:
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    signal.signal(number, pass_on)


def _wait_for_all(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all processes; if one fails, kill the rest after a grace period.

    They would wait for it forever.
    """
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(_GRACE_SECONDS)
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in processes]
