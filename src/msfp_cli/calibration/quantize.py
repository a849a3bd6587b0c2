"""Quantize a float denoiser as a calibration says."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.errors import RunError
from msfp_cli.formats.compensation import move_into_cells
from msfp_cli.formats.multipliers import step_sizes
from msfp_cli.formats.packing import unpack
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.replace import find_layers, store_layers_, store_variants_
from msfp_cli.pipelines.denoiser import fingerprint


def print_of(denoiser: nn.Module) -> str:
    """Return the fingerprint of a float denoiser, whichever type it was loaded in."""
    return fingerprint(denoiser, torch.bfloat16)


def refuse_other_weights(denoisers: Mapping[str, nn.Module], calibration: Calibration) -> None:
    """Refuse float denoisers that are not those that were calibrated.

    Calibrations of earlier versions do not say which those were.

    Raises:
        RunError: one has other parameters, or is missing.
    """
    for component, expected in (calibration.fingerprints or {}).items():
        denoiser = denoisers.get(component)
        if denoiser is None or print_of(denoiser) != expected:
            raise RunError(
                f"{calibration.source.model} was changed since it was calibrated: its {component} "
                "is another one; run the same `msfp calibrate` again, with --overwrite"
            )


def moved_weight(calibration: Calibration, component: str, name: str, weight: Tensor) -> Tensor:
    """Return what is rounded of a weight, moved to where it rounds to the calibration's codes.

    Arguments:
        name: of the layer.
        weight: of the float layer; it stays as it is.

    Returns:
        The weight, rotated where inputs are; moved if the calibration has codes for it.
    """
    codes = calibration.codes.get(component, {}).get(name)
    scheme = calibration.layers[component][name].scheme
    fmt = scheme.weight
    weight = scheme.transform.rotate(weight)
    if codes is None or fmt is None:
        return weight
    codes = unpack(codes.to(weight.device), fmt.bits, weight.shape)
    book = torch.tensor(fmt.code_book, dtype=torch.float32, device=weight.device)  # all are exact
    integers = book.index_select(0, codes.view(-1).int()).view(weight.shape)
    sizes = step_sizes(*calibration.steps_of(component, name), weight.shape)
    return move_into_cells(weight, sizes.to(weight.device), integers, fmt)


@torch.no_grad()
def move_weights_(denoiser: nn.Module, calibration: Calibration, component: str) -> None:
    """Rotate and move each weight of a float denoiser, see `moved_weight`.

    All that rounds the weights afterwards, or begins to train them, begins at the calibration's
    codes.
    """
    layers = find_layers(denoiser)
    for name in calibration.table(component):
        if name in layers:  # another model is refused where it is used
            weight = layers[name].weight
            weight.data = moved_weight(calibration, component, name, weight.data)


def quantize_(
    denoiser: nn.Module, calibration: Calibration, component: str, *, keep_packed: bool = False
) -> nn.Module:
    """Replace the denoiser's layers by quantized ones, one after another, to save memory.

    Arguments:
        keep_packed: leave their weights packed when they run, which takes less memory.
    """
    table = calibration.table(component)
    lift = calibration.input_lifts.get(component)
    store_layers_(
        denoiser,
        table,
        calibration.scales[component],
        calibration.multipliers.get(component, {}),
        functools.partial(moved_weight, calibration, component),
        clock=calibration.clock(component),
    )
    if lift is not None:
        rows = lift.rows()
        store_variants_(denoiser, {n: rows for n, each in table.items() if each.variants > 1})
    if keep_packed:
        prepare_(denoiser, keep_packed=True)
    return denoiser
