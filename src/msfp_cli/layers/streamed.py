"""Weights that stay in the files of a model: each is read when its layer runs, then let go of.

So a model in full precision takes the memory of its largest layer, whatever its size. Only the
weights of layers that can be quantized are streamed, which are nearly all bytes of a model; norms
and biases are in memory. Files are mapped: where a weight needs no conversion, the layer uses the
very pages that the system keeps of the file, and reads the disk only if it had to drop them.

While a weight is not there, its place is taken by one NaN that is expanded to the weight's shape.
It has the shape, type and device of the weight, takes no memory, and whoever reads it by mistake
gets nothing that looks like a result. `weight_in_memory` is for whoever needs the values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from msfp_cli.files.documents import open_tensors
from msfp_cli.layers.quantized import FloatLayer

_ATTRIBUTE = "weight_in_file"


class WeightInFile:
    """The weight of one layer, in memory as long as somebody uses it.

    Arguments:
        file: a safetensors file.
        name: of the tensor in it.
        place: what stands in for the weight, of its shape, type and device.
    """

    def __init__(self, file: Path, name: str, place: Tensor) -> None:
        self.file = file
        self.name = name
        self.place = place
        self.users = 0

    def load_(self, layer: nn.Module) -> None:
        """Read the weight of the layer, unless that was done."""
        weight = layer._parameters.get("weight")  # none if the layer was quantized meanwhile
        if weight is not None and self.users == 0:
            with open_tensors(self.file, redo="download the model again") as file:
                weight.data = file.get_tensor(self.name).to(self.place)
        self.users += 1

    def drop_(self, layer: nn.Module) -> None:
        """Let go of the weight, if nobody else uses it."""
        self.users -= 1
        weight = layer._parameters.get("weight")
        if weight is not None and self.users == 0:
            weight.data = self.place


def stream_(layer: FloatLayer, file: Path, name: str, place: Tensor) -> None:
    """Leave the weight of a layer in its file from now on; it is read whenever the layer runs.

    Arguments:
        name: of the tensor in the file.
        place: of one element, of the type and on the device in which the layer computes.
    """
    shape = layer.weight.shape
    nothing = torch.full_like(place, torch.nan).expand(shape)
    layer.weight = nn.Parameter(nothing, requires_grad=False)
    weight = WeightInFile(file, name, nothing)
    setattr(layer, _ATTRIBUTE, weight)
    layer.register_forward_pre_hook(lambda layer, args: weight.load_(layer))
    layer.register_forward_hook(lambda layer, args, output: weight.drop_(layer), always_call=True)


@contextmanager
def weight_in_memory(layer: nn.Module) -> Iterator[None]:
    """Have the weight of a layer in memory while the context is open; most are there anyway."""
    weight: WeightInFile | None = getattr(layer, _ATTRIBUTE, None)
    if weight is None:
        yield
        return
    weight.load_(layer)
    try:
        yield
    finally:
        weight.drop_(layer)
