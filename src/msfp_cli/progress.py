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
    """Shows tasks that advance towards a total, as the console does; a caller may pass its own."""

    def task(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Open a task; what it yields is called with the number of steps done.

        Arguments:
            total: steps of the task; None if it is not known yet.
        """
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
