"""A small classifier of the built-in pipeline's pictures: which garment, which colour, and features for distances.

It tells whether a picture shows what its prompt asked for, and its features tell sets of pictures
apart where no large extractor is at hand. `examples/train_fashion/train_classifier.py` trains it on
tinted Fashion-MNIST; the weights that come with msfp are of 124 thousand parameters.
"""

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
        widths, strides = (3, 32, 48, 64, 96), (1, 2, 1, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=s, padding=1), nn.GroupNorm(8, o), nn.SiLU())
            for i, o, s in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(96 * 2 * 2, 64), nn.SiLU())
        self.pool = nn.AvgPool2d(4)
        self.garment = nn.Linear(64, len(GARMENTS))
        self.colour = nn.Linear(64, len(COLOURS))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Return the feature maps after each stage."""
        found, x = [], pictures * 2 - 1
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def embed(self, pictures: Tensor) -> Tensor:
        """Return the features ``(pictures, 64)`` on which both answers rest."""
        if pictures.shape[1:] != (3, SIDE, SIDE):
            raise UsageError(
                f"the classifier takes pictures of {SIDE} by {SIDE}, not {tuple(pictures.shape[2:])}"
            )
        features: Tensor = self.features(self.pool(self.maps(pictures)[-1]))
        return features

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of garments ``(pictures, 10)`` and of colours ``(pictures, 8)``."""
        features = self.embed(pictures)
        return self.garment(features), self.colour(features)


def load_classifier() -> GarmentClassifier:
    """Load the classifier that comes with msfp."""
    model = GarmentClassifier()
    model.load_state_dict(
        load_file(Path(str(files("msfp_cli") / "data" / "fashion_classifier.safetensors")))
    )
    return model.eval().requires_grad_(False)


def asked_for(prompt: str) -> tuple[int | None, int | None]:
    """Return which garment and which colour a prompt names, None where it names none."""
    words = prompt.lower().replace(",", " ").split()
    garment = next((i for i, name in enumerate(GARMENTS) if name in words), None)
    colour = next((i for i, name in enumerate(COLOURS) if name in words), None)
    return garment, colour


@torch.no_grad()
def agreement(
    model: GarmentClassifier, pictures: Tensor, prompts: list[str]
) -> tuple[float, float]:
    """Return the shares of pictures whose garment, and whose colour, is what the prompt asked for.

    Arguments:
        pictures: ``(pictures, 3, 32, 32)`` in 0..1.
        prompts: one for each; those that name no garment (or colour) do not count. NaN if none
            counts.
    """
    wanted = [asked_for(prompt) for prompt in prompts]
    shares = []
    for which, logits in enumerate(model(pictures)):
        pairs = [
            (int(row.argmax()), names[which]) for row, names in zip(logits, wanted, strict=True)
        ]
        counted = [found == name for found, name in pairs if name is not None]
        shares.append(sum(counted) / len(counted) if counted else float("nan"))
    return shares[0], shares[1]
