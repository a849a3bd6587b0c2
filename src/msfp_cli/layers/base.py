"""A quantized layer as its kernel sees it, and what a kernel is: one way to execute one layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.multipliers import LARGEST_INTEGER
from msfp_cli.formats.rounding import Grid, per_channel
from msfp_cli.layers.kernels.geometry import Geometry
from msfp_cli.layers.scheme import LayerScheme


class QuantizedLayer(nn.Module, ABC):
    """A quantized layer as its kernel sees it; `quantized.Quantized` implements it."""

    kind: ClassVar[str]  # the name of its row
    scheme: LayerScheme
    weight_shape: torch.Size
    weight_dtype: torch.dtype  # of the model: what a float weight would have
    bias: Any  # nn.Parameter or None, which torch declares differently in its layers
    kernel: "Kernel | None"

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight in the model's type, shape of the float layer's."""

    @abstractmethod
    def float_weight(self) -> Tensor:
        """Return what the input of a kernel is multiplied by; float32 where it is held as codes.

        It is the weight, rotated where inputs are.
        """

    @abstractmethod
    def codes(self, member: int | Tensor = 0) -> Tensor:
        """Return the codes of a member's weight, uint8, shape of the float weight."""

    @abstractmethod
    def integers(self, member: int | Tensor = 0) -> Tensor:
        """Return the integers of a member's weight, int8, shape of the float weight."""

    @abstractmethod
    def take_kernel_(self, kernel: "Kernel") -> None:
        """Run with a kernel that was made from this layer, until the layer is changed."""

    @abstractmethod
    def variant(self) -> int | Tensor:
        """Return which variant of the layer runs at the timestep that the denoiser is at."""

    @abstractmethod
    def member(self, otherwise: int | None = None) -> int | Tensor:
        """Return which member of the layer's hub serves the timestep that the denoiser is at.

        Arguments:
            otherwise: the answer if the denoiser is not running, which is an error without it.
        """

    @abstractmethod
    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the float operation with the given weight and the `kernel_bias`."""

    @property
    def kernel_bias(self) -> Tensor | None:
        """The bias that a kernel adds: the layer's, unless outputs are multiplied by a size first.

        It is read at each call.
        """
        bias: Tensor | None = None if self.scheme.transform.token_scales else self.bias
        return bias

    @abstractmethod
    def geometry(self) -> Geometry | None:
        """Return how a convolution slides; None if the layer is not one.

        Raises:
            ValueError: it does not pad with the same number of zeros on both sides.
        """

    def weight_format(self) -> FloatFormat:
        """Return the format of the weight, which has to be quantized."""
        assert self.scheme.weight is not None, "this layer's weight is in floating point"
        return self.scheme.weight

    @property
    def largest_integer(self) -> int:
        """A bound of the weight's integers, their multipliers included."""
        return LARGEST_INTEGER if self.scheme.weight_groups else self.weight_format().largest

    def weight_grid(self) -> Grid:
        """Return the grid of the weight, one scale per output channel.

        Integers of groups have their multiplier, so this is the scale of theirs, too.
        """
        scale = per_channel(self.get_buffer("weight_scale"), len(self.weight_shape))
        return Grid(self.weight_format(), scale)


class Kernel(ABC):
    """A way to execute one layer, made from the layer where it is, and called many times.

    Arguments:
        keep_packed: keep the weight in its packed bits, and unpack it at every call.

    A subclass says of itself:

    - ``name``: what users call it;
    - ``kinds``: the kinds of layer that it can run, names in `quantized.KINDS`; none unless it says
      so, and None stands for every kind;
    - ``device``: the only type of device that it runs on, if there is one;
    - ``lays_out``: whether it brings the weight into a form of its own, unless that is kept packed;
    - ``holds_weight``: whether this one holds the weight in such a form, so that the layer's codes
      can go;
    - ``seconds``: what a call of this one took and of others, by name, where that chose it.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str] | None] = frozenset()
    device: ClassVar[str | None] = None
    lays_out: ClassVar[bool] = False
    holds_weight = False
    seconds: Mapping[str, float] = MappingProxyType({})

    @staticmethod
    @abstractmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say in a few words why a layer of these kinds cannot run where it is, or nothing."""

    @abstractmethod
    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Prepare to run the layer."""

    @abstractmethod
    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the layer on its input, in the input's type."""

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of a weight that it holds, int8, shape of the float weight."""
        raise NotImplementedError(f"kernel {self.name!r} does not hold a weight")
