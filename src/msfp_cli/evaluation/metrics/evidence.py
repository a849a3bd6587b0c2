"""What metrics are computed from: all that is gathered of one model before the first one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from msfp_cli.evaluation.cost import Cost
from msfp_cli.evaluation.metrics.distances import too_few
from msfp_cli.evaluation.result import DenoiserError, SetSizes


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """The pictures that one model drew.

    Arguments:
        pictures: uint8 ``(pictures, 3, height, width)``.
        latents: the final samples behind them, float32.
        are_drawings: whether the pictures only show what was made: sound or embeddings.
    """

    pictures: Tensor
    latents: Tensor
    are_drawings: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one model.

    Arguments:
        own: what it drew.
        full: what full precision drew from the same prompts and seeds; None for full precision.
        features: of its own pictures, ``(pictures, dimensions)``.
        feature_sets: features of other sets of pictures, as far as there are any: ``full`` (by full
            precision) and ``reference`` (real pictures).
        prompts: one for each picture, None if the pipeline takes none.
        extractor: name of the extractor of the features.
        clip: the CLIP model to score with, None to leave the score out.
        device: where to run it.
        denoisers: comparison of each quantized denoiser with full precision.
        denoiser_bytes: size of all denoisers.
        cost: time and memory, None if they are not measured.
    """

    own: PictureSet
    full: PictureSet | None = None
    features: Tensor
    feature_sets: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] | None = None
    extractor: str
    clip: str | None = None
    device: str = "cpu"
    denoisers: Mapping[str, DenoiserError] = field(default_factory=dict)
    denoiser_bytes: int
    cost: Cost | None = None

    def set_sizes(self) -> dict[str, SetSizes]:
        """Return the sizes of the sets that can be compared.

        A single picture is not a set, and of drawings no distance is computed.
        """
        if self.own.are_drawings:
            return {}
        num_pictures, dimensions = self.features.shape
        sizes = {}
        for name, features in self.feature_sets.items():
            smaller = min(num_pictures, len(features))
            if smaller >= 2:
                few = too_few(smaller, dimensions)
                sizes[name] = SetSizes(num_pictures=(num_pictures, len(features)), few=few)
        return sizes
