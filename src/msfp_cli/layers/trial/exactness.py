"""Whether a kernel's sums are right on this machine: the integers of `reference`.

The exact sums are computed on the CPU, because the libraries of a GPU may multiply pictures by
methods that round in between. They are compared at the first and the last rows of the input.
"""

import copy

import torch
from torch import Tensor, nn

from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.arithmetic import Arithmetic
from msfp_cli.layers.kernels.reference import run_reference

_TOKENS = 64  # at either end of an input
_LAST_DIGITS = 4 * torch.finfo(torch.float32).eps
_proven: set[str] = set()  # ways of computing whose sums were found right in float32


def is_exact(kernel: Kernel, layer: QuantizedLayer, x: Tensor) -> bool:
    """Whether a kernel's sums are the integers of `reference`, at both ends of the input.

    There, two sums that differ by one are a factor apart, unless that is below the last digits.
    Outputs are compared in float32 where no layer of these formats was before, and in the type of
    the input then, because a compiler makes a kernel anew for each type.
    """
    way = way_of(layer)
    values = x if way in _proven else x.float()
    ends = _ends(layer, values).float().cpu()
    with torch.device("cpu"):
        twin = _on_cpu(layer)
        integers = [twin.integers(each) for each in range(twin.scheme.hub)]
        arithmetic = Arithmetic.of(twin, integers)
        expected = run_reference(twin, ends, arithmetic)
        factor, constant, _ = arithmetic.of_variant(twin.variant(), twin.kernel_bias)
    found = _ends(layer, kernel(layer, values)).float().cpu()
    along = (-1, 1, 1) if arithmetic.geometry else (-1,)
    digits = _LAST_DIGITS * (expected.abs().amax() + constant.abs().amax())
    digits = digits + torch.finfo(values.dtype).eps * expected.abs()
    is_right = bool(((found - expected).abs() <= factor.view(along) / 4 + digits).all())
    if is_right:
        _proven.add(way)
    return is_right


def _ends(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Return the first and the last rows of an input, or of an output: pictures, or tokens."""
    if layer.geometry() is None:
        tokens = x.reshape(-1, x.shape[-1])
        return torch.cat([tokens[:_TOKENS], tokens[-_TOKENS:]])
    return torch.cat([x[:1], x[-1:]]) if len(x) > 1 else x


def _on_cpu(layer: QuantizedLayer) -> QuantizedLayer:
    """Return a copy of a layer whose tensors are on the CPU."""
    twin = copy.copy(layer)
    twin._buffers = {
        name: each if each is None else each.cpu() for name, each in twin._buffers.items()
    }
    twin._parameters = {
        name: each if each is None else nn.Parameter(each.detach().cpu(), requires_grad=False)
        for name, each in twin._parameters.items()
    }
    return twin


def way_of(layer: QuantizedLayer) -> str:
    """Return what the way of computing depends on, but not the sizes."""
    scheme = layer.scheme
    geometry = layer.geometry()
    grids = [grid for grid in scheme.inputs() if grid is not None]
    formats = [str(scheme.weight), *dict.fromkeys(str(grid.format) for grid in grids)]
    words = [layer.kind, *(geometry.flat() if geometry else ()), *formats, scheme.weight_groups]
    has_zero_point = any(grid.zero_point for grid in grids)
    return f"{words} {has_zero_point=} has_bias={layer.kernel_bias is not None}"
