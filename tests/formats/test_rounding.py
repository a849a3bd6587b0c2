from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfp_cli.errors import UsageError
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.rounding import (
    Grid,
    dequantize,
    fake_quantize,
    fake_quantize_learned,
    quantize,
)


def test_signed_grids_have_no_zero_point() -> None:
    fmt = FloatFormat.parse("e2m1")
    for scale in (0.5, torch.ones(3)):
        with pytest.raises(ValueError, match=r"e2m1 has a sign, so no zero point of 0\.3"):
            Grid(fmt, scale, 0.3)


def valid_formats() -> list[FloatFormat]:
    found = []
    for exponent_bits, mantissa_bits, signed in product(range(9), range(9), (True, False)):
        try:
            found.append(FloatFormat(exponent_bits, mantissa_bits, signed))
        except UsageError:
            continue
    return found


FORMATS = valid_formats()
SEARCHED = [
    fmt
    for bits in range(2, 9)
    for signed in (True, False)
    for fmt in formats_of_width(bits, signed=signed)
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def all_codes(fmt: FloatFormat) -> Tensor:
    return torch.arange(2**fmt.bits, dtype=torch.uint8)


def grid_of(fmt: FloatFormat, max_value: float = 3.3, offset: float = 0.0) -> Grid:
    """A grid of the given maximum; `offset` counts in steps and applies to unsigned formats."""
    grid = Grid.with_maximum(fmt, torch.tensor(max_value))
    if fmt.signed:
        return grid
    return Grid.with_maximum(fmt, torch.tensor(max_value), offset * float(grid.scale))


def awkward_values(grid: Grid) -> Tensor:
    """Float32 values in and far outside a grid, with both zeros, infinities and subnormals."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(400, generator=generator) * float(grid.max_value)
    near_zero = torch.randn(100, generator=generator) * float(grid.scale)
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40, 3e38, -3e38])
    return torch.cat([inside, near_zero, dequantize(all_codes(grid.format), grid), odd])


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    fmt = draw(st.sampled_from(SEARCHED))
    max_value = draw(st.floats(2.0**-10, 2.0**10, width=32))
    zero_point = 0.0 if fmt.signed else draw(st.floats(-1, 0, width=32))
    return Grid.with_maximum(fmt, torch.tensor(max_value), zero_point)


values = st.lists(st.floats(-(2.0**11), 2.0**11, width=32), min_size=1, max_size=30)
relaxed = settings(max_examples=100, deadline=None, derandomize=True)


@each_format
def test_dequantize_is_scale_times_code_book_plus_zero_point(fmt: FloatFormat) -> None:
    grid = grid_of(fmt, offset=-3.7)
    expected = torch.tensor(fmt.code_book, dtype=torch.float64) * grid.scale + grid.zero_point
    torch.testing.assert_close(
        dequantize(all_codes(fmt), grid).double(),
        expected,
        rtol=3e-7,
        atol=1e-6 * float(grid.scale),
    )


@pytest.mark.parametrize("offset", [0.0, -3.7])
@pytest.mark.parametrize("max_value", [3.3, 1e-3, 7e4])
@each_format
def test_every_code_book_value_is_a_fixed_point(
    fmt: FloatFormat, max_value: float, offset: float
) -> None:
    grid = grid_of(fmt, max_value, offset)
    codes = all_codes(fmt)
    values = dequantize(codes, grid)
    assert torch.equal(fake_quantize(values, grid), values)
    written = torch.where(
        (codes == fmt.sign_bit) & fmt.signed, 0, codes
    )  # zero has one code, though two would do
    assert torch.equal(quantize(values, grid), written)


@each_format
def test_rounds_to_the_nearest_level_and_ties_to_the_even_code(fmt: FloatFormat) -> None:
    grid = Grid(fmt, 1.0)
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    middle = ((levels[1:] + levels[:-1]) / 2).float()
    infinity = torch.full_like(middle, float("inf"))
    below, above = torch.nextafter(middle, -infinity), torch.nextafter(middle, infinity)
    generator = torch.Generator().manual_seed(0)
    uniform = (torch.rand(300, generator=generator) * 2.5 - 1.25) * min(fmt.largest, 2.0**60)
    x = torch.cat([middle, below, above, uniform, torch.randn(300, generator=generator) * 5])
    distances = (x.double()[:, None] - levels).abs()
    chosen = (x.double() - dequantize(quantize(x, grid), grid).double()).abs()
    assert torch.equal(chosen, distances.min(dim=1).values)
    assert (quantize(middle, grid) % 2 == 0).all()
    if fmt.largest < 2**20:  # the neighbours of a border are no ties
        assert torch.equal(fake_quantize(below, grid).double(), levels[:-1])
        assert torch.equal(fake_quantize(above, grid).double(), levels[1:])


@given(grids(), values)
@relaxed
def test_nearest_for_any_scale_and_zero_point(grid: Grid, numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    levels = torch.tensor(grid.format.levels, dtype=torch.float64) * grid.scale + grid.zero_point
    best = (x.double()[:, None] - levels).abs().min(dim=1).values
    chosen = (x.double() - fake_quantize(x, grid).double()).abs()
    slack = 1e-6 * (x.double().abs() + abs(grid.zero_point) + 1e-30)
    assert (chosen <= best + slack).all()


@given(grids(), values)
@relaxed
def test_monotone(grid: Grid, numbers: list[float]) -> None:
    rounded = fake_quantize(torch.tensor(sorted(numbers)), grid)
    assert (rounded.diff() >= 0).all()


@given(grids(), values)
@relaxed
def test_idempotent(grid: Grid, numbers: list[float]) -> None:
    once = fake_quantize(torch.tensor(numbers), grid)
    assert torch.equal(fake_quantize(once, grid), once)


@each_dtype
@each_format
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(
    fmt: FloatFormat, dtype: torch.dtype
) -> None:
    grid = grid_of(fmt, offset=-3.7)
    x = awkward_values(grid).to(dtype)
    rounded = fake_quantize(x, grid)
    with_grad = fake_quantize(x.clone().requires_grad_(), grid)
    expected = dequantize(quantize(x, grid), grid)
    assert rounded.dtype == with_grad.dtype == dtype
    assert with_grad.requires_grad
    for got in (rounded, with_grad.detach()):
        assert torch.equal(got, expected.to(dtype))
        assert torch.equal(got.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_is_float32_whatever_the_type(dtype: torch.dtype) -> None:
    grid = Grid(FloatFormat.parse("ue2m2"), 0.0371, -0.2781)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(quantize(x, grid), quantize(x.float(), grid))
    assert torch.equal(quantize(x, grid), quantize(x.double(), grid))


@pytest.mark.parametrize("grid", [(1.0, 0.0), (0.0625, -3.7), (0.371, -0.25)], ids=str)
@each_format
def test_fake_quantize_skips_the_codes_with_the_same_result_for_every_float16(
    fmt: FloatFormat, grid: tuple[float, float]
) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[~x.isnan()].float()
    placed = Grid(fmt, grid[0], 0.0 if fmt.signed else grid[1])
    rounded, expected = fake_quantize(x, placed), dequantize(quantize(x, placed), placed)
    assert torch.equal(rounded.view(torch.int32), expected.view(torch.int32))


@each_format
def test_infinities_saturate_and_nan_stays_nan(fmt: FloatFormat) -> None:
    grid = grid_of(fmt, offset=-3.7)
    levels = dequantize(all_codes(fmt), grid)
    extremes = torch.tensor([float("inf"), -float("inf")])
    for x in (extremes, extremes.clone().requires_grad_()):
        assert fake_quantize(x, grid).tolist() == [levels.max(), levels.min()]
    nan = torch.tensor([float("nan"), -float("nan"), 0.0])
    for x in (nan, nan.clone().requires_grad_()):
        assert fake_quantize(x, grid).isnan().tolist() == [True, True, False]
    assert (quantize(nan, grid).int() < 2**fmt.bits).all()


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.signed], ids=str)
def test_zero_is_code_0_and_never_negative(fmt: FloatFormat) -> None:
    grid = grid_of(fmt)
    x = torch.tensor([0.0, -0.0, 0.4, -0.4, 0.5, -0.5, -1e-30, -1e-44]) * torch.tensor(
        float(grid.scale)
    )
    assert quantize(x, grid).tolist() == [0] * len(x)
    assert not fake_quantize(x, grid).signbit().any()
    assert not dequantize(torch.tensor([0, fmt.sign_bit], dtype=torch.uint8), grid).signbit().any()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
@pytest.mark.parametrize("name", ["e2m1", "ue2m2"])
def test_empty_tensors_stay_empty(name: str, shape: tuple[int, ...]) -> None:
    grid = Grid(FloatFormat.parse(name), 0.5)
    codes = quantize(torch.empty(shape), grid)
    assert codes.shape == shape and codes.dtype == torch.uint8
    assert dequantize(codes, grid).shape == shape
    x = torch.empty(shape, requires_grad=True)
    fake_quantize(x, grid).sum().backward()
    assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize("shape", [(5, 8), (5, 2, 3, 3)])
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "ue3m1"])
def test_each_channel_is_rounded_with_its_own_scale(name: str, shape: tuple[int, ...]) -> None:
    fmt, generator = FloatFormat.parse(name), torch.Generator().manual_seed(0)
    x, scales = torch.randn(shape, generator=generator), torch.rand(5, generator=generator) + 0.01
    grid = Grid(fmt, scales.view(-1, *[1] * (len(shape) - 1)))
    by_channel = [
        quantize(row, Grid(fmt, float(scale))) for row, scale in zip(x, scales, strict=True)
    ]
    assert torch.equal(quantize(x, grid), torch.stack(by_channel))
    expected = [dequantize(c, Grid(fmt, float(s))) for c, s in zip(by_channel, scales, strict=True)]
    assert torch.equal(fake_quantize(x, grid), torch.stack(expected))


def test_memory_layout_does_not_matter() -> None:
    grid = Grid(FloatFormat.parse("e2m1"), 0.3)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fake_quantize(x.t(), grid), fake_quantize(x, grid).t())
    assert torch.equal(quantize(x[:, ::2], grid), quantize(x, grid)[:, ::2])


@each_dtype
@pytest.mark.parametrize(
    ("grid", "low", "high"),
    [
        (Grid(FloatFormat.parse("e2m1"), 0.25), -3.0, 3.0),
        (Grid(FloatFormat.parse("ue2m2"), 0.125, -0.25), -0.25, 3.25),
        (Grid(FloatFormat.parse("ue1m3"), 0.125), 0.0, 1.875),
    ],
    ids=["e2m1", "ue2m2", "ue1m3"],
)
def test_gradient_is_straight_through_inside_the_range_and_zero_outside(
    grid: Grid, low: float, high: float, dtype: torch.dtype
) -> None:
    points = [
        low,
        high,
        low - 0.125,
        high + 0.125,
        low + 0.125,
        high - 0.125,
        1.0,
        0.3,
        -9.0,
        9.0,
        float("inf"),
    ]
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    upstream = torch.linspace(-2, 3, len(points)).to(dtype)
    fake_quantize(x, grid).backward(upstream)
    inside = torch.tensor([low <= point <= high for point in points])
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, upstream, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["e1m2", "ue2m2"])
def test_gradient_range_is_exact_for_every_16_bit_value(name: str, dtype: torch.dtype) -> None:
    fmt = FloatFormat.parse(name)
    # Bounds that no 16-bit type can represent: rounding them would move the range.
    grid = Grid(
        fmt,
        float(torch.tensor(1.0045 / fmt.largest)),
        0.0 if fmt.signed else float(torch.tensor(-0.3003)),
    )
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[~x.isnan()].clone().requires_grad_()
    fake_quantize(x, grid).sum().backward()
    low, high = (
        grid.zero_point - fmt.signed * grid.scale * fmt.largest,
        grid.zero_point + grid.scale * fmt.largest,
    )
    inside = (x.detach().double() >= low) & (x.detach().double() <= high)
    assert x.grad is not None
    assert x.detach()[(x.grad != 0) != inside].tolist() == []


def test_gradient_range_follows_the_channel() -> None:
    scales = torch.tensor([[0.1], [1.0]])
    x = torch.tensor([[5.0, 0.5], [5.0, 0.5]], requires_grad=True)
    fake_quantize(x, Grid(FloatFormat.parse("e1m2"), scales)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1], [1, 1]]


def test_no_graph_is_kept_without_grad() -> None:
    grid = Grid(FloatFormat.parse("e2m1"), 0.3)
    x = torch.randn(4, requires_grad=True)
    with torch.no_grad():
        assert not fake_quantize(x, grid).requires_grad
    assert not fake_quantize(x.detach(), grid).requires_grad


@each_format
def test_maximum_is_the_largest_level_above_the_zero_point(fmt: FloatFormat) -> None:
    grid = Grid.with_maximum(fmt, torch.tensor(2.7))
    assert dequantize(all_codes(fmt), grid).max().item() == pytest.approx(2.7, rel=3e-7)
    assert float(grid.max_value) == pytest.approx(2.7, rel=3e-7)
    assert isinstance(grid.scale, float) and grid.scale == float(torch.tensor(grid.scale))


def test_maxima_per_channel_give_scales_per_channel() -> None:
    maxima = torch.tensor([[1.2], [2.4], [0.3]])
    grid = Grid.with_maximum(FloatFormat.parse("e2m1"), maxima)
    torch.testing.assert_close(grid.scale, torch.tensor([[0.1], [0.2], [0.025]]))
    torch.testing.assert_close(grid.max_value, maxima)


def test_zero_point_is_kept_in_float32() -> None:
    grid = Grid.with_maximum(FloatFormat.parse("ue2m2"), torch.tensor(1.0), -0.1)
    assert grid.zero_point == torch.tensor(-0.1, dtype=torch.float32).item() != -0.1


UNIT = 0.75  # what the zero point's move is counted in


def no_shift() -> Tensor:
    """What moves a grid, before training."""
    return torch.zeros(2, requires_grad=True)


def plain_autograd(x: Tensor, grid: Grid, shift: Tensor) -> Tensor:
    """The documented gradients, float64: inside the range q follows x, outside it stands still."""
    fmt = grid.format
    q = torch.tensor(fmt.code_book, dtype=torch.float64)[quantize(x, grid).long()]
    reach, exact = torch.tensor(grid.scale) * fmt.largest, x.detach().float()
    inside = (exact >= grid.zero_point - reach * fmt.signed) & (exact <= grid.zero_point + reach)
    growth, moved = shift.double()
    scale, zero_point = growth.exp() * grid.scale, grid.zero_point + moved * UNIT
    steps = (x.double() - zero_point) / scale
    return zero_point + scale * (q + (steps - steps.detach()) * inside)


@each_dtype
@each_format
def test_learned_grid_rounds_as_a_fixed_one_bit_for_bit(
    fmt: FloatFormat, dtype: torch.dtype
) -> None:
    grid = grid_of(fmt, offset=-3.7)
    x = awkward_values(grid).to(dtype)
    got, expected = fake_quantize_learned(x, grid, no_shift(), UNIT), fake_quantize(x, grid)
    assert got.dtype == dtype and got.requires_grad
    assert torch.equal(got, expected)
    assert torch.equal(got.signbit(), expected.signbit())


@given(grids(), values)
@relaxed
def test_learned_grid_anywhere_rounds_as_a_fixed_one(grid: Grid, numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    assert torch.equal(fake_quantize_learned(x, grid, no_shift(), UNIT), fake_quantize(x, grid))


# Shares of the largest value, away from the borders of the grid, where either side's gradient is
# right.
shares = st.floats(-1.5, 1.5, width=32).filter(
    lambda share: min(abs(share), abs(abs(share) - 1)) > 1e-4
)


@given(grids(), st.lists(shares, min_size=1, max_size=30), st.integers(0, 2**31))
@relaxed
def test_gradients_of_a_learned_grid_are_those_of_plain_autograd(
    grid: Grid, parts: list[float], seed: int
) -> None:
    x = (torch.tensor(parts) * grid.max_value + grid.zero_point).requires_grad_()
    upstream = torch.randn(len(parts), generator=torch.Generator().manual_seed(seed))
    got, expected = (
        torch.autograd.grad(rounded, (x, shift), upstream.to(rounded.dtype))
        for shift in (no_shift(),)
        for rounded in (fake_quantize_learned(x, grid, shift, UNIT), plain_autograd(x, grid, shift))
    )
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-7)
    # What float32 may lose is a share of the sums' terms, of the size of the largest value in
    # steps.
    terms = float((upstream.abs() * (x.detach().abs() + abs(grid.zero_point))).sum())
    torch.testing.assert_close(got[1][0], expected[1][0], rtol=1e-5, atol=2e-6 * terms + 1e-6)
    torch.testing.assert_close(
        got[1][1], expected[1][1], rtol=1e-5, atol=2e-6 * float(upstream.abs().sum())
    )


@pytest.mark.parametrize("name", ["e2m1", "ue2m2", "ue4m0", "e4m3"])
def test_clipped_values_pull_the_grid_and_rounded_ones_only_its_scale(name: str) -> None:
    fmt = FloatFormat.parse(name)
    grid = Grid(fmt, 0.5, 0.0 if fmt.signed else -0.25)
    outside, shift = torch.tensor([1e6, 1e6, -1e6]), no_shift()
    (slopes,) = torch.autograd.grad(fake_quantize_learned(outside, grid, shift, UNIT).sum(), shift)
    assert slopes.tolist() == [0.5 * fmt.largest * (1 if fmt.signed else 2), 3 * UNIT]
    inside = dequantize(torch.tensor([3], dtype=torch.uint8), grid) + 0.125
    (slopes,) = torch.autograd.grad(fake_quantize_learned(inside, grid, shift, UNIT).sum(), shift)
    assert slopes.tolist() == [-0.125, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["e2m1", "ue2m2"])
def test_gradients_of_a_learned_grid_are_summed_in_float32_whatever_the_type(
    name: str, dtype: torch.dtype
) -> None:
    fmt, generator = FloatFormat.parse(name), torch.Generator().manual_seed(0)
    grid = Grid(fmt, 0.25, 0.0 if fmt.signed else -0.3125)
    x = torch.randn(20_000, generator=generator).to(dtype).requires_grad_()
    upstream = (torch.randn(20_000, generator=generator) + 0.5).to(dtype)
    shift = no_shift()
    got = torch.autograd.grad(fake_quantize_learned(x, grid, shift, UNIT), (x, shift), upstream)
    expected = torch.autograd.grad(plain_autograd(x, grid, shift), (x, shift), upstream.double())
    assert [one.dtype for one in got] == [dtype, torch.float32]
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-2)


def test_only_the_grid_may_be_learned() -> None:
    grid = Grid(FloatFormat.parse("ue2m2"), 0.25, -0.25)
    x, shift = torch.tensor([0.3, 9.0]), no_shift()
    (slopes,) = torch.autograd.grad(fake_quantize_learned(x, grid, shift, UNIT).sum(), shift)
    assert slopes.all()
