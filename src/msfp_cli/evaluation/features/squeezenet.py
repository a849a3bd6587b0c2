"""Deep features that come with msfp: SqueezeNet 1.1 without its classifier, trained on ImageNet.

722 thousand parameters, kept in half precision (Iandola et al. 2016, arXiv:1602.07360; weights of
the authors' Caffe model, MIT). They serve where no larger extractor is available: for a distance
between two pictures that sees structure and not only pixels, and as features for distances between
sets of pictures. The distance is like LPIPS (Zhang et al. 2018, arXiv:1801.03924) without its
trained weights, so the numbers are not those of LPIPS.
"""

from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

_SIDE = 224
_MEAN = (103.939, 116.779, 123.68)  # blue, green, red, of 255
# Squeezed and expanded channels of each fire module, by its place in the sequence; None is a pool.
_FIRES = {
    3: (16, 64),
    4: (16, 64),
    5: None,
    6: (32, 128),
    7: (32, 128),
    8: None,
    9: (48, 192),
    10: (48, 192),
    11: (64, 256),
    12: (64, 256),
}
_STAGES = (1, 4, 7, 9, 10, 11, 12)  # the same as in LPIPS


class _Fire(nn.Module):
    """Squeeze the channels by 1x1, expand them by 1x1 and 3x3 side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return twice `expanded` channels."""
        x = functional.relu(self.squeeze(x))
        return torch.cat(
            [functional.relu(self.expand1x1(x)), functional.relu(self.expand3x3(x))], dim=1
        )


class SqueezeNet(nn.Module):
    """Feature maps of pictures in 0..1, ``(pictures, 3, height, width)``, resized to 224 by 224."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), _pool()]
        channels = 64
        for widths in _FIRES.values():
            parts.append(_pool() if widths is None else _Fire(channels, *widths))
            channels = channels if widths is None else 2 * widths[1]
        self.features = nn.Sequential(*parts)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Return the feature maps of seven stages, from fine to coarse."""
        resized = functional.interpolate(
            pictures.float(), (_SIDE, _SIDE), mode="bilinear", antialias=True
        )
        x = resized.flip(1) * 255 - torch.tensor(_MEAN, device=pictures.device)[:, None, None]
        maps = []
        for place, part in enumerate(self.features):
            x = part(x)
            if place in _STAGES:
                maps.append(x)
        return maps

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the mean of the last maps, ``(pictures, 512)``."""
        return self.maps(pictures)[-1].mean(dim=(-2, -1))


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


def load_squeezenet() -> SqueezeNet:
    """Load the features that come with msfp, in float32."""
    model = SqueezeNet()
    weights = load_file(Path(str(files("msfp_cli") / "data" / "squeezenet.safetensors")))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def deep_distance(model: SqueezeNet, pictures: Tensor, reference: Tensor) -> Tensor:
    """Return how far each picture is from its reference in deep features, 0 if they are equal.

    At each stage the features of every place are scaled to unit length; squared differences are
    summed over channels and averaged over places; the mean of the stages is the distance. This is
    LPIPS whose weights are all one over the number of stages.

    Arguments:
        pictures, reference: ``(pictures, 3, height, width)`` in 0..1.

    Returns:
        float64 ``(pictures,)``.
    """
    total = torch.zeros(len(pictures), dtype=torch.float64)
    for ours, theirs in zip(model.maps(pictures), model.maps(reference), strict=True):
        difference = _unit_length(ours) - _unit_length(theirs)
        total += difference.square().sum(dim=1).mean(dim=(-2, -1)).cpu()
    return total / len(_STAGES)


def _unit_length(features: Tensor) -> Tensor:
    """Scale the features of every place to unit length, in float64."""
    return functional.normalize(features.double(), dim=1)
