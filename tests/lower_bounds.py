"""Install the lowest versions that pyproject.toml allows, and run short tests with them.

``python tests/lower_bounds.py FOLDER`` makes an environment in FOLDER; a second run goes on with
it. What follows FOLDER is passed to pytest in place of the tests that are run otherwise. torch has
the version of constraints.txt, whose build for CPUs needs no gigabytes of CUDA packages, and so
has what only checks the source.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
PINNED = ("torch", "mypy", "ruff", "pre-commit")  # as in constraints.txt
TESTS = (
    "tests/formats",
    "tests/layers",
    "tests/pipelines",
    "tests/recording",
    "tests/checkpoint",
    "tests/report",
    "tests/test_sample.py",
    "tests/test_status.py",
)
# Warnings that libraries of today no longer give are not errors.
OPTIONS = ("-q", "-m", "not slow", "-W", "default", "-p", "no:cacheprovider")


def lower_bounds(project: dict[str, Any]) -> dict[str, str]:
    """Return the lowest version of each package that a project names, also for its tests."""
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dev"], *extras["report"]]
    bounds = dict(requirement.split(">=") for requirement in requirements)
    return {name: bound for name, bound in bounds.items() if name not in PINNED}


def constraints(bounds: dict[str, str], pins: str) -> Iterator[str]:
    """Yield the lines of a file of constraints: lower bounds, and the pins of the rest."""
    for name, bound in bounds.items():
        yield f"{name}=={bound}"
    for name in PINNED:
        yield from re.findall(rf"^{name}==.*$", pins, re.MULTILINE)


def install(folder: Path) -> Path:
    """Install msfp and its tests' packages at their lower bounds, and return the interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = constraints(lower_bounds(project), (ROOT / "constraints.txt").read_text("utf-8"))
    file = folder / "constraints.txt"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", file, "--editable", f"{ROOT}[dev]"], check=True)
    return python


def main() -> None:
    """Install and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments, tests = parser.parse_known_args()
    python = install(arguments.folder.resolve())
    subprocess.run([python, "-m", "pip", "freeze", "--exclude-editable"], check=True)
    command = [python, "-m", "pytest", *OPTIONS, *(tests or TESTS)]
    raise SystemExit(subprocess.run(command, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
