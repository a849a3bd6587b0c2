"""Several processes that share a task, as `accelerate launch` starts them; usually there is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from accelerate import PartialState


@dataclass(frozen=True)
class Processes:
    """One process among others.

    Arguments:
        index: its number, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls, device: str) -> "Processes":
        """Return how this process was started, and meet the others.

        Arguments:
            device: where the work is done; accelerate does not find out by itself that it is the
                CPU.
        """
        state = PartialState(cpu=device == "cpu")
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the first process alone make the files that the others then find."""
        if self.count > 1:
            with PartialState().main_process_first():
                yield
        else:
            yield


ALONE = Processes()
