"""Processes that share work: who does what, what they tell each other, and how they end."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msfp_cli.processes import ALONE, LAUNCHED, LEFT_ALONE, LEFT_ALONE_WORDS, Processes, meeting
from together import Ended, run_together

PRICES = st.lists(st.integers(0, 100), max_size=30)


@dataclass(frozen=True)
class Finding:
    """What a process may find."""

    name: str
    value: float
    tensor: Tensor | None
    rest: list[Tensor]


@given(PRICES, st.integers(1, 5))
def test_parts_are_all_items_once_each_and_in_order(prices: list[int], count: int) -> None:
    items = list(enumerate(prices))
    parts = [Processes(index, count).part(items, lambda item: item[1]) for index in range(count)]
    assert sorted(sum(parts, [])) == items
    assert all(part == sorted(part) for part in parts)


@given(PRICES.filter(bool), st.integers(1, 5))
def test_no_part_is_dearer_than_another_by_more_than_one_item(
    prices: list[int], count: int
) -> None:
    items = list(enumerate(prices))
    parts = [Processes(index, count).part(items, lambda item: item[1]) for index in range(count)]
    sums = [sum(price for _, price in part) for part in parts]
    assert max(sums) - min(sums) <= max(prices)


def test_items_of_one_price_are_dealt_in_turn() -> None:
    assert [Processes(index, 3).part(range(7)) for index in range(3)] == [
        [0, 3, 6],
        [1, 4],
        [2, 5],
    ]


def test_a_process_that_is_alone_has_all_and_waits_for_nobody(tmp_path: Path) -> None:
    with meeting("cpu") as processes:
        assert processes == Processes() == ALONE
    assert ALONE.is_first and not Processes(1, 2).is_first
    ALONE.wait()
    ALONE.refuse_apart(tmp_path / "nowhere")
    assert ALONE.gather({"a": 1}, int) == {"a": 1}
    assert ALONE.of_first("a", str) == "a"


def test_all_get_what_each_has_found(tmp_path: Path) -> None:
    found = [
        Finding("b", float("inf"), None, [torch.arange(3), torch.tensor(0.1).bfloat16()]),
        Finding("a", 0.1 + 0.2, torch.eye(2).T[:, :1], []),
    ]

    def work(index: int) -> None:
        with meeting("cpu") as processes:
            assert processes == Processes(index, 2)
            everything = processes.gather({str(index): found[index]}, Finding)
            assert list(everything) == ["0", "1"]
            for ours, theirs in zip(everything.values(), found, strict=True):
                assert (ours.name, ours.value) == (theirs.name, theirs.value)
                assert (ours.tensor is None) == (theirs.tensor is None)
                pairs = zip([ours.tensor, *ours.rest], [theirs.tensor, *theirs.rest], strict=True)
                assert all(one is None or _is_same(one, other) for one, other in pairs)
            assert processes.of_first(index + 5, int) == 5
            assert processes.gather({} if index else {"a": {"b": 1}}, dict[str, int]) == {
                "a": {"b": 1}
            }
            with processes.first_goes_first():
                assert (tmp_path / "first").exists() == bool(index)
                (tmp_path / "first").touch()

    assert [ended.code for ended in run_together(work, tmp_path)] == [0, 0]


def _is_same(one: Tensor, other: Tensor | None) -> bool:
    assert other is not None
    return one.dtype == other.dtype and torch.equal(one, other)


def test_nobody_leaves_before_the_slowest(tmp_path: Path) -> None:
    def work(index: int) -> None:
        with meeting("cpu"):
            time.sleep(index)

    assert min(ended.seconds for ended in run_together(work, tmp_path, 3)) > 2


def ends_of(tmp_path: Path, dying: int, count: int) -> list[Ended]:
    """Let one process die while the others have long work to do."""

    def work(index: int) -> None:
        with meeting("cpu") as processes:
            processes.wait()  # one that dies while the others still connect is `commands`' matter
            if index == dying:
                time.sleep(1)  # until the others have left `wait`, too
                os.kill(os.getpid(), 9)
            time.sleep(60)

    return run_together(work, tmp_path, count)


@pytest.mark.parametrize(("dying", "count"), [(0, 2), (1, 2), (2, 3)])
def test_process_that_dies_ends_the_others_who_say_so_in_one_line(
    dying: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCHED, raising=False)
    ends = ends_of(tmp_path, dying, count)
    assert ends.pop(dying).code == -9
    for end in ends:
        assert (end.code, end.says) == (LEFT_ALONE, f"error: {LEFT_ALONE_WORDS}\n")
        assert end.seconds < 30


def test_those_that_msfp_has_launched_leave_the_word_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHED, "1")
    assert ends_of(tmp_path, 0, 2)[1].says == ""


def test_error_of_one_process_ends_the_others(tmp_path: Path) -> None:
    def work(index: int) -> None:
        with meeting("cpu") as processes, processes.first_goes_first():
            if index == 0:
                raise SystemExit(3)

    first, second = run_together(work, tmp_path)
    assert first.code == 3
    assert second.code in (LEFT_ALONE, 99)  # told of it, or waiting for it


def test_machines_that_do_not_share_the_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msfp_cli.processes._SECONDS_TO_SEE", 1)
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()

    def work(index: int) -> None:
        with meeting("cpu") as processes:
            processes.refuse_apart(tmp_path / "one")
            processes.refuse_apart(tmp_path / ("other" if index else "one"))

    ends = run_together(work, tmp_path)
    assert ends[0].code in (LEFT_ALONE, 99)
    assert "RunError" in ends[1].says
    assert "is not the directory that the first process writes to" in ends[1].says


LOSING_EACH_OTHER = """
from msfp_cli.__main__ import keep_torch_quiet
keep_torch_quiet()
import os, signal, time
from torch.distributed import DistNetworkError, TCPStore
there, here = os.pipe()
if os.fork() == 0:
    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    os.write(here, str(store.port).encode())
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
store = TCPStore("127.0.0.1", int(os.read(there, 9)), 2, False, wait_for_workers=False)
try:
    store.get("never")
except DistNetworkError:
    os._exit(3)
"""


@pytest.mark.parametrize("level", ["", "INFO"])
def test_torch_writes_no_log_of_its_own_unless_it_is_asked_to(level: str) -> None:
    environment = {name: text for name, text in os.environ.items() if "LOG_LEVEL" not in name}
    environment |= {"TORCH_CPP_LOG_LEVEL": level} if level else {}
    command = [sys.executable, "-c", LOSING_EACH_OTHER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert ("TCPStore" in done.stderr) == bool(level)
