import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from msfp_cli.errors import ModelError
from msfp_cli.evaluation.cost import Cost, machine, measure_cost
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.pipelines.sampling import Sampling

MIB = 1 << 20


def resident_bytes() -> int:
    """Return what this process takes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def python(code: str) -> str:
    """Run a few lines in a fresh process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure() -> Cost:
    return measure_cost(
        ModelSource(model="a/model"),
        ("a cat", "1"),
        Sampling(num_inference_steps=3, guidance_scale=1.5),
        device="cpu",
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux's count of a process's memory"
)
def test_cost_is_that_of_a_process_of_its_own(tiny_source: ModelSource) -> None:
    ballast = torch.ones(500 * MIB, dtype=torch.uint8)
    cost = measure_cost(tiny_source, (None, None), Sampling(num_inference_steps=2), device="cpu")
    assert cost.load_seconds > 0 and cost.seconds_per_picture > 0
    assert 50 * MIB < cost.peak_memory_bytes < resident_bytes()
    assert int(ballast[-1]) == 1


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux's count of a process's memory"
)
def test_peak_memory_is_neither_the_parents_nor_what_is_held_now() -> None:
    ballast = torch.ones(500 * MIB, dtype=torch.uint8)
    assert resident_bytes() > 500 * MIB
    code = "from msfp_cli.memory import peak_bytes\n{}\nprint(peak_bytes())"
    small = int(python(code.format("")))
    assert 5 * MIB < small < 200 * MIB
    large = int(python(code.format("held = b'x' * (300 << 20); del held")))
    assert large - small == pytest.approx(300 * MIB, rel=0.1)
    assert int(ballast[-1]) == 1


def test_process_with_a_broken_installation_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with pytest.raises(ModelError) as caught:
        measure()
    assert (
        str(caught.value)
        == "cannot measure time and memory of a/model: ImportError: this torch is broken"
    )


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a shell script in Python's place."""

    def put(script: str) -> None:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return put


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo Traceback >&2; echo 'ValueError: odd' >&2; exit 1", "ValueError: odd"),
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "exit code -9"),  # as the system does where memory ends
    ],
    ids=["error", "silent", "killed"],
)
def test_process_that_fails_is_one_line(
    script: str, reason: str, instead: Callable[[str], None]
) -> None:
    instead(script)
    with pytest.raises(ModelError) as caught:
        measure()
    assert str(caught.value) == f"cannot measure time and memory of a/model: {reason}"


def test_process_is_told_all_and_its_last_line_counts(
    instead: Callable[[str], None], tmp_path: Path
) -> None:
    cost = Cost(load_seconds=1.5, seconds_per_picture=0.25, peak_memory_bytes=7)
    said = json.dumps({"load_seconds": 1.5, "seconds_per_picture": 0.25, "peak_memory_bytes": 7})
    instead(f"printf '%s' \"$3\" > '{tmp_path}/asked'; echo a notice; echo '{said}'")
    assert measure() == cost
    assert json.loads((tmp_path / "asked").read_text()) == {
        "source": ModelSource(model="a/model").to_json(),
        "sampling": {
            "num_inference_steps": 3,
            "guidance_scale": 1.5,
            "seed": 0,
            "batch_size": 8,
        },
        "conditions": ["a cat", "1"],
        "device": "cpu",
        "kernel": None,
    }


def test_machine_says_what_it_is_measured_on() -> None:
    found = machine("cpu")
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert int(found["cores"]) >= 1 and int(found["threads"]) >= 1
    assert found == json.loads(json.dumps(found)) and all(found.values())
