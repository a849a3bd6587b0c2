"""Which pipeline is meant and how it is called; nothing here needs torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from msfp_cli.errors import UsageError
from msfp_cli.recipe import Recipe, at_least

Pipeline: TypeAlias = Any  # any diffusers pipeline: its class is the user's
Scheduler: TypeAlias = Any  # any diffusers scheduler

DTYPES = ("float32", "float16", "bfloat16")

S = TypeVar("S", bound="Sampling")


@dataclass(frozen=True, kw_only=True)
class ModelSource(Recipe):
    """Where a pipeline comes from.

    Arguments:
        model: a local directory, a hub id, or ``msfp:fashion`` for the built-in pipeline.
        revision, variant: as in ``from_pretrained``.
        dtype: a name in `DTYPES`; None chooses float32 on a CPU and bfloat16 elsewhere.
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class Sampling(Recipe):
    """How to call a pipeline; recipes that draw pictures extend it.

    Arguments:
        num_inference_steps: steps of the sampler; None leaves the pipeline's default.
        guidance_scale: strength of classifier-free guidance; None leaves the pipeline's default.
        seed: image i is drawn with seed ``seed + i``.
        batch_size: images per call of the pipeline.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        at_least("batch size", self.batch_size, 1)
        if self.num_inference_steps is not None:
            at_least("steps", self.num_inference_steps, 1)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call, which an export remembers as well."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }

    def or_else(self: S, defaults: Mapping[str, Any]) -> S:
        """Return the same sampling with defaults in place of what is None."""
        unset = {key for key, value in self.to_json().items() if value is None}
        return replace(self, **{key: defaults[key] for key in unset & defaults.keys()})
