"""Run a layer on the 8-bit integer units of a CPU, through oneDNN.

The formula is that of `arithmetic`. The input is rounded to bytes (`to_bytes`), and these are
multiplied by the bytes of the weight (`onednn`).

Without VNNI a CPU adds two products in 16 bits, so formats whose pair could overflow are refused
there.
"""

import platform
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from msfp_cli.formats.rounding import Grid
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.kernels.arithmetic import (
    BYTE,
    KINDS_IN_INTEGERS,
    Arithmetic,
    of_one_shape,
    refusal_of_integers,
    refusal_of_overflow,
    widest_input,
)
from msfp_cli.layers.kernels.geometry import Strip, frame_of, subtract_frame_
from msfp_cli.layers.kernels.onednn import Operands, is_taken, multiply_bytes, prepack
from msfp_cli.layers.kernels.reference import run_reference
from msfp_cli.layers.kernels.simulated import input_grids, is_lifted, simulate
from msfp_cli.layers.kernels.to_bytes import (
    can_be_looked_up,
    look_up_bytes,
    round_compiled,
    round_to_bytes,
    tables_of_bytes,
)

_MAX_FRAMES = 8  # of a layer, each of a variant and a size of picture
_INT16 = 2**15 - 1


class Cpu(Kernel):
    """Runs a layer as bytes times bytes.

    The weight is kept as oneDNN lays it out for its units, one byte each, and the layer's codes can
    go; with `keep_packed` the codes stay and are unpacked at every call.
    """

    name: ClassVar[str] = "cpu"
    kinds: ClassVar[frozenset[str] | None] = KINDS_IN_INTEGERS
    device: ClassVar[str | None] = "cpu"
    lays_out: ClassVar[bool] = True

    @staticmethod
    def refusal(layer: QuantizedLayer) -> str | None:
        """Say why the layer cannot run here, or nothing."""
        return refusal_of_integers(layer) or _refusal_here(layer) or _refusal_of_sums(layer)

    def __init__(self, layer: QuantizedLayer, *, keep_packed: bool) -> None:
        """Lay out the weights, and fold scales and zero point."""
        integers = [layer.integers(member) for member in range(layer.scheme.hub)]
        self.arithmetic = Arithmetic.of(layer, integers)
        self.holds_weight = not keep_packed
        self.weights: list[Tensor] = []
        self._frames: dict[tuple[int | Tensor, torch.Size], list[Strip]] = {}
        self._tables: dict[tuple[Grid, torch.dtype], list[Tensor]] = {}
        if self.holds_weight:
            packed = [prepack(each, self.arithmetic.geometry) for each in integers]
            self.weights = list(map(of_one_shape, packed))

    def __call__(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """Run the layer.

        A shape that oneDNN does not take goes to the reference, which refuses what no layer
        takes as torch does. What needs gradients is simulated.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return simulate(layer, x)
        geometry = self.arithmetic.geometry
        groups = 1 if geometry is None else geometry.groups
        if not is_taken(x, geometry, layer.weight_shape[1] * groups):
            return run_reference(layer, x, self.arithmetic)
        variant = layer.variant()
        grids = input_grids(layer, variant)
        if torch.compiler.is_compiling():
            lifted = torch.as_tensor(is_lifted(layer, variant))
            planes = round_compiled(x.detach(), grids, lifted, self.arithmetic.shift)
            member = torch.as_tensor(layer.member())
            y: Tensor = multiply_bytes(*self._operands(layer, planes, variant, member))
        else:
            planes = self.round(x.detach(), grids[0])
            operands = self._operands(layer, planes, variant, layer.member())
            dtype = x.dtype if operands.writes(x.dtype) else torch.float32
            y = operands._replace(frame=None).multiply(dtype)
            subtract_frame_(y, self._frame(operands.frame, variant, x.shape[2:]))
        return y.to(x.dtype)

    def round(self, x: Tensor, grid: Grid) -> list[Tensor]:
        """Round an input to bytes; where its type allows it, by a table that is remembered."""
        if not can_be_looked_up(x.dtype):
            return round_to_bytes(x, grid, self.arithmetic.shift)
        tables = self._tables.get((grid, x.dtype))
        if tables is None:
            tables = tables_of_bytes(x.dtype, grid, self.arithmetic.shift)
            self._tables[grid, x.dtype] = tables
        return look_up_bytes(x, tables)

    def _frame(
        self, taps: Tensor | None, variant: int | Tensor, size: torch.Size
    ) -> Sequence[Strip]:
        """Return what the edges of an output have too much; the last few sizes are remembered."""
        if taps is None or self.arithmetic.geometry is None:
            return ()
        frame = self._frames.get((variant, size))
        if frame is None:
            frame = frame_of(taps, self.arithmetic.geometry, *size)
            if len(self._frames) == _MAX_FRAMES:
                self._frames = {}
            self._frames[variant, size] = frame
        return frame

    def _operands(
        self,
        layer: QuantizedLayer,
        planes: Sequence[Tensor],
        variant: int | Tensor,
        member: int | Tensor,
    ) -> Operands:
        """Gather what is multiplied; of weights that are kept packed, one is unpacked here."""
        geometry = self.arithmetic.geometry
        factor, constant, frame = self.arithmetic.of_variant(variant, layer.kernel_bias)
        return Operands(
            planes=planes,
            weights=self.weights if self.holds_weight else [layer.integers(member)],
            member=member,
            shift=self.arithmetic.shift,
            factor=factor,
            constant=constant,
            frame=frame,
            geometry=[] if geometry is None else geometry.flat(),
        )

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of a member's weight, int8, shape of the float weight."""
        plain = self.weights[int(member)].to_dense()
        return plain if self.arithmetic.geometry else plain.t().contiguous()


def _refusal_here(layer: QuantizedLayer) -> str | None:
    """Say why no layer can run on this device, or nothing."""
    device = layer.get_buffer("weight_scale").device.type
    if device != "cpu":
        return f"the layer is on {device}"
    return None if runs_on_this_cpu() else "it needs oneDNN on an x86 CPU"


def runs_on_this_cpu() -> bool:
    """Whether this machine has what the kernel needs."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and bool(torch.backends.mkldnn.is_available())


def _refusal_of_sums(layer: QuantizedLayer) -> str | None:
    """Say where the sums of a layer could overflow, or nothing."""
    weight = layer.weight_format()
    fmt = widest_input(layer.scheme)
    largest_byte = min(fmt.largest * (1 + fmt.signed), BYTE)
    if reason := refusal_of_overflow(layer, largest_byte):
        return reason
    if 2 * largest_byte * layer.largest_integer > _INT16 and not torch.cpu._is_vnni_supported():
        return (
            f"products of {fmt} and {weight} could overflow the 16-bit sums of this CPU: "
            "it lacks VNNI"
        )
    return None
