"""Ways to execute a quantized layer: one file each, one registry that picks.

A kernel is made from a layer once, on the device where the layer is, and then called with the layer
and its input. `simulated` computes in floating point, with any layer on any device, and is what
gradients take. `reference` defines what a layer is in integers (see `arithmetic`), and `cpu` has
its bits; both are there to be compared with. Kernels say why they refuse a layer, and the first
that does not refuse gets it; those for another type of device are not asked. On a GPU that is
`measured`, which lets the kernels there compete when the layer first runs. Tables have a kernel of
their own, `lookup`.
"""

import os

from msfp_cli.errors import UsageError
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.cpu import Cpu
from msfp_cli.layers.kernels.cuda_fp8 import CudaFp8
from msfp_cli.layers.kernels.lookup import Lookup
from msfp_cli.layers.kernels.reference import Reference
from msfp_cli.layers.kernels.simulated import Simulated
from msfp_cli.layers.trial.measured import RIVALS, Measured

AUTO = "auto"
MEASURED = Measured.name  # what `choose_kernel` answers where a first call is to tell
_OVERRIDE = "MSFP_KERNEL"  # takes the place of ``auto``, for programs that others wrote
_IN_TURN: tuple[type[Kernel], ...] = (Cpu, Measured, Simulated)
_NAMED: tuple[type[Kernel], ...] = (*RIVALS, CudaFp8, Reference, Cpu, Simulated)
KERNELS: dict[str, type[Kernel]] = {kernel.name: kernel for kernel in _NAMED}


def choose_kernel(layer: QuantizedLayer, name: str = AUTO) -> tuple[type[Kernel], str]:
    """Return the kernel that runs a layer, and why.

    Arguments:
        name: a name in `KERNELS`, or ``auto``: what the environment variable ``MSFP_KERNEL`` names,
            else the first that does not refuse.

    Raises:
        UsageError: there is no such kernel.
    """
    override = os.environ.get(_OVERRIDE) if name == AUTO else None
    name = override or name
    if name != AUTO and name not in KERNELS:
        names = ", ".join((AUTO, *KERNELS))
        if override:
            raise UsageError(f"{_OVERRIDE}={name} in the environment is not one of {names}")
        raise UsageError(
            f"unknown kernel {name!r}; choose one of {names}, or load the pipeline with openvino "
            "or openvino-qk8"
        )
    if _refusal(Lookup, layer) is None:
        return Lookup, ""
    refusals: list[str] = []
    for kernel in _candidates(layer) if name == AUTO else (KERNELS[name],):
        reason = _refusal(kernel, layer)
        if reason is None:
            return kernel, "; ".join(refusals)
        refusals.append(f"{kernel.name}: {reason}")
    return Simulated, "; ".join(refusals)


def words_for(asked: str) -> tuple[str, str, str]:
    """Return the kernel that is asked for, how a message calls it, and how to ask for none.

    Arguments:
        asked: as in `choose_kernel`; only the environment takes the place of ``auto``.
    """
    override = os.environ.get(_OVERRIDE) if asked == AUTO else None
    if override:
        return override, f"{_OVERRIDE}={override} in the environment", f"unset {_OVERRIDE}"
    return asked, f"kernel {asked!r}", f"choose {AUTO!r}"


def _refusal(kernel: type[Kernel], layer: QuantizedLayer) -> str | None:
    """Say why a kernel cannot run a layer; the one place that asks for its kind."""
    if kernel.kinds is not None and layer.kind not in kernel.kinds:
        return f"it does not run layers of the kind {layer.kind!r}"
    return kernel.refusal(layer)


def _candidates(layer: QuantizedLayer) -> list[type[Kernel]]:
    """List the kernels that ``auto`` asks in turn: those for other devices are left out."""
    device = _device_type(layer)
    return [kernel for kernel in _IN_TURN if kernel.device in (None, device)]


def _device_type(layer: QuantizedLayer) -> str:
    """Return the type of device that a layer is on, without computing a quantized weight."""
    tensor = layer.weight if layer.scheme.weight is None else layer.get_buffer("weight_scale")
    return tensor.device.type
