import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from msfp_cli.errors import RunError
from msfp_cli.files.lock import inherited, only_writer, remove_stale

HOLD = """
import sys
from pathlib import Path
from msfp_cli.files.lock import only_writer
with only_writer(Path("run"), Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_second_process_says_who_holds_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holder(lock) as process:
        message = rf"^run is being written by .*process {process.pid} on .*; wait until it ends$"
        with pytest.raises(RunError, match=message), only_writer(Path("run"), lock):
            pytest.fail("two writers")
    assert not lock.exists()
    with only_writer(Path("run"), lock):
        assert lock.exists()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holder(lock) as process:
        process.send_signal(signal.SIGKILL)
    assert lock.exists()
    with only_writer(Path("run"), lock):
        assert f"process {os.getpid()} on" in lock.read_text()
    assert not lock.exists()


def test_lock_of_a_killed_process_is_deleted_and_a_held_one_stays(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holder(lock) as process:
        remove_stale(lock)
        assert lock.exists()
        process.send_signal(signal.SIGKILL)
    remove_stale(lock)
    assert not lock.exists()
    remove_stale(lock)


def test_thread_may_enter_its_lock_again_and_another_may_not(tmp_path: Path) -> None:
    def enter() -> None:
        with only_writer(tmp_path, tmp_path / "lock"):
            pass

    with only_writer(tmp_path, tmp_path / "lock"), ThreadPoolExecutor(1) as other:
        enter()
        assert (tmp_path / "lock").exists()
        with pytest.raises(RunError, match="is being written by"):
            other.submit(enter).result()


def test_child_shares_the_lock_and_keeps_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with only_writer(Path("run"), lock):
        variables, descriptors = inherited()
        child = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            pass_fds=descriptors,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
    child.communicate()
    assert child.returncode == 0


def test_first_of_several_processes_holds_it_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with only_writer(tmp_path, tmp_path / "lock"):
        assert not (tmp_path / "lock").exists()
