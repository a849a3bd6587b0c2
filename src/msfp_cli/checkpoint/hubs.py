"""Hubs and their router on disk: what is first as it is, and of the rest what changed.

In memory a layer has the packed codes of every member, ``weight_codes``, ``(hub, bytes)``. In a
file they are ``(1, bytes)``, and ``weight_changes``, uint8 ``(any,)``, has the changes from the
first member to the second, to the third and so on, one after another (`formats.changes`). A hub
whose changes would take more than the codes themselves is left as it is.

The router's table has 1,001 rows, most of which equal the row before. In a file it has the others
only, and ``starts``, int16 ``(rows,)``, the number of each, in ascending order from 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError
from msfp_cli.formats.changes import apply_changes, changes_between
from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.packing import pack, unpack
from msfp_cli.layers.replace import quantized_layers
from msfp_cli.layers.routing import ROUTER, TABLE_SIZE

_CODES, _CHANGES = "weight_codes", "weight_changes"
_TABLE, _STARTS = "table", "starts"


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
    table = tensors.get(f"{ROUTER}.{_TABLE}")
    if table is not None:
        is_new = torch.ones(len(table), dtype=torch.bool)
        is_new[1:] = (table[1:] != table[:-1]).any(dim=1).cpu()
        starts = is_new.nonzero()[:, 0]
        folded[f"{ROUTER}.{_TABLE}"] = table[starts.to(table.device)]
        folded[f"{ROUTER}.{_STARTS}"] = starts.to(torch.int16)
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
    starts = tensors.get(f"{ROUTER}.{_STARTS}")
    if starts is not None and hasattr(model, ROUTER):
        router = model.get_submodule(ROUTER)
        router._buffers[_TABLE] = router.get_buffer(_TABLE)[: len(starts)]
        place = router.get_buffer(_TABLE).new_empty(starts.shape, dtype=torch.int16)
        router.register_buffer(_STARTS, place)


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
    if hasattr(model, ROUTER):
        _unfold_table_(model.get_submodule(ROUTER))


def _unfold_table_(router: nn.Module) -> None:
    """Give a router every row of its table."""
    starts = router._buffers.pop(_STARTS, None)
    if starts is None:
        return
    places = starts.cpu().long()
    ends = torch.cat([places[1:], torch.tensor([TABLE_SIZE])])
    if not len(places) or places[0] != 0 or (ends <= places).any():
        raise CheckpointError(f"{ROUTER}.{_STARTS} of the export is damaged; export again")
    table = router.get_buffer(_TABLE)
    router._buffers[_TABLE] = table.repeat_interleave((ends - places).to(table.device), dim=0)


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
