"""Several processes that share a task, as `accelerate launch` starts them; usually there is one.

All of them run the same program. Where work divides, `Processes.part` says what this process does,
and `Processes.gather` gives everybody what all of them found, so that they go on alike. Who does
what depends on the work and the number of processes only. What is sent is JSON and tensors: nothing
is pickled. One process, the first, writes results.

When a process ends before its time, the others would wait for it, or work for hours in vain.
Therefore the first listens to all others while a `meeting` lasts, and they to it. The kernel closes
these connections when a process ends, however it ends.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from uuid import uuid4

from msfp_cli.errors import RunError
from msfp_cli.files.atomic import temporary_of
from msfp_cli.files.typed import read_value
from msfp_cli.progress import SILENT, Progress

if TYPE_CHECKING:  # `msfp --help` must not load torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

# Set for processes that another msfp has started, which tells what happened to them.
LAUNCHED = "MSFP_LAUNCHED"
# Exit code of a process that ends only because another process of the same command is gone.
LEFT_ALONE = 75
LEFT_ALONE_WORDS = (
    "another process of this command has ended, and says why where it ran; run the same command to "
    "go on"
)
_FOREVER = timedelta(days=365)  # the others may take their time
_SECONDS_TO_SEE = 90  # a new file, on a network file system that remembers what was there
_LAST_WORDS = 2  # seconds that a process has to end for a reason of its own
_TENSOR = "$tensor"  # how a message tells a tensor from plain values
_VALUES = "$values"  # the name under which a message has its JSON, so no tensor's

Tree: TypeAlias = Any  # of dataclasses, mappings, lists, tensors and plain values
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process among others.

    Arguments:
        index: its number, from 0.
        count: how many there are.
        progress: told of what this process does.
    """

    index: int = 0
    count: int = 1
    progress: Progress = SILENT

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.index == 0

    def part(self, items: Sequence[S], price: Callable[[S], float] = lambda item: 1.0) -> list[S]:
        """Return the items that are this process's own, in their order; together these are all.

        Arguments:
            price: what an item takes. Dear ones are dealt first, each to whoever has least to do.
        """
        loads = [0.0] * self.count
        own = set[int]()
        numbers = sorted(range(len(items)), key=lambda number: -price(items[number]))
        for number in numbers:
            idlest = loads.index(min(loads))
            loads[idlest] += price(items[number])
            if idlest == self.index:
                own.add(number)
        return [item for number, item in enumerate(items) if number in own]

    def gather(self, own: Mapping[str, T], kind: type[T]) -> dict[str, T]:
        """Return what all processes have, by name; everybody gets the same.

        Arguments:
            own: what this process has. No other process has a value of the same name.
            kind: of the values: whatever `read_value` reads, a tensor, or a dataclass of such.
        """
        if self.count == 1:
            return dict(own)
        everything = dict[str, T]()
        for message in _exchange(_encode(own)):
            for name, value in _decode(message).items():
                everything[name] = read_value(kind, value)
        return everything

    def of_first(self, value: T, kind: type[T]) -> T:
        """Return the first process's value in all of them, which then agree on it."""
        return self.gather({"": value} if self.is_first else {}, kind)[""]

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier(group=_line())

    def refuse_apart(self, directory: Path) -> None:
        """Refuse machines that do not share the directory that the first process writes to.

        Raises:
            RunError: what the first wrote is not seen here.
        """
        if self.count == 1:
            return
        mark = temporary_of(directory / "shared")
        if self.is_first:
            mark.write_text(uuid4().hex)
        expected = self.of_first(mark.read_text() if self.is_first else "", str)
        if not self.wait_for(lambda: mark.exists() and mark.read_text() == expected):
            raise RunError(
                f"{directory} on {socket.gethostname()} is not the directory that the first "
                "process writes to; put it on a file system that all machines share"
            )
        self.wait()
        if self.is_first:
            mark.unlink()

    def wait_for(self, is_there: Callable[[], bool]) -> bool:
        """Wait until what another process wrote is seen here; False if it is not in good time."""
        for _ in range(_SECONDS_TO_SEE):
            if is_there():
                return True
            time.sleep(1)
        return False

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the first process alone make the files that the others then find."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


ALONE = Processes()


@contextmanager
def meeting(device: str, progress: Progress = SILENT) -> Iterator[Processes]:
    """Meet the processes that were started together; none leaves before the others.

    If one of them ends while the context is open, all others end within seconds.

    Arguments:
        device: where the work is done; accelerate does not find out by itself that it is the CPU.
        progress: told of what this process does.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes(progress=progress)
        return
    from accelerate import PartialState
    from torch import distributed

    state = PartialState(cpu=device == "cpu")
    processes = Processes(state.process_index, state.num_processes, progress)
    _line()  # every process makes the groups in the same order
    group = distributed.new_group(backend="gloo", timeout=_FOREVER)
    others = range(1, processes.count) if processes.is_first else (0,)
    listeners = [
        threading.Thread(target=_listen, args=(other, group), daemon=True) for other in others
    ]
    for listener in listeners:
        listener.start()
    yield processes
    processes.wait()
    for other in others:
        distributed.send(_signal(), dst=other, group=group)
    for listener in listeners:
        listener.join()


@cache
def _line() -> "ProcessGroup":
    """Return the connections that parts are exchanged over, on the CPU and in no hurry."""
    from torch import distributed

    group: ProcessGroup = distributed.new_group(backend="gloo", timeout=_FOREVER)
    return group


def _signal() -> "Tensor":
    """Return the least that can be sent."""
    import torch

    return torch.zeros(1, dtype=torch.uint8)


def _listen(other: int, group: "ProcessGroup") -> None:
    """Wait until another process says that it is done; if it is gone before that, end this one."""
    from torch import distributed

    try:
        distributed.recv(_signal(), src=other, group=group)
    except RuntimeError:
        time.sleep(_LAST_WORDS)
        if LAUNCHED not in os.environ:
            sys.stderr.write(f"error: {LEFT_ALONE_WORDS}\n")
            sys.stderr.flush()
        os._exit(LEFT_ALONE)


def _exchange(message: "Tensor") -> "Iterator[Tensor]":
    """Send bytes to all processes, and yield those of each."""
    import torch
    from torch import distributed

    count = distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    distributed.all_gather(sizes, torch.tensor([len(message)]), group=_line())
    for source, size in enumerate(sizes):
        own = source == distributed.get_rank()
        each = message if own else torch.empty(int(size), dtype=torch.uint8)
        distributed.broadcast(each, src=source, group=_line())
        yield each


def _encode(values: object) -> "Tensor":
    """Return values as the bytes of a safetensors file."""
    import torch
    from safetensors.torch import save

    tensors = dict[str, "Tensor"]()
    text = json.dumps(_put_aside(values, tensors))
    tensors[_VALUES] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def _put_aside(value: Tree, tensors: "dict[str, Tensor]") -> Tree:
    """Return values as JSON, with the names of tensors in their places."""
    from torch import Tensor

    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {each.name: _put_aside(getattr(value, each.name), tensors) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _put_aside(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_put_aside(item, tensors) for item in value]
    return value


def _decode(message: "Tensor") -> Tree:
    """Undo `_encode`, but for the dataclasses."""
    from safetensors.torch import load

    tensors = load(message.numpy().tobytes())
    return _put_back(json.loads(tensors.pop(_VALUES).numpy().tobytes()), tensors)


def _put_back(value: Tree, tensors: "Mapping[str, Tensor]") -> Tree:
    """Return JSON with the tensors in their places."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_back(item, tensors) for key, item in value.items()}
    return [_put_back(item, tensors) for item in value] if isinstance(value, list) else value
