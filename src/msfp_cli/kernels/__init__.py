"""Ways to execute a quantized layer: one file each, one registry that picks.

A kernel is a function ``(layer, x) -> y``. `reference` defines what every other kernel has to compute; it is always
available and runs on any device.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from msfp_cli.kernels import reference

if TYPE_CHECKING:
    from msfp_cli.layers import QuantizedLayer

Kernel = Callable[["QuantizedLayer", Tensor], Tensor]

KERNELS: dict[str, Kernel] = {"reference": reference.run}
