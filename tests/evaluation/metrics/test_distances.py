from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from msfp_cli.errors import UsageError
from msfp_cli.evaluation.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision,
    psnr,
    recall,
    ssim,
    too_few,
)

DISTANCES: list[Callable[[Tensor, Tensor], float]] = [frechet_distance, kernel_distance]
few = settings(max_examples=20, deadline=None, derandomize=True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(11, 20),
    st.integers(11, 20),
    st.integers(0, 1000),
)
@few
def test_pictures_measures_equal_those_of_torchmetrics(
    n: int, channels: int, height: int, width: int, seed: int
) -> None:
    pictures, reference = (
        draw(n, channels, height, width, seed=seed),
        draw(n, channels, height, width, seed=seed + 1),
    )
    for i in range(n):
        pair = pictures[i : i + 1], reference[i : i + 1]
        assert float(psnr(*pair)) == pytest.approx(
            float(peak_signal_noise_ratio(*pair, data_range=1.0)), abs=1e-5
        )
        _, everywhere = structural_similarity_index_measure(
            *pair, data_range=1.0, return_full_image=True
        )
        inside = everywhere[
            ..., 5:-5, 5:-5
        ]  # theirs goes on over the mirrored border, Wang's does not
        assert float(ssim(*pair)) == pytest.approx(float(inside.mean()), abs=1e-6)
    assert psnr(pictures, reference).shape == ssim(pictures, reference).shape == (n,)


def test_equal_pictures_are_perfect() -> None:
    pictures = draw(2, 3, 16, 16)
    assert psnr(pictures, pictures).isinf().all()
    torch.testing.assert_close(ssim(pictures, pictures), torch.ones(2, dtype=torch.float64))


def frechet_by_scipy(x: Tensor, y: Tensor) -> float:
    cov_x, cov_y = (torch.cov(each.t()).numpy() for each in (x, y))
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    return float((x.mean(0) - y.mean(0)).square().sum()) + float((cov_x + cov_y - 2 * root).trace())


@given(st.integers(2, 8), st.integers(20, 40), st.integers(0, 1000))
@few
def test_frechet_distance_equals_the_formula_by_scipy_and_by_torchmetrics(
    dimensions: int, samples: int, seed: int
) -> None:
    x, y = (
        draw(samples, dimensions, seed=seed) * 3,
        draw(samples + 5, dimensions, seed=seed + 1).square(),
    )
    assert frechet_distance(x, y) == pytest.approx(frechet_by_scipy(x, y), rel=1e-6, abs=1e-9)
    by_torchmetrics = _compute_fid(x.mean(0), torch.cov(x.t()), y.mean(0), torch.cov(y.t()))
    assert frechet_distance(x, y) == pytest.approx(float(by_torchmetrics), rel=1e-6, abs=1e-9)


def test_frechet_distance_of_shifted_and_widened_samples_is_the_closed_form() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(x + 2, x) == pytest.approx(4 * 4, rel=1e-9)
    assert frechet_distance(3 * x, x) == pytest.approx(
        float((2 * x.mean(0)).square().sum() + (3 - 1) ** 2 * torch.cov(x.t()).trace()), rel=1e-9
    )


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 6), st.integers(0, 1000))
@few
def test_kernel_distance_equals_that_of_torchmetrics(
    n: int, m: int, dimensions: int, seed: int
) -> None:
    n = m = min(n, m)  # torchmetrics takes sets of one size only
    x, y = draw(n, dimensions, seed=seed), draw(m, dimensions, seed=seed + 1)
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(x, y)), abs=1e-9)


def poly_mmd_by_pairs(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def mean(pairs: list[float]) -> float:
        return sum(pairs) / len(pairs)

    inside = [
        mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
        for s in (x, y)
    ]
    return sum(inside) - 2 * mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_of_sets_of_other_sizes_is_the_mean_over_pairs() -> None:
    x, y = draw(5, 3), draw(8, 3, seed=1)
    assert kernel_distance(x, y) == pytest.approx(poly_mmd_by_pairs(x, y), abs=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_order_does_not_matter_and_equal_sets_are_close(
    distance: Callable[[Tensor, Tensor], float],
) -> None:
    x, y = draw(60, 5), draw(50, 5, seed=1) + 0.3
    shuffled = x[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert distance(shuffled, y) == pytest.approx(distance(x, y), rel=1e-9)
    assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-9)
    assert distance(x, shuffled) < 0.02 * distance(x, y)


def test_equal_sets_have_no_frechet_distance() -> None:
    x = draw(60, 5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_precision_and_recall_tell_quality_from_variety() -> None:
    near, far = draw(40, 2), draw(40, 2, seed=1) + 10
    both = torch.cat([near, far])
    assert precision(near, near) == recall(near, near) == 1
    assert precision(near, far) == recall(near, far) == 0
    assert precision(near, both) == 1 and 0.4 < recall(near, both) < 0.6  # good, but half of it
    assert 0.4 < precision(both, near) < 0.6 and recall(both, near) == 1  # all, but half is bad


def test_wrong_sets_are_refused() -> None:
    with pytest.raises(UsageError, match="same number and size"):
        psnr(draw(2, 3, 16, 16), draw(2, 3, 16, 17))
    with pytest.raises(UsageError, match="same number and size"):
        ssim(draw(2, 3, 16, 16), draw(1, 3, 16, 16))
    with pytest.raises(UsageError, match="at least 11 by 11"):
        ssim(draw(1, 1, 8, 32), draw(1, 1, 8, 32))
    for distance in (frechet_distance, kernel_distance, precision, recall):
        with pytest.raises(UsageError, match="at least two"):
            distance(draw(1, 3), draw(5, 3))
        with pytest.raises(UsageError, match="features of [34] and [34] dimensions"):
            distance(draw(5, 3), draw(5, 4))
    with pytest.raises(UsageError, match="more than 3"):
        precision(draw(3, 3), draw(9, 3))


@pytest.mark.parametrize(
    ("samples", "dimensions", "few_enough"), [(100, 64, True), (128, 64, False)]
)
def test_too_few_samples_for_a_covariance_are_told(
    samples: int, dimensions: int, few_enough: bool
) -> None:
    assert too_few(samples, dimensions) is few_enough
