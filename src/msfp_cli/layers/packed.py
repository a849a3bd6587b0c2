"""A layer's weight as packed codes, which the layer itself or its kernel holds.

The state is two buffers: ``weight_codes``, packed, one row per member of the layer's hub, and
``weight_scale``, float32, one per output channel or per row of a table. A kernel may hold the
weight in a form of its own. Then there is no ``weight_codes``: codes are made from the kernel's
integers when they are asked for, and `PackedLayer.restore_` takes them back. If somebody else puts
codes there, an offloader say, it is those that count.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from msfp_cli.formats.multipliers import (
    expand,
    pack_multipliers,
    step_sizes,
    unpack_multipliers,
)
from msfp_cli.formats.packing import pack, packed_size, unpack, unpack_integers
from msfp_cli.formats.rounding import Grid, dequantize, quantize
from msfp_cli.layers.base import Kernel, QuantizedLayer
from msfp_cli.layers.weight import PackedWeight

# Of each tensor: which one it is, how often it was written to, and where it is.
Source: TypeAlias = tuple[tuple[int, int, torch.device], ...]


class PackedLayer(QuantizedLayer):
    """A quantized layer that knows its weight, but not yet how it is made, run, moved and saved."""

    def _make_room(self, hub: int, bits: int, device: torch.device) -> None:
        """Make buffers for the codes of every member and for their common scales."""
        size = packed_size(self.weight_shape.numel(), bits)
        codes = torch.empty(hub, size, dtype=torch.uint8, device=device)
        scale = torch.empty(self.weight_shape[0], dtype=torch.float32, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)
        if self.scheme.weight_groups:
            size = packed_size(self.weight_shape[0] * self.scheme.weight_groups, 4)
            packed = torch.empty(size, dtype=torch.uint8, device=device)
            self.register_buffer("weight_multipliers", packed)

    def multipliers(self) -> Tensor | None:
        """Return the multiplier of each weight, uint8, ``weight_shape``; None if there are none."""
        if not self.scheme.weight_groups:
            return None
        shape = (self.weight_shape[0], self.scheme.weight_groups)
        packed = self.get_buffer("weight_multipliers")
        return expand(unpack_multipliers(packed, shape), self.weight_shape)

    def restore_(self) -> None:
        """Let go of the kernel, and take back the codes; the next call chooses again."""
        if self._weight_holder is not None:
            device = self.get_buffer("weight_scale").device
            self._buffers["weight_codes"] = self.packed_codes().to(device)
        self.kernel = None

    @property
    def _weight_holder(self) -> Kernel | None:
        """The kernel, if it holds the weight in the place of the layer's codes."""
        if self.kernel is None or not self.kernel.holds_weight or "weight_codes" in self._buffers:
            return None
        return self.kernel

    def source(self) -> Source:
        """Return what tells whether the tensors that a kernel was made from have changed."""
        names = ("weight_codes", "weight_scale", "weight_multipliers")
        tensors = [self._buffers.get(name) for name in names]
        return tuple(
            (id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.device)
            for tensor in tensors
            if tensor is not None
        )

    @property
    def weight(self) -> Tensor:
        """The weight in the model's type; where it is held as codes, a `PackedWeight`.

        It is that of the member that serves, and of the first while the denoiser is not running.
        """
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        if "weight_scale" not in self._buffers:
            raise AttributeError("weight")  # so torch sees that it may be registered
        if torch.compiler.is_compiling():
            return self._typed_weight()
        device = self.get_buffer("weight_scale").device
        return PackedWeight(self._typed_weight, self.weight_shape, self.weight_dtype, device)

    def _typed_weight(self) -> Tensor:
        member = self.member(otherwise=0)
        return self.scheme.transform.rotate(self._dequantize(member)).to(self.weight_dtype)

    def float_weight(self) -> Tensor:
        """Return the weight, rotated where inputs are; float32 where it is held as codes.

        Raises:
            MsfpError: the layer's hub has several members, and its denoiser is not running.
        """
        parameter: Tensor | None = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        return self._dequantize(self.member())

    def _dequantize(self, member: int | Tensor) -> Tensor:
        if self._weight_holder is not None or self.scheme.weight_groups:
            return self.integers(member).float() * self.weight_grid().scale
        return dequantize(self.codes(member), self.weight_grid())

    def codes(self, member: int | Tensor = 0) -> Tensor:
        """Return the codes of a member's weight, uint8, shape of the float weight."""
        return unpack(self._packed_row(member), self.weight_format().bits, self.weight_shape)

    def integers(self, member: int | Tensor = 0) -> Tensor:
        """Return the integers of a member's weight, int8, shape of the float weight."""
        if self._weight_holder is not None:
            return self._weight_holder.integers(member)
        packed = self._packed_row(member)
        integers = unpack_integers(packed, self.weight_format(), self.weight_shape)
        multipliers = self.multipliers()
        return integers if multipliers is None else integers.mul_(multipliers.to(torch.int8))

    def packed_codes(self) -> Tensor:
        """Return the packed codes, uint8, one row per member, wherever they are held."""
        if self._weight_holder is None:
            return self.get_buffer("weight_codes")
        multipliers = self.multipliers()
        rows = []
        for member in range(self.scheme.hub):
            integers = self.integers(member)
            own = integers if multipliers is None else integers.float() / multipliers
            rows.append(self._pack(own))
        return torch.stack(rows)

    def _packed_row(self, member: int | Tensor) -> Tensor:
        packed = self.packed_codes()
        if isinstance(member, int):
            return packed[member]
        return packed.index_select(0, member.view(1))[0]

    def _pack(self, steps: Tensor) -> Tensor:
        """Round a weight in steps of its grid, and pack the codes."""
        fmt = self.weight_format()
        return pack(quantize(steps, Grid(fmt, 1.0)), fmt.bits)

    def store_(
        self, weight: Tensor, scale: Tensor, member: int = 0, multipliers: Tensor | None = None
    ) -> None:
        """Round a float weight to the layer's format and keep the codes.

        Arguments:
            weight: ``weight_shape``, rotated where inputs are.
            scale: float32, ``(out,)``; all members share it.
            member: whose weight it is.
            multipliers: uint8 ``(out, groups)``, where the scheme has groups; likewise.
        """
        sizes = step_sizes(scale, multipliers, weight.shape).to(weight.device)
        self.store_steps_(weight.float() / sizes, scale, member, multipliers)

    def store_steps_(
        self, steps: Tensor, scale: Tensor, member: int = 0, multipliers: Tensor | None = None
    ) -> None:
        """Round a weight that is given in its own steps, and keep the codes.

        Arguments:
            steps: ``weight_shape``, or a matrix ``(out, rest)``.
            scale: float32, ``(out,)``; all members share it.
            member: whose weight it is.
            multipliers: uint8 ``(out, groups)``, where the scheme has groups; likewise.
        """
        packed = self._pack(steps)
        self.restore_()
        self.get_buffer("weight_scale").copy_(scale)
        if multipliers is not None:
            self.get_buffer("weight_multipliers").copy_(pack_multipliers(multipliers))
        self.get_buffer("weight_codes")[member].copy_(packed)
