"""Quantize diffusers pipelines to 4-bit floating point, weights and activations.

Importing this package registers the format with diffusers, so that a stock
``DiffusionPipeline.from_pretrained`` loads an export. Everything else is imported when it is first
asked for.
"""

from importlib import import_module
from typing import Any

from msfp_cli.checkpoint.registration import register
from msfp_cli.version import __version__ as __version__

# Every public name and the module that has it. Type checkers read the same from `__init__.pyi`.
_HOME = {
    "CalibrateRecipe": "calibration.recipe",
    "Calibration": "calibration.result",
    "FloatFormat": "formats.float_format",
    "Grid": "formats.rounding",
    "MSFPConfig": "checkpoint.quantizer",
    "MSFPPipeline": "checkpoint.pipeline",
    "ModelSource": "pipelines.loading",
    "MsfpError": "errors",
    "RecordRecipe": "recording.recipe",
    "calibrate_": "checkpoint.in_memory",
    "dequantize": "formats.rounding",
    "export_": "checkpoint.export",
    "fake_quantize": "formats.rounding",
    "load_calibrated": "checkpoint.export",
    "load_pipeline": "pipelines.loading",
    "prepare_": "layers.prepare",
    "quantize": "formats.rounding",
    "quantize_": "checkpoint.in_memory",
    "record_calls": "recording.record",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    """Import a public name's module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'msfp_cli' has no attribute {name!r}")
    return getattr(import_module(f"msfp_cli.{_HOME[name]}"), name)


register()
