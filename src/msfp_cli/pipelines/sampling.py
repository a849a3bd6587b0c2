"""Call a stock pipeline the way its user would, whatever it is conditioned on.

What a pipeline takes is read off its signature: a prompt, class labels, or only a batch size. Image
``i`` always gets its own generator seeded with ``seed + i``, so a picture does not depend on the
batch it was made in.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from msfp_cli.errors import ModelError
from msfp_cli.pipelines.conditions import arguments_of
from msfp_cli.pipelines.source import Pipeline, Sampling


def call_pipeline(
    pipe: Pipeline,
    conditions: Sequence[str | None],
    sampling: Sampling,
    *,
    first: int = 0,
    output_type: str = "pil",
) -> Any:  # noqa: ANN401 (a list of pictures, or latents)
    """Run the pipeline once for a batch and return its pictures (or latents).

    Arguments:
        conditions: prompt or class label for each image; None for an unconditional pipeline.
        sampling: steps, guidance, seed.
        first: index of the first image of the batch, which fixes the seeds.
        output_type: ``pil``, or ``latent`` to skip the decoder.
    """
    options = {
        "generator": _generators(sampling.seed + first, len(conditions)),
        "output_type": output_type,
        **sampling.arguments(),
    }
    parameters = inspect.signature(pipe.__call__).parameters
    arguments = {
        key: value for key, value in options.items() if key in parameters and value is not None
    }
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    try:
        result = pipe(**arguments_of(pipe, conditions), **arguments)
    except TypeError as error:
        if "ScalarType" not in str(error):
            raise
        raise ModelError(
            f"{type(pipe).__name__} cannot turn this type into pictures ({error}); "
            "use --dtype float32"
        ) from None
    return result.images if hasattr(result, "images") else result[0]


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """Return a generator for each image of a batch."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]
