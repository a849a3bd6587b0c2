"""Mutated exports and runs are refused or harmless; ``python -m tests.fuzz`` tries more of them."""

import json
import os
import pickle
import runpy
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fuzz import worker
from fuzz.mutations import SOURCE, Mutation, Payload
from fuzz.worker import READERS, Fuzzer, Write, attempts, bounded_time, in_child, outcome_of

MUTATION = Mutation(file="vae/config.json", words="value", signed=False, gone=False)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def bad_trials(fuzzer: Fuzzer, kind: str, count: int, seed: int) -> list[str]:
    trials = list(fuzzer.trials(kind, range(count), seed))
    assert len({trial.outcome for trial in trials}) > 1
    return [str(trial) for trial in trials if trial.is_bad()]


@pytest.mark.parametrize("kind", READERS)
def test_no_mutation_crashes_hangs_runs_code_or_gets_through(fuzzer: Fuzzer, kind: str) -> None:
    assert bad_trials(fuzzer, kind, 15, seed=0) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", READERS)
def test_many_mutations(fuzzer: Fuzzer, kind: str) -> None:
    assert bad_trials(fuzzer, kind, 60, seed=1) == []


def unpickle(directory: Path) -> str:
    """Read as a careless loader would."""
    return str(pickle.loads((directory / "model.bin").read_bytes()))


def unpickle_with_torch(directory: Path) -> str:
    return str(torch.load(directory / "model.ckpt", weights_only=False))


def run_python(directory: Path) -> str:
    return str(runpy.run_path(str(directory / "canary.py")))


def start_a_process(directory: Path) -> str:
    return str(os.system("true"))


def read_safely(directory: Path) -> str:
    return str((directory / "model.bin").read_bytes())


@pytest.mark.parametrize(
    ("reader", "outcome"),
    [
        (unpickle, "code"),
        (unpickle_with_torch, "code"),
        (run_python, "code"),
        (start_a_process, "code"),
        (read_safely, "different"),
    ],
)
def test_code_that_a_reader_runs_is_seen(
    tmp_path: Path, reader: Callable[[Path], str], outcome: str
) -> None:
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Payload()))
    torch.save(Payload(), tmp_path / "model.ckpt")
    (tmp_path / "canary.py").write_text(SOURCE)
    answer = in_child(lambda write: write(outcome_of(reader, tmp_path, "")))
    assert answer.words.removeprefix("\x1e").split()[0] == outcome


def run_everything(directory: Path) -> str:
    """Run whatever code a mutation has put there."""
    for path in directory.rglob("*"):
        if path.suffix in (".bin", ".ckpt"):
            torch.load(path, weights_only=False)
        elif path.name == "canary.py":
            runpy.run_path(str(path))
    return ""


def test_mutations_put_code_where_a_careless_reader_runs_it(
    fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READERS, "export", {"careless": run_everything})
    trials = [t for t in fuzzer.trials("export", range(50), seed=0) if t.is_bad()]
    assert {trial.outcome for trial in trials} == {"code"}
    assert {trial.mutation.words.split()[0] for trial in trials} == {"code", "pickle"}


def compute() -> None:
    while True:
        pass


def wait() -> None:
    time.sleep(60)


def run_out_of_memory() -> None:
    os.write(2, b"memory allocation of 8000000000 bytes failed")
    os.abort()


@pytest.mark.parametrize(
    ("death", "ours", "stock"),
    [
        (compute, "hang", "bound"),
        (wait, "hang", "hang"),
        (run_out_of_memory, "crash", "bound"),
        (os.abort, "crash", "crash"),
    ],
)
@pytest.mark.parametrize("reader", ["MSFPPipeline", "DiffusionPipeline"])
def test_trial_that_ends_its_process_is_bad_unless_diffusers_asked_for_too_much(
    reader: str, death: Callable[[], None], ours: str, stock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CPU_SECONDS", 0.1)
    monkeypatch.setattr(worker, "SECONDS", 1)

    def work(tasks: list[tuple[int, str]], write: Write) -> None:
        for number, _ in tasks:
            write(json.dumps(asdict(MUTATION)))
            with bounded_time():
                if number == 1:
                    death()
            write("equal")

    trials = list(attempts([(number, reader) for number in range(3)], work))
    outcome = ours if reader == "MSFPPipeline" else stock
    assert [trial.outcome for trial in trials] == ["equal", outcome, "equal"]
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert trials[1].is_bad() == (outcome != "bound")


def test_process_that_ends_between_two_trials_is_not_taken_for_either() -> None:
    def work(tasks: list[tuple[int, str]], write: Write) -> None:
        for number, _ in tasks:
            if number == 1 and len(tasks) > 2:
                os._exit(1)
            write(json.dumps(asdict(MUTATION)))
            write("equal")

    trials = list(attempts([(number, "MSFPPipeline") for number in range(3)], work))
    assert [(trial.number, trial.outcome) for trial in trials] == [(n, "equal") for n in range(3)]


@pytest.mark.parametrize(
    ("reader", "changes", "is_bad"),
    [
        ("MSFPPipeline", {}, True),
        ("MSFPPipeline", {"gone": True}, True),
        ("MSFPPipeline", {"signed": True}, False),
        ("DiffusionPipeline", {}, False),
        ("DiffusionPipeline", {"file": "unet/config.json"}, True),
        ("Recording", {}, True),
        ("Recording", {"gone": True}, False),
    ],
)
def test_damage_that_nobody_notices_is_bad_where_it_is_covered(
    reader: str, changes: dict[str, object], is_bad: bool
) -> None:
    mutation = Mutation(**{**asdict(MUTATION), **changes})
    assert worker.Trial(0, mutation, reader, "different", "").is_bad() == is_bad
