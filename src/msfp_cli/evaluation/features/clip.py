"""How well pictures fit their prompts: the CLIP score (Hessel et al. 2021, arXiv:2104.08718)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msfp_cli.errors import ModelError
from msfp_cli.pipelines.bounds import refuse_random_tensors

_BATCH = 16


@torch.no_grad()
def clip_score(model: str, pictures: Tensor, prompts: Sequence[str], device: str) -> float:
    """Return the mean over pictures of ``100 max(0, cosine of picture and prompt)``.

    Arguments:
        model: a directory or hub id of a CLIP model.
        pictures: uint8 ``(pictures, 3, height, width)``.
        prompts: one for each.

    Raises:
        ModelError: the model cannot be loaded.
    """
    clip, processor = _load(model, device)
    scores = []
    for first in range(0, len(prompts), _BATCH):
        batch = pictures[first : first + _BATCH]
        inputs = processor(
            text=list(prompts[first : first + _BATCH]),
            images=[picture.permute(1, 2, 0).numpy() for picture in batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(device)
        result = clip(**inputs)
        cosines = torch.nn.functional.cosine_similarity(result.image_embeds, result.text_embeds)
        scores.append(cosines.clamp_min(0))
    return float(100 * torch.cat(scores).double().mean())


def _load(model: str, device: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ModelError(
            f"cannot load the CLIP model {model!r}: "
            "it is neither a directory nor a hub id (owner/name)"
        )
    try:
        clip, report = CLIPModel.from_pretrained(model, output_loading_info=True)
        processor = CLIPProcessor.from_pretrained(model)
    except Exception as error:  # every library below has its own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the CLIP model {model!r}: {reason}") from None
    refuse_random_tensors(model, report)
    return clip.eval().to(device), processor
