"""Feature extractors by name, for distances between sets of pictures.

``squeezenet`` and ``fashion`` come with msfp; ``inception`` is what published FID values use, where
torch-fidelity and its weights can be had; ``module:factory`` is anything of the user's: a function
without arguments that returns an ``nn.Module`` from pictures in 0..1 to features. Distances by
different extractors cannot be compared, so every result names its own.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.errors import UsageError
from msfp_cli.evaluation.features.fashion import load_classifier
from msfp_cli.evaluation.features.squeezenet import load_squeezenet

_BATCH = 64
_USUAL = 512 * 512  # pixels of a picture of which a whole batch fits into memory


@dataclass(frozen=True)
class Extractor:
    """A named function from pictures to features.

    Arguments:
        name: as the user gave it.
        embed: float pictures ``(pictures, 3, height, width)`` in 0..1 to ``(pictures,
            dimensions)``.
    """

    name: str
    embed: Callable[[Tensor], Tensor] = field(repr=False)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Return the features of uint8 pictures ``(pictures, 3, height, width)``, float32.

        Raises:
            UsageError: the extractor's result is not a tensor ``(pictures, dimensions)``.
        """
        batches = in_batches(pictures, _BATCH)
        return torch.cat([self._rows(batch.float() / 255) for batch in batches])

    def _rows(self, pictures: Tensor) -> Tensor:
        """Return the features of a batch; refuse a result that is not one row for each picture."""
        rows: Any = self.embed(pictures)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(pictures):
            result = (
                f"shape {tuple(rows.shape)}"
                if isinstance(rows, Tensor)
                else f"a {type(rows).__name__}"
            )
            raise UsageError(
                f"extractor {self.name!r} gives {result} for {len(pictures)} pictures; "
                "it must give one row a picture"
            )
        return rows.float().cpu()


def in_batches(pictures: Tensor, most: int) -> tuple[Tensor, ...]:
    """Split pictures into batches that take about the same memory; frames of a video are large.

    Arguments:
        pictures: ``(pictures, channels, height, width)``.
        most: pictures of a batch, if they are not larger than usual.
    """
    height, width = pictures.shape[-2:]
    return torch.split(pictures, max(1, min(most, most * _USUAL // (height * width))))


def load_extractor(name: str) -> Extractor:
    """Return an extractor.

    Raises:
        UsageError: there is none of that name, or what it needs is not installed.
    """
    if name == "squeezenet":
        return Extractor(name, load_squeezenet())
    if name == "fashion":
        return Extractor(name, load_classifier().embed)
    if name == "inception":
        return Extractor(name, _inception())
    if ":" in name:
        return Extractor(name, _imported(name))
    raise UsageError(
        f"unknown extractor {name!r}; "
        "choose squeezenet, fashion, inception, or give module:factory of your own"
    )


def _inception() -> Callable[[Tensor], Tensor]:
    """Return the Inception v3 of published FID values; torch-fidelity downloads its weights."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UsageError(
            "extractor 'inception' needs torch-fidelity: pip install 'msfp[inception]'; "
            "or use --extractor squeezenet"
        ) from None
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    except OSError as error:  # it fetches the weights
        raise UsageError(
            f"the weights of extractor 'inception' cannot be fetched ({error}); "
            "use --extractor squeezenet"
        ) from None
    return lambda pictures: model((pictures * 255).round().to(torch.uint8))[0]


def _imported(name: str) -> nn.Module:
    """Import ``module:factory`` and call it."""
    module, _, factory = name.partition(":")
    try:
        model = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # the user's module may raise whatever it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"cannot make extractor {name!r} ({reason}); "
            "it must be importable and callable without arguments"
        ) from None
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"extractor {name!r} gives a {type(model).__name__}; it must give a torch.nn.Module"
        )
    return model.eval().requires_grad_(False)
