"""Options of an evaluation; nothing here needs torch."""

from dataclasses import dataclass
from pathlib import Path

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.sampling import Sampling, write_prompts
from msfp_cli.recipe import option
from msfp_cli.recording.recipe import MAX_IMAGES

STEPS_BEFORE = ("signed", "calibrated")  # compared with the export, besides full precision
_SEED = 5_000_011  # far from those of the recordings


def _read_steps(text: str) -> tuple[str, ...]:
    """Read names separated by commas; ``none`` stands for no name.

    Raises:
        UsageError: a name is unknown.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in (*STEPS_BEFORE, "none"):
            known = ", ".join(STEPS_BEFORE)
            raise UsageError(f"unknown --compare {name!r}; choose one of {known}, or none")
    return tuple(name for name in names if name != "none")


def _write_steps(steps: tuple[str, ...]) -> str:
    return ",".join(steps) or "none"


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe(Sampling):
    """How to measure an export; the steps and guidance that are None are those of the calibration.

    Arguments:
        prompts: as a file or given; reused with new seeds where there are fewer than pictures.
        reference: see `load_reference`.
        compare: see `models_to_evaluate`.
    """

    seed: int = _SEED
    prompts: Path | tuple[str, ...] | None = option(
        None,
        "File with prompts or class labels, one a line. Default: built-in prompts that the "
        "recording does not use.",
        read=Path,
        write=write_prompts,
    )
    num_images: int = option(32, "Pictures of each model.", at_least=1, at_most=MAX_IMAGES)
    num_trajectories: int = option(
        8,
        "How many of these are also compared step by step, at the denoiser's output.",
        at_least=1,
    )
    extractor: str | None = option(
        None,
        "Features for distances between sets of pictures: squeezenet, fashion, inception, or "
        "module:factory. Default: fashion for the built-in pipeline, else squeezenet.",
    )
    reference: Path | None = option(
        None,
        "Real pictures to compare with: a directory, or an npz file with uint8 `images`. Default: "
        "none, but a stored set for the built-in pipeline.",
    )
    clip: str | None = option(
        None,
        "CLIP model, as directory or hub id, that scores how well pictures fit their prompts. "
        "Default: no score.",
    )
    compare: tuple[str, ...] | None = option(
        None,
        "Intermediate models to measure too: signed, calibrated, or none. Default: all that this "
        "run can rebuild.",
        choices=STEPS_BEFORE,
        read=_read_steps,
        write=_write_steps,
    )
    layers: bool = option(
        True,
        "Whether to measure each layer's output; both denoisers are in memory then. Default: "
        "--layers.",
        names=("--layers/--no-layers",),
    )
    kernel: str = option(
        "auto",
        "How the export's layers are computed, as in `msfp sample`; layers are not measured one by "
        "one with openvino.",
        before="auto",
    )
    cost: bool = option(
        True,
        "Whether to measure time and memory, in fresh processes. Default: --cost.",
        names=("--cost/--no-cost",),
    )

    @property
    def by_layer(self) -> bool:
        """Whether layers are measured one by one: an engine runs the denoiser as a whole."""
        return self.layers and not self.kernel.startswith("openvino")
