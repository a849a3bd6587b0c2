"""Check that a device rounds inputs as float32 does.

The CPU does. Other devices are asked for float32 (`compilation.settings_of`), but one that has only
16 bits may accept that and compute in these, and `traced` rounds by the last bit of a float32.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from msfp_cli.engines.compilation import CPU, settings_of
from msfp_cli.engines.package import core, import_openvino
from msfp_cli.engines.traced import integers_of
from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid

_GRID = Grid(FloatFormat(2, 1, signed=True), 0.3)
_NUM_VALUES = 1024  # over twice the range of the grid


class _Rounding(nn.Module):
    """Rounds to the grid of a layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the integers of the grid."""
        return integers_of(x, _GRID)


@functools.cache
def refuse_inexact(device: str) -> None:
    """Refuse a device on which a value gets another integer than in torch.

    Raises:
        UsageError: there is such a value.
    """
    if device == CPU:
        return
    x = torch.linspace(-2, 2, _NUM_VALUES) * _GRID.max_value
    rounding = _Rounding()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, that Python's branches are fixed
        traced = torch.jit.trace(rounding, x)
        model = import_openvino().convert_model(traced, example_input=x)
    model.reshape([len(x)])
    compiled = core().compile_model(model, device, settings_of(device, torch.float32))
    if not torch.equal(torch.from_numpy(compiled([x.numpy()])[0].copy()), rounding(x)):
        raise UsageError(
            f"OpenVINO's device {device!r} computes with too few bits to round the inputs of "
            "layers; choose kernel 'openvino', which runs on the CPU"
        )
