"""What was asked of an evaluation, and its directory at work: what it may go on with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from msfp_cli.errors import CheckpointError, RunError, UsageError
from msfp_cli.files import write_text
from msfp_cli.pipelines.source import Sampling

STEPS_BEFORE = (
    "signed",
    "calibrated",
)  # what an export may be compared with, besides full precision
_SEED = 5_000_011  # far from the seeds of the recordings
_ASKED = "asked.json"
_PARTS = (_ASKED, "trajectories", "pictures", "measured", "signed", "evaluation.json")
_MEASURING = (
    "extractor",
    "reference",
    "clip",
    "layers",
    "cost",
)  # settings that no picture depends on
_T = TypeVar("_T")


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


def refuse_other(place: Path, asked: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse a directory that holds something else, before anything is written.

    Arguments:
        asked: the settings as JSON values.
        overwrite: whether another evaluation may be there.

    Raises:
        RunError: it is nothing of ours, or an evaluation with other settings.
        CheckpointError: its settings cannot be read.
    """
    if place.exists() and (
        not place.is_dir() or not all(_is_ours(part.name) for part in place.iterdir())
    ):
        raise RunError(f"{place} is nothing that msfp wrote; choose another place")
    if (place / _ASKED).exists() and not overwrite:
        _refuse_other_settings(place, asked)


def begin(place: Path, asked: dict[str, Any], *, overwrite: bool) -> None:
    """Write the settings; what an evaluation with the same ones has is kept unless `overwrite` is set."""
    if overwrite and (place / _ASKED).exists():
        shutil.rmtree(place)
    write_text(place / _ASKED, json.dumps(asked, indent=1))


def read_document(path: Path, understand: Callable[[Any], _T]) -> _T:
    """Read a JSON file of an unfinished evaluation.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return understand(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); use --overwrite to evaluate again"
        ) from None


def _is_ours(name: str) -> bool:
    """Whether an evaluation has a part of that name, finished or left behind by a process that was killed."""
    return name in _PARTS or name.startswith(tuple(f".{part}" for part in _PARTS))


def _refuse_other_settings(place: Path, asked: dict[str, Any]) -> None:
    """Refuse to go on with other settings; before anything was measured, what the pictures do not need may change."""
    known = read_document(
        place / _ASKED, lambda document: {**document, **document.get("record", {})}
    )
    odd = [
        key
        for key, value in {**asked, **asked["record"]}.items()
        if known.get(key) != value and key != "record"
    ]
    if not any((place / "measured").glob("*.json")):
        odd = [key for key in odd if key not in _MEASURING]
    if odd:
        raise RunError(
            f"{place} holds an evaluation with other settings ({odd[0]!r} differs); use --overwrite"
        )
