"""What a kernel is: one way to execute one layer."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from msfp_cli.layers.quantized import QuantizedLayer


class Kernel(ABC):
    """A way to execute one layer, made from the layer where it is, and called many times.

    Arguments:
        keep_packed: keep the weight in its packed bits, and unpack it at every call.
    """

    name: ClassVar[str]
    device: ClassVar[str | None] = None  # the only type of device it runs on, where there is one
    lays_out: ClassVar[bool] = (
        False  # whether it brings the weight into a form of its own, unless it is kept packed
    )
    holds_weight = (
        False  # whether it holds the weight in a form of its own, so that the layer's codes can go
    )

    @staticmethod
    @abstractmethod
    def refusal(layer: "QuantizedLayer") -> str | None:
        """Say in a few words why a layer cannot run this way where it is, or nothing."""

    @abstractmethod
    def __init__(self, layer: "QuantizedLayer", *, keep_packed: bool) -> None:
        """Prepare to run the layer."""

    @abstractmethod
    def __call__(self, layer: "QuantizedLayer", x: Tensor) -> Tensor:
        """Run the layer on its input, in the input's type."""

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of one set of weights, int8, shape of the float weight, where the kernel holds it."""
        raise NotImplementedError(f"kernel {self.name!r} holds no weight")
