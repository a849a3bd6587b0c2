"""Quantize a float denoiser as a calibration says."""

import torch
from torch import nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.formats.compensation import move_into_cells
from msfp_cli.formats.multipliers import step_sizes
from msfp_cli.formats.packing import unpack_integers
from msfp_cli.layers.replace import find_layers, store_layers_


@torch.no_grad()
def move_weights_(denoiser: nn.Module, calibration: Calibration, component: str) -> None:
    """Move each weight of a float denoiser to where it rounds to the calibration's codes.

    All that rounds the weights afterwards, or begins to train them, begins at these codes.
    """
    layers = find_layers(denoiser)
    table = calibration.table(component)
    for name, packed in calibration.codes.get(component, {}).items():
        fmt = table[name].weight
        if fmt is None or name not in layers:  # another model, which is refused where it is used
            continue
        weight = layers[name].weight
        integers = unpack_integers(packed.to(weight.device), fmt, weight.shape).float()
        sizes = step_sizes(*calibration.steps_of(component, name), weight.shape)
        weight.data = move_into_cells(weight, sizes.to(weight.device), integers, fmt)


def quantize_(denoiser: nn.Module, calibration: Calibration, component: str) -> nn.Module:
    """Replace the denoiser's layers by quantized ones, one after another, to save memory."""
    move_weights_(denoiser, calibration, component)
    store_layers_(
        denoiser,
        calibration.table(component),
        calibration.scales[component],
        calibration.multipliers.get(component, {}),
    )
    return denoiser
