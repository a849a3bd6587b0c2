"""Quantize a model that is in memory already."""

from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.quantize import quantize_ as quantize_as_calibrated_
from msfp_cli.calibration.quantize import refuse_other_weights
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.quantizer import (
    MSFPConfig,
    clock_settings,
    mark_quantized_,
    schema_of,
    weight_only_config,
)
from msfp_cli.checkpoint.text_encoder import MSFPTextQuantizer, mark_text_encoder_, text_encoder
from msfp_cli.errors import UsageError
from msfp_cli.layers.replace import quantized_layers, require_network
from msfp_cli.pipelines.denoiser import refuse_changed
from msfp_cli.processes import ALONE, Processes
from msfp_cli.recording.result import Recording
from msfp_cli.version import __version__

M = TypeVar("M", bound=nn.Module)
Pipeline: TypeAlias = Any  # of diffusers, which is untyped


@torch.no_grad()
def quantize_(module: M, how: "MSFPConfig | Calibration", component: str = "") -> M:
    """Replace a module's layers by quantized ones, one after another, to save memory.

    A model of diffusers or transformers can be saved with ``save_pretrained`` afterwards.

    Arguments:
        how: a config quantizes the weights and needs no calibration; a calibration does what it
            says.
        component: the pipeline's name for the module, which a calibration needs.

    Raises:
        UsageError: the module is quantized already, has adapters, has no layer to quantize, or is a
            whole pipeline; the calibration has no such component; or `how` is neither, or has a
            value of a wrong type.
        RunError: the module is not the one that was calibrated.
        CheckpointError: a weight is not finite.
    """
    require_network(module)
    if not isinstance(how, MSFPConfig | Calibration):
        raise UsageError(
            f"a {type(how).__name__} does not say how to quantize; "
            "give MSFPConfig(weights=4), or a Calibration"
        )
    refuse_changed(type(module).__name__, module)
    if isinstance(how, Calibration):
        if quantized_layers(module):
            raise UsageError(f"{type(module).__name__} is quantized already; load it again")
        _require_component(how, component)
        refuse_other_weights({component: module}, how)
        quantize_as_calibrated_(module, how, component)
        mark_calibrated_(module, how, component)
        return module
    if isinstance(module, PreTrainedModel):
        encoder = text_encoder(module, how)
    else:
        encoder = how.encoder(module)
    for name in sorted(encoder.weights):
        encoder.encode_(module, name, module.get_parameter(name))
    config = weight_only_config(encoder.table, how.source)
    if isinstance(module, PreTrainedModel):
        mark_text_encoder_(module, MSFPTextQuantizer(config, pre_quantized=True))
    elif isinstance(module, ModelMixin):
        mark_quantized_(module, config)
    return module


def _require_component(calibration: Calibration, component: str) -> None:
    if component not in calibration.layers:
        names = ", ".join(map(repr, calibration.layers))
        raise UsageError(f"the calibration has no component {component!r}; give one of {names}")


def calibrate_(
    pipe: Pipeline,
    recording: Recording,
    held_out: Recording,
    recipe: CalibrateRecipe,
    *,
    processes: Processes = ALONE,
    work: Path | None = None,
    max_memory: int | None = None,
) -> Calibration:
    """Calibrate a pipeline, and leave it quantized: to draw with, or to save as an export.

    Arguments:
        recording: calls to choose on.
        held_out: calls to measure on.
        processes: those that share the work; all of them get the whole result.
        work: where finished parts of compensation are kept, so that a killed run goes on.
        max_memory: bytes that this process may take; less takes longer and gives the same result.

    Raises:
        CalibrationError: an activation holds a NaN or infinity.
        UsageError: a denoiser is quantized already, has adapters, or has no layer to quantize.
        ModelError: a weight holds a NaN or infinity.
    """
    calibration = calibrate_denoisers_(
        pipe, recording, held_out, recipe, processes=processes, work=work, max_memory=max_memory
    )
    for component in calibration.layers:
        mark_calibrated_(pipe.components[component], calibration, component)
    quantize_text_encoders_(pipe, calibration)
    return calibration


def mark_calibrated_(
    denoiser: nn.Module, calibration: Calibration, component: str, *, is_tuned: bool = False
) -> None:
    """Mark a denoiser that was quantized as a calibration says, so that it can be saved.

    Arguments:
        is_tuned: whether fine-tuning has changed it since.
    """
    layers = quantized_layers(denoiser)
    config = MSFPConfig(
        layers={name: layer.scheme.to_json() for name, layer in layers.items()},
        schema_version=schema_of(layer.scheme for layer in layers.values()),
        **clock_settings(calibration.clock(component)),
        source=calibration.source.to_json(),
        sampling=calibration.record.arguments(),
        is_tuned=is_tuned,
        tool_version=__version__,
    )
    mark_quantized_(denoiser, config)


def quantize_text_encoders_(pipe: Pipeline, calibration: Calibration) -> None:
    """Quantize the weights of the text encoders that a calibration names (`--also`)."""
    origin = calibration.source.to_json()
    for name, bits in calibration.recipe.text_encoders().items():
        quantize_(pipe.components[name], MSFPConfig(weights=bits, source=origin))
