"""What a kernel is: one way to execute one layer."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from msfp_cli.layers.base import QuantizedLayer


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
      can go.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str] | None] = frozenset()
    device: ClassVar[str | None] = None
    lays_out: ClassVar[bool] = False
    holds_weight = False

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
