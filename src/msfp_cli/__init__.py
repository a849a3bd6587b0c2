"""Quantize diffusers pipelines to 4-bit floating point, weights and activations.

Importing this package registers the format with diffusers, so that a stock
``DiffusionPipeline.from_pretrained`` loads an export. Everything else is imported when it is first
asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msfp_cli.checkpoint.registration import register
from msfp_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from msfp_cli.calibration.calibrate import calibrate_
    from msfp_cli.calibration.recipe import CalibrateRecipe
    from msfp_cli.calibration.result import Calibration, quantize_
    from msfp_cli.checkpoint.export import export_, load_calibrated
    from msfp_cli.checkpoint.pipeline import MSFPPipeline
    from msfp_cli.errors import MsfpError
    from msfp_cli.formats.float_format import FloatFormat
    from msfp_cli.formats.rounding import Grid, dequantize, fake_quantize, quantize
    from msfp_cli.layers.prepare import prepare_
    from msfp_cli.pipelines.loading import load_pipeline
    from msfp_cli.pipelines.source import ModelSource
    from msfp_cli.recording.recipe import RecordRecipe
    from msfp_cli.recording.record import record_calls

_HOMES = {
    "calibration.calibrate": ("calibrate_",),
    "calibration.recipe": ("CalibrateRecipe",),
    "calibration.result": ("Calibration", "quantize_"),
    "checkpoint.export": ("export_", "load_calibrated"),
    "checkpoint.pipeline": ("MSFPPipeline",),
    "errors": ("MsfpError",),
    "formats.float_format": ("FloatFormat",),
    "formats.rounding": ("Grid", "dequantize", "fake_quantize", "quantize"),
    "layers.prepare": ("prepare_",),
    "pipelines.loading": ("load_pipeline",),
    "pipelines.source": ("ModelSource",),
    "recording.record": ("record_calls",),
    "recording.recipe": ("RecordRecipe",),
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
