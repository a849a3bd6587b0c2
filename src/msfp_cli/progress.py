"""How workflows report progress, without knowing who shows it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves an open task on."""

    def __call__(self, steps: int, note: str = "") -> None:
        """Say that `steps` more are done, and (with a note) how it stands."""
        ...


class Progress(Protocol):
    """Something that can show a task that advances towards a total; the console gives one, a library caller may."""

    def task(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Open a task of `total` steps (None: not yet known); call what it yields with the steps done."""
        ...

    def log(self, line: str) -> None:
        """Say something that is to stay on the screen."""
        ...


class NoProgress:
    """Show nothing."""

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Open a task that nobody sees."""
        yield lambda steps, note="": None

    def log(self, line: str) -> None:
        """Say nothing."""


SILENT: Progress = NoProgress()
