"""What is measured of a model's pictures: against the same ones by full precision, and against a set of others."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msfp_cli.calibration.observe import observe
from msfp_cli.evaluation.distances import (
    SSIM_WINDOW,
    frechet_distance,
    kernel_distance,
    precision_recall,
    psnr,
    ssim,
    too_few,
)
from msfp_cli.evaluation.features.fashion import agreement, load_classifier
from msfp_cli.evaluation.features.squeezenet import deep_distance, load_squeezenet
from msfp_cli.evaluation.result import Distance, Histogram
from msfp_cli.pipelines.denoiser import DenoiserCall

MOST_PSNR = 100.0  # dB, of two pictures that are equal
_BATCH, _NEIGHBOURS = 32, 3
_BINS, _SAMPLES = 64, 20_000


def compare_pictures(pictures: Tensor, reference: Tensor) -> dict[str, tuple[float, ...]]:
    """Return ``psnr``, ``ssim`` and ``deep`` of each picture against the same one by full precision.

    Pictures smaller than its window have no ``ssim``.

    Arguments:
        pictures, reference: uint8 ``(pictures, 3, height, width)``.
    """
    network = load_squeezenet()
    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "deep": []}
    for batch, wanted in zip(
        torch.split(pictures, _BATCH), torch.split(reference, _BATCH), strict=True
    ):
        ours, theirs = batch.float() / 255, wanted.float() / 255
        found["psnr"] += psnr(ours, theirs).clamp_max(MOST_PSNR).tolist()
        if min(pictures.shape[-2:]) >= SSIM_WINDOW:
            found["ssim"] += ssim(ours, theirs).tolist()
        found["deep"] += deep_distance(network, ours, theirs).tolist()
    return {name: tuple(values) for name, values in found.items()}


def input_histograms(denoiser: nn.Module, calls: Sequence[DenoiserCall]) -> dict[str, Histogram]:
    """Return how the elements of every layer's input are spread over some calls of the full-precision denoiser."""
    seen = observe(
        denoiser,
        calls,
        len(calls),
        max_samples=_SAMPLES,
        generator=torch.Generator().manual_seed(0),
        advance=lambda steps, note="": None,
    )
    found = {}
    for name, observation in seen.items():
        if not observation.samples:
            continue  # a table: its input is indices
        low, high = observation.minimum, observation.maximum
        counts = (
            torch.histc(torch.cat(observation.samples), _BINS, low, high)
            if low < high
            else torch.zeros(_BINS)
        )
        found[name] = Histogram(
            minimum=low, maximum=high, counts=tuple(int(count) for count in counts)
        )
    return found


def distance_between(features: Tensor, reference: Tensor) -> Distance | None:
    """Return how far two sets of features are apart; None if one has fewer than two."""
    if min(len(features), len(reference)) < 2:
        return None
    enough = min(len(features), len(reference)) > _NEIGHBOURS
    precision, recall = (
        precision_recall(features, reference, neighbours=_NEIGHBOURS) if enough else (None, None)
    )
    return Distance(
        frechet=frechet_distance(features, reference),
        kernel=kernel_distance(features, reference),
        precision=precision,
        recall=recall,
        num_pictures=(len(features), len(reference)),
        few=too_few(min(len(features), len(reference)), features.shape[1]),
    )


def prompt_agreement(pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Return the shares of fashion pictures whose ``garment`` and ``colour`` are what their prompt names."""
    garment, colour = agreement(load_classifier(), pictures.float() / 255, list(prompts))
    return {
        name: share
        for name, share in (("garment", garment), ("colour", colour))
        if share is not None
    }
