"""The timestep, from the denoiser's call to the layers: which variant of a layer runs now.

A variant is a member of the layer's hub, with its input at the usual bits or lifted
(`LayerScheme.variants`). The choice depends on the timestep alone, so a router is a table,
``timestep -> variant``, for every layer that switches. `RouterTable` reads the timestep of each
call where it arrives, in the denoiser's own arguments, holds the choice while that call runs, and
lets go of it whatever happens; no layer ever counts its calls. Threads may share a denoiser: the
choice belongs to the call, and so to the thread that makes it. A layer that is asked to choose
while its denoiser is not running raises.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from msfp_cli.errors import MsfpError
from msfp_cli.layers.clock import Clock

TABLE_SIZE = 1001  # timesteps 0..1000
ROUTER = "msfp_router"  # the name of the table among a denoiser's modules

Argument: TypeAlias = Any  # what a block of a denoiser takes and returns
T = TypeVar("T")


class Route(Generic[T]):
    """The choice of every layer during one call of the denoiser, and none outside of a call."""

    def __init__(self) -> None:
        self._by_thread: dict[int, Sequence[T] | Tensor] = {}

    def open(self, choices: Sequence[T] | Tensor) -> None:
        """Hold one choice per layer for this thread until `close`."""
        self._by_thread[_thread()] = choices

    def close(self) -> None:
        """Let go of this thread's choices."""
        self._by_thread.pop(_thread(), None)

    def during(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with this call's choices, for a time when the call is over."""
        choices = self._choices()
        return function if choices is None else partial(self._run, choices, function)

    def _run(
        self,
        choices: Sequence[T] | Tensor,
        function: Callable[..., Any],
        *args: Argument,
    ) -> Argument:
        with self._held(choices):
            return function(*args)

    @contextmanager
    def _held(self, choices: Sequence[T] | Tensor) -> Iterator[None]:
        """Hold choices while the context is open, and what was held before after it."""
        before = self._by_thread.get(_thread())
        self.open(choices)
        try:
            yield
        finally:
            self.close()
            if before is not None:
                self.open(before)

    def _choices(self) -> Sequence[T] | Tensor | None:
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
                "a layer that changes with the timestep ran outside its denoiser; "
                "call the denoiser, which knows the timestep"
            )
        return cast(T, choices[slot])


def _thread() -> int:
    """Return the number of this thread; a graph that is traced serves them all."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _is_recorded() -> bool:
    """Whether the call becomes a graph that is to serve every timestep."""
    return torch.compiler.is_compiling() or torch.jit._trace.is_tracing()


def table_index(timestep: float) -> int:
    """Return the row of the table that serves a timestep, 1000 (noise) to 0 (clean)."""
    return min(max(round(timestep), 0), TABLE_SIZE - 1)


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
        """Return the variant of the layer in row `slot`."""
        if self._row is None:
            self._row = self._read()
        return self._row[slot]


class _Recomputation:
    """A denoiser's function for gradient checkpointing, with the choices of the call.

    The backward pass computes blocks again when the denoiser's call is over, and maybe after other
    calls at other timesteps.

    Arguments:
        checkpoint: takes a block and its arguments.
    """

    def __init__(self, checkpoint: Callable[..., Any], route: Route[Any]) -> None:
        self._checkpoint = checkpoint
        self._route = route

    def __call__(self, block: Callable[..., Any], *args: Argument) -> Argument:
        """Run a block, and remember the choices for when it is run again."""
        return self._checkpoint(self._route.during(block), *args)

    @classmethod
    def prepare_(cls, denoiser: nn.Module, route: Route[Any]) -> None:
        """Let every block of a denoiser that is checkpointed remember."""
        for module in denoiser.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, cls):
                vars(module)["_gradient_checkpointing_func"] = cls(function, route)


class RouterTable(nn.Module):
    """The router of an exported denoiser: a table and the hooks that read it.

    Arguments:
        num_layers: layers that switch, in the order of their names.
        clock: reads the timestep of a call.

    The table is the buffer ``table``, uint8, ``(1001, num_layers)``.
    """

    def __init__(self, num_layers: int, clock: Clock, device: torch.device | None = None) -> None:
        super().__init__()
        self.clock = clock
        self.route = Route[int | Tensor]()
        self.register_buffer(
            "table", torch.zeros(TABLE_SIZE, num_layers, dtype=torch.uint8, device=device)
        )

    def forward(self, timestep: float) -> list[int]:
        """Return the variant of each layer at a timestep.

        This is ``forward`` because offloaders bring a module's tensors back for that.
        """
        row: list[int] = self.get_buffer("table")[table_index(timestep)].tolist()
        return row

    def compiled_choices(self, timestep: Tensor) -> Tensor:
        """Return the same as int64 ``(num_layers, 1)``, for a graph that serves every timestep.

        They are one tensor: many would be views of it, whose offsets a compiler takes for sizes
        that are equal to those of a picture by chance.

        Arguments:
            timestep: the argument of the call that says what time it is.
        """
        row = self.clock.traced(timestep).round().clamp(0, TABLE_SIZE - 1)
        return self.get_buffer("table").index_select(0, row.long()).long().T

    def attach_(self, denoiser: nn.Module) -> None:
        """Become a module of the denoiser and listen to its calls."""
        denoiser.add_module(ROUTER, self)
        names = list(inspect.signature(denoiser.forward).parameters)
        argument = self.clock.argument
        self._position = names.index(argument) if argument in names else len(names)
        denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        denoiser.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_positional = len(args) > self._position
        timestep = args[self._position] if is_positional else kwargs.get(self.clock.argument)
        if timestep is None:
            raise MsfpError("the denoiser was called without its timestep, which its router needs")
        if _is_recorded() and isinstance(timestep, Tensor):
            self.route.open(self.compiled_choices(timestep))
        else:
            self.route.open(_Row(self, self.clock.read(timestep)))
            if torch.is_grad_enabled():
                _Recomputation.prepare_(module, self.route)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        self.route.close()
