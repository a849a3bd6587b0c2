"""Which model is meant; nothing here needs torch."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from msfp_cli.errors import UsageError
from msfp_cli.recipe import Recipe

Pipeline: TypeAlias = Any  # any diffusers pipeline: its class is the user's
Scheduler: TypeAlias = Any  # any diffusers scheduler

DTYPES = ("float32", "float16", "bfloat16")


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
