"""Quantize diffusers pipelines to 4-bit floating point, weights and activations.

Importing this package registers the format with diffusers, so that a stock ``DiffusionPipeline.from_pretrained``
loads an export. Everything else is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msfp_cli.registration import register

if TYPE_CHECKING:
    from msfp_cli.calibrate import calibrate_
    from msfp_cli.calibration import Calibration, quantize_
    from msfp_cli.errors import MsfpError
    from msfp_cli.export import export_, load_calibrated
    from msfp_cli.formats import FloatFormat
    from msfp_cli.loading import load_pipeline
    from msfp_cli.pipeline import MSFPPipeline
    from msfp_cli.recipe import CalibrateRecipe, ModelSource, RecordRecipe
    from msfp_cli.record import record_calls
    from msfp_cli.rounding import Grid, dequantize, fake_quantize, quantize
    from msfp_cli.surgery import prepare_

__version__ = "0.1.0"

_HOMES = {
    "calibrate": ("calibrate_",),
    "calibration": ("Calibration", "quantize_"),
    "errors": ("MsfpError",),
    "export": ("export_", "load_calibrated"),
    "formats": ("FloatFormat",),
    "loading": ("load_pipeline",),
    "pipeline": ("MSFPPipeline",),
    "recipe": ("CalibrateRecipe", "ModelSource", "RecordRecipe"),
    "record": ("record_calls",),
    "rounding": ("Grid", "dequantize", "fake_quantize", "quantize"),
    "surgery": ("prepare_",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604 (checked against _HOMES by a test)
    "Calibration",
    "CalibrateRecipe",
    "FloatFormat",
    "Grid",
    "MSFPPipeline",
    "ModelSource",
    "MsfpError",
    "RecordRecipe",
    "calibrate_",
    "dequantize",
    "export_",
    "fake_quantize",
    "load_calibrated",
    "load_pipeline",
    "prepare_",
    "quantize",
    "quantize_",
    "record_calls",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    """Import a public name's module when it is first asked for."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'msfp_cli' has no attribute {name!r}")
    return getattr(import_module(f"msfp_cli.{_HOME_OF[name]}"), name)


register()
