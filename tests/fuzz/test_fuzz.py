"""Mutated exports and runs are refused or harmless; ``python -m tests.fuzz`` tries more of them."""

import pytest

from fuzz.worker import READERS, Fuzzer, Trial


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def bad_trials(fuzzer: Fuzzer, kind: str, count: int, seed: int) -> list[str]:
    trials: list[Trial] = []
    for number in range(count):
        trials += fuzzer.trials(kind, number, seed)
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
