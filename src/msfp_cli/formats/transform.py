"""What is done to the input of a Linear layer before it is rounded, and undone by its product.

A grid has a few levels for all elements of an input, so it fits best where these are alike. Two
things make them more alike, and neither changes what the layer computes:

    y = W x = size * (W R) (R x / size)         R R = 1

*Rotation*: each block of neighbouring channels is multiplied by a Hadamard matrix ``R``, whose
elements are 1 and -1 over the root of their number. It spreads an outlier of one channel over its
block. ``R`` is symmetric and orthogonal, so it is its own inverse. The weight is rotated once,
before it is rounded (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; in blocks: ConvRot,
arXiv:2512.03673).

*Size*: each token, a row of the last dimension, is divided by its largest magnitude, and its output
is multiplied by that. Then one grid fits all tokens and all timesteps. (The root mean square in its
place gained nothing: what a token's largest elements lose to clipping counts most.)

The grid, its format and zero point are calibrated for ``R x / size``. So kernels stay as they are,
and all of this happens around them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from msfp_cli.formats.rounding import Grid, fake_quantize

SMALLEST_BLOCK = 16  # channels; fewer would hardly spread an outlier
LARGEST_BLOCK = 128
_SMALLEST_SIZE = 1e-12  # of a token; one of zeros is divided by this


def block_of(channels: int) -> int:
    """Return how many channels are rotated together: a power of two; 0 if there are too few.

    Arguments:
        channels: of an input; blocks have to divide them.
    """
    block = min(channels & -channels, LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else 0


def _make_hadamard(size: int, device: torch.device) -> Tensor:
    matrix = torch.full((1, 1), size**-0.5, device=device)
    while len(matrix) < size:
        upper = torch.cat([matrix, matrix], dim=1)
        lower = torch.cat([matrix, -matrix], dim=1)
        matrix = torch.cat([upper, lower])
    return matrix


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _cached_hadamard(size: int, device: torch.device) -> Tensor:
    return _make_hadamard(size, device)


def hadamard(size: int, device: torch.device) -> Tensor:
    """Return the orthogonal Hadamard matrix, float32 ``(size, size)``, in Sylvester's order.

    Arguments:
        size: a power of two.
    """
    return (_make_hadamard if torch.compiler.is_compiling() else _cached_hadamard)(size, device)


def token_sizes(x: Tensor) -> Tensor:
    """Return the largest magnitude of each token, float32 ``(..., 1)``; never 0.

    Arguments:
        x: ``(..., channels)``; gradients do not reach it.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    return largest.float().clamp_min(_SMALLEST_SIZE)


@dataclass(frozen=True, kw_only=True)
class InputTransform:
    """How the input of one layer is transformed.

    Arguments:
        rotation: channels that are rotated together, a power of two; 0 for no rotation.
        token_scales: whether each token is divided by its size.
    """

    rotation: int = 0
    token_scales: bool = False

    def __post_init__(self) -> None:
        if self.rotation and block_of(self.rotation) != self.rotation:
            raise ValueError(f"blocks of {self.rotation} channels cannot be rotated")

    def __str__(self) -> str:
        rotated = [f"rotated by {self.rotation}"] if self.rotation else []
        return ", ".join([*rotated, *(["token scales"] if self.token_scales else [])])

    @property
    def num_parts(self) -> int:
        """How much is done to the input: rotation and token scales, one of them, or nothing."""
        return (self.rotation > 0) + self.token_scales

    @property
    def is_identity(self) -> bool:
        """Whether the input stays as it is."""
        return not self.num_parts

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate blocks of the last dimension, or rotate them back, which is the same.

        Arguments:
            x: an input ``(..., channels)`` or a weight ``(out, channels)``.

        Returns:
            The type and shape of `x`; computed in float32.
        """
        if not self.rotation:
            return x
        blocks = x.float().unflatten(-1, (-1, self.rotation))
        with torch.autocast(x.device.type, enabled=False):
            rotated: Tensor = blocks @ hadamard(self.rotation, x.device)
        return rotated.flatten(-2).to(x.dtype)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what is rounded in the place of an input, and the size of each token.

        Returns:
            The transformed input, type and shape of `x`; sizes as `token_sizes` has them, None if
            tokens are not divided by theirs.
        """
        if not self.token_scales:
            return self.rotate(x), None
        rotated = self.rotate(x.float())  # float16 may not hold it before it is divided
        sizes = token_sizes(rotated)
        return (rotated / sizes).to(x.dtype), sizes

    def rounded(self, x: Tensor, grid: Grid) -> Tensor:
        """Return what the rotated weight is multiplied by: the rounded input, in its own size.

        Arguments:
            grid: of the transformed input.

        Returns:
            The type and shape of `x`.
        """
        transformed, sizes = self(x)
        rounded = fake_quantize(transformed, grid)
        return rounded if sizes is None else (rounded * sizes).to(x.dtype)

    def around(self, product: Callable[[Tensor], Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """Run what multiplies by the rotated weight, on the transformed input.

        Arguments:
            product: from a transformed input to the output; where tokens are divided by their size,
                without the bias.
            bias: ``(out,)``.
        """
        transformed, sizes = self(x)
        y = product(transformed)
        if sizes is None:
            return y
        y = y * sizes
        return (y if bias is None else y + bias).to(x.dtype)

    def views(self, x: Tensor) -> Tensor:
        """Return what transformed elements are made of: the input and its sizes, and both rotated.

        Returns:
            float32 ``(4, *x.shape)``.
        """
        rotated = self.rotate(x.float())
        pairs = [(each.float(), token_sizes(each).expand(x.shape)) for each in (x, rotated)]
        return torch.stack(list(chain.from_iterable(pairs)))

    def of_views(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Return transformed elements, and what each is multiplied by after it was rounded.

        Arguments:
            views: some elements of `views`, ``(4, elements)``.
        """
        values, sizes = views[2:] if self.rotation else views[:2]
        sizes = sizes if self.token_scales else torch.ones_like(sizes)
        return values / sizes, sizes

    def error(self, views: Tensor, grid: Grid) -> float:
        """Return the squared error that rounding makes, relative to the sum of squares.

        Arguments:
            views: see `of_views`.
            grid: of the transformed input.
        """
        values, sizes = self.of_views(views)
        errors = (fake_quantize(values, grid) - values) * sizes
        return float(errors.square().sum() / (values * sizes).square().sum())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: nothing where the input stays as it is."""
        rotation = {"rotation": self.rotation} if self.rotation else {}
        return {**rotation, **({"token_scales": True} if self.token_scales else {})}
