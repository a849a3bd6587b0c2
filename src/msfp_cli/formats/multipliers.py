"""A step for each group of weights: the output channel's own step times a small integer.

One scale for each output channel serves large and small weights of a row alike. Here a row is cut
into groups of consecutive weights, and each group has a multiplier ``m`` of the row's step: a
weight is ``scale * m * code``, so its integer is ``m * code``. The integers of a 4-bit code book
are small (up to 12 for e2m1), and 8-bit units take bytes up to 127, so the sum of a whole row stays
one exact sum of integers, and no kernel changes. Free scales for each group would need a sum each
(derivation: ours).

A multiplier is 1 to 16 and takes 4 bits, one eighth of a bit a weight in groups of 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.packing import pack, unpack
from msfp_cli.formats.search import NEGLIGIBLE, SortedRows

LARGEST_INTEGER = 127
_BITS = 4
_LARGEST = 1 << _BITS
# Steps of a row that are tried, relative to the smallest that reaches its largest group.
_STEPS = tuple(0.7 * 1.22**power for power in range(12))
_GROUPS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class GroupedScale:
    """Steps of a weight in groups, and how well they do.

    Arguments:
        format: of the codes.
        scale: float32 ``(out,)``, the step of each row.
        multipliers: uint8 ``(out, groups)``, 1 to 16.
        error: squared error over all weights, relative to their sum of squares.
    """

    format: FloatFormat
    scale: Tensor
    multipliers: Tensor
    error: float


def largest_multiplier(fmt: FloatFormat) -> int:
    """Return the largest multiplier whose integers are signed bytes; 1 leaves no choice."""
    return min(LARGEST_INTEGER // fmt.largest, _LARGEST)


def search_groups(weight: Tensor, formats: Sequence[FloatFormat], most: int) -> GroupedScale | None:
    """Find format, step and multipliers of the least squared error, rounded to the nearest.

    Arguments:
        weight: floating point, ``(out, ...)``, finite.
        formats: signed candidates; one is chosen for all rows.
        most: weights of a group, at most.

    Returns:
        None where a row is one group, or no format leaves a choice.
    """
    rows = weight.detach().float().reshape(weight.shape[0], -1).abs()
    size = group_size(rows.shape[1], num_groups(rows.shape[1], most))
    if size == rows.shape[1]:
        return None
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))
    groups = padded.view(len(rows), -1, size)
    found = [_search(groups, fmt) for fmt in formats if largest_multiplier(fmt) > 1]
    return min(found, key=lambda each: each.error, default=None)


def _search(groups: Tensor, fmt: FloatFormat) -> GroupedScale:
    height = max(1, _GROUPS_AT_ONCE // groups.shape[1])
    parts = [_search_rows(part, fmt) for part in groups.split(height)]
    errors, scales, multipliers = zip(*parts, strict=True)
    total = float(groups.double().square().sum()) or 1.0
    return GroupedScale(
        format=fmt,
        scale=torch.cat(scales),
        multipliers=torch.cat(multipliers),
        error=float(torch.cat(errors).sum()) / total,
    )


def _search_rows(groups: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Return errors, steps and multipliers of some rows; zeros that fill up a group cost nothing.

    Arguments:
        groups: magnitudes, ``(rows, groups, weights)``.
    """
    most = largest_multiplier(fmt)
    largest = groups.amax(dim=(1, 2)).double()
    largest = torch.where(largest > NEGLIGIBLE, largest, torch.ones_like(largest))
    smallest = largest / (fmt.largest * most)
    steps = smallest[:, None] * groups.new_tensor(_STEPS, dtype=torch.float64)  # (rows, steps)
    factors = torch.arange(1, most + 1, dtype=torch.float64, device=groups.device)
    maxima = steps[:, None, :, None] * factors * fmt.largest  # (rows, 1, steps, multipliers)
    candidates = maxima.expand(-1, groups.shape[1], -1, -1)
    errors = SortedRows(groups.flatten(0, 1)).error(
        fmt.magnitudes, candidates.reshape(groups.shape[0] * groups.shape[1], -1)
    )
    of_groups, chosen = errors.view(candidates.shape).min(dim=3)  # (rows, groups, steps)
    error, step = of_groups.sum(dim=1).min(dim=1)
    picked = chosen.gather(2, step[:, None, None].expand(-1, groups.shape[1], 1))[..., 0]
    scale = _shortened(steps.gather(1, step[:, None])[:, 0].float())
    return error.clamp_min(0), scale, (picked + 1).to(torch.uint8)


def _shortened(scale: Tensor) -> Tensor:
    """Clear the lowest 8 bits of each scale.

    Then a scale times any integer of a weight is exact in float32, and `scale * (m * code)` is
    `(scale * m) * code` to the last bit.
    """
    return scale.view(torch.int32).bitwise_and(-256).view(torch.float32)


def expand(multipliers: Tensor, shape: torch.Size) -> Tensor:
    """Return the multiplier of each weight.

    Arguments:
        multipliers: ``(out, groups)``.
        shape: of the weight, ``(out, ...)``.
    """
    width = shape[1:].numel()
    size = group_size(width, multipliers.shape[1])
    return multipliers.repeat_interleave(size, dim=1)[:, :width].reshape(shape)


def num_groups(width: int, most: int) -> int:
    """Return how many groups of at most `most` weights a row is cut into."""
    return -(-width // most)


def group_size(width: int, groups: int) -> int:
    """Return the weights of each group; the last may have fewer."""
    return -(-width // groups)


def step_sizes(scale: Tensor, multipliers: Tensor | None, shape: torch.Size) -> Tensor:
    """Return the step of each weight, float32; it broadcasts against the weight.

    Arguments:
        scale: float32 ``(out,)``.
        multipliers: uint8 ``(out, groups)``, None for a step for each row.
        shape: of the weight, ``(out, ...)``.
    """
    rows = scale.view(-1, *[1] * (len(shape) - 1))
    return rows if multipliers is None else rows * expand(multipliers, shape).float()


def refuse_multipliers(
    name: str, multipliers: Tensor, fmt: FloatFormat, shape: tuple[int, int]
) -> None:
    """Refuse multipliers of a weight that cannot be.

    Arguments:
        name: of the layer, for the message.
        fmt: of the weight.
        shape: that they should have, ``(out, groups)``.

    Raises:
        ValueError: they have another shape, or give integers that are not signed bytes.
    """
    if multipliers.shape != shape or multipliers.dtype != torch.uint8:
        raise ValueError(f"{name} has multipliers of another shape or type")
    most = largest_multiplier(fmt)
    if ((multipliers < 1) | (multipliers > most)).any():
        raise ValueError(f"{name} has a multiplier that is not from 1 to {most}")


def pack_multipliers(multipliers: Tensor) -> Tensor:
    """Pack multipliers, two a byte."""
    return pack(multipliers - 1, _BITS)


def unpack_multipliers(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `pack_multipliers`.

    Arguments:
        shape: ``(out, groups)``.
    """
    return unpack(packed, _BITS, shape) + 1
