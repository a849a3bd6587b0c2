"""Quantize a model that is in memory already."""

from typing import TypeVar

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from msfp_cli.calibration.quantize import quantize_ as quantize_as_calibrated_
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.quantizer import MSFPConfig, mark_quantized_, weight_only_config
from msfp_cli.checkpoint.text_encoder import MSFPTextQuantizer, mark_text_encoder_, text_encoder
from msfp_cli.pipelines.denoiser import refuse_changed

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def quantize_(module: M, how: "MSFPConfig | Calibration", component: str = "") -> M:
    """Replace a module's layers by quantized ones, one after another, to save memory.

    A model of diffusers or transformers can be saved with ``save_pretrained`` afterwards.

    Arguments:
        how: a config quantizes the weights and needs no calibration; a calibration does what it
            says.
        component: the pipeline's name for the module, which a calibration needs.

    Raises:
        UsageError: the module is quantized already, has adapters, or no layer to quantize.
        CheckpointError: a weight is not finite.
    """
    if isinstance(how, Calibration):
        quantize_as_calibrated_(module, how, component)
        return module
    refuse_changed(type(module).__name__, module)
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
