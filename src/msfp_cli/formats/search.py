"""The exact search: the best format, maximum and zero point for a tensor, by mean squared error.

Brute force rounds the whole tensor once per candidate. It is not needed. Sort the samples once and
keep their cumulative sum; a grid with levels ``g_k`` and borders ``b_k`` (midpoints) puts the
samples ``i_k = searchsorted(x, b_k)`` onwards above border k, so

    error = sum x^2 - 2 sum_k g_k (S[i_{k+1}] - S[i_k]) + sum_k g_k^2 (i_{k+1} - i_k),      S =
    cumulative sum of x

which is the squared error of brute force at the price of a few binary searches (derivation: ours).
Summed by parts, only the steps between levels appear. Sums are kept in float64. Signed grids are
symmetric, so they are scored on ``|x|`` with half the levels. Rows are independent, which makes
per-channel weights the same code as per-tensor activations.

A search is coarse, then fine: a grid of maxima (and zero points) per format, then rounds of a finer
grid around each row's winner. Every format's best score is returned, not only the winner's, because
the report shows them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid

_CHUNK = 1 << 20  # elements of a block of rows: small enough for a processor's cache


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Say how finely to search.

    Arguments:
        num_maxima: coarse maxima, spread evenly over ``[low, high]`` times the data's own.
        num_zero_points: coarse zero points, spread evenly from the data's minimum to 0.
        num_refinements: rounds of a finer grid around the winner; each narrows it four-fold.
        low, high: the range of maxima, as fractions of the data's largest magnitude.
        margin: how much better (relative) an unsigned format has to be before it is preferred to
            the best signed one. A zero point costs a correction term in every layer at run time,
            and a grid of 16 even levels between two zero crossings beats e2m1 by 9 % even on a
            Gaussian; we let it win only where it matters (ours).
    """

    num_maxima: int = 100
    num_zero_points: int = 13
    num_refinements: int = 2
    low: float = 0.05
    high: float = 1.2
    margin: float = 0.1

    def for_bits(self, bits: int) -> "SearchSpace":
        """Return a coarser space for wide formats: a bit doubles the cost and halves the gain."""
        if bits <= 4:
            return self
        return replace(
            self,
            num_maxima=max(8, self.num_maxima // 5),
            num_zero_points=max(2, self.num_zero_points // 3),
        )


@dataclass(frozen=True, kw_only=True)
class FormatScore:
    """The best that one format can do.

    Arguments:
        format: the format.
        error: squared error relative to the tensor's own sum of squares, over all rows.
        max_value: float32, ``(rows,)``, the best maximum of each row.
        zero_point: the best zero point, None for signed formats.
    """

    format: FloatFormat
    error: float
    max_value: Tensor
    zero_point: float | None = None

    def grid(self) -> Grid:
        """Return the grid of a whole tensor, which is one row."""
        return Grid.with_maximum(self.format, self.max_value[0], self.zero_point)


@dataclass(frozen=True)
class SearchResult:
    """The winner of a search and the score of every format, best first."""

    winner: FormatScore
    scores: tuple[FormatScore, ...]


# Rows of less, and rows of zeros, are exact enough on every grid: they get one whose steps can be
# multiplied in float32, as if they reached 1.
NEGLIGIBLE = 1e-30


class SortedRows:
    """Samples sorted row by row with their cumulative sums, ready to score any grid."""

    def __init__(self, rows: Tensor) -> None:
        """Sort `rows`, float32 of shape ``(rows, samples)``."""
        self.values = _sort(rows)
        self.num_rows, self.num_samples = self.values.shape
        sums = torch.zeros(
            self.num_rows, self.num_samples + 1, dtype=torch.float64, device=rows.device
        )
        torch.cumsum(self.values, dim=1, dtype=torch.float64, out=sums[:, 1:])
        self.sums = sums
        self.sum_of_squares = torch.linalg.vector_norm(
            self.values, dim=1, dtype=torch.float64
        ).square()

    def error(
        self, levels: Sequence[int], max_values: Tensor, zero_points: Tensor | None = None
    ) -> Tensor:
        """Return the squared error of rounding each row to each candidate grid.

        Arguments:
            levels: ascending integers of the code book; the last is the largest magnitude.
            max_values: float64, ``(rows, candidates)``, the value of the last level above the zero
                point.
            zero_points: float64, ``(rows, candidates)``, or None for 0.

        Returns:
            float64, ``(rows, candidates)``, sums over the row's samples.
        """
        unit = torch.tensor(levels, dtype=torch.float64, device=self.values.device) / levels[-1]
        step = unit.diff()
        square_step = unit.square().diff()
        borders = max_values[..., None] * ((unit[1:] + unit[:-1]) / 2)
        top = max_values * unit[-1]
        zero = torch.zeros_like(max_values)
        if zero_points is not None:
            zero = zero_points
            borders = borders + zero[..., None]
            top = top + zero
        above = torch.searchsorted(self.values, _round_up(borders).view(self.num_rows, -1))
        sums = self.sums.gather(1, above).view(borders.shape)
        counts = above.view(borders.shape).double()
        cross = top * self.sums[:, -1:] - max_values * (sums @ step)
        power = top.square() * self.num_samples - max_values.square() * (counts @ square_step)
        power = power - 2 * max_values * zero * (counts @ step)
        error: Tensor = self.sum_of_squares[:, None] - 2 * cross + power
        return error


def _round_up(borders: Tensor) -> Tensor:
    """Return the smallest float32 not below each border.

    It parts float32 samples as the float64 border does.
    """
    nearest = borders.float()
    below = (nearest.double() < borders).int()
    bits = nearest.view(torch.int32)
    # The next float up is the next integer up for a positive float, down for a negative one.
    towards = (bits >> 31) | 1
    return (bits + below * towards).view(torch.float32)


def _sort(rows: Tensor) -> Tensor:
    """Sort each row ascending, as float32.

    On a CPU numpy's sort is three times as fast as torch's, and twice as fast again for the bits of
    16-bit numbers, which are in the order of the numbers where none has a sign.
    """
    rows = rows.detach()
    if rows.device.type != "cpu":
        return rows.float().sort(dim=1).values
    if rows.dtype in (torch.bfloat16, torch.float16) and not (rows.view(torch.int16) < 0).any():
        bits = np.sort(rows.contiguous().view(torch.int16).numpy(), axis=1)
        return torch.from_numpy(bits).view(rows.dtype).float()
    return torch.from_numpy(np.sort(rows.float().contiguous().numpy(), axis=1))


def _fractions(space: SearchSpace, device: torch.device) -> Tensor:
    """Return the coarse maxima as fractions of the data's own.

    1 is among them, so the result is never worse than absmax.
    """
    even = torch.linspace(
        space.low, space.high, space.num_maxima, dtype=torch.float64, device=device
    )
    return torch.cat([even, even.new_ones(1)])


def _around(best: Tensor, step: Tensor, num: int = 9) -> Tensor:
    """Return `num` points within one `step` either side of `best`, ``(rows, num)``."""
    offsets = torch.linspace(-1, 1, num, dtype=torch.float64, device=best.device)
    return best[:, None] + step[:, None] * offsets


def _best_maximum(
    rows: SortedRows, levels: Sequence[int], space: SearchSpace
) -> tuple[Tensor, Tensor]:
    """Search a maximum per row, without zero point; return errors and maxima, float64 (rows,)."""
    largest = torch.maximum(rows.values[:, -1].abs(), rows.values[:, 0].abs()).double()
    largest = torch.where(largest > NEGLIGIBLE, largest, torch.ones_like(largest))
    fractions = _fractions(space, largest.device)
    maxima = largest[:, None] * fractions
    step = largest * (fractions[1] - fractions[0])
    floor = largest[:, None] * space.low / 2  # keeps a scale positive, however small the data
    for _ in range(space.num_refinements + 1):
        errors, index = rows.error(levels, maxima).min(dim=1)
        best = maxima.gather(1, index[:, None])[:, 0]
        maxima = _around(best, step).maximum(floor)
        step = step / 4
    return errors.clamp_min(0), best


def _best_offset_grid(
    rows: SortedRows, levels: Sequence[int], space: SearchSpace
) -> tuple[Tensor, Tensor, Tensor]:
    """Search maximum and zero point together.

    Returns:
        Errors, maxima and zero points, each float64 ``(rows,)``.
    """
    device = rows.values.device
    low = rows.values[:, 0].double()
    high = rows.values[:, -1].double()
    zero_fractions = torch.linspace(0, 1, space.num_zero_points, dtype=torch.float64, device=device)
    max_fractions = _fractions(space, device)
    zeros = low[:, None] * zero_fractions
    zero_step = low.abs() * zero_fractions[1]
    spread = high - low.clamp_max(0)
    spread = torch.where(spread > NEGLIGIBLE, spread, torch.ones_like(high))
    maxima = spread[:, None] * max_fractions
    max_step = spread * (max_fractions[1] - max_fractions[0])
    floor = spread[:, None] * space.low / 2
    for _ in range(space.num_refinements + 1):
        pairs_max = maxima.repeat_interleave(zeros.shape[1], dim=1)
        pairs_zero = zeros.repeat(1, maxima.shape[1])
        errors, index = rows.error(levels, pairs_max, pairs_zero).min(dim=1)
        best_max = pairs_max.gather(1, index[:, None])[:, 0]
        best_zero = pairs_zero.gather(1, index[:, None])[:, 0]
        maxima = _around(best_max, max_step).maximum(floor)
        zeros = _around(best_zero, zero_step)
        max_step = max_step / 4
        zero_step = zero_step / 4
    return errors.clamp_min(0), best_max, best_zero


def search_tensor(
    samples: Tensor, formats: Sequence[FloatFormat], space: SearchSpace
) -> SearchResult:
    """Find the best grid for a whole tensor; unsigned formats may have a zero point.

    Arguments:
        samples: floating point, any shape, at least one element, finite.
        formats: candidates, signed or not.
        space: how finely to search.
    """
    row = samples.reshape(1, -1)
    rows = SortedRows(row)
    magnitudes = SortedRows(row.abs())
    total = float(rows.sum_of_squares) or 1.0
    scores = []
    for fmt in formats:
        if fmt.signed:
            error, max_value = _best_maximum(magnitudes, fmt.magnitudes, space)
            zero_point = None
        else:
            error, max_value, zero = _best_offset_grid(rows, fmt.magnitudes, space)
            zero_point = float(zero)
        scores.append(
            FormatScore(
                format=fmt,
                error=float(error) / total,
                max_value=max_value.float(),
                zero_point=zero_point,
            )
        )
    return _choose(scores, space.margin)


def search_rows(weight: Tensor, formats: Sequence[FloatFormat], space: SearchSpace) -> SearchResult:
    """Find the best signed format for a weight, with one maximum for each output channel.

    Arguments:
        weight: floating point, ``(out, ...)``, finite.
        formats: signed candidates; one is chosen for all rows.
        space: how finely to search.
    """
    rows = weight.detach().reshape(weight.shape[0], -1)
    errors = torch.zeros(len(formats), dtype=torch.float64)
    maxima: list[list[Tensor]] = [[] for _ in formats]
    total = 0.0
    for chunk in _row_chunks(rows):
        magnitudes = SortedRows(chunk.abs())
        total += float(magnitudes.sum_of_squares.sum())
        for i, fmt in enumerate(formats):
            error, max_value = _best_maximum(magnitudes, fmt.magnitudes, space)
            errors[i] += error.sum().cpu()
            maxima[i].append(max_value.float())
    scores = [
        FormatScore(
            format=fmt, error=float(errors[i]) / (total or 1.0), max_value=torch.cat(maxima[i])
        )
        for i, fmt in enumerate(formats)
    ]
    return _choose(scores, space.margin)


def _row_chunks(rows: Tensor) -> Iterator[Tensor]:
    """Cut rows into blocks of bounded size, counting the borders of their candidates too."""
    height = max(1, _CHUNK // max(rows.shape[1], 1024))
    for first in range(0, rows.shape[0], height):
        yield rows[first : first + height]


def _choose(scores: Sequence[FormatScore], margin: float) -> SearchResult:
    """Pick the lowest error; unsigned formats have to beat the signed ones by `margin`."""
    ranked = tuple(sorted(scores, key=lambda score: score.error))
    signed = next((score for score in ranked if score.format.signed), None)
    winner = ranked[0]
    if signed is not None and winner.error >= (1 - margin) * signed.error:
        winner = signed
    return SearchResult(winner, ranked)
