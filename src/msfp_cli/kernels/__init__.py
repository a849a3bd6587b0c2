"""Ways to execute a quantized layer: one file each, one registry that picks.

A kernel is made from a layer once, on the device where the layer is, and then called with the layer and its input.
`reference` defines what every other kernel has to compute; it is always available, runs on any device, and is what
gradients take. The others say why they refuse a layer, and the first that does not refuse gets it.
"""

from typing import TYPE_CHECKING

from msfp_cli.errors import UsageError
from msfp_cli.kernels.cpu import Cpu
from msfp_cli.kernels.kernel import Kernel
from msfp_cli.kernels.reference import Reference

if TYPE_CHECKING:
    from msfp_cli.layers import QuantizedLayer

AUTO = "auto"
_IN_TURN: tuple[type[Kernel], ...] = (Cpu, Reference)
KERNELS = {kernel.name: kernel for kernel in _IN_TURN}


def choose_kernel(layer: "QuantizedLayer", wanted: str = AUTO) -> tuple[type[Kernel], str]:
    """Return the kernel that runs a layer, and why.

    Arguments:
        wanted: a name in `KERNELS`, or ``auto`` for the first that does not refuse.

    Raises:
        UsageError: there is no such kernel.
    """
    if wanted != AUTO and wanted not in KERNELS:
        raise UsageError(f"unknown kernel {wanted!r}; choose one of {', '.join((AUTO, *KERNELS))}")
    refusals: list[str] = []
    for name, kernel in KERNELS.items():
        reason = kernel.refusal(layer) if wanted in (AUTO, name) else None
        if reason is not None:
            refusals.append(f"{name}: {reason}")
        elif wanted in (AUTO, name):
            return kernel, "; ".join(refusals)
    return Reference, "; ".join(refusals)
