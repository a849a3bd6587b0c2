"""Compute each metric from what was gathered of a model: a formula, and the evidence it needs.

Each function returns None if its evidence is missing: full precision is not compared with itself,
and pictures without prompts have no score of their prompts.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

from torch import Tensor

from msfp_cli.evaluation.features import fashion
from msfp_cli.evaluation.features.clip import clip_score
from msfp_cli.evaluation.features.extractors import in_batches
from msfp_cli.evaluation.features.squeezenet import deep_distance as distance_of_maps
from msfp_cli.evaluation.features.squeezenet import load_squeezenet
from msfp_cli.evaluation.metrics import distances
from msfp_cli.evaluation.metrics.evidence import Evidence
from msfp_cli.recording.compare import relative_error

MOST_PSNR = 100.0  # dB, of two pictures that are equal
_BATCH = 32

PerPicture: TypeAlias = tuple[float, ...]
Compute: TypeAlias = Callable[[Evidence], float | PerPicture | None]


def output_error(evidence: Evidence) -> float | None:
    """Return the error of the denoiser's output; the largest if there are several denoisers."""
    return max((denoiser.error for denoiser in evidence.denoisers.values()), default=None)


def latents_error(evidence: Evidence) -> float | None:
    """Return the relative squared error of the final latents."""
    if evidence.full is None:
        return None
    return relative_error(evidence.own.latents, evidence.full.latents)


def psnr(evidence: Evidence) -> PerPicture | None:
    """Return the peak signal-to-noise ratio of each picture, at most `MOST_PSNR`."""
    return _pairwise(evidence, lambda *pair: distances.psnr(*pair).clamp_max(MOST_PSNR))


def ssim(evidence: Evidence) -> PerPicture | None:
    """Return the structural similarity of each picture; None if pictures are below its window."""
    if min(evidence.own.pictures.shape[-2:]) < distances.SSIM_WINDOW:
        return None
    return _pairwise(evidence, distances.ssim)


def deep_distance(evidence: Evidence) -> PerPicture | None:
    """Return the distance of each picture in SqueezeNet's features."""
    return _pairwise(evidence, partial(distance_of_maps, load_squeezenet()))


def _pairwise(evidence: Evidence, formula: Callable[[Tensor, Tensor], Tensor]) -> PerPicture | None:
    """Compare each picture with the same one by full precision.

    Arguments:
        formula: takes two batches of pictures in 0..1, gives one value for each pair.
    """
    if evidence.full is None:
        return None
    batches = in_batches(evidence.own.pictures, _BATCH)
    full_batches = in_batches(evidence.full.pictures, _BATCH)
    values = list[float]()
    for batch, full_batch in zip(batches, full_batches, strict=True):
        values += formula(batch.float() / 255, full_batch.float() / 255).tolist()
    return tuple(values)


def between_sets(
    formula: Callable[[Tensor, Tensor], float], other: str, *, at_least: int = 2
) -> Compute:
    """Return a function that applies a formula to a model's features and those of another set.

    Arguments:
        formula: takes two sets of features, each ``(pictures, dimensions)``.
        other: a key of `Evidence.feature_sets`.
        at_least: how many pictures the formula needs in either set.
    """

    def compute(evidence: Evidence) -> float | None:
        features = evidence.feature_sets.get(other)
        if features is None or min(len(features), len(evidence.features)) < at_least:
            return None
        return formula(evidence.features, features)

    return compute


def agreement(evidence: Evidence, which: Literal[0, 1]) -> float | None:
    """Return the share of pictures with the right garment (0) or colour (1), in percent."""
    if evidence.extractor != "fashion" or evidence.prompts is None or evidence.own.are_drawings:
        return None
    pictures = evidence.own.pictures.float() / 255
    share = fashion.agreement(fashion.load_classifier(), pictures, evidence.prompts)[which]
    return None if share is None else 100 * share


def clip(evidence: Evidence) -> float | None:
    """Return the CLIP score, if a CLIP model is given."""
    if evidence.clip is None or evidence.prompts is None or evidence.own.are_drawings:
        return None
    return clip_score(evidence.clip, evidence.own.pictures, evidence.prompts, evidence.device)


def size(evidence: Evidence) -> float:
    """Return the size of the denoisers in MiB."""
    return evidence.denoiser_bytes / 2**20


def seconds_per_picture(evidence: Evidence) -> float | None:
    """Return the time per picture, if it was measured."""
    return None if evidence.cost is None else evidence.cost.seconds_per_picture


def peak_memory(evidence: Evidence) -> float | None:
    """Return the largest memory in MiB, if it was measured."""
    return None if evidence.cost is None else evidence.cost.peak_memory_bytes / 2**20
