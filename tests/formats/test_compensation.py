"""Rounding for the output of a layer: against plain formulas, and the laws of a nearest plane."""

import pytest
import torch
from torch import Tensor

from msfp_cli.formats.compensation import compensated_steps, move_into_cells
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.rounding import round_steps

FORMATS = ("e2m1", "e1m2", "e3m0", "e1m6", "e2m3", "e0m1")
DAMPINGS = torch.tensor([0.01, 0.1, 1.0])


def parse(name: str) -> FloatFormat:
    return FloatFormat.parse(name)


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Return samples ``(..., n, k)`` whose columns depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    k = shape[-1]
    mixing = torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator)
    sizes = torch.rand(k, generator=generator) + 0.2
    return torch.randn(*shape, generator=generator) @ mixing * sizes


def weight_steps(fmt: FloatFormat, *shape: int, seed: int = 1) -> Tensor:
    """Return a weight that fills its grid, in steps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * fmt.largest / 2.5


def statistics(steps: Tensor, x: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    return rounded.mT @ rounded, steps @ (x - rounded).mT @ rounded


def damped(moments: Tensor, damping: float) -> Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean()
    return moments + damping * mean * torch.eye(len(moments))


def gptq(
    steps: Tensor, moments: Tensor, missing: Tensor, fmt: FloatFormat, damping: float
) -> Tensor:
    """Return the codes by GPTQ as published: inverse, its factor, one column after another."""
    order = moments.diagonal().argsort(stable=True).flip(0)
    hessian = damped(moments, damping)
    work = (steps + missing @ hessian.inverse())[:, order]
    upper = torch.linalg.cholesky(hessian[order][:, order].inverse(), upper=True)
    rounded = torch.empty_like(work)
    for column in range(work.shape[1]):
        rounded[:, column] = round_steps(work[:, column].clone(), fmt)
        error = (work[:, column] - rounded[:, column]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
    return rounded[:, order.argsort()]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("inputs", [3, 40, 300])
def test_equals_gptq_as_published(name: str, inputs: int) -> None:
    fmt = parse(name)
    x = correlated(500, inputs)
    rounded = (x * 2).round() / 2
    steps = weight_steps(fmt, 16, inputs)
    moments, missing = statistics(steps, x, rounded)
    got = compensated_steps(steps, moments, missing, fmt, DAMPINGS)
    for each, damping in zip(got, DAMPINGS.tolist(), strict=True):
        expected = gptq(steps, moments, missing, fmt, damping)
        # A tie that the order of summing decides moves what comes after it.
        assert (each != expected).float().mean() < 0.02


def test_columns_with_multipliers_round_to_their_multiples() -> None:
    """One multiplier for all columns is a coarser grid for a smaller weight."""
    fmt = parse("e2m1")
    x = correlated(400, 30)
    steps = weight_steps(fmt, 8, 30)
    moments, missing = statistics(steps, x, (x * 2).round() / 2)
    plain = compensated_steps(steps, moments, missing, fmt, DAMPINGS)
    threes = torch.full_like(steps, 3.0)
    got = compensated_steps(3 * steps, moments, 3 * missing, fmt, DAMPINGS, threes)
    assert (got != 3 * plain).float().mean() < 0.02  # ties, as above
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(1, 11, (8, 30), generator=generator).float()
    (got,) = compensated_steps(4 * steps, moments, 4 * missing, fmt, torch.tensor([0.1]), mixed)
    assert torch.equal(round_steps(got / mixed, fmt) * mixed, got)


def test_a_weight_on_the_grid_is_kept_where_the_input_is_not_rounded() -> None:
    fmt = parse("e2m1")
    steps = round_steps(weight_steps(fmt, 8, 20), fmt)
    x = correlated(100, 20)
    got = compensated_steps(steps, x.mT @ x, None, fmt, DAMPINGS)
    assert torch.equal(got, steps.expand(3, -1, -1))


def test_a_linear_change_of_the_input_is_undone_by_least_squares() -> None:
    """What x was is ``x_q M``, so the least squares are ``W M^T``; here these are integers."""
    fmt = parse("e1m6")
    generator = torch.Generator().manual_seed(2)
    change = torch.randint(-1, 2, (12, 12), generator=generator).float() + 3 * torch.eye(12)
    steps = torch.randint(-4, 5, (6, 12), generator=generator).float()
    rounded = correlated(400, 12)
    moments, missing = statistics(steps, rounded @ change, rounded)
    got = compensated_steps(steps, moments, missing, fmt, torch.tensor([1e-6]))
    assert torch.equal(got[0], steps @ change.mT)


def test_the_error_of_each_column_is_within_half_a_step_of_the_nearest_plane() -> None:
    fmt = parse("e1m6")
    x = correlated(300, 30)
    moments = x.mT @ x
    steps = weight_steps(fmt, 40, 30) / 2  # far from the ends, where nothing is clipped
    (got,) = compensated_steps(steps, moments, None, fmt, torch.tensor([0.1]))
    order = moments.diagonal().argsort(stable=True)
    lower = torch.linalg.cholesky(damped(moments, 0.1)[order][:, order])
    error = (steps - got)[:, order] @ lower
    assert (error.abs() <= 0.5001 * lower.diagonal()).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_output_error_is_below_that_of_nearest_rounding(name: str) -> None:
    fmt = parse(name)
    x = correlated(2000, 60)
    rounded = (x * 2).round() / 2
    steps = weight_steps(fmt, 32, 60)
    (got,) = compensated_steps(steps, *statistics(steps, x, rounded), fmt, torch.tensor([0.01]))

    def error(codes: Tensor) -> float:
        return float((x @ steps.mT - rounded @ codes.mT).square().sum())

    assert error(got) < error(round_steps(steps.clone(), fmt))


def test_groups_are_rounded_as_if_each_were_alone() -> None:
    fmt = parse("e2m1")
    x = correlated(3, 200, 9)
    steps = weight_steps(fmt, 3, 5, 9)
    moments, missing = statistics(steps, x, x.round())
    got = compensated_steps(steps, moments, missing, fmt, DAMPINGS)
    for group in range(3):
        alone = compensated_steps(steps[group], moments[group], missing[group], fmt, DAMPINGS)
        assert torch.equal(got[:, group], alone)


def test_great_damping_is_nearest_rounding() -> None:
    fmt = parse("e2m1")
    x = correlated(100, 20)
    steps = weight_steps(fmt, 8, 20)
    (got,) = compensated_steps(steps, *statistics(steps, x, x.round()), fmt, torch.tensor([1e7]))
    assert torch.equal(got, round_steps(steps.clone(), fmt))


def test_moments_without_a_factor_give_nan() -> None:
    steps = weight_steps(parse("e2m1"), 4, 5)
    nothing = torch.zeros(5, 5)
    got = compensated_steps(steps, nothing, torch.zeros(4, 5), parse("e2m1"), DAMPINGS)
    assert got.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_moved_weight_rounds_to_the_given_integers(bits: int, dtype: torch.dtype) -> None:
    for fmt in formats_of_width(bits, signed=True):
        if fmt.integer_bits > 8:
            continue
        generator = torch.Generator().manual_seed(bits)
        levels = torch.tensor(fmt.levels, dtype=torch.float32)
        integers = levels[torch.randint(len(levels), (40, 30), generator=generator)]
        scale = torch.rand(40, 1, generator=generator) + 0.01
        weight = (weight_steps(fmt, 40, 30) * scale).to(dtype)
        moved = move_into_cells(weight, scale, integers, fmt)
        assert moved.dtype == dtype
        assert torch.equal(round_steps(moved.float() / scale, fmt), integers)
        kept = round_steps(weight.float() / scale, fmt) == integers
        assert torch.equal(moved[kept], weight[kept])
        assert torch.equal(move_into_cells(moved, scale, integers, fmt), moved)


def test_a_weight_is_moved_no_further_than_into_its_cell() -> None:
    fmt = parse("e2m1")  # ... 4 6 8 12: the cell of 8 is 7..10
    weight = torch.tensor([[1.0, 7.5, 20.0]])
    moved = move_into_cells(weight, torch.ones(1, 1), torch.full((1, 3), 8.0), fmt)
    assert moved.tolist() == [[7.0625, 7.5, 9.875]]
