"""Look rows of a quantized table up: what an ``nn.Embedding`` does, but the rows are codes.

There is nothing to multiply and no input to round, so this is exact, runs everywhere, and is the
only way for a table.
"""

from typing import ClassVar

from torch import Tensor

from msfp_cli.formats.packing import unpack
from msfp_cli.formats.rounding import Grid, dequantize
from msfp_cli.layers.base import Kernel, QuantizedLayer


def look_up(table: QuantizedLayer, index: Tensor) -> Tensor:
    """Return rows of a table.

    Arguments:
        index: whole numbers, any shape.

    Returns:
        ``(*index.shape, embedding_dim)``, in the type of the model.
    """
    fmt = table.weight_format()
    flat = index.reshape(-1)
    count, width = table.weight_shape
    if width * fmt.bits % 8:  # rows do not begin on whole bytes
        codes = table.codes().index_select(0, flat)
    else:
        packed = table.get_buffer("weight_codes").view(count, -1).index_select(0, flat)
        codes = unpack(packed.view(-1), fmt.bits, (len(flat), width))
    scale = table.get_buffer("weight_scale").index_select(0, flat)
    rows = dequantize(codes, Grid(fmt, scale[:, None])).to(table.weight_dtype)
    return rows.view(*index.shape, width)


class Lookup(Kernel):
    """Runs tables."""

    name: ClassVar[str] = "lookup"
    kinds: ClassVar[frozenset[str] | None] = frozenset({"embedding"})

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Refuse nothing."""
        return None

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Need nothing: the codes stay packed."""

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Look the rows `x` of `layer` up."""
        return look_up(layer, x)
