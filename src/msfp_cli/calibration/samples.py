"""Samples of a layer's input, as rows that its weight is multiplied by, and sums over them.

A Linear's rows are its input vectors, rotated where its scheme says so. A convolution's are
patches, ``in_channels / groups * k * k`` numbers for each group: what the window holds at some
position of the output, where padding is zero after the input was rounded. Positions are drawn by a
generator of the layer's own, so they depend neither on which other layers are sampled nor on which
process does it.
"""

import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from msfp_cli.formats.objective import CheckRows
from msfp_cli.layers.quantized import FloatLayer
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.layers.streamed import weight_in_memory
from msfp_cli.memory import peak_bytes
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.watch import watch_layers
from msfp_cli.progress import Advance

# Inputs of one sum of products: 5,760 take 0.13 GB in float32. A wider layer has several sums, of
# whole input channels each, and loses the products of one part with another.
MAX_INPUTS = 5760
_STRIP = 1024  # rows of a sum that are added at a time, up to its diagonal
ROWS = 16_384  # of each layer's input that are summed up
CHECK_ROWS = 2048  # of each layer's input that dampings are compared on
_GROUP_BYTES = 3 * 2**30  # the samples of a group of layers, at most
ROUNDING_BYTES = 7 * 2**27  # what rounding the largest layer takes beside its samples

K = TypeVar("K", bound=Hashable)


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
    count = -(-inputs // MAX_INPUTS)
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
        scheme: how its input is transformed and rounded.
        moments: ``sum x_q x_q^T`` for each of `input_parts`, ``(groups, k, k)``. It is symmetric,
            and only what is below the diagonal counts until `complete_` was called.
        missing: ``sum W (x - x_q) x_q^T``, likewise, ``(groups, out / groups, k)``; empty if the
            input is not rounded. Where that is less work, it is the sum without ``W``, until
            `complete_` was called.
        checks: rows that are in no sum.
    """

    name: str
    layer: FloatLayer
    scheme: LayerScheme
    moments: list[Tensor] = field(default_factory=list)
    missing: list[Tensor] = field(default_factory=list)
    checks: list[CheckRows] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        device = self.layer.weight.device
        groups = num_groups(self.layer)
        for part in input_parts(self.layer):
            size = part.stop - part.start
            self.moments.append(torch.zeros(groups, size, size, device=device))
            if self.scheme.input is not None:
                rows = _missing_rows(self.layer, part)
                self.missing.append(torch.zeros(groups, rows, size, device=device))

    def add(self, x: Tensor, output: Tensor, count: int, *, is_lifted: bool = False) -> None:
        """Add some rows of a run of the layer to the sums.

        Arguments:
            is_lifted: whether inputs are lifted at the timestep of this run.
        """
        exact, rounded = self._draw(x, output, count, is_lifted=is_lifted)
        parts = input_parts(self.layer)
        for moments, part in zip(self.moments, parts, strict=True):
            _add_products_(moments, rounded[..., part])
        with weight_in_memory(self.layer):
            for missing, part in zip(self.missing, parts, strict=False):  # of none or all parts
                lost = exact[..., part] - rounded[..., part]
                if missing.shape[1] < lost.shape[-1]:
                    lost = lost @ self._weight(part).mT
                missing.baddbmm_(lost.mT, rounded[..., part])

    def keep(self, x: Tensor, output: Tensor, count: int, *, is_lifted: bool = False) -> None:
        """Keep some rows of a run of the layer to check on."""
        exact, rounded = self._draw(x, output, count, is_lifted=is_lifted)
        with weight_in_memory(self.layer):
            self.checks.append(CheckRows(exact @ self._weight(slice(None)).mT, rounded))

    def _weight(self, part: slice) -> Tensor:
        """Return the rotated weights of some inputs, ``(groups, out / groups, size)``."""
        weight = self.scheme.transform.rotate(self.layer.weight)
        return weight_rows(self.layer, weight)[..., part].float()

    def complete_(self) -> None:
        """Make the sums what they stand for, and join the rows to check on.

        The weight has to be in memory.
        """
        for number, part in enumerate(input_parts(self.layer)):
            if self.missing and _missing_rows(self.layer, part) == part.stop - part.start:
                self.missing[number] = self._weight(part) @ self.missing[number]
        for moments in self.moments:
            size = moments.shape[-1]
            for end in range(_STRIP, size, _STRIP):
                own = slice(end - _STRIP, end)
                moments[:, own, end:] = moments[:, end:, own].mT
        outputs = torch.cat([each.outputs for each in self.checks], dim=1)
        rounded = torch.cat([each.rounded for each in self.checks], dim=1)
        self.checks = [CheckRows(outputs, rounded)]

    def _draw(
        self, x: Tensor, output: Tensor, count: int, *, is_lifted: bool
    ) -> tuple[Tensor, Tensor]:
        """Draw rows of the input, none twice, and return them as they are and as rounded."""
        total = output.numel() // self.layer.weight.shape[0]
        positions = torch.randperm(total, generator=self._generator)[:count].to(x.device)
        transform = self.scheme.transform
        exact = rows_at(self.layer, transform.rotate(x.float()), output, positions)
        grid = self.scheme.lifted_input if is_lifted else self.scheme.input
        grid = grid or self.scheme.input
        if grid is None:
            return exact, exact
        rounded = transform.rounded(x.float(), grid)
        return exact, rows_at(self.layer, rounded, output, positions)


def _missing_rows(layer: FloatLayer, part: slice) -> int:
    """Return the rows that the sum over a part of the inputs has until it is complete.

    For each row of the input, the product with the weight takes as long as adding it to the sum.
    """
    inputs: int = part.stop - part.start
    outputs: int = layer.weight.shape[0] // num_groups(layer)
    return outputs if 2 * outputs < inputs else inputs


def _add_products_(moments: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` up to the diagonal, strip by strip: half of the whole product."""
    size = rows.shape[-1]
    for start in range(0, size, _STRIP):
        end = min(start + _STRIP, size)
        moments[:, start:end, :end].baddbmm_(rows[..., start:end].mT, rows[..., :end])


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
    added = max(1, ROWS // max(1, len(checks) - sum(checks)))
    kept = max(1, CHECK_ROWS // max(1, sum(checks)))

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
    sums: int = 0
    for part in input_parts(layer):
        size: int = part.stop - part.start
        sums += size * (size + _missing_rows(layer, part))
    inputs: int = layer.weight[0].numel()
    outputs: int = layer.weight.shape[0] // groups
    return 4 * groups * (sums + CHECK_ROWS * (inputs + outputs))
