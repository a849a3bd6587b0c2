"""Round a weight for the output of its layer, rather than to the nearest codes.

A layer with weight ``W`` was meant to compute ``W x`` and will compute ``Q x_q``, where ``x_q`` is
its rounded input and ``Q`` its rounded weight. Over samples of both,

    E |W x - Q x_q|^2 + damping |W - Q|^2  =  |(W' - Q) L|^2 + const,       with
    H = E x_q x_q^T + damping,   C = E (x - x_q) x_q^T,   W' = W + W C H^-1,   L L^T = H

so ``W'`` is the weight of least error as long as nothing is rounded: it makes up for the rounding
of the input (Li et al. 2025, arXiv:2504.02692). The damping draws it towards ``W``, because the
samples are few.

What is left is to find the point ``Q`` of a grid that is nearest to ``W'`` in the metric of ``L``.
``L`` is lower triangular, so the error of column ``j`` depends on the columns from ``j`` on. Once
the columns after it are rounded, the best real number for column ``j`` is known, and is rounded:

    q_j = round( w'_j + sum_{i > j} (w'_i - q_i) L_ij / L_jj )

This is Babai's nearest plane, and gives the same codes as GPTQ (Frantar et al. 2022,
arXiv:2210.17323), which updates the columns that are not rounded yet: its error is pushed onto
them. GPTQ needs the inverse of ``H``, and this needs its Cholesky factor only. Columns with the
largest input are rounded first, when most others are left to make up for them.

Half of the columns is rounded, then the other half learns of all their errors in one product of
matrices, and is rounded; each half likewise. So nearly all work is products of matrices.

Weights count in steps of their output channel, which changes nothing above: output channels do not
depend on each other. A group of columns with a multiplier ``m`` rounds to multiples of ``m``.
"""

import torch
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import round_steps

_COLUMNS = 16  # columns that are rounded one by one, before the rest learns of them
_INSET = 1 / 16  # of half a cell: how far from its border a moved weight stays


def compensated_steps(
    steps: Tensor,
    moments: Tensor,
    missing: Tensor | None,
    fmt: FloatFormat,
    dampings: Tensor,
    multipliers: Tensor | None = None,
) -> Tensor:
    """Round a weight so that the output of its layer has the least error.

    Arguments:
        steps: float32 ``(..., out, k)``, the weight in steps of its grid.
        moments: float32 ``(..., k, k)``, the sum of ``x_q x_q^T`` over samples of the input.
        missing: float32 ``(..., out, k)``, the sum of ``W (x - x_q) x_q^T`` over the same samples,
            in steps: ``W C`` above; None where the input is not rounded.
        fmt: the format of the weight.
        dampings: float32 ``(d,)``, the values of the damping to try, as shares of the mean of the
            diagonal of `moments`.
        multipliers: float32, shape of `steps`; None for 1.

    Returns:
        float32 ``(d, ..., out, k)``, integers of the format's code book times their multipliers.
        Where the moments have no Cholesky factor at some damping, all are NaN.
    """
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, stable=True)
    shape = (len(dampings), *steps.mT.shape)
    lower = _damped_factor(_permuted(moments, order), dampings)
    target = _ordered(steps, order).expand(shape).clone()
    if missing is not None:
        target += torch.cholesky_solve(_ordered(missing, order).expand(shape), lower)
    lower /= lower.diagonal(dim1=-2, dim2=-1)[..., None, :].clone()
    factors = None if multipliers is None else _ordered(multipliers, order).expand(shape)
    _nearest_plane_(target, target.clone(), lower, fmt, factors)
    back = order.argsort(dim=-1)[..., None].expand(shape)
    return target.gather(-2, back).mT.contiguous()


def _ordered(rows: Tensor, order: Tensor) -> Tensor:
    """Return the columns of ``(..., out, k)`` in another order, as ``(..., k, out)``."""
    return torch.take_along_dim(rows.mT, order[..., None], dim=-2)


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Return a matrix with its rows and columns in another order."""
    rows = torch.take_along_dim(matrix, order[..., None], dim=-2)
    return torch.take_along_dim(rows, order[..., None, :], dim=-1)


def _damped_factor(moments: Tensor, dampings: Tensor) -> Tensor:
    """Return the Cholesky factor of the moments at each damping, NaN where there is none."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    added = dampings.view(-1, *[1] * mean.ndim) * mean  # (d, ...)
    damped = moments.repeat(len(dampings), *[1] * moments.ndim)
    damped.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
    lower: Tensor
    lower, failure = torch.linalg.cholesky_ex(damped)
    return lower.masked_fill_((failure != 0)[..., None, None], torch.nan)


def _nearest_plane_(
    target_: Tensor, errors_: Tensor, push: Tensor, fmt: FloatFormat, factors: Tensor | None
) -> None:
    """Replace `target` by the integers nearest to it in the metric of a factor, last column first.

    Arguments:
        target_: ``(..., k, out)``, a row for each column of the weight; what the columns after
            these make each of them learn was added before.
        errors_: the target as it was; becomes the difference from the integers.
        push: ``(..., k, k)``, the lower factor with each column divided by its diagonal.
        factors: ``(..., k, out)``, the multiplier of each element; None for 1.
    """
    size = target_.shape[-2]
    if size > _COLUMNS:
        half = size // 2
        for own in (slice(half, size), slice(0, half)):
            if own.start == 0:
                target_[..., own, :] += push[..., half:, own].mT @ errors_[..., half:, :]
            part = None if factors is None else factors[..., own, :]
            _nearest_plane_(
                target_[..., own, :], errors_[..., own, :], push[..., own, own], fmt, part
            )
        return
    for column in reversed(range(size)):
        best = target_[..., column, :]
        if factors is None:
            best.copy_(round_steps(best, fmt))
        else:
            factor = factors[..., column, :]
            best.copy_(round_steps(best / factor, fmt) * factor)
        errors_[..., column, :] -= best
        before = push[..., column, :column, None]
        target_[..., :column, :] += before * errors_[..., column, None, :]


def move_into_cells(weight: Tensor, scale: Tensor, integers: Tensor, fmt: FloatFormat) -> Tensor:
    """Return a weight that rounds to given integers and is as near to the given one as that allows.

    An element that rounds to its integer is kept. Others are moved to the near side of the cell of
    their integer, so what begins with the result (a low-rank update, say) begins at these codes.

    Arguments:
        weight: floating point, ``(out, ...)``.
        scale: float32, broadcasts against it.
        integers: of the format's code book, in floating point, shape of the weight.

    Returns:
        The type and shape of `weight`.
    """
    steps = weight.float() / scale
    levels = torch.tensor(fmt.levels, dtype=torch.float32, device=weight.device)
    place = torch.bucketize(integers, levels)
    middles = (levels[1:] + levels[:-1]) / 2
    ends = levels.new_tensor([torch.inf])
    to_low = torch.cat([-ends, middles])[place] - integers
    to_high = torch.cat([middles, ends])[place] - integers
    reach = 1 - _INSET
    inside = steps.clamp(integers + reach * to_low, integers + reach * to_high)
    moved = (inside * scale).to(weight.dtype)
    # In 16 bits a border may be out of reach; the integer itself is near enough to a number.
    moved = torch.where(
        _rounds_to(moved, scale, integers, fmt), moved, (integers * scale).to(moved)
    )
    return torch.where(_rounds_to(weight, scale, integers, fmt), weight, moved)


def _rounds_to(weight: Tensor, scale: Tensor, integers: Tensor, fmt: FloatFormat) -> Tensor:
    """Whether each element of a weight rounds to its integer."""
    return round_steps(weight.float() / scale, fmt) == integers
