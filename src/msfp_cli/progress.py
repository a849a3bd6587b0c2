"""How workflows report progress, without knowing who shows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Something that can show a task that advances towards a total; the console gives one, a library caller may."""

    def task(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Open a task of `total` steps (None: not yet known); call what it yields with the steps done."""
        ...


class NoProgress:
    """Show nothing."""

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Open a task that nobody sees."""
        yield lambda steps: None


SILENT: Progress = NoProgress()
