"""Samples of a layer's input, as rows that its weight is multiplied by, and sums over them.

A Linear's rows are its input vectors. A convolution's are patches, ``in_channels / groups * k * k``
numbers for each group: what the window holds at some position of the output, where padding is zero
after the input was rounded. Positions are drawn by a generator of the layer's own, so they depend
neither on which other layers are sampled nor on which process does it.
"""

import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from msfp_cli.formats.rounding import Grid, fake_quantize
from msfp_cli.layers.base import FloatLayer
from msfp_cli.memory import peak_bytes
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.watch import watch_layers
from msfp_cli.progress import Advance

# Inputs of one sum of products: 5,760 take 0.13 GB in float32. A wider layer has several sums, of
# whole input channels each, and loses the products of one part with another.
_MAX_INPUTS = 5760
_ROWS = 16_384  # of each layer's input that are summed up
_CHECK_ROWS = 2048  # of each layer's input that dampings are compared on
_GROUP_BYTES = 3 * 2**30  # the samples of a group of layers, at most
ROUNDING_BYTES = 3 * 2**28  # what rounding the largest layer takes beside its samples

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Pairs:
    """Rows of the input as it was and as it is rounded, each ``(groups, rows, k)``."""

    exact: Tensor
    rounded: Tensor


def can_sample(layer: FloatLayer) -> bool:
    """Whether the rows that a layer's weight is multiplied by are known here."""
    return isinstance(layer, nn.Linear | nn.Conv2d)


def num_groups(layer: FloatLayer) -> int:
    """Return how many parts of the outputs see different inputs; 1 but for grouped convolutions."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def weight_rows(layer: FloatLayer, weight: Tensor) -> Tensor:
    """Return a weight as ``(groups, out / groups, k)``."""
    groups = num_groups(layer)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def input_parts(layer: FloatLayer) -> list[slice]:
    """Return the parts of k whose products are summed: one, unless the layer is too wide."""
    channel = layer.weight[0, 0].numel()
    inputs = layer.weight[0].numel()
    count = -(-inputs // _MAX_INPUTS)
    size = -(-inputs // channel // count) * channel
    return [slice(start, min(start + size, inputs)) for start in range(0, inputs, size)]


def rows_at(layer: FloatLayer, x: Tensor, output: Tensor, positions: Tensor) -> Tensor:
    """Return what the weight is multiplied by at some positions of the output.

    Arguments:
        x: the input, not padded.
        positions: int64 ``(rows,)``, numbers of output positions over batch and picture.

    Returns:
        ``(groups, rows, k)``.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])[positions][None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    height, width = output.shape[-2:]
    picture = positions // (height * width)
    top = positions // width % height * layer.stride[0]
    left = positions % width * layer.stride[1]
    down = _taps(layer, 0, x.device)
    right = _taps(layer, 1, x.device)
    patches = padded[
        picture[:, None, None],
        :,
        top[:, None, None] + down[:, None],
        left[:, None, None] + right,
    ]  # (rows, kh, kw, channels)
    channels_first = patches.permute(0, 3, 1, 2)
    return channels_first.reshape(len(positions), layer.groups, -1).transpose(0, 1)


def _taps(layer: nn.Conv2d, axis: int, device: torch.device) -> Tensor:
    """Return how far each tap of a window is from the first."""
    return torch.arange(layer.kernel_size[axis], device=device) * layer.dilation[axis]


@dataclass
class LayerSamples:
    """Sums over the rows of a layer's input, and other rows to check on.

    Arguments:
        name: of the layer; the positions depend on it.
        layer: the float layer.
        grid: of its input, None if the input is not rounded.
        lifted: of its input where that is lifted, None if it never is.
        moments: ``sum x_q x_q^T`` for each of `input_parts`, ``(groups, k, k)``.
        cross: ``sum (x - x_q) x_q^T``, likewise; empty if the input is not rounded.
        checks: rows that are in no sum.
    """

    name: str
    layer: FloatLayer
    grid: Grid | None
    lifted: Grid | None = None
    moments: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    checks: list[Pairs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        for part in input_parts(self.layer):
            size = part.stop - part.start
            shape = (num_groups(self.layer), size, size)
            self.moments.append(torch.zeros(shape, device=self.layer.weight.device))
            if self.grid is not None:
                self.cross.append(torch.zeros(shape, device=self.layer.weight.device))

    def add(self, x: Tensor, output: Tensor, count: int, *, is_lifted: bool = False) -> None:
        """Add some rows of a run of the layer to the sums.

        Arguments:
            is_lifted: whether inputs are lifted at the timestep of this run.
        """
        pairs = self._draw(x, output, count, is_lifted=is_lifted)
        for number, part in enumerate(input_parts(self.layer)):
            rounded = pairs.rounded[..., part]
            self.moments[number].baddbmm_(rounded.mT, rounded)
            if self.cross:
                missing = pairs.exact[..., part] - rounded
                self.cross[number].baddbmm_(missing.mT, rounded)

    def keep(self, x: Tensor, output: Tensor, count: int, *, is_lifted: bool = False) -> None:
        """Keep some rows of a run of the layer to check on."""
        self.checks.append(self._draw(x, output, count, is_lifted=is_lifted))

    def check_rows(self) -> Pairs:
        """Return all rows that were kept."""
        exact = torch.cat([pairs.exact for pairs in self.checks], dim=1)
        rounded = torch.cat([pairs.rounded for pairs in self.checks], dim=1)
        return Pairs(exact, rounded)

    def _draw(self, x: Tensor, output: Tensor, count: int, *, is_lifted: bool) -> Pairs:
        """Draw rows, without any twice."""
        total = output.numel() // self.layer.weight.shape[0]
        positions = torch.randperm(total, generator=self._generator)[:count].to(x.device)
        exact = rows_at(self.layer, x.float(), output, positions)
        if self.grid is None:
            return Pairs(exact, exact)
        grid = self.lifted if self.lifted is not None and is_lifted else self.grid
        rounded = fake_quantize(x, grid).float()
        return Pairs(exact, rows_at(self.layer, rounded, output, positions))


def sample(
    denoiser: nn.Module,
    calls: Iterable[DenoiserCall],
    checks: Sequence[bool],
    samples: Mapping[str, LayerSamples],
    advance: Advance,
    is_lifted_at: Callable[[float], bool] = lambda timestep: False,
) -> None:
    """Replay recorded calls and fill the samples of some layers.

    Arguments:
        checks: of each call, whether its rows are kept to check on.
        is_lifted_at: whether inputs are lifted at a timestep.
    """
    checking = iter(checks)
    is_check = False
    is_lifted = False
    added = max(1, _ROWS // max(1, len(checks) - sum(checks)))
    kept = max(1, _CHECK_ROWS // max(1, sum(checks)))

    def report(name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if is_check:
            samples[name].keep(args[0], output, kept, is_lifted=is_lifted)
        else:
            samples[name].add(args[0], output, added, is_lifted=is_lifted)

    with watch_layers({name: each.layer for name, each in samples.items()}, report):
        for call in calls:
            is_check = next(checking)
            is_lifted = is_lifted_at(call.timestep)
            replay(denoiser, call)
            advance(1)


def group_layers(layers: Mapping[K, FloatLayer], size: int) -> list[list[K]]:
    """Put layers together, in order, as long as their samples fit into `size` bytes."""
    groups: list[list[K]] = []
    filled = math.inf
    for name, layer in layers.items():
        own = memory(layer)
        if filled + own > size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += own
    return groups


def group_bytes(max_memory: int | None) -> int:
    """Return what the samples of a group of layers may take.

    Arguments:
        max_memory: bytes that this process may take; what it took so far, to call the denoiser
            among others, is not for samples.
    """
    if max_memory is None:
        return _GROUP_BYTES
    return min(_GROUP_BYTES, max_memory - peak_bytes() - ROUNDING_BYTES)


def expected_groups(layers: Mapping[K, FloatLayer], max_memory: int | None) -> tuple[int, int]:
    """Return how many groups layers will make, and the memory that this process will take then."""
    groups = group_layers(layers, group_bytes(max_memory))
    samples = (sum(memory(layers[name]) for name in group) for group in groups)
    return len(groups), peak_bytes() + ROUNDING_BYTES + max(samples, default=0)


def memory(layer: FloatLayer) -> int:
    """Return the bytes that the samples of a layer take, at most."""
    groups: int = num_groups(layer)
    sums: int = sum((part.stop - part.start) ** 2 for part in input_parts(layer))
    inputs: int = layer.weight[0].numel()
    return 4 * 2 * groups * (sums + _CHECK_ROWS * inputs)
