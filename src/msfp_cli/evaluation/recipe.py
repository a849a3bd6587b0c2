"""Options of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.source import Sampling

# What an export may be compared with, besides full precision.
STEPS_BEFORE = ("signed", "calibrated")
_SEED = 5_000_011  # far from the seeds of the recordings


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe(Sampling):
    """How to measure an export; the steps and guidance that are None are those of the calibration.

    Arguments:
        prompts: prompts or class labels, over again with other seeds where there are fewer than
            pictures; None takes built-in ones that the recording does not use.
        num_images: pictures of each model.
        num_trajectories: of these, how many are followed through the denoiser.
        extractor: see `extractors`; None takes ``fashion`` for the built-in pipeline and
            ``squeezenet`` else.
        reference: real pictures, see `load_reference`.
        clip: a CLIP model to score with.
        compare: steps before to measure as well, see `find_subjects`.
        layers: whether to measure each layer's output, for which both denoisers are in memory at
            once.
        cost: whether to measure time and memory, in processes of their own.
    """

    prompts: tuple[str, ...] | None = None
    num_images: int = 32
    num_trajectories: int = 8
    seed: int = _SEED
    extractor: str | None = None
    reference: Path | None = None
    clip: str | None = None
    compare: tuple[str, ...] | None = None
    layers: bool = True
    cost: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (
            ("--num-images", self.num_images),
            ("--num-trajectories", self.num_trajectories),
        ):
            if value < 1:
                raise UsageError(f"{option} must be at least 1, got {value}")
