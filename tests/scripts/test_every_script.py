"""Every script is run by a test."""

from pathlib import Path

import pytest

from scripts.run_script import ROOT

SCRIPTS = [
    path
    for folder in ("benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]
TESTS = [
    *Path(__file__).parent.glob("test_*.py"),
    ROOT / "tests/layers/kernels/test_gpu_benchmark.py",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_run_by_a_test(script: Path) -> None:
    assert any(script.name in test.read_text() for test in TESTS)
