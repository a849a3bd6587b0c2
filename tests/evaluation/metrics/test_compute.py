"""How each metric is computed: picture by picture, between sets, and from prompts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from msfp_cli.evaluation.features.fashion import load_classifier
from msfp_cli.evaluation.features.squeezenet import deep_distance, load_squeezenet
from msfp_cli.evaluation.metrics import compute
from msfp_cli.evaluation.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision,
    recall,
)
from msfp_cli.evaluation.metrics.evidence import Evidence, PictureSet
from msfp_cli.evaluation.metrics.table import METRICS

few = settings(max_examples=20, deadline=None, derandomize=True)
COMPUTE = {metric.key: metric.compute for metric in METRICS}
DISTANCES = ("frechet_full", "kernel_full", "precision_full", "recall_full")


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shuffled(rows: Tensor, seed: int = 3) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def evidence_of(pictures: Tensor, full: Tensor | None = None, **rest: Any) -> Evidence:  # noqa: ANN401
    latents = torch.zeros(len(pictures), 1)
    return Evidence(
        own=PictureSet(pictures=pictures, latents=latents),
        full=None if full is None else PictureSet(pictures=full, latents=latents),
        features=latents,
        **{"extractor": "squeezenet", "denoiser_bytes": 0, **rest},
    )


def sets_of(features: Tensor, others: Tensor) -> Evidence:
    evidence = evidence_of(bytes_of(1, 3, 8, 8))
    return replace(evidence, features=features, feature_sets={"full": others})


def distances_of(features: Tensor, others: Tensor) -> list[Any]:
    return [COMPUTE[key](sets_of(features, others)) for key in DISTANCES]


def test_equal_pictures_are_as_good_as_it_gets() -> None:
    pictures = bytes_of(2, 3, 16, 16)
    evidence = evidence_of(pictures, pictures.clone())
    assert compute.psnr(evidence) == (compute.MOST_PSNR, compute.MOST_PSNR) == (100, 100)
    assert compute.ssim(evidence) == pytest.approx((1, 1), abs=1e-12)
    assert compute.deep_distance(evidence) == (0, 0)


def test_pictures_are_compared_one_by_one_whatever_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compute, "_BATCH", 2)
    pictures = bytes_of(3, 3, 12, 20)
    reference = bytes_of(3, 3, 12, 20, seed=1)
    reference[1] = pictures[1] // 2
    evidence = evidence_of(pictures, reference)
    psnr, ssim = compute.psnr(evidence), compute.ssim(evidence)
    deep = compute.deep_distance(evidence)
    assert psnr is not None and ssim is not None and deep is not None
    assert len(psnr) == len(ssim) == len(deep) == 3
    network = load_squeezenet()
    for i in range(3):
        pair = pictures[i : i + 1] / 255, reference[i : i + 1] / 255
        _, full = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)
        by_torchmetrics = float(peak_signal_noise_ratio(*pair, data_range=1.0))
        assert psnr[i] == pytest.approx(by_torchmetrics, abs=1e-4)
        assert ssim[i] == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-4)
        assert deep[i] == pytest.approx(float(deep_distance(network, *pair)), rel=1e-4)


def test_large_pictures_are_compared_a_few_at_a_time() -> None:
    one = torch.zeros(1, dtype=torch.uint8).expand(9, 3, 2048, 1024)
    sizes = list[int]()

    def formula(pictures: Tensor, reference: Tensor) -> Tensor:
        sizes.append(len(pictures))
        return torch.zeros(len(pictures))

    assert compute._pairwise(evidence_of(one, one), formula) == (0,) * 9
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize(("height", "width", "fits"), [(10, 40, 0), (40, 10, 0), (11, 11, 1)])
def test_pictures_smaller_than_the_window_have_no_ssim(height: int, width: int, fits: bool) -> None:
    pictures = bytes_of(1, 3, height, width), bytes_of(1, 3, height, width, seed=1)
    evidence = evidence_of(*pictures)
    assert (compute.ssim(evidence) is not None) == fits
    assert compute.psnr(evidence) is not None and compute.deep_distance(evidence) is not None


def test_distances_are_those_of_the_formulas() -> None:
    x, y = normal(40, 4), normal(50, 4, seed=1) + 1
    formulas = (frechet_distance, kernel_distance, precision, recall)
    assert distances_of(x, y) == [formula(x, y) for formula in formulas]
    reference = replace(sets_of(x, y), feature_sets={"reference": y})
    keys = ("frechet", "kernel", "precision", "recall")
    assert [COMPUTE[key](reference) for key in keys] == distances_of(x, y)
    assert all(COMPUTE[key](reference) is None for key in DISTANCES)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 6), st.integers(0, 1000))
@few
def test_order_of_pictures_does_not_matter(n: int, m: int, dimensions: int, seed: int) -> None:
    x, y = normal(n, dimensions, seed=seed), normal(m, dimensions, seed=seed + 1)
    first, second = distances_of(x, y), distances_of(shuffled(x), shuffled(y))
    assert second[:2] == pytest.approx(first[:2], rel=1e-6, abs=1e-6)
    assert second[2:] == first[2:]


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 1000))
@few
def test_equal_sets_are_no_distance_apart(n: int, dimensions: int, seed: int) -> None:
    x = normal(n, dimensions, seed=seed)
    frechet, kernel, *near = distances_of(x, shuffled(x))
    assert frechet == pytest.approx(0, abs=1e-5 * dimensions)
    assert kernel <= 1e-9  # unbiased, so below 0 where the pictures themselves are the same
    assert near == ([1, 1] if n > 3 else [None, None])


@pytest.mark.parametrize(("ours", "theirs"), [(1, 9), (9, 1), (0, 9), (1, 1)])
def test_one_picture_has_no_distance(ours: int, theirs: int) -> None:
    assert distances_of(normal(ours, 4), normal(theirs, 4)) == [None] * 4


@pytest.mark.parametrize(("ours", "theirs", "enough"), [(3, 9, 0), (9, 3, 0), (4, 4, 1)])
def test_too_few_pictures_have_no_neighbours(ours: int, theirs: int, enough: bool) -> None:
    distances = distances_of(normal(ours, 4), normal(theirs, 4, seed=1))
    assert [distance is not None for distance in distances] == [True, True, enough, enough]


@pytest.mark.parametrize(
    ("prompts", "keys"),
    [
        (("a red dress", "a blue bag"), {"garment", "colour"}),
        (("a dress", "a bag"), {"garment"}),
        (("something red", "blue"), {"colour"}),
        (("a cat", "a dog"), set()),
    ],
    ids=["both", "garment", "colour", "none"],
)
def test_agreement_is_left_out_where_no_prompt_names_any(
    prompts: tuple[str, ...], keys: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier: Callable[[Tensor], tuple[Tensor, Tensor]] = load_classifier()
    batches: list[Tensor] = []

    def answer(pictures: Tensor) -> tuple[Tensor, Tensor]:
        batches.append(pictures)
        return classifier(pictures)

    monkeypatch.setattr(compute.fashion, "load_classifier", lambda: answer)
    evidence = evidence_of(bytes_of(2, 3, 32, 32), extractor="fashion", prompts=prompts)
    shares = {key: COMPUTE[key](evidence) for key in ("garment", "colour")}
    assert {key for key, share in shares.items() if share is not None} == keys
    assert all(share is None or 0 <= share <= 100 for share in shares.values())  # type: ignore[operator]
    assert 0 <= float(batches[0].min()) < float(batches[0].max()) <= 1
    assert COMPUTE["garment"](replace(evidence, extractor="squeezenet")) is None
