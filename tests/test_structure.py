"""The shape of the source is bounded, and the README's tree names every module."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from structure import SOURCE, duplicate_classes, measure, modules

README = Path(__file__).parents[1] / "README.md"
BOUNDS = {
    "modules in the largest folder": 14,
    "own imports per module, mean": 3.6,
    "fan-out, 90 % of modules": 8,
    "fan-out, largest": 14,
    "imports upwards": 0,
    "circles": 0,
    "lines of a function, median": 9,
    "lines of a function, 90 %": 25,
    "functions over 60 lines": 0,
    "packed assignments per 1,000 lines of code": 4.9,
    "nested comprehensions per 1,000 lines of code": 0.9,
    "noqa and type: ignore": 61,
}
# Figures that the source has not reached yet.
OPEN = {
    "own imports per module, mean",
}


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return measure()


def bounded(title: str) -> ParameterSet:
    """Return a case that is expected to fail as long as the figure is open."""
    return pytest.param(title, marks=pytest.mark.xfail(strict=True) if title in OPEN else ())


@pytest.mark.parametrize("title", [bounded(title) for title in BOUNDS])
def test_figure_is_within_its_bound(title: str, figures: dict[str, float]) -> None:
    assert figures[title] <= BOUNDS[title]


def test_no_two_public_classes_share_a_name() -> None:
    assert duplicate_classes() == {}


def test_readme_names_every_module_and_no_other() -> None:
    files = {str(path.relative_to(SOURCE)) for path in modules().values()}
    assert set(tree_of(README.read_text())) == {
        file for file in files if not file.endswith("__init__.py")
    }


def tree_of(text: str) -> Iterator[str]:
    """Yield the Python files of the tree in the README, relative to the package."""
    (block,) = re.findall(r"```\nsrc/msfp_cli/\n(.*?)```", text, re.DOTALL)
    folders = list[str]()
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4 - 1
        if depth < 0:
            return  # the tree goes on with folders beside the package
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            yield "".join(folders) + name
