"""A small classifier of the built-in pipeline's pictures: which garment, and which colour.

It tells whether a picture shows what its prompt names, and its features are used for distances
between sets of these pictures. `examples/train_fashion/train_classifier.py` trains it on tinted
Fashion-MNIST; it has 124 thousand parameters, and the weights come with msfp.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from msfp_cli.errors import UsageError

GARMENTS = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
COLOURS = ("white", "red", "green", "blue", "yellow", "orange", "purple", "cyan")
SIDE = 32


class GarmentClassifier(nn.Module):
    """Tell garment and colour of pictures ``(pictures, 3, 32, 32)`` in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [_stage(3, 32, 1), _stage(32, 48, 2), _stage(48, 64, 1), _stage(64, 96, 2)]
        )
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(96 * 2 * 2, 64), nn.SiLU())
        self.pool = nn.AvgPool2d(4)
        self.garment = nn.Linear(64, len(GARMENTS))
        self.colour = nn.Linear(64, len(COLOURS))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Return the feature maps after each stage."""
        x = pictures * 2 - 1
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def embed(self, pictures: Tensor) -> Tensor:
        """Return the features ``(pictures, 64)`` on which both answers rest."""
        if pictures.shape[1:] != (3, SIDE, SIDE):
            raise UsageError(
                f"the classifier takes pictures of {SIDE} by {SIDE}, "
                f"not {tuple(pictures.shape[2:])}"
            )
        features: Tensor = self.features(self.pool(self.maps(pictures)[-1]))
        return features

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of garments ``(pictures, 10)`` and of colours ``(pictures, 8)``."""
        features = self.embed(pictures)
        return self.garment(features), self.colour(features)


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return a convolution of 3 by 3 with its normalization and activation."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(8, out_channels), nn.SiLU())


def load_classifier() -> GarmentClassifier:
    """Load the classifier that comes with msfp."""
    model = GarmentClassifier()
    weights = Path(str(files("msfp_cli") / "data" / "fashion_classifier.safetensors"))
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


def garment_in(prompt: str) -> int | None:
    """Return which of `GARMENTS` a prompt names, None if it names none."""
    return _first_named(GARMENTS, prompt)


def colour_in(prompt: str) -> int | None:
    """Return which of `COLOURS` a prompt names, None if it names none."""
    return _first_named(COLOURS, prompt)


def _first_named(names: Sequence[str], prompt: str) -> int | None:
    words = prompt.lower().replace(",", " ").split()
    return next((i for i, name in enumerate(names) if name in words), None)


@torch.no_grad()
def agreement(
    model: GarmentClassifier, pictures: Tensor, prompts: Sequence[str]
) -> tuple[float | None, float | None]:
    """Return the shares of pictures whose garment, and whose colour, is what the prompt names.

    Arguments:
        pictures: ``(pictures, 3, 32, 32)`` in 0..1.
        prompts: one for each picture; a prompt that names no garment (or colour) does not count.

    Returns:
        Two shares in 0..1; None if no prompt counts.
    """
    garments, colours = model(pictures)
    return (
        _share_right(garments, [garment_in(prompt) for prompt in prompts]),
        _share_right(colours, [colour_in(prompt) for prompt in prompts]),
    )


def _share_right(logits: Tensor, labels: Sequence[int | None]) -> float | None:
    """Return the share of rows whose largest logit is at their label; None without any label."""
    pairs = zip(logits.argmax(dim=1).tolist(), labels, strict=True)
    right = [answer == label for answer, label in pairs if label is not None]
    return sum(right) / len(right) if right else None
