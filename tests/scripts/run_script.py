"""Run a script of the repository as a user does: in a process of its own, to its last line."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_script(script: str, *arguments: object, code: int = 0) -> list[str]:
    """Run a script with one thread and no network.

    Arguments:
        script: its path in the repository.
        arguments: of its command line.
        code: the exit code that it has to have.

    Returns:
        The lines that it printed: of its results where it ended well, of its errors otherwise.
    """
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return (done.stderr if code else done.stdout).strip().splitlines()
