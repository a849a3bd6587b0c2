"""Let the kernels of a GPU compete for a layer when it first runs: the fastest exact one stays.

Which kernel is fastest depends on the card, on versions, and on the layer's size, so nobody is
trusted. Each rival runs the layer on its own input. One whose sums are not the integers of
`reference` is out, and so is one that fails. The others are timed beside `simulated`, which is what
the layer means in floating point, and which runs in the end where no rival is faster. What won is
remembered (`winners`), so that the next process tries nothing.

The exact sums are computed on the CPU, because the libraries of a GPU may multiply pictures by
methods that round in between. There the first and the last row of the input are compared.
"""

import copy
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from importlib import metadata
from typing import ClassVar

import torch
from torch import Tensor, nn

from msfp_cli.layers import winners
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.arithmetic import Arithmetic
from msfp_cli.layers.kernels.cuda import Cuda
from msfp_cli.layers.kernels.reference import run_reference
from msfp_cli.layers.kernels.simulated import Simulated, simulate
from msfp_cli.version import __version__

RIVALS: tuple[type[Kernel], ...] = (Cuda,)
FLOAT = "not rounded"  # the layer in floating point, which is timed to be seen beside the others
_WARM_UP = 2  # the first call may compile
_CALLS = 7
_LAST_DIGITS = 4 * torch.finfo(torch.float32).eps
_TRYING = threading.RLock()  # times that are taken at once are of no use


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
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    has_rows = x.ndim >= 2 if layer.geometry() is None else x.ndim == 4
    return has_rows and x.numel() > 0 and bool(torch.isfinite(x).all())


@torch.no_grad()
def fastest(layer: QuantizedLayer, x: Tensor, *, keep_packed: bool) -> Kernel | None:
    """Return the fastest exact kernel for a layer, prepared; None if not even simulating works.

    Arguments:
        x: an input of the layer, with rows, and numbers that are finite.
        keep_packed: see `Kernel`.
    """
    kinds = [rival for rival in RIVALS if rival.refusal(layer) is None]
    kinds.append(Simulated)
    key = key_of(layer, x, keep_packed=keep_packed)
    known = winners.find(key)
    for kind in kinds:
        if known is not None and known.kernel == kind.name:
            return _with_words(kind(layer, keep_packed=keep_packed), known)
    kernels: dict[str, Kernel] = {}
    times: dict[str, float] = {}
    failed = set(kinds)
    for kind in kinds:
        with suppress(Exception):  # whatever a GPU's compiler says: there is another way to run
            kernel = kind(layer, keep_packed=keep_packed)
            if kind is Simulated or is_exact(kernel, layer, x):
                times[kind.name] = seconds_of(partial(kernel, layer, x))
                kernels[kind.name] = kernel
            failed.remove(kind)
    if Simulated in failed:
        return None
    best = kernels[min(times, key=times.__getitem__)]
    times[FLOAT] = seconds_of(partial(layer.apply_weight, x, layer.weight.to(x.dtype)))
    winner = winners.Winner(best.name, times)
    winners.keep(key, winner, lasting=not failed)
    return _with_words(best, winner)


def _with_words(kernel: Kernel, winner: winners.Winner) -> Kernel:
    kernel.measured = winner.words()
    return kernel


def is_exact(kernel: Kernel, layer: QuantizedLayer, x: Tensor) -> bool:
    """Whether a kernel's sums are the integers of `reference`, on the first and the last row.

    Outputs are compared in float32. There, two sums that differ by one are a factor apart, unless
    that is below the last digits.
    """
    ends = torch.stack([x[0], x[-1]]).float().cpu()
    twin = _on_cpu(layer)
    integers = [twin.integers(member) for member in range(twin.scheme.hub)]
    arithmetic = Arithmetic.of(twin, integers)
    expected = run_reference(twin, ends, arithmetic)
    output = kernel(layer, x.float())
    found = torch.stack([output[0], output[-1]]).cpu()
    factor, constant, _ = arithmetic.of_variant(twin.variant(), twin.kernel_bias)
    along = (-1, 1, 1) if arithmetic.geometry else (-1,)
    digits = _LAST_DIGITS * (expected.abs().amax() + constant.abs().amax())
    return bool(((found - expected).abs() <= factor.view(along) / 4 + digits).all())


def _on_cpu(layer: QuantizedLayer) -> QuantizedLayer:
    """Return a copy of a layer, without its hooks' objects, whose tensors are on the CPU."""
    twin = copy.copy(layer)
    twin._buffers = {
        name: each if each is None else each.cpu() for name, each in twin._buffers.items()
    }
    twin._parameters = {
        name: each if each is None else nn.Parameter(each.detach().cpu(), requires_grad=False)
        for name, each in twin._parameters.items()
    }
    return twin


def seconds_of(run: Callable[[], Tensor]) -> float:
    """Return the median seconds of a call, on whatever device its result is."""
    device = [run() for _ in range(_WARM_UP)][-1].device
    took = []
    for _ in range(_CALLS):
        _wait_for(device)
        start = time.perf_counter()
        run()
        _wait_for(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def key_of(layer: QuantizedLayer, x: Tensor, *, keep_packed: bool) -> str:
    """Return what the speed of a layer depends on, as the key of `winners`."""
    scheme = layer.scheme
    geometry = layer.geometry()
    is_channels_last = x.ndim == 4 and not x.is_contiguous()
    parts = {
        "card": _card(x.device),
        "versions": _versions(),
        "layer": [layer.kind, *layer.weight_shape, *(geometry.flat() if geometry else ())],
        "formats": [str(scheme.weight), *(str(grid and grid.format) for grid in scheme.inputs())],
        "groups": scheme.weight_groups,
        "input": [str(x.dtype), *x.shape],
    }
    words = [f"{name} {value}" for name, value in parts.items()]
    words += ["channels last"] * is_channels_last + ["packed"] * keep_packed
    return ", ".join(words)


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=1)
def _versions() -> str:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"msfp {__version__}, torch {torch.__version__}, triton {triton}"
