from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfp_cli.formats import search
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.formats.search import (
    FormatScore,
    SearchResult,
    SearchSpace,
    SortedRows,
    search_rows,
    search_tensor,
)

SPACE = SearchSpace()
SIGNED, UNSIGNED = (formats_of_width(4, signed=signed) for signed in (True, False))
BOTH = SIGNED + UNSIGNED


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """A Gaussian whose width varies from sample to sample."""
    return gaussian(*shape, seed=seed) * torch.exp(0.3 * gaussian(*shape, seed=seed + 1))


def after_silu(count: int) -> Tensor:
    return torch.nn.functional.silu(1.5 * heavy_tailed(count))


def rounding_error(x: Tensor, levels: Tensor) -> float:
    """Brute force in float64: each sample goes to the nearest of all levels."""
    return float((x.double().reshape(-1, 1) - levels.double()).square().min(dim=1).values.sum())


def grid_levels(fmt: FloatFormat, max_value: float, zero_point: float = 0.0) -> Tensor:
    return torch.tensor(fmt.levels, dtype=torch.float64) / fmt.largest * max_value + zero_point


def absmax_error(x: Tensor, fmt: FloatFormat) -> float:
    """The usual scaling: the grid just covers the data."""
    low = 0.0 if fmt.signed else min(float(x.min()), 0.0)
    span = float(x.abs().max()) if fmt.signed else float(x.max()) - low
    return rounding_error(x, grid_levels(fmt, span, low))


def grid_of(score: FormatScore) -> Grid:
    rows = score.max_value.numel()
    return Grid.with_maximum(
        score.format,
        score.max_value[0] if rows == 1 else score.max_value[:, None],
        score.zero_point,
    )


def measured_error(x: Tensor, score: FormatScore) -> float:
    error = (fake_quantize(x.float(), grid_of(score)).double() - x.double()).square().sum()
    return float(error / (x.double().square().sum() or 1.0))


def best(result: SearchResult, *, signed: bool) -> FormatScore:
    return next(score for score in result.scores if score.format.signed == signed)


def same(one: SearchResult, other: SearchResult) -> bool:
    return one.winner.format == other.winner.format and all(
        (a.format, a.zero_point) == (b.format, b.zero_point)
        and torch.equal(a.max_value, b.max_value)
        and a.error == pytest.approx(b.error, rel=1e-12)
        for a, b in zip(one.scores, other.scores, strict=True)
    )


@pytest.mark.parametrize(
    "name", ["e1m2", "e2m1", "e3m0", "ue1m3", "ue2m2", "ue3m1", "ue4m0", "e3m4", "ue4m4"]
)
@pytest.mark.parametrize("with_zero_point", [False, True])
def test_error_equals_brute_force(name: str, with_zero_point: bool) -> None:
    fmt, generator = FloatFormat.parse(name), torch.Generator().manual_seed(1)
    data = torch.stack([gaussian(400), heavy_tailed(400), after_silu(400)])
    maxima = (torch.rand(3, 6, generator=generator, dtype=torch.float64) + 0.05) * 4
    zeros = torch.rand(3, 6, generator=generator, dtype=torch.float64) * -1.5
    got = SortedRows(data).error(fmt.levels, maxima, zeros if with_zero_point else None)
    for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(6)).tolist():
        zero = float(zeros[row, column]) if with_zero_point else 0.0
        expected = rounding_error(data[row], grid_levels(fmt, float(maxima[row, column]), zero))
        assert float(got[row, column]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["e1m2", "ue2m2", "e3m4"])
def test_error_is_exact_for_the_float32_numbers_next_to_a_border(name: str) -> None:
    fmt, generator = FloatFormat.parse(name), torch.Generator().manual_seed(2)
    for max_value in torch.rand(20, generator=generator, dtype=torch.float64).tolist():
        levels = grid_levels(fmt, max_value)
        nearest = ((levels[1:] + levels[:-1]) / 2).float()
        data = torch.cat(
            [
                nearest,
                torch.nextafter(nearest, -torch.ones(())),
                torch.nextafter(nearest, torch.ones(())),
            ]
        )
        got = SortedRows(data[:, None]).error(
            fmt.levels, torch.full((len(data), 1), max_value, dtype=torch.float64)
        )
        expected = torch.tensor([rounding_error(x, levels) for x in data], dtype=torch.float64)
        torch.testing.assert_close(got[:, 0], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("fmt", SIGNED, ids=str)
def test_signed_grids_may_be_scored_on_magnitudes(fmt: FloatFormat) -> None:
    data, maxima = heavy_tailed(2, 500), torch.tensor([[0.7, 2.0], [1.5, 9.0]], dtype=torch.float64)
    halves = SortedRows(data.abs()).error(fmt.magnitudes, maxima)
    torch.testing.assert_close(
        halves, SortedRows(data).error(fmt.levels, maxima), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize(
    "data", [gaussian(3000), heavy_tailed(3000), after_silu(3000)], ids=["normal", "heavy", "silu"]
)
def test_never_worse_than_absmax(data: Tensor, bits: int) -> None:
    formats = formats_of_width(bits, signed=True) + formats_of_width(bits, signed=False)
    result = search_tensor(data, formats, SPACE.for_bits(bits))
    total = float(data.double().square().sum())
    for score in result.scores:
        assert score.error * total <= absmax_error(data, score.format) * (1 + 1e-9)


@given(st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_never_worse_than_absmax_on_a_handful_of_numbers(numbers: list[float]) -> None:
    data = torch.tensor(numbers)
    total = float(data.double().square().sum()) or 1.0
    for score in search_tensor(data, BOTH, SPACE).scores:
        assert score.error * total <= absmax_error(data, score.format) + 1e-12 * total


@pytest.mark.parametrize("fmt", BOTH, ids=str)
def test_data_that_lie_on_the_absmax_grid_stay_exact(fmt: FloatFormat) -> None:
    data = torch.tensor(fmt.levels, dtype=torch.float32) * 0.37
    assert search_tensor(data, [fmt], SPACE).winner.error < 1e-12


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_a_power_of_two_only_scales_the_grid(exponent: int) -> None:
    data = after_silu(500)
    one, other = (search_tensor(x, BOTH, SPACE) for x in (data, data * 2.0**exponent))
    assert [s.format for s in other.scores] == [s.format for s in one.scores]
    for a, b in zip(one.scores, other.scores, strict=True):
        assert b.error == pytest.approx(a.error, rel=1e-6)
        assert b.max_value.item() == pytest.approx(a.max_value.item() * 2.0**exponent, rel=1e-6)


def test_order_of_the_samples_does_not_matter() -> None:
    data = after_silu(1000)
    shuffled = data[torch.randperm(1000, generator=torch.Generator().manual_seed(5))].view(10, 100)
    assert same(search_tensor(data, BOTH, SPACE), search_tensor(shuffled, BOTH, SPACE))


@pytest.mark.parametrize(
    "data", [gaussian(2000), after_silu(2000), after_silu(2000) - 3], ids=["normal", "silu", "low"]
)
def test_reported_error_is_the_error_of_fake_quantize(data: Tensor) -> None:
    for score in search_tensor(data, BOTH, SPACE).scores:
        assert score.error == pytest.approx(measured_error(data, score), rel=1e-5)


def test_scores_are_sorted_and_cover_every_format_once() -> None:
    result = search_tensor(after_silu(500), BOTH, SPACE)
    assert {score.format for score in result.scores} == set(BOTH)
    assert [score.error for score in result.scores] == sorted(
        score.error for score in result.scores
    )
    assert all((score.zero_point is None) == score.format.signed for score in result.scores)


def test_zero_point_carries_the_gain_after_silu() -> None:
    data = after_silu(20_000)
    result = search_tensor(data, BOTH, SPACE)
    rows, total = SortedRows(data.reshape(1, -1)), float(data.double().square().sum())
    maxima = torch.linspace(0.05, 1.2, 400, dtype=torch.float64)[None] * data.max().double()
    without = (
        min(
            float(rows.error(fmt.magnitudes, maxima, torch.zeros_like(maxima)).min())
            for fmt in UNSIGNED
        )
        / total
    )
    signed, unsigned = best(result, signed=True), best(result, signed=False)
    assert signed.error > without > 3 * unsigned.error
    assert result.winner is unsigned
    assert signed.format.name == "e2m1" and unsigned.format.name == "ue2m2"
    assert unsigned.zero_point is not None and -0.2785 < unsigned.zero_point < -0.2


@pytest.mark.parametrize("count", [20_000, 100_000])
def test_signed_e2m1_wins_on_a_gaussian(count: int) -> None:
    assert search_tensor(gaussian(count), BOTH, SPACE).winner.format.name == "e2m1"
    assert search_rows(gaussian(1, count), SIGNED, SPACE).winner.format.name == "e2m1"


def test_margin_keeps_sixteen_even_levels_from_winning_a_gaussian() -> None:
    data = gaussian(20_000)
    kept = search_tensor(data, BOTH, SPACE)
    even = kept.scores[0]
    assert even.format.name == "ue1m3"
    assert (1 - SPACE.margin) * kept.winner.error < even.error < kept.winner.error
    assert search_tensor(data, BOTH, replace(SPACE, margin=0.0)).winner.format == even.format


def test_margin_does_not_keep_an_unsigned_format_that_is_alone() -> None:
    assert search_tensor(gaussian(500), UNSIGNED, SPACE).winner.format.name == "ue1m3"


def test_wide_formats_are_searched_more_coarsely() -> None:
    assert SPACE.for_bits(4) == SPACE
    wide = SPACE.for_bits(8)
    assert wide.num_maxima < SPACE.num_maxima and wide.num_zero_points < SPACE.num_zero_points


def test_refinement_moves_maximum_and_zero_point_to_lower_the_error() -> None:
    data = after_silu(2000)
    fine, coarse = (
        search_tensor(data, BOTH, replace(SPACE, num_refinements=n)).scores for n in (2, 0)
    )
    for after in fine:
        before = next(score for score in coarse if score.format == after.format)
        assert after.error < before.error
        assert after.max_value != before.max_value
        assert after.format.signed or after.zero_point != before.zero_point


def test_rows_get_their_own_maxima_as_if_searched_alone() -> None:
    weight = heavy_tailed(7, 300) * torch.logspace(-3, 2, 7)[:, None]
    together = search_rows(weight, SIGNED, SPACE)
    alone = [search_rows(row[None], SIGNED, SPACE) for row in weight]
    totals = weight.double().square().sum(dim=1)
    for score in together.scores:
        parts = [next(s for s in result.scores if s.format == score.format) for result in alone]
        torch.testing.assert_close(
            score.max_value, torch.cat([part.max_value for part in parts]), rtol=1e-6, atol=0
        )
        errors = torch.tensor([part.error for part in parts], dtype=torch.float64)
        assert score.error == pytest.approx(float((errors * totals).sum() / totals.sum()), rel=1e-9)
        assert score.error == pytest.approx(measured_error(weight, score), rel=1e-5)


def test_one_row_is_searched_like_a_tensor() -> None:
    data = heavy_tailed(800)
    assert same(search_rows(data[None], SIGNED, SPACE), search_tensor(data, SIGNED, SPACE))


def test_kernel_of_a_convolution_is_one_row_per_output_channel() -> None:
    weight = gaussian(6, 4, 3, 3)
    result = search_rows(weight, SIGNED, SPACE)
    assert result.winner.max_value.shape == (6,)
    assert result.winner.max_value.dtype == torch.float32
    assert same(result, search_rows(weight.flatten(1), SIGNED, SPACE))


@pytest.mark.parametrize("chunk", [1, 3000])
def test_blocks_of_rows_do_not_change_the_result(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = heavy_tailed(7, 60)
    whole = search_rows(weight, SIGNED, SPACE)
    monkeypatch.setattr(search, "_CHUNK", chunk)
    blocks = search_rows(weight, SIGNED, SPACE)
    assert blocks.winner.format == whole.winner.format
    for a, b in zip(whole.scores, blocks.scores, strict=True):
        assert b.error == pytest.approx(a.error, rel=1e-12)
        torch.testing.assert_close(b.max_value, a.max_value, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(10),
        torch.full((10,), 5.0),
        torch.full((10,), -5.0),
        torch.tensor([3.0]),
        torch.tensor([-3.0]),
        torch.tensor(2.0),
        torch.tensor([0.0]),
        -after_silu(300).abs() - 1,
        after_silu(300).abs() + 1,
        torch.tensor([1e-20, -2e-20, 3e-20]),
        torch.tensor([1e18, -2e18, 3e18]),
    ],
    ids=[
        "zeros",
        "five",
        "minus five",
        "one",
        "minus one",
        "0-d",
        "0",
        "negative",
        "positive",
        "tiny",
        "huge",
    ],
)
def test_degenerate_data_give_a_usable_grid(data: Tensor) -> None:
    result = search_tensor(data, BOTH, SPACE)
    for score in result.scores:
        scale = grid_of(score).scale
        assert 0 < scale < float("inf")
        assert 0 <= score.error <= 1
        assert score.zero_point is None or abs(score.zero_point) <= float(data.abs().max()) * 1.1
    assert measured_error(data, result.winner) <= 0.1


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_constant_is_exact_with_a_zero_point(value: float) -> None:
    result = search_tensor(torch.full((10,), value), UNSIGNED, SPACE)
    assert measured_error(torch.full((10,), value), result.winner) == 0


def test_zero_row_among_others_keeps_a_positive_scale() -> None:
    weight = gaussian(3, 50)
    weight[1] = 0
    winner = search_rows(weight, SIGNED, SPACE).winner
    assert (winner.max_value > 0).all() and winner.max_value.isfinite().all()
    assert not fake_quantize(weight, grid_of(winner))[1].any()


def test_weight_of_zeros_is_exact() -> None:
    result = search_rows(torch.zeros(3, 5), SIGNED, SPACE)
    assert [score.error for score in result.scores] == [0] * len(SIGNED)
    assert (result.winner.max_value > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_input_is_searched_in_float32(dtype: torch.dtype) -> None:
    data = after_silu(600).to(dtype)
    assert same(search_tensor(data, BOTH, SPACE), search_tensor(data.float(), BOTH, SPACE))
    weight = data.view(6, 100)
    assert same(search_rows(weight, SIGNED, SPACE), search_rows(weight.float(), SIGNED, SPACE))


def test_search_takes_parameters_and_leaves_them_alone() -> None:
    weight = torch.nn.Parameter(gaussian(4, 20))
    before = weight.detach().clone()
    assert not search_rows(weight, SIGNED, SPACE).winner.max_value.requires_grad
    assert not search_tensor(weight, BOTH, SPACE).winner.max_value.requires_grad
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True])
def test_16_bit_rows_are_sorted_as_numbers(dtype: torch.dtype, signed: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 301).mul_(100).to(dtype)
    rows[0, :4] = torch.tensor([0.0, -0.0, 6e-5, -6e-5])
    rows = rows if signed else rows.abs()
    assert torch.equal(SortedRows(rows).values, rows.float().sort(dim=1).values)
