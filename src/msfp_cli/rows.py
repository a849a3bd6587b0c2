"""Rows of recorded calls: take some, and join those of several calls, at several timesteps, to one call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from msfp_cli.denoiser import DenoiserCall

# Arguments whose first dimension is a position and never the batch, whatever its size.
_POSITIONS = ("img_ids", "txt_ids", "image_rotary_emb")


def take_rows(call: DenoiserCall, rows: Tensor) -> DenoiserCall:
    """Return a call of some rows of the batch only.

    Arguments:
        rows: int64, ``(rows,)``; every tensor whose first dimension is the batch is indexed by it.
    """
    batch = call.output.shape[0]

    def take(value: Any) -> Any:  # noqa: ANN401 (a tree of arguments)
        if isinstance(value, Tensor):
            return value[rows] if _has_rows(value, batch) else value
        if isinstance(value, dict):
            return {key: item if key in _POSITIONS else take(item) for key, item in value.items()}
        return type(value)(take(item) for item in value) if isinstance(value, list | tuple) else value

    return replace(call, arguments=take(call.arguments), output=call.output[rows])


@dataclass(frozen=True, kw_only=True)
class JoinedCall:
    """Rows of recorded calls as one call of the denoiser.

    Arguments:
        timesteps: one per row.
        arguments: as in `DenoiserCall`; ``timestep`` is a tensor of one per row.
        output: what was recorded, a row for each.
    """

    timesteps: tuple[float, ...]
    arguments: dict[str, Any]
    output: Tensor


def join_rows(picked: Sequence[tuple[DenoiserCall, int]]) -> list[JoinedCall]:
    """Join rows of several calls, whose timesteps may differ.

    Arguments:
        picked: a call and the index of one of its rows, each.

    Returns:
        As few calls as possible, one where nothing but rows and timesteps differs. Prompts of unequal length, or
        options that change on the way, make more.
    """
    groups: list[list[tuple[DenoiserCall, int, Any]]] = []
    for call, row in picked:
        arguments = _one_row(call.arguments, row, len(call.output))
        group = next((group for group in groups if _alike(group[0][2], arguments)), None)
        if group is None:
            groups.append(group := [])
        group.append((call, row, arguments))
    return [
        JoinedCall(
            timesteps=tuple(call.timestep for call, _, _ in group),
            arguments=_stack([arguments for _, _, arguments in group]),
            output=torch.stack([call.output[row] for call, row, _ in group]),
        )
        for group in groups
    ]


@dataclass(frozen=True)
class _Row:
    """One row of a tensor whose first dimension is the batch."""

    values: Tensor


def _one_row(value: Any, row: int, batch: int, name: str = "") -> Any:  # noqa: ANN401 (a tree of arguments)
    """Return a tree of arguments with a `_Row` for every tensor that has rows, and for the timestep."""
    if name == "timestep":  # of the batch, of each row, or (video) of each token of each row
        timestep = torch.as_tensor(value)
        return _Row(timestep[row] if _has_rows(timestep, batch) else timestep.reshape(-1)[0])
    if isinstance(value, Tensor):
        return _Row(value[row]) if name not in _POSITIONS and _has_rows(value, batch) else value
    if isinstance(value, dict):
        return {key: _one_row(item, row, batch, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_one_row(item, row, batch) for item in value)
    return value


def _has_rows(value: Tensor, batch: int) -> bool:
    return value.ndim > 0 and len(value) == batch


def _alike(one: Any, other: Any) -> bool:  # noqa: ANN401 (trees of arguments)
    """Whether two trees differ in nothing but what their rows hold."""
    if type(one) is not type(other):
        return False
    if isinstance(one, _Row):
        return (one.values.dtype, one.values.shape) == (other.values.dtype, other.values.shape)
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _stack(trees: Sequence[Any]) -> Any:  # noqa: ANN401 (trees of arguments)
    """Return one tree of batches."""
    first = trees[0]
    if isinstance(first, _Row):
        return torch.stack([tree.values for tree in trees])
    if isinstance(first, dict):
        return {key: _stack([tree[key] for tree in trees]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(map(_stack, zip(*trees, strict=True)))
    return first
