"""A layer's weight as packed codes, which the layer itself or its kernel holds.

The state is two buffers: ``weight_codes``, packed, one row per member of the layer's hub, and
``weight_scale``, float32, one per output channel or per row of a table. A kernel may hold the
weight in a form of its own. Then there is no ``weight_codes``: codes are made from the kernel's
integers when they are asked for, and `PackedLayer.restore_` takes them back.
"""

import torch
from torch import Tensor

from msfp_cli.formats.packing import pack, packed_size, unpack, unpack_integers
from msfp_cli.formats.rounding import Grid, dequantize, per_channel, quantize
from msfp_cli.layers.base import QuantizedLayer
from msfp_cli.layers.kernels.kernel import Kernel


class PackedLayer(QuantizedLayer):
    """A quantized layer that knows its weight, but not yet how it is made, run, moved and saved."""

    kernel: Kernel | None

    def _make_room(self, hub: int, bits: int, device: torch.device) -> None:
        """Make buffers for the codes of every member and for their common scales."""
        size = packed_size(self.weight_shape.numel(), bits)
        codes = torch.empty(hub, size, dtype=torch.uint8, device=device)
        scale = torch.empty(self.weight_shape[0], dtype=torch.float32, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)

    def restore_(self) -> None:
        """Let go of the kernel, and take back the codes; the next call chooses again."""
        if self._weight_holder is not None:
            self._buffers["weight_codes"] = self.packed_codes()
        self.kernel = None

    @property
    def _weight_holder(self) -> Kernel | None:
        """The kernel, if it holds the weight in the place of the layer's codes."""
        return self.kernel if self.kernel is not None and self.kernel.holds_weight else None

    @property
    def weight(self) -> Tensor:
        """The weight in floating point; dequantized to float32 where it is held as codes.

        Raises:
            MsfpError: the layer's hub has several members, and its denoiser is not running.
        """
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        if "weight_scale" not in self._buffers:
            raise AttributeError("weight")  # so torch sees that it may be registered
        if self._weight_holder is not None:
            return self.integers(self.member()).float() * self.weight_grid().scale
        return dequantize(self.codes(self.member()), self.weight_grid())

    def codes(self, member: int | Tensor = 0) -> Tensor:
        """Return the codes of a member's weight, uint8, shape of the float weight."""
        return unpack(self._packed_row(member), self.weight_format().bits, self.weight_shape)

    def integers(self, member: int | Tensor = 0) -> Tensor:
        """Return the integers of a member's weight, int8, shape of the float weight."""
        if self._weight_holder is not None:
            return self._weight_holder.integers(member)
        return unpack_integers(self._packed_row(member), self.weight_format(), self.weight_shape)

    def packed_codes(self) -> Tensor:
        """Return the packed codes, uint8, one row per member, wherever they are held."""
        if self._weight_holder is None:
            return self.get_buffer("weight_codes")
        rows = [self._pack(self.integers(member)) for member in range(self.scheme.hub)]
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

    def store_(self, weight: Tensor, scale: Tensor, member: int = 0) -> None:
        """Round a float weight to the layer's format and keep the codes.

        Arguments:
            weight: ``weight_shape``.
            scale: float32, ``(out,)``; all members share it.
            member: whose weight it is.
        """
        steps = weight.float() / per_channel(scale, weight.ndim).to(weight.device)
        self.store_steps_(steps, scale, member)

    def store_steps_(self, steps: Tensor, scale: Tensor, member: int = 0) -> None:
        """Round a weight that is given in steps of its grid, ``W / scale``, and keep the codes.

        Arguments:
            steps: ``weight_shape``, or a matrix ``(out, rest)``.
            scale: float32, ``(out,)``; all members share it.
            member: whose weight it is.
        """
        packed = self._pack(steps)
        self.restore_()
        self.get_buffer("weight_scale").copy_(scale)
        self.get_buffer("weight_codes")[member].copy_(packed)
