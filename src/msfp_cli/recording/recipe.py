"""What is recorded and which pictures are held out; nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.conditions import prompts_of
from msfp_cli.pipelines.sampling import Sampling, write_prompts
from msfp_cli.recipe import option

NUM_IMAGES = 800  # default
NUM_IMAGES_LARGE = 200  # default for large denoisers: their pictures are slower and bigger
LARGE = 100_000_000  # parameters
MAX_CONDITIONS = 200  # of the built-in ones that are recorded: the rest is left to evaluate on
MAX_IMAGES = 100_000  # lists of so many are made at once, and files of so many are counted
_HELD_OUT = 24  # conditions of a long recording, or a few more: each measurement takes time
DEFAULT_MAX_BYTES = 8 << 30


@dataclass(frozen=True, kw_only=True)
class RecordRecipe(Sampling):
    """How to record denoiser calls: a sampling, and what it is of.

    Arguments:
        conditions: a prompt or class label per image; None for each image of an unconditional
            pipeline.
    """

    conditions: tuple[str | None, ...]
    num_inference_steps: int | None = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditions:
            raise UsageError("no prompts to record; give at least one")

    @classmethod
    def of(cls, conditions: Sequence[str | None], sampling: Sampling) -> "RecordRecipe":
        """Return the recipe that records these conditions, sampled as that one says."""
        return cls(conditions=tuple(conditions), **sampling.settings())

    @property
    def num_shards(self) -> int:
        """How many pipeline calls the recording takes."""
        return -(-len(self.conditions) // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class RecordOptions(Sampling):
    """What the user may say about recording; `record_recipes` makes recipes of it."""

    num_inference_steps: int | None = 20
    prompts: Path | tuple[str, ...] | None = option(
        None,
        "File with prompts or class labels, one a line. Default: built-in prompts; labels spread "
        "over all classes.",
        read=Path,
        write=write_prompts,
    )
    num_images: int | None = option(
        None,
        "Pictures to record. One in five (about 24 at most) is held out for measuring. Default: "
        f"one per prompt of --prompts, otherwise {NUM_IMAGES} ({NUM_IMAGES_LARGE} for large "
        "models); prompts are reused with new noise.",
        names=("--num-images", "--num-prompts"),
        at_least=1,
        at_most=MAX_IMAGES,
    )
    max_recording_gib: float = option(
        8.0, "Largest size of the recording on disk, in GiB; a larger one is refused.", above=0
    )

    @property
    def max_bytes(self) -> int:
        """The bound on the recording's size in bytes."""
        return int(self.max_recording_gib * 2**30)

    def with_prompts(self) -> "RecordOptions":
        """Return the same options with the prompts that their file holds.

        Raises:
            UsageError: the file cannot be read, or is empty.
        """
        return replace(self, prompts=prompts_of(self.prompts))


def recorded_conditions(
    conditions: Sequence[str | None], num_images: int
) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Assign a condition to each picture; if there are too few, they are reused with new noise.

    Returns:
        The condition of each picture to calibrate on, and of each that is held out.
    """
    chosen, held_out = split_held_out(conditions)
    count = max(len(chosen), num_images - len(held_out))
    return tuple(chosen[i % len(chosen)] for i in range(count)), held_out


def split_held_out(
    conditions: Sequence[str | None],
) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Set every fifth condition aside, about 24 at most; a single one is in both parts.

    Returns:
        The conditions to calibrate on, and those held out to measure on.
    """
    if len(conditions) < 5:
        return tuple(conditions[:-1] or conditions), tuple(conditions[-1:])
    every = max(5, len(conditions) // _HELD_OUT)
    held_out = tuple(c for i, c in enumerate(conditions) if i % every == every - 1)
    chosen = tuple(c for i, c in enumerate(conditions) if i % every != every - 1)
    return chosen, held_out
