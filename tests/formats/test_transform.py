"""A transformed product is the plain one; a rotation is its own inverse and keeps sizes."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.rounding import Grid
from msfp_cli.formats.transform import (
    LARGEST_BLOCK,
    SMALLEST_BLOCK,
    InputTransform,
    block_of,
    hadamard,
    token_sizes,
)

BLOCKS = (16, 32, 64, 128)
EVERY = [
    InputTransform(rotation=rotation, token_scales=token_scales)
    for rotation, token_scales in [(0, False), (16, False), (0, True), (16, True)]
]
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", BLOCKS)
def test_matrix_is_that_of_the_document(size: int) -> None:
    """An element is negative where the binary numbers of its row and column share odd ones."""
    matrix = hadamard(size, CPU)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    torch.testing.assert_close(matrix, torch.tensor(signs) / size**0.5)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))


@given(st.integers(1, 20_000))
def test_blocks_are_the_largest_powers_of_two_that_divide(channels: int) -> None:
    block = block_of(channels)
    if block:
        assert channels % block == 0 and SMALLEST_BLOCK <= block <= LARGEST_BLOCK
        assert block == LARGEST_BLOCK or channels % (2 * block)
    else:
        assert channels % SMALLEST_BLOCK


@pytest.mark.parametrize("rotation", [1, 8, 24, 256, -16])
def test_other_blocks_are_refused(rotation: int) -> None:
    with pytest.raises(ValueError, match=f"blocks of {rotation} "):
        InputTransform(rotation=rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotation", BLOCKS)
def test_rotating_twice_changes_nothing(rotation: int, dtype: torch.dtype) -> None:
    x = draw(3, 5, 384).to(dtype)
    transform = InputTransform(rotation=rotation)
    rotated = transform.rotate(x)
    assert rotated.dtype == dtype and not torch.allclose(rotated, x)
    torch.testing.assert_close(transform.rotate(rotated), x, atol=0.03, rtol=0.03)
    norms = [each.float().norm(dim=-1) for each in (rotated, x)]
    torch.testing.assert_close(*norms, atol=0, rtol=1e-2)


def test_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(48)
    x[20] = 16.0
    rotated = InputTransform(rotation=16).rotate(x)
    assert torch.equal(rotated.abs(), torch.tensor([0.0, 4.0, 0.0]).repeat_interleave(16))


@pytest.mark.parametrize("transform", EVERY, ids=repr)
def test_transformed_product_is_the_product(transform: InputTransform) -> None:
    x = draw(4, 3, 48).mul(torch.tensor([0.0, 1e-3, 1.0, 1e4])[:, None, None]).requires_grad_()
    weight = draw(7, 48, seed=1)
    bias = draw(7, seed=2)
    rotated = transform.rotate(weight)
    kernel_bias = None if transform.token_scales else bias
    y = transform.around(lambda rows: F.linear(rows, rotated, kernel_bias), x, bias)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (plain,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scaled_tokens_have_a_size_of_one(dtype: torch.dtype) -> None:
    scaled, sizes = InputTransform(token_scales=True)(draw(3, 40).to(dtype) * 5)
    assert scaled.dtype == dtype and sizes is not None
    torch.testing.assert_close(token_sizes(scaled), torch.ones(3, 1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rotation", BLOCKS)
def test_scaled_tokens_do_not_overflow_float16_when_they_are_rotated(rotation: int) -> None:
    transform = InputTransform(rotation=rotation, token_scales=True)
    x = torch.full((2, 128), 3e4).half()
    weight = draw(7, 128, seed=1)
    y = transform.around(lambda rows: F.linear(rows.float(), transform.rotate(weight)), x, None)
    torch.testing.assert_close(y, F.linear(x.float(), weight).half(), rtol=1e-2, atol=0)
    assert transform.views(x).isfinite().all()


@pytest.mark.parametrize("transform", EVERY[1:], ids=repr)
def test_error_of_views_is_that_of_the_input(transform: InputTransform) -> None:
    """The views of all elements give the error that rounding the whole input makes."""
    x = draw(64, 32) * torch.linspace(0.1, 4, 64)[:, None]
    grid = Grid(FloatFormat.parse("e2m1"), 0.2)
    views = transform.views(x).flatten(1)
    exact = transform.rotate(x)
    error = (transform.rounded(x, grid) - exact).square().sum() / exact.square().sum()
    assert transform.error(views, grid) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("transform", EVERY[2:], ids=repr)
def test_one_grid_fits_tokens_of_all_sizes(transform: InputTransform) -> None:
    x = draw(64, 32)
    sizes = torch.logspace(-4, 4, 64)[:, None]
    grid = Grid(FloatFormat.parse("e2m1"), 0.25)
    alone = transform.rounded(x, grid)
    torch.testing.assert_close(transform.rounded(x * sizes, grid), alone * sizes)


@pytest.mark.parametrize("transform", EVERY[2:], ids=repr)
def test_only_the_token_with_a_nan_is_lost(transform: InputTransform) -> None:
    x = draw(3, 32)
    x[1, 7] = float("nan")
    y = transform.rounded(x, Grid(FloatFormat.parse("e2m1"), 0.25))
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
