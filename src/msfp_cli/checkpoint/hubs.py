"""Hubs on disk: the first member's codes as they are, and of the others what changed.

In memory a layer has the packed codes of every member, ``weight_codes``, ``(hub, bytes)``. In a
file they are ``(1, bytes)``, and ``weight_changes``, uint8 ``(any,)``, has the changes from the
first member to the second, to the third and so on, one after another (`formats.changes`). A hub
whose changes would take more than the codes themselves is left as it is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError
from msfp_cli.formats.changes import apply_changes, changes_between
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.packing import pack, unpack
from msfp_cli.layers.replace import quantized_layers

_CODES, _CHANGES = "weight_codes", "weight_changes"


def fold(tensors: Mapping[str, Tensor], formats: Mapping[str, FloatFormat]) -> dict[str, Tensor]:
    """Return a denoiser's tensors as a file holds them.

    Arguments:
        tensors: of its state dict.
        formats: of the weights, by layer.
    """
    folded = dict(tensors)
    for name, fmt in formats.items():
        codes = tensors[f"{name}.{_CODES}"]
        if len(codes) == 1:
            continue
        first, *others = [_unpacked(row, fmt) for row in codes.cpu()]
        changes = torch.cat([changes_between(first, other, fmt) for other in others])
        if changes.numel() < codes[1:].numel():
            folded[f"{name}.{_CODES}"] = codes[:1].clone()
            folded[f"{name}.{_CHANGES}"] = changes
    return folded


def make_room_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the layers whose hub is folded the buffers that a file has for them.

    Arguments:
        tensors: of the file.
    """
    for name, layer in quantized_layers(model).items():
        changes = tensors.get(f"{name}.{_CHANGES}")
        if changes is not None and layer.scheme.hub > 1:
            layer._buffers[_CODES] = layer.get_buffer(_CODES)[:1]
            place = layer.get_buffer(_CODES).new_empty(changes.shape)
            layer.register_buffer(_CHANGES, place)


def unfold_(model: nn.Module) -> None:
    """Give the layers the codes of every member, once the file's tensors are loaded.

    Raises:
        CheckpointError: the changes of a layer are not valid.
    """
    for name, layer in quantized_layers(model).items():
        changes = layer._buffers.pop(_CHANGES, None)
        if changes is None:
            continue
        codes = layer.get_buffer(_CODES)
        try:
            members = _members(
                codes[0].cpu(), changes.cpu(), layer.weight_format(), layer.scheme.hub
            )
        except ValueError as error:
            raise CheckpointError(
                f"{name}.{_CHANGES} of the export is damaged ({error}); export again"
            ) from None
        layer._buffers[_CODES] = members.to(codes.device)


def _members(packed: Tensor, changes: Tensor, fmt: FloatFormat, hub: int) -> Tensor:
    """Return the packed codes of all members, ``(hub, bytes)``."""
    first = _unpacked(packed, fmt)
    rows = [packed]
    for _ in range(1, hub):
        codes, changes = apply_changes(first, changes, fmt)
        rows.append(pack(codes, fmt.bits)[: len(packed)])
    if len(changes):
        raise ValueError(f"{len(changes)} bytes are left over")
    return torch.stack(rows)


def _unpacked(packed: Tensor, fmt: FloatFormat) -> Tensor:
    """Return all codes that whole bytes hold, those that only fill up the last among them."""
    return unpack(packed, fmt.bits, (8 * len(packed) // fmt.bits,))
