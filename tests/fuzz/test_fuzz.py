"""Mutated exports and runs are refused or harmless; ``python -m tests.fuzz`` tries more of them."""

import os
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuzz.mutations import SOURCE, Payload
from fuzz.worker import READERS, Fuzzer, in_child, outcome_of


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
    assert answer.words.split()[0] == outcome


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
    assert {trial.mutation.split()[0] for trial in trials} == {"code", "pickle"}
