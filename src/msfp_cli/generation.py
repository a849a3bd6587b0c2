"""Call a stock pipeline the way its user would, whatever it is conditioned on.

What a pipeline takes is read off its signature: a prompt, class labels, or only a batch size. Image ``i`` always gets
its own generator seeded with ``seed + i``, so a picture does not depend on the batch it was made in.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from msfp_cli.errors import ModelError, UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to run a pipeline.

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


def conditioning_of(pipe: Any) -> str:  # noqa: ANN401 (a pipeline's class is the user's)
    """Say what a pipeline is conditioned on: ``prompt``, ``class_labels`` or ``none``."""
    parameters = inspect.signature(pipe.__call__).parameters
    return next((kind for kind in ("prompt", "class_labels") if kind in parameters), "none")


def _condition(pipe: Any, conditions: Sequence[str | None]) -> dict[str, Any]:  # noqa: ANN401
    """Return the arguments that pass one condition per image."""
    kind = conditioning_of(pipe)
    if kind == "none":
        return {"batch_size": len(conditions)}
    if any(condition is None for condition in conditions):
        raise UsageError(f"{type(pipe).__name__} needs a prompt for every picture; give --prompt or --prompts FILE")
    if kind == "prompt":
        return {"prompt": list(conditions)}
    return {"class_labels": [_class_label(pipe, str(condition)) for condition in conditions]}


def _class_label(pipe: Any, text: str) -> int:  # noqa: ANN401
    """Read a class label: its number, or its name where the pipeline knows names."""
    if text.strip().isdigit():
        return int(text)
    labels = getattr(pipe, "labels", None) or {}
    if text not in labels:
        raise UsageError(f"{text!r} is no class label of this pipeline; give a number or one of its label names")
    return int(labels[text])


def call_pipeline(
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
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
    parameters = inspect.signature(pipe.__call__).parameters
    wanted: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(sampling.seed + first + i) for i in range(len(conditions))],
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "output_type": output_type,
    }
    arguments = {key: value for key, value in wanted.items() if key in parameters and value is not None}
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    try:
        result = pipe(**_condition(pipe, conditions), **arguments)
    except TypeError as error:
        if "ScalarType" not in str(error):
            raise
        raise ModelError(
            f"{type(pipe).__name__} cannot turn this type into pictures ({error}); use --dtype float32"
        ) from None
    return result.images if hasattr(result, "images") else result[0]


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], *, titles: Sequence[str] = (), min_side: int = 128, gap: int = 4
) -> Image.Image:
    """Lay pictures out row by row; small ones are enlarged without smoothing so that pixels can be seen.

    Arguments:
        rows: pictures of one size.
        titles: one line above each row, or none.
    """
    width, height = rows[0][0].size
    factor = max(1, min_side // max(width, height))
    width, height, head = width * factor, height * factor, 24 if titles else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (head + height + gap) + gap), "white")
    for y, row in enumerate(rows):
        top = gap + y * (head + height + gap)
        if titles:
            ImageDraw.Draw(sheet).text((gap, top + 4), titles[y], fill="black", font=ImageFont.load_default(14))
        for x, picture in enumerate(row):
            enlarged = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + x * (width + gap), top + head))
    return sheet
