"""Round the input to its grid, then run the layer in floating point: what training does.

    y = conv(fake_quantize(x), dequantize(codes)) + bias

A convolution pads *after* rounding, with real zeros rather than with the zero point, as the float
layer does. Sums are in floating point, so their last digits depend on the order in which a
processor adds.
"""

from typing import ClassVar

import torch
from torch import Tensor

from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.layers.base import Kernel, QuantizedLayer


def simulate(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Run `layer` on `x` in the type of `x`; gradients reach `x`."""
    if layer.scheme.input is not None:
        x = _rounded_input(layer, x, layer.variant())
    return layer.apply_weight(x, layer.float_weight().to(x.dtype))


def with_gradients(layer: QuantizedLayer, y: Tensor, x: Tensor) -> Tensor:
    """Return a kernel's output as autograd needs it, for an input that needs no gradient.

    The bias gets its gradient. The output of a convolution is laid out as the float layer's would
    be: the backward pass of torch's ``group_norm`` ends the process where an input that needs no
    gradient has its channels last.

    Arguments:
        y: the output, without a gradient; its numbers stay as they are.
        x: the input.
    """
    if y.ndim == 4 and x.is_contiguous():
        y = y.contiguous()
    bias = layer.kernel_bias
    if bias is None or not bias.requires_grad:
        return y
    zero = (bias - bias.detach()).to(y.dtype)  # with the gradient of the bias
    return y + zero.view(-1, *[1] * (len(layer.weight_shape) - 2))


class Simulated(Kernel):
    """Runs any layer on any device; slower than the float layer, as it rounds before it runs."""

    name: ClassVar[str] = "simulated"
    kinds: ClassVar[frozenset[str] | None] = None

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Refuse nothing."""
        return None

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Need nothing: the layer's codes are read at each call."""

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run `layer` on `x`."""
        return simulate(layer, x)


def _rounded_input(layer: QuantizedLayer, x: Tensor, variant: int | Tensor) -> Tensor:
    """Round the input of a variant."""
    usual, *lifted = input_grids(layer, variant)
    rounded = fake_quantize(x, usual)
    if not lifted:
        return rounded
    condition = torch.as_tensor(is_lifted(layer, variant))
    return torch.where(condition, fake_quantize(x, lifted[0]), rounded)


def is_lifted(layer: QuantizedLayer, variant: int | Tensor) -> bool | Tensor:
    """Whether the input of a variant is lifted, as a tensor where `variant` is one."""
    return variant >= layer.scheme.hub


def input_grids(layer: QuantizedLayer, variant: int | Tensor) -> list[Grid]:
    """Return the grid of a variant's input.

    Where `variant` is a tensor, the grid's numbers are, too, and a grid for lifted inputs comes
    second, if the layer has one: whoever calls chooses by `is_lifted`.
    """
    scheme = layer.scheme
    assert scheme.input is not None, "this layer's input is in floating point"
    if isinstance(variant, int):
        return [grid for grid in (scheme.input_of(variant),) if grid is not None]
    grids = [grid for grid in scheme.inputs()[: scheme.hub] if grid is not None]
    numbers = torch.tensor([[grid.scale, grid.zero_point] for grid in grids], device=variant.device)
    member = variant.view(1) % scheme.hub
    scale, zero_point = numbers.index_select(0, member)[0].unbind()
    usual = Grid(scheme.input.format, scale, zero_point)  # type: ignore[arg-type]  # the zero point is a tensor like the scale
    return [usual] if scheme.lifted_input is None else [usual, scheme.lifted_input]
