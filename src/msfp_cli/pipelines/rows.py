"""Rows of recorded calls: take some, or join those of several calls, at several timesteps."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from msfp_cli.pipelines.denoiser import DenoiserCall, is_cache, with_attributes

# Arguments whose first dimension is never the batch, whatever its size.
_POSITIONS = ("img_ids", "txt_ids", "image_rotary_emb", "padding_mask")
# Arguments that may have several entries for each row of the batch, one after another (one a frame
# of a video).
_FOLDED = (
    "encoder_hidden_states",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
)
# Arguments whose second dimension is the batch: hidden states of several layers of an encoder.
_STACKED = ("encoder_hidden_states_llama3",)


@dataclass(frozen=True, kw_only=True)
class JoinedCall:
    """Rows of recorded calls as one call of the denoiser.

    Arguments:
        timesteps: one per row.
        arguments: as in `DenoiserCall`; the time is a tensor of one per row.
        output: what was recorded, a row for each.
    """

    timesteps: tuple[float, ...]
    arguments: dict[str, Any]
    output: Tensor


def take_rows(call: DenoiserCall, rows: Tensor) -> DenoiserCall:
    """Return a call of some rows of the batch only.

    Arguments:
        rows: int64, ``(rows,)``; every tensor whose first dimension is the batch is indexed by it.
    """
    return replace(
        call,
        arguments=_merge([_take_all(call, call.arguments, rows)]),
        output=call.output[rows],
    )


def join_rows(picked: Sequence[tuple[DenoiserCall, int]]) -> list[JoinedCall]:
    """Join rows of several calls, whose timesteps may differ.

    Arguments:
        picked: a call and the index of one of its rows, each.

    Returns:
        As few calls as possible, one where nothing but rows and timesteps differs. Prompts of
        unequal length, options that change on the way, or tokens packed in one sequence, make more.
    """
    groups: list[list[tuple[DenoiserCall, int, Any]]] = []
    for call, row in picked:
        if _is_packed(call):
            groups.append([(call, row, call.arguments)])
            continue
        time = _of_each_row(call.arguments[call.time], len(call.output))
        taken = _take_all(call, call.arguments | {call.time: time}, torch.tensor([row]))
        group = next((group for group in groups if _alike(group[0][2], taken)), None)
        if group is None:
            groups.append(group := [])
        group.append((call, row, taken))
    return [_join(group) for group in groups]


def _join(group: Sequence[tuple[DenoiserCall, int, Any]]) -> JoinedCall:
    """Return the rows of a group as one call."""
    return JoinedCall(
        timesteps=tuple(call.timestep for call, _, _ in group),
        arguments=_merge([arguments for _, _, arguments in group]),
        output=torch.stack([call.output[row] for call, row, _ in group]),
    )


def _is_packed(call: DenoiserCall) -> bool:
    """Whether a call has the tokens of one picture in one sequence, with a time for each token.

    Nothing can be joined to such a sequence.
    """
    time = torch.as_tensor(call.arguments[call.time])
    return len(call.output) == 1 and time.ndim == 1 and len(time) > 1


def _of_each_row(timestep: Any, batch: int) -> Tensor:  # noqa: ANN401 (tensor or number, as the pipeline passes it)
    """Return the timestep of each row; in some video models it is one of each token of each row."""
    each: Tensor = torch.as_tensor(timestep)
    return each if each.ndim and len(each) == batch else each.reshape(-1)[:1].expand(batch)


@dataclass(frozen=True)
class _Items:
    """Some items of a list that has one for each row of the batch."""

    values: list[Any]


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor, and the dimension that is the batch."""

    values: Tensor
    dim: int = 0


def _take_all(call: DenoiserCall, arguments: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return the arguments of a call with `_Rows` and `_Items` for all that has rows."""
    batch = len(call.output)
    taken: dict[str, Any] = _take(arguments, rows, batch)
    if call.is_listed:
        for name, value in arguments.items():
            if isinstance(value, list | tuple) and len(value) == batch:
                taken[name] = _Items([value[row] for row in rows.tolist()])
    return taken


def _take(value: Any, rows: Tensor, batch: int, name: str = "") -> Any:  # noqa: ANN401 (a tree of arguments)
    """Return a tree of arguments with `_Rows` for every tensor that has rows."""
    if name in _POSITIONS:
        return value
    if isinstance(value, Tensor) and name in _STACKED:
        return _Rows(value[:, rows], dim=1)
    if isinstance(value, Tensor):
        if not value.ndim or not (
            len(value) == batch or (name in _FOLDED and len(value) % batch == 0)
        ):
            return value
        return _Rows(
            value.reshape(batch, len(value) // batch, *value.shape[1:])[rows].flatten(0, 1)
        )
    if isinstance(value, dict):
        return {key: _take(item, rows, batch, key) for key, item in value.items()}
    if is_cache(value):
        return with_attributes(value, _take(vars(value), rows, batch))
    return (
        type(value)(_take(v, rows, batch, name) for v in value)
        if isinstance(value, list | tuple)
        else value
    )


def _alike(one: Any, other: Any) -> bool:  # noqa: ANN401 (trees of arguments)
    """Whether two trees differ in nothing but what their rows hold."""
    if type(one) is not type(other):
        return False
    if isinstance(one, _Rows):
        return (one.values.dtype, one.values.shape) == (other.values.dtype, other.values.shape)
    if isinstance(one, _Items):
        return True  # of any size
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if is_cache(one):
        return _alike(vars(one), vars(other))
    return bool(one == other)


def _merge(trees: Sequence[Any]) -> Any:  # noqa: ANN401 (trees of arguments)
    """Return one tree of batches."""
    first = trees[0]
    if isinstance(first, _Rows):
        return torch.cat([tree.values for tree in trees], dim=first.dim)
    if isinstance(first, _Items):
        return list(itertools.chain.from_iterable(tree.values for tree in trees))
    if isinstance(first, dict):
        return {key: _merge(list(map(itemgetter(key), trees))) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(map(_merge, zip(*trees, strict=True)))
    if is_cache(first):
        return with_attributes(first, _merge([vars(tree) for tree in trees]))
    return first
