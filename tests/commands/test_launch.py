"""Several processes run one command line: what they are told, and what is heard of them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import typer

from msfp_cli.commands import launch
from msfp_cli.commands.console import STOPPED, guarded
from msfp_cli.errors import UsageError
from msfp_cli.processes import LAUNCHED, LEFT_ALONE, LEFT_ALONE_WORDS

Script = Callable[[str], int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a function that launches a shell script as two processes and returns the exit code."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 1)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "argv", ["msfp", "evaluate", "--num-processes", "2", "--out", "a b"])

    def launch_two(script: str) -> int:
        (tmp_path / "python").write_text(f"#!/bin/sh\ncd '{tmp_path}'\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        with pytest.raises(typer.Exit) as ended:
            launch.share_out(2, nullcontext())
        return ended.value.exit_code

    return launch_two


def test_processes_know_of_each_other_and_run_the_same_command_line(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    names = "$WORLD_SIZE $RANK $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS"
    assert run(f'echo "$# $*" > command$RANK; echo "{names}" > told$RANK') == 0
    first, second = ((tmp_path / f"told{rank}").read_text().split() for rank in range(2))
    assert first[:4] == ["2", "0", "0", "127.0.0.1"] and second[:4] == ["2", "1", "1", "127.0.0.1"]
    assert (
        first[4:] == second[4:]
        and int(first[4]) > 1023
        and first[5] == os.environ["OMP_NUM_THREADS"]
    )
    for rank in range(2):
        assert (
            tmp_path / f"command{rank}"
        ).read_text() == "7 -m msfp_cli evaluate --num-processes 2 --out a b\n"


@pytest.mark.parametrize("is_there", [True, False])
def test_processes_look_for_modules_where_this_one_does(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """A file of the user's, called random.py say, is not taken for Python's own."""
    here = os.getcwd()
    others = [place for place in sys.path if place not in ("", here)]
    monkeypatch.setattr(sys, "path", [here, *others] if is_there else others)
    assert run('echo "$1" > first$RANK') == 0
    for rank in range(2):
        assert (tmp_path / f"first{rank}").read_text() == ("-m\n" if is_there else "-P\n")


def test_the_first_process_speaks_for_all(run: Script, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("echo result $RANK; echo note $RANK >&2") == 0
    assert capfd.readouterr() == ("result 0\n", "note 0\n")


def test_error_that_all_meet_is_said_once(run: Script, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("echo error $RANK >&2; exit 2") == 2
    assert capfd.readouterr() == ("", "error 0\n")


@pytest.mark.parametrize("other", ["exit 0", "exec sleep 100"], ids=["ends", "waits"])
def test_error_of_the_second_process_is_heard(
    other: str, run: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(f"if [ $RANK = 1 ]; then echo error 1 >&2; exit 3; fi; {other}") == 3
    assert capfd.readouterr() == ("", "error 1\n")


def test_process_that_waits_for_one_that_failed_is_taken_along(
    run: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("echo error $RANK >&2; [ $RANK = 0 ] && exit 2; exec sleep 100") == 2
    assert capfd.readouterr() == ("", "error 0\n")


@pytest.mark.parametrize(
    "other", ["exit 0", "exec sleep 100", f"exit {LEFT_ALONE}"], ids=["ends", "waits", "notices"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_is_killed_is_a_failure_that_is_explained(
    rank: int, other: str, run: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(f"[ $RANK = {rank} ] && kill -9 $$; {other}") == 1
    reason = "a process was killed, probably because memory ran out"
    line = f"error: {reason}; --num-processes 1 needs less\n"
    assert capfd.readouterr() == ("", line)


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_failed_first_says_why(
    rank: int, run: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(f"if [ $RANK = {rank} ]; then echo error {rank} >&2; exit 2; fi; exit {LEFT_ALONE}")
        == 2
    )
    assert capfd.readouterr() == ("", f"error {rank}\n")


@pytest.mark.parametrize(
    ("size", "launched", "code", "line"),
    [
        (None, None, 1, "RuntimeError: [/gloo/transport"),
        ("2", "1", LEFT_ALONE, ""),
        ("2", None, LEFT_ALONE, LEFT_ALONE_WORDS),
    ],
    ids=["alone", "launched by msfp", "launched by accelerate"],
)
def test_process_that_loses_the_other_leaves_the_word_to_it(
    size: str | None,
    launched: str | None,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lose() -> None:
        raise RuntimeError(
            "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2. Good luck!"
        )

    for name, value in (("WORLD_SIZE", size), (LAUNCHED, launched)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises(typer.Exit) as ended:
        guarded(lose)()
    says = capsys.readouterr().err
    assert (ended.value.exit_code, bool(says)) == (code, bool(line))
    assert says.startswith(f"error: {line}" if line else "") and says.count("\n") == bool(line)


def test_polite_kill_of_the_launcher_is_heard_by_all(tmp_path: Path) -> None:
    script = f"#!/bin/sh\ncd '{tmp_path}'\ntrap 'touch saved$RANK; exit 1' TERM\ntouch began$RANK\n"
    (tmp_path / "python").write_text(f"{script}while true; do sleep 0.1; done\n")
    (tmp_path / "python").chmod(0o755)
    launcher = subprocess.Popen(
        [sys.executable, "-c", launching(tmp_path)], env=outside(), stdin=subprocess.DEVNULL
    )
    wait_for(tmp_path, "began")
    launcher.terminate()
    wait_for(tmp_path, "saved")
    assert launcher.wait(20) == 1


def test_processes_that_end_by_a_polite_kill_were_stopped(
    run: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("kill $$; exec sleep 100") == 1
    assert capfd.readouterr() == ("", f"error: {STOPPED}\n")


@pytest.mark.parametrize(("launched", "ends"), [("1", True), (None, False)])
def test_launched_process_ends_when_its_input_does(launched: str | None, ends: bool) -> None:
    begin = "from msfp_cli.commands.launch import end_with_launcher as begin; begin()"
    code = f"import time; {begin}; print(flush=True)"
    code += "; time.sleep(60)"
    environment = {**os.environ, "MSFP_LAUNCHED": launched} if launched else dict(os.environ)
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        process.stdin.close()
        if ends:
            assert process.wait(20) == 1
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.kill()


def test_input_of_launched_processes_ends_when_the_launcher_is_killed(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(
        f"#!/bin/sh\ncd '{tmp_path}'\ntouch began$RANK\ncat\ntouch ended$RANK\n"
    )
    (tmp_path / "python").chmod(0o755)
    launcher = subprocess.Popen(
        [sys.executable, "-c", launching(tmp_path)], env=outside(), stdin=subprocess.DEVNULL
    )
    wait_for(tmp_path, "began")
    assert not list(tmp_path.glob("ended*"))
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path, "ended")


def launching(directory: Path) -> str:
    """Return a program that runs a script of this directory as two processes."""
    return (
        "import contextlib, sys\n"
        "import typer\n"
        "from msfp_cli.commands.app import launch\n"
        f"sys.executable = '{directory}/python'\n"
        "try:\n"
        "    launch.share_out(2, contextlib.nullcontext())\n"
        "except typer.Exit as ended:\n"
        "    sys.exit(ended.exit_code)\n"
    )


def outside() -> dict[str, str]:
    """Return the environment of a process that no other has launched."""
    return {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}


def wait_for(directory: Path, what: str) -> None:
    """Wait until both processes have said so."""
    for _ in range(300):
        if len(list(directory.glob(f"{what}*"))) == 2:
            return
        time.sleep(0.1)
    pytest.fail(f"not {what}")


@pytest.mark.parametrize(("num_processes", "inside"), [(1, False), (1, True), (2, True)])
def test_one_process_and_those_that_were_launched_do_the_work(
    num_processes: int, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_launch", lambda count: pytest.fail("launched"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if inside:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    launch.share_out(num_processes, nullcontext())


@pytest.mark.parametrize(
    ("size", "rank", "is_said"),
    [("1", None, True), ("3", "0", True), ("3", "1", False), ("2", "0", False)],
)
def test_processes_that_are_not_started_are_said_once(
    size: str,
    rank: str | None,
    is_said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched: list[int] = []
    monkeypatch.setattr(launch, "_launch", lambda count: launched.append(count) or 0)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", size)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    launch.share_out(1, nullcontext())
    assert capsys.readouterr().err == ""
    launch.share_out(2, nullcontext())
    line = capsys.readouterr().err
    assert line.startswith(f"note: --num-processes 2 starts none, as WORLD_SIZE={size}") == is_said
    assert bool(line) == is_said
    monkeypatch.delenv("WORLD_SIZE")  # as it says
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(typer.Exit):
        launch.share_out(2, nullcontext())
    assert launched == [2]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, "^WORLD_SIZE='' is not a number; unset WORLD_SIZE and RANK, or start"),
        ({"RANK": "first"}, "^RANK='first' is not a number; unset"),
        (
            {"WORLD_SIZE": "2"},
            "MASTER_ADDR does not say where they meet; unset WORLD_SIZE and RANK",
        ),
    ],
    ids=str,
)
def test_variables_that_a_cluster_has_set_in_part_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    launch.share_out(1, nullcontext())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launch.share_out(1, nullcontext())


@pytest.mark.parametrize(
    ("calls", "cores", "count"),
    [
        (1, 8, 1),
        (2, 1, 1),
        (2, 2, 2),
        (2, 16, 2),
        (4, 2, 2),
        (4, 3, 2),
        (4, 4, 4),
        (6, 4, 3),
        (5, 4, 1),
    ],
)
def test_on_a_cpu_as_many_processes_share_the_calls_as_have_a_core_and_equal_shares(
    calls: int, cores: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch.processes_for(calls, "cpu") == count
    monkeypatch.setattr("msfp_cli.pipelines.loading.choose_device", lambda device: "cuda")
    assert launch.processes_for(calls, None) == 1


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "WORLD_SIZE"])
def test_one_process_where_somebody_has_shared_the_machine_out(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_cores", lambda: 4)
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "2")
    assert launch.processes_for(4, "cpu") == 1


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= launch._cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_main_process_is_the_first(
    rank: str | None, speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert launch.is_main() == speaks
