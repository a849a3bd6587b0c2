from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

import msfp_cli.evaluation.measures
from msfp_cli.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from msfp_cli.evaluation.features.fashion import load_classifier
from msfp_cli.evaluation.features.squeezenet import deep_distance, load_squeezenet
from msfp_cli.evaluation.measures import (
    MOST_PSNR,
    compare_pictures,
    distance_between,
    input_histograms,
    prompt_agreement,
)
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.recording.result import Recording

few = settings(max_examples=20, deadline=None, derandomize=True)


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shuffled(rows: Tensor, seed: int = 3) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def test_equal_pictures_are_as_good_as_it_gets() -> None:
    pictures = bytes_of(2, 3, 16, 16)
    found = compare_pictures(pictures, pictures.clone())
    assert found["psnr"] == (MOST_PSNR, MOST_PSNR) == (100, 100)
    assert found["ssim"] == pytest.approx((1, 1), abs=1e-12)
    assert found["deep"] == (0, 0)


def test_pictures_are_compared_one_by_one_whatever_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(msfp_cli.evaluation.measures, "_BATCH", 2)
    pictures, reference = bytes_of(3, 3, 12, 20), bytes_of(3, 3, 12, 20, seed=1)
    reference[1] = pictures[1] // 2
    found = compare_pictures(pictures, reference)
    network = load_squeezenet()
    assert {name: len(values) for name, values in found.items()} == {
        "psnr": 3,
        "ssim": 3,
        "deep": 3,
    }
    for i in range(3):
        pair = pictures[i : i + 1] / 255, reference[i : i + 1] / 255
        _, full = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)
        assert found["psnr"][i] == pytest.approx(
            float(peak_signal_noise_ratio(*pair, data_range=1.0)), abs=1e-4
        )
        assert found["ssim"][i] == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-4)
        assert found["deep"][i] == pytest.approx(float(deep_distance(network, *pair)), rel=1e-4)


@pytest.mark.parametrize(("height", "width", "number"), [(10, 40, 0), (40, 10, 0), (11, 11, 1)])
def test_pictures_smaller_than_the_window_have_no_ssim(
    height: int, width: int, number: int
) -> None:
    found = compare_pictures(bytes_of(1, 3, height, width), bytes_of(1, 3, height, width, seed=1))
    assert {name: len(values) for name, values in found.items()} == {
        "psnr": 1,
        "ssim": number,
        "deep": 1,
    }


def test_histograms_count_what_reaches_every_layer(
    tiny_pipe: DiffusionPipeline, tiny_recordings: tuple[Recording, Recording]
) -> None:
    calls = list(tiny_recordings[1].calls("unet"))
    found, inputs = input_histograms(tiny_pipe.unet, calls), dict[str, list[Tensor]]()
    layers = find_layers(tiny_pipe.unet)
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, out, name=name: inputs.setdefault(name, []).append(args[0])
        )
    for call in calls:
        tiny_pipe.unet(**call.arguments)
    assert found.keys() == inputs.keys() == layers.keys()
    for name, histogram in found.items():
        values = torch.cat([each.detach().flatten() for each in inputs[name]])
        assert (histogram.minimum, histogram.maximum) == (float(values.min()), float(values.max()))
        assert len(histogram.counts) == 64 and sum(histogram.counts) > 0
        if sum(histogram.counts) < 1000:
            continue  # the embedding of a timestep has few elements
        shares = torch.tensor(histogram.counts) / sum(histogram.counts)
        wanted = torch.histc(values, 64, histogram.minimum, histogram.maximum) / values.numel()
        assert float((shares - wanted).abs().sum()) < 0.3  # a sample of them


def test_histograms_are_the_same_each_time(
    tiny_pipe: DiffusionPipeline, tiny_recordings: tuple[Recording, Recording]
) -> None:
    calls = list(tiny_recordings[1].calls("unet"))
    first = input_histograms(tiny_pipe.unet, calls)
    torch.rand(3)
    assert input_histograms(tiny_pipe.unet, calls) == first


class OneLayer(nn.Module):
    """A denoiser of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: float, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(sample),)


@pytest.mark.parametrize(
    ("value", "counts"), [(0.5, [0] * 64), (None, [2, *[0] * 62, 2])], ids=["constant", "two"]
)
def test_histogram_of_few_values(value: float | None, counts: list[int]) -> None:
    sample = (
        torch.tensor([[-1.0, 3.0], [3.0, -1.0]]) if value is None else torch.full((2, 2), value)
    )
    call = DenoiserCall(
        component="unet", timestep=1.0, arguments={"sample": sample, "timestep": 1.0}, output=sample
    )
    (histogram,) = input_histograms(OneLayer(), [call]).values()
    assert (histogram.minimum, histogram.maximum) == (sample.min(), sample.max())
    nonzero = [i for i, count in enumerate(histogram.counts) if count]
    assert nonzero == [i for i, count in enumerate(counts) if count]


def test_distance_holds_every_measure_and_both_numbers() -> None:
    x, y = normal(40, 4), normal(50, 4, seed=1) + 1
    found = distance_between(x, y)
    assert found is not None
    assert (found.frechet, found.kernel) == (frechet_distance(x, y), kernel_distance(x, y))
    assert (found.precision, found.recall) == precision_recall(x, y)
    assert found.num_pictures == (40, 50) and not found.few


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 6), st.integers(0, 1000))
@few
def test_order_of_pictures_does_not_matter(n: int, m: int, dimensions: int, seed: int) -> None:
    x, y = normal(n, dimensions, seed=seed), normal(m, dimensions, seed=seed + 1)
    first, second = distance_between(x, y), distance_between(shuffled(x), shuffled(y))
    assert first is not None and second is not None
    assert second.frechet == pytest.approx(first.frechet, rel=1e-6, abs=1e-6)
    assert second.kernel == pytest.approx(first.kernel, rel=1e-6, abs=1e-6)
    assert (second.precision, second.recall) == (first.precision, first.recall)


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 1000))
@few
def test_equal_sets_are_no_distance_apart(n: int, dimensions: int, seed: int) -> None:
    x = normal(n, dimensions, seed=seed)
    found = distance_between(x, shuffled(x))
    assert found is not None
    assert found.frechet == pytest.approx(0, abs=1e-5 * dimensions)
    assert found.kernel <= 1e-9  # unbiased, so below 0 where the pictures themselves are the same
    assert (found.precision, found.recall) == ((1, 1) if n > 3 else (None, None))


@pytest.mark.parametrize(
    ("ours", "theirs", "few_enough"),
    [(7, 100, True), (100, 7, True), (8, 8, False), (100, 100, False)],
)
def test_too_few_pictures_on_either_side_are_told(ours: int, theirs: int, few_enough: bool) -> None:
    found = distance_between(normal(ours, 4), normal(theirs, 4, seed=1))
    assert found is not None and found.few is few_enough


@pytest.mark.parametrize(("ours", "theirs"), [(1, 9), (9, 1), (0, 9), (1, 1)])
def test_one_picture_has_no_distance(ours: int, theirs: int) -> None:
    assert distance_between(normal(ours, 4), normal(theirs, 4)) is None


@pytest.mark.parametrize(("ours", "theirs", "known"), [(3, 9, False), (9, 3, False), (4, 4, True)])
def test_too_few_pictures_have_no_neighbours(ours: int, theirs: int, known: bool) -> None:
    found = distance_between(normal(ours, 4), normal(theirs, 4, seed=1))
    assert found is not None
    assert (found.precision is not None) == (found.recall is not None) == known


@pytest.mark.parametrize(
    ("prompts", "names"),
    [
        (("a red dress", "a blue bag"), {"garment", "colour"}),
        (("a dress", "a bag"), {"garment"}),
        (("something red", "blue"), {"colour"}),
        (("a cat", "a dog"), set()),
    ],
    ids=["both", "garment", "colour", "none"],
)
def test_agreement_is_left_out_where_no_prompt_asks(
    prompts: tuple[str, ...], names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier: Callable[[Tensor], tuple[Tensor, Tensor]] = load_classifier()
    seen: list[Tensor] = []

    def answer(pictures: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(pictures)
        return classifier(pictures)

    monkeypatch.setattr(msfp_cli.evaluation.measures, "load_classifier", lambda: answer)
    found = prompt_agreement(bytes_of(2, 3, 32, 32), prompts)
    assert found.keys() == names and all(0 <= share <= 1 for share in found.values())
    assert 0 <= float(seen[0].min()) < float(seen[0].max()) <= 1
