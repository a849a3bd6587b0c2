"""Which pipeline is meant and how it is called; nothing here needs torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from msfp_cli.recipe import Recipe, option

Pipeline: TypeAlias = Any  # any diffusers pipeline: its class is the user's
Scheduler: TypeAlias = Any  # any diffusers scheduler

DTYPES = ("float32", "float16", "bfloat16")
MAX_SEED = 2**62  # torch takes 64 bits; pictures count on from here

S = TypeVar("S", bound="Sampling")


@dataclass(frozen=True, kw_only=True)
class ModelSource(Recipe):
    """Where a pipeline comes from.

    Arguments:
        model: a local directory, a hub id, or ``msfp:fashion`` for the built-in pipeline.
    """

    model: str
    revision: str | None = option(None, "Revision of a hub model. Default: the newest.")
    variant: str | None = option(
        None, "Variant of the weights' files, such as fp16. Default: the files without a variant."
    )
    dtype: str | None = option(
        None,
        f"Type to compute in: {', '.join(DTYPES)}. Default: float32 on a CPU, else bfloat16.",
        choices=DTYPES,
    )


@dataclass(frozen=True, kw_only=True)
class Sampling(Recipe):
    """How to call a pipeline; recipes that draw pictures extend it.

    Steps and guidance that are None are left to the pipeline, or to what was calibrated.
    """

    num_inference_steps: int | None = option(
        None,
        "Steps of the sampler. Default: 20 to calibrate, then as calibrated.",
        names=("--steps",),
        at_least=1,
    )
    guidance_scale: float | None = option(
        None,
        "Strength of classifier-free guidance. Default: the pipeline's own to calibrate, then as "
        "calibrated.",
    )
    seed: int = option(
        0,
        "Seed of the first picture; picture i is drawn with seed + i.",
        at_least=0,
        at_most=MAX_SEED,
    )
    batch_size: int = option(8, "Pictures per call of the pipeline.", at_least=1)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call, which an export remembers as well."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }

    def settings(self) -> dict[str, Any]:
        """Return the fields of a sampling by name, without those of whatever extends it."""
        return {field.name: getattr(self, field.name) for field in fields(Sampling)}

    def or_else(self: S, defaults: Mapping[str, Any]) -> S:
        """Return the same sampling with defaults in place of what is None."""
        unset = {key for key, value in self.settings().items() if value is None}
        return replace(self, **{key: defaults[key] for key in unset & defaults.keys()})


def write_prompts(prompts: Path | Sequence[str]) -> str:
    """Return the file of an option for prompts; those from Python stand for a file of them."""
    return str(prompts) if isinstance(prompts, Path) else "prompts.txt"
