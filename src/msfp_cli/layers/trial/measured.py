"""Let the kernels of a GPU compete for a layer when it first runs: the fastest exact one stays.

Which kernel is fastest depends on the card, on versions, and on the layer's size, so all of them
are measured. Each rival runs the layer on its own input. One whose sums are not the integers of
`reference` is out, and so is one that fails; a warning says so once. The others are timed beside
`simulated`, which is what the layer means in floating point, and which runs in the end where no
rival is faster. What won is remembered (`winners`), so that the next process tries nothing.
"""

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from importlib import metadata
from typing import ClassVar

import torch
from torch import Tensor

from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.cuda import Cuda
from msfp_cli.layers.kernels.simulated import Simulated, simulate
from msfp_cli.layers.trial import winners
from msfp_cli.layers.trial.exactness import is_exact, way_of
from msfp_cli.version import __version__

RIVALS: tuple[type[Kernel], ...] = (Cuda,)
FLOAT = "not rounded"  # the layer in floating point, which is timed to be seen beside the others
_WARM_UP = 2  # the first call may compile
_CALLS = 7
_ROUNDS = 2
_CHANCES = 2  # failures of a kernel in one process, after which no layer tries it
_TRYING = threading.RLock()  # times that are taken at once are of no use
_failures: Counter[str] = Counter()
_said: set[str] = set()


class Measured(Kernel):
    """Stands for a kernel until the layer first runs, and then gives way to the one that won.

    Until then, a call is simulated that is compiled, recorded as a CUDA graph, or followed back by
    gradients, and one with an input that is empty or not finite.
    """

    name: ClassVar[str] = "measured at the first call"
    kinds: ClassVar[frozenset[str] | None] = Cuda.kinds
    device: ClassVar[str | None] = "cuda"
    lays_out: ClassVar[bool] = True

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say why no rival can run the layer, or nothing."""
        reasons = [rival.refusal(layer) for rival in RIVALS]
        return None if None in reasons else "; ".join(filter(None, reasons))

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Note what the winner is to do with the weight."""
        self.keep_packed = keep_packed

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Find the fastest kernel, hand the layer to it, and run it."""
        if not _can_be_tried(layer, x):
            return simulate(layer, x)
        with _TRYING:
            if layer.kernel is self:  # no other thread was here first
                found = fastest(layer, x, keep_packed=self.keep_packed)
                if found is None:  # what is wrong with the input is said here
                    return simulate(layer, x)
                layer.take_kernel_(found)
            kernel = layer.kernel
        return simulate(layer, x) if kernel is None else kernel(layer, x)


def _can_be_tried(layer: QuantizedLayer, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit._trace.is_tracing():
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    is_here = x.device == layer.get_buffer("weight_scale").device
    return is_here and x.numel() > 0 and _is_taken(layer, x)


def _is_taken(layer: QuantizedLayer, x: Tensor) -> bool:
    """Whether an input has rows, and the channels that the layer takes."""
    geometry = layer.geometry()
    if geometry is None:
        return x.ndim >= 2 and x.shape[-1] == layer.weight_shape[1]
    return x.ndim == 4 and x.shape[1] == layer.weight_shape[1] * geometry.groups


@torch.inference_mode(mode=False)  # a kernel lives longer than the call that makes it
@torch.no_grad()
def fastest(layer: QuantizedLayer, x: Tensor, *, keep_packed: bool) -> Kernel | None:
    """Return the fastest exact kernel for a layer, prepared; None if the input tells nothing.

    It does not if its numbers are not finite, or if nothing can run on it.

    Arguments:
        x: an input of the layer, with rows.
        keep_packed: see `Kernel`.
    """
    kinds = [rival for rival in RIVALS if rival.refusal(layer) is None and not _is_broken(rival)]
    kinds.append(Simulated)
    key = key_of(layer, x, keep_packed=keep_packed)
    known = winners.find(key)
    for kind in kinds:
        if known is not None and known.kernel == kind.name:
            return _with_times(kind(layer, keep_packed=keep_packed), known)
    if not torch.isfinite(x).all():
        return None
    trial = Trial(layer, x)
    for kind in kinds:
        trial.check(kind, keep_packed=keep_packed)
    trial.race()
    if not trial.seconds:
        return None
    best = trial.kernels[min(trial.seconds, key=trial.seconds.__getitem__)]
    with suppress(RuntimeError):  # the memory may be full; this is only to be seen
        weight = layer.float_weight().to(x.dtype)
        trial.seconds[FLOAT] = seconds_of(partial(layer.apply_weight, x, weight))
    winner = winners.Winner(best.name, trial.seconds)
    if not trial.was_short:
        winners.keep(key, winner, lasting=not trial.failed)
    return _with_times(best, winner)


def _with_times(kernel: Kernel, winner: winners.Winner) -> Kernel:
    kernel.seconds = winner.seconds
    return kernel


class Trial:
    """What kernels do with one input of a layer.

    Attributes:
        kernels: those that may run the layer, by name, prepared.
        seconds: what a call of each takes.
        failed: whether one failed that may run another time.
        was_short: whether one failed for want of memory, which tells nothing of the kernel.
    """

    def __init__(self, layer: QuantizedLayer, x: Tensor) -> None:
        self.layer = layer
        self.x = x
        self.kernels: dict[str, Kernel] = {}
        self.seconds: dict[str, float] = {}
        self.failed = False
        self.was_short = False

    def check(self, kind: type[Kernel], *, keep_packed: bool) -> None:
        """Prepare a kernel, and let it take part if it is right; say once why it may not."""
        try:
            kernel = kind(self.layer, keep_packed=keep_packed)
            if kind is Simulated or is_exact(kernel, self.layer, self.x):
                self.kernels[kind.name] = kernel
            else:
                _say(kind, "its sums are wrong on this machine")
        except torch.OutOfMemoryError:
            self.was_short = True
        except Exception as error:  # noqa: BLE001 (whatever a compiler says: there is another way)
            self.failed = True
            _failures[kind.name] += 1
            _say(kind, f"{type(error).__name__}: {error}".splitlines()[0][:200])

    def race(self) -> None:
        """Time the kernels in turn, twice, so that none has the warmer card."""
        for _ in range(_ROUNDS):
            for name, kernel in list(self.kernels.items()):
                try:
                    took = seconds_of(partial(kernel, self.layer, self.x))
                except RuntimeError as error:  # in the type of this input, say
                    self.failed = True
                    self.was_short |= isinstance(error, torch.OutOfMemoryError)
                    del self.kernels[name]
                    self.seconds.pop(name, None)
                else:
                    self.seconds[name] = min(took, self.seconds.get(name, took))


def _is_broken(kind: type[Kernel]) -> bool:
    """Whether a kernel has failed so often in this process that no layer tries it any more."""
    return _failures[kind.name] >= _CHANCES


def _say(kind: type[Kernel], reason: str) -> None:
    """Warn, once for each kernel, of what would go unseen."""
    if kind.name not in _said:
        _said.add(kind.name)
        warnings.warn(
            f"kernel {kind.name!r} is passed over: {reason}; name it to see more (kernel=, or the "
            "environment variable MSFP_KERNEL)",
            stacklevel=2,
        )


def seconds_of(run: Callable[[], Tensor]) -> float:
    """Return the seconds of a call among several, on whatever device its result is.

    Where Python takes longer than the device, that is Python's time, as for any call.
    """
    device = [run() for _ in range(_WARM_UP)][-1].device
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(_CALLS):
        run()
    _wait_for(device)
    return (time.perf_counter() - start) / _CALLS


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def key_of(layer: QuantizedLayer, x: Tensor, *, keep_packed: bool) -> str:
    """Return what the speed of a layer depends on, as the key of `winners`."""
    parts = {
        "card": _card(x.device),
        "versions": _versions(),
        "layer": [way_of(layer), *layer.weight_shape],
        "input": [str(x.dtype), *x.shape, "strides", *x.stride()],
        "products": _settings(x.device),
    }
    return ", ".join(
        [*(f"{name} {each}" for name, each in parts.items()), *["packed"] * keep_packed]
    )


def _settings(device: torch.device) -> list[bool | str]:
    """Return the settings of torch that floating-point products depend on."""
    backends = torch.backends
    autocast = torch.is_autocast_enabled(device.type)
    return [
        str(torch.get_autocast_dtype(device.type)) if autocast else False,
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
    ]


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=1)
def _versions() -> str:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"msfp {__version__}, torch {torch.__version__}, triton {triton}"
