"""The timestep, from the denoiser's call to the layers: which member of its hub serves a layer now.

The choice depends on the timestep alone, so an exported router is a table, ``timestep -> member``,
for every layer that switches. `RouterTable` reads the timestep of each call where it arrives, in
the denoiser's own arguments, holds the choice while that call runs, and lets go of it whatever
happens; no layer ever counts its calls. Threads may share a denoiser: the choice belongs to the
call, and so to the thread that makes it. A layer that is asked to choose while its denoiser is not
running raises.
"""

import inspect
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from msfp_cli.errors import MsfpError

TABLE_SIZE = 1001  # timesteps 0..1000, or 0..1 in thousandths
ROUTER = "msfp_router"  # the name of the table among a denoiser's modules

T = TypeVar("T")


class Route(Generic[T]):
    """The choice of every layer during one call of the denoiser, and none outside of a call."""

    def __init__(self) -> None:
        self._by_thread: dict[int, Sequence[T]] = {}

    def open(self, choices: Sequence[T]) -> None:
        """Hold one choice per layer for this thread until `close`."""
        self._by_thread[_thread()] = choices

    def close(self) -> None:
        """Let go of this thread's choices."""
        self._by_thread.pop(_thread(), None)

    def _choices(self) -> Sequence[T] | None:
        """Return this thread's choices, or the only ones that there are.

        On a GPU, autograd runs backward passes, and what they compute again, in its own threads.
        """
        own = self._by_thread.get(_thread())
        if own is not None or len(self._by_thread) != 1:
            return own
        return next(iter(self._by_thread.values()), None)

    def is_open(self) -> bool:
        """Whether a call of the denoiser is running here."""
        return self._choices() is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: a call that runs here does not run there."""
        return {"_by_thread": {}}

    def of(self, slot: int) -> T:
        """Return the choice of the layer in row `slot`.

        Raises:
            MsfpError: the denoiser is not running, so no timestep is known.
        """
        choices = self._choices()
        if choices is None:
            raise MsfpError(
                "a layer with a LoRA hub ran outside its denoiser; "
                "call the denoiser, which knows the timestep"
            )
        return choices[slot]


def _thread() -> int:
    """Return the number of this thread; a graph that is traced serves them all."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _is_recorded() -> bool:
    """Whether the call becomes a graph that is to serve every timestep."""
    return torch.compiler.is_compiling() or torch.jit._trace.is_tracing()


def table_index(timestep: float, unit: float) -> int:
    """Return the row of the table that serves a timestep.

    Arguments:
        unit: the factor that brings timesteps to 0..1000, see `timestep_unit`.
    """
    return min(max(round(timestep * unit), 0), TABLE_SIZE - 1)


def timestep_unit(timesteps: Sequence[float]) -> float:
    """Return the factor that brings timesteps to 0..1000.

    It is 1000 for flow models, whose time runs from 1 to 0, and otherwise 1.
    """
    return 1000.0 if max(timesteps) <= 1.0 else 1.0


def check_unit(unit: float) -> float:
    """Return a unit of timesteps as `timestep_unit` makes it.

    Raises:
        ValueError: it is another number.
    """
    if unit not in (1.0, 1000.0):
        raise ValueError(f"a timestep unit of {unit} is neither 1 nor 1000")
    return float(unit)


def shared_timestep(value: Any) -> float:  # noqa: ANN401 (tensor or number, as the pipeline passes it)
    """Return the timestep of a call, whose batch has to share one.

    Raises:
        MsfpError: the rows of the batch are at several timesteps.
    """
    if not isinstance(value, Tensor):
        return float(value)
    values = value.detach().reshape(-1).cpu().double()
    if (values != values[0]).any():
        raise MsfpError(
            "the denoiser was called with several timesteps at once; "
            "a router needs one for the whole batch"
        )
    return float(values[0])


class _Row(Sequence[int]):
    """A row of a router's table, read when the first layer asks.

    By then the denoiser runs, and whatever offloads it has brought the table back.
    """

    def __init__(self, router: "RouterTable", timestep: float) -> None:
        self._read = partial(router, timestep)
        self._row: list[int] | None = None

    def __len__(self) -> int:
        """Return how many layers switch."""
        return len(self._row or self._read())

    def __getitem__(self, slot: Any) -> Any:  # noqa: ANN401 (Sequence's signature)
        """Return the member that serves the layer in row `slot`."""
        if self._row is None:
            self._row = self._read()
        return self._row[slot]


class RouterTable(nn.Module):
    """The router of an exported denoiser: a table and the hooks that read it.

    Arguments:
        num_layers: layers that switch, in the order of their names.
        unit: see `timestep_unit`.

    The table is the buffer ``table``, uint8, ``(1001, num_layers)``.
    """

    def __init__(self, num_layers: int, unit: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.unit = unit
        self.route = Route[int | Tensor]()
        self.register_buffer(
            "table", torch.zeros(TABLE_SIZE, num_layers, dtype=torch.uint8, device=device)
        )

    def forward(self, timestep: float) -> list[int]:
        """Return the member that serves each layer at a timestep.

        This is ``forward`` because offloaders bring a module's tensors back for that.
        """
        row: list[int] = self.get_buffer("table")[table_index(timestep, self.unit)].tolist()
        return row

    def compiled_choices(self, timestep: Tensor) -> Sequence[Tensor]:
        """Return the same as tensors, int64 of one element, for a graph that serves every timestep.

        A compiled call cannot look whether the rows of a batch share their timestep; the first
        row's counts.
        """
        row = (timestep.reshape(-1)[:1].double() * self.unit).round().clamp(0, TABLE_SIZE - 1)
        return torch.split(self.get_buffer("table").index_select(0, row.long())[0].long(), 1)

    def attach_(self, denoiser: nn.Module) -> None:
        """Become a module of the denoiser and listen to its calls."""
        denoiser.add_module(ROUTER, self)
        names = list(inspect.signature(denoiser.forward).parameters)
        self._position = names.index("timestep") if "timestep" in names else len(names)
        denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        denoiser.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[self._position] if len(args) > self._position else kwargs.get("timestep")
        if timestep is None:
            raise MsfpError("the denoiser was called without its timestep, which its router needs")
        if _is_recorded() and isinstance(timestep, Tensor):
            self.route.open(self.compiled_choices(timestep))
        else:
            self.route.open(_Row(self, shared_timestep(timestep)))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        self.route.close()
