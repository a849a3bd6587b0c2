"""Every script in benchmarks/ runs on tiny sizes, to its last printed line.

Each runs in a process of its own, as a user runs it. `gpu.py` needs a GPU; its parts that need none
are tested in tests/layers/kernels/test_gpu_benchmark.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TINY = "StableDiffusionPipeline"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def run(script: str, *arguments: object, code: int = 0) -> list[str]:
    """Run a script of benchmarks/, and return the lines that it printed."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return (done.stdout if code == 0 else done.stderr).strip().splitlines()


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_calibration_compares_formats_and_lists_the_layers_fed_by_silu(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--num-images", 2, "--steps", 1, "--num-tests", 1, "--rows", "mixed")
    page = tmp_path / "page.md"
    lines = run("calibration.py", "--model", tiny(TINY), *options, "--markdown", page)
    formats, plain, lifted = cells(lines[0])
    assert formats == "mixed"
    assert 0 < float(lifted) < float(plain)
    assert cells(lines[-1])[-1] == "default"
    assert page.read_text().splitlines()[2:] == ["| formats | no lift | lift 5 % |", *lines[2:]]


def test_search_finds_what_brute_force_finds() -> None:
    lines = run("search.py", "--num-samples", 200, "--width", 32)
    assert len([line for line in lines if line.startswith(("e", "ue"))]) == 7
    (worst,) = (line for line in lines if line.startswith("greatest"))
    assert float(worst.split(": ")[1].split()[0]) < 1e-9
    assert lines[-1].startswith("peak memory")


@linux_only
def test_execution_compares_kernels_with_float32(tmp_path: Path) -> None:
    options = ("--work", tmp_path, "--models", "tiny", "--calls", 1)
    lines = run("execution.py", *options, "--only", "msfp reference")
    float32, reference = (cells(line) for line in lines[-2:])
    assert float32[0] == "float32" and float(float32[4]) == 1
    assert reference[0] == "msfp reference" and float(reference[4]) < 0.25
    peer = run("execution.py", *options, "--only", "quanto qint8")[-1]
    assert peer.startswith("| quanto qint8 | give --peers")
    assert run("execution.py", *options, "--profile")[-1].startswith("| the whole call | ")
