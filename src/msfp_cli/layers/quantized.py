"""Linear and Conv2d layers that hold 4-bit codes and round their input, and tables that hold codes.

All subclass torch's own layers, so libraries that ask ``isinstance(layer, nn.Linear)`` (PEFT among
them) see what they expect; ``layer.weight`` dequantizes on the fly. The state is two buffers,
``weight_codes`` (packed, one row per member of the layer's hub) and ``weight_scale`` (float32, one
per output channel, or per row of a table), beside the float bias. What is one number per layer
(formats, the input's scale and zero point) is no tensor: it is `LayerScheme`, a plain value
that the checkpoint stores as JSON. A layer whose hub has several members reads from its route which
one serves the timestep that the denoiser is at.

How a layer runs is its kernel's business. A layer chooses one when it first runs, for the device it
is on then; a kernel that keeps the weight in a form of its own lets the layer drop its codes, which
come back when they are asked for: to be saved, copied, or moved to another device.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from msfp_cli.formats.float_format import FloatFormat
from msfp_cli.formats.packing import pack, packed_size, unpack
from msfp_cli.formats.rounding import Grid, dequantize, quantize
from msfp_cli.layers.kernels.kernel import Kernel
from msfp_cli.layers.kernels.lookup import look_up
from msfp_cli.layers.kernels.registry import AUTO, choose_kernel
from msfp_cli.layers.kernels.simulated import simulate
from msfp_cli.layers.routing import Route
from msfp_cli.layers.scheme import LayerScheme

FloatLayer = nn.Linear | nn.Conv2d | nn.Embedding
KINDS: dict[str, type[FloatLayer]] = {
    "linear": nn.Linear,
    "conv2d": nn.Conv2d,
    "embedding": nn.Embedding,
}
_PIECE = 1 << 20  # bytes that are looked up at once: bounds the temporaries of a large weight


class QuantizedLayer(Protocol):
    """What a kernel may ask of a layer."""

    scheme: LayerScheme
    weight_shape: torch.Size
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, shape of the float layer's."""
        ...

    def get_buffer(self, target: str) -> Tensor:
        """One of the layer's buffers."""
        ...

    def integers(self, member: int | Tensor) -> Tensor:
        """Return the integers of a set of weights, int8, shape of the float weight."""
        ...

    def member(self) -> int | Tensor:
        """Which set of weights serves the timestep that the denoiser is at."""
        ...

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the float operation with the given weight and the layer's own bias."""
        ...


class Quantized(nn.Module):
    """The part that all share; the float layer's class comes second in the bases."""

    scheme: LayerScheme
    kernel: Kernel | None
    wish: tuple[str, bool]
    weight_shape: torch.Size
    route: Route[int | Tensor] | None
    slot: int
    bias: Any  # nn.Parameter or None; torch types it differently in its two layers

    def _take_over(self, layer: FloatLayer, scheme: LayerScheme) -> None:
        """Take the settings and bias of a float layer, and room for its codes (on its device, meta included)."""
        nn.Module.__init__(self)
        tensors = {"weight", "bias"} | set(layer.__dict__.keys() & nn.Module().__dict__.keys())
        self.__dict__.update(
            {key: value for key, value in layer.__dict__.items() if key not in tensors}
        )
        self.scheme, self.kernel, self.weight_shape = scheme, None, layer.weight.shape
        self.wish = (AUTO, False)
        grid = scheme.input
        for fmt in (scheme.weight, grid and grid.format):
            _ = (
                fmt and fmt.code_book
            )  # now: before Python 3.12 it is made under a lock, where torch.compile stops
        self.training, self.route, self.slot = layer.training, None, 0
        self.register_parameter("bias", getattr(layer, "bias", None))  # type: ignore[arg-type]
        if scheme.weight is None:
            self.register_parameter("weight", layer.weight)  # type: ignore[arg-type]
            return
        size = packed_size(layer.weight.numel(), scheme.weight.bits)
        device = layer.weight.device
        self.register_buffer(
            "weight_codes", torch.empty(scheme.hub, size, dtype=torch.uint8, device=device)
        )
        self.register_buffer(
            "weight_scale", torch.empty(layer.weight.shape[0], dtype=torch.float32, device=device)
        )

    def prepare_(self, kernel: str = AUTO, *, keep_packed: bool = False) -> str:
        """Choose the kernel that runs this layer where it is now, and prepare it.

        Arguments:
            kernel: a name in `kernels.KERNELS`, or ``auto``.
            keep_packed: keep the weight in 4 bits in memory, too, and unpack it at every call.

        Returns:
            Why other kernels were passed over; empty where the first one took it.

        Raises:
            UsageError: there is no such kernel.
        """
        chosen, reason = choose_kernel(self, kernel)  # type: ignore[arg-type]  # a layer, by way of its subclasses
        self.restore_()
        self.wish = (kernel, keep_packed)
        self.kernel = chosen(self, keep_packed=keep_packed)  # type: ignore[arg-type]
        if self.kernel.holds_weight:
            del self._buffers["weight_codes"]
        return reason

    def restore_(self) -> None:
        """Let go of the kernel, and take back the codes if it holds them; the next call chooses again."""
        if self.kernel is not None and self.kernel.holds_weight:
            self._buffers["weight_codes"] = self.packed_codes()
        self.kernel = None

    def packed_codes(self) -> Tensor:
        """Return the packed codes, uint8, one row per set of weights, wherever they are held."""
        if self.kernel is None or not self.kernel.holds_weight:
            return self.get_buffer("weight_codes")
        fmt = self._weight_format()
        rows = [self.kernel.integers(member) for member in range(self.scheme.hub)]
        return torch.stack([pack(quantize(row, Grid(fmt, 1.0)), fmt.bits) for row in rows])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ANN401 (torch's signature)
        """Move or convert the layer, but keep its scales in float32: float16 would turn small ones to 0."""
        scale = self._buffers.get("weight_scale")
        if scale is not None and self.kernel is not None and fn(scale[:0]).device != scale.device:
            self.restore_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None:
            moved = self.get_buffer("weight_scale")
            if moved.dtype != torch.float32:
                self._buffers["weight_scale"] = scale.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: ANN401 (torch's)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self.kernel is not None and self.kernel.holds_weight:
            destination[f"{prefix}weight_codes"] = self.packed_codes()

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401 (torch's signature)
        self.restore_()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: codes rather than a kernel, whose own form of the weight cannot be copied."""
        state = self.__dict__.copy()
        if self.kernel is not None and self.kernel.holds_weight:
            state["_buffers"] = {**self._buffers, "weight_codes": self.packed_codes()}
        return {**state, "kernel": None}

    @property
    def weight(self) -> Tensor:
        """The weight in floating point; dequantized to float32 where it is held as codes.

        Raises:
            MsfpError: the layer has several sets of weights, and its denoiser is not running.
        """
        if "weight" in self._parameters:
            return self._parameters["weight"]  # type: ignore[return-value]
        if "weight_scale" not in self._buffers:
            raise AttributeError("weight")
        if self.kernel is not None and self.kernel.holds_weight:
            return self.kernel.integers(self.member()).float() * self.weight_grid().scale
        return dequantize(self.codes(self.member()), self.weight_grid())

    def member(self) -> int | Tensor:
        """Return which set of weights serves the timestep that the denoiser is at; a tensor while it is compiled."""
        return 0 if self.route is None else self.route.of(self.slot)

    def codes(self, member: int | Tensor = 0) -> Tensor:
        """Return the codes of one set of weights, uint8, shape of the float weight."""
        return unpack(self._packed_row(member), self._weight_format().bits, self.weight_shape)

    def integers(self, member: int | Tensor = 0) -> Tensor:
        """Return the integers of one set of weights, int8, shape of the float weight; the format has to fit."""
        if self.kernel is not None and self.kernel.holds_weight:
            return self.kernel.integers(member)
        bits, scale = self._weight_format().bits, self.get_buffer("weight_scale")
        book = torch.tensor(self._weight_format().code_book, dtype=torch.int8, device=scale.device)
        if bits != 4:
            return book.index_select(0, self.codes(member).view(-1).int()).view(self.weight_shape)
        # Both codes of a byte are looked up at once, as one int16, and a piece at a time: weights
        # can be large.
        byte = torch.arange(256, device=scale.device)
        pairs = torch.stack([book[byte & 15], book[byte >> 4]], dim=1).view(torch.int16).view(-1)
        pieces = torch.split(self._packed_row(member), _PIECE)
        found = torch.cat([pairs.index_select(0, piece.int()) for piece in pieces])
        return found.view(torch.int8)[: self.weight_shape.numel()].view(self.weight_shape)

    def _packed_row(self, member: int | Tensor) -> Tensor:
        packed = self.packed_codes()
        return (
            packed[member] if isinstance(member, int) else packed.index_select(0, member.view(1))[0]
        )

    def _weight_format(self) -> FloatFormat:
        fmt = self.scheme.weight
        assert fmt is not None, "this layer's weight is in floating point"
        return fmt

    def weight_grid(self) -> Grid:
        """Return the weight's grid, one scale per output channel."""
        scale = self.get_buffer("weight_scale")
        return Grid(self._weight_format(), scale.view(-1, *[1] * (len(self.weight_shape) - 1)))

    def store_(self, weight: Tensor, scale: Tensor, member: int = 0) -> None:
        """Round a float weight to the layer's format and keep the codes.

        Arguments:
            weight: ``weight_shape``.
            scale: float32, ``(out,)``; all members share it.
            member: which set of weights.
        """
        rows = scale.view(-1, *[1] * (weight.ndim - 1))
        self.store_steps_(weight.float() / rows.to(weight.device), scale, member)

    def store_steps_(self, steps: Tensor, scale: Tensor, member: int = 0) -> None:
        """Round a weight that is given in steps of its grid, ``W / scale``, and keep the codes.

        Arguments:
            steps: ``weight_shape``, or a matrix ``(out, rest)``.
            scale: float32, ``(out,)``; all members share it.
            member: which set of weights.
        """
        fmt = self._weight_format()
        self.restore_()
        self.get_buffer("weight_scale").copy_(scale)
        self.get_buffer("weight_codes")[member].copy_(
            pack(quantize(steps, Grid(fmt, 1.0)), fmt.bits)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Round the input, run the layer; the kernel decides how."""
        if self.kernel is None and not torch.compiler.is_compiling():
            self.prepare_(self.wish[0], keep_packed=self.wish[1])
        if self.kernel is None:
            return simulate(self, x)  # type: ignore[arg-type]
        return self.kernel(self, x)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Name the formats beside torch's own description."""
        grid = self.scheme.input
        return f"{super().extra_repr()}, weight={self.scheme.weight}, input={grid and grid.format}"


class QuantLinear(Quantized, nn.Linear):  # type: ignore[misc, override]  # weight is a property here
    """A Linear layer with quantized weight and input: ``(..., in_features) -> (..., out_features)``."""

    def __init__(self, layer: nn.Linear, scheme: LayerScheme) -> None:
        """Take the place of `layer`; call `store_` or load a state dict to give it codes."""
        self._take_over(layer, scheme)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply by `weight` and add the bias."""
        return nn.functional.linear(x, weight, self.bias)


class QuantConv2d(Quantized, nn.Conv2d):  # type: ignore[misc, override]  # weight is a property here
    """A Conv2d layer with quantized weight and input: ``(batch, in_channels, height, width)`` to the layer's output."""

    def __init__(self, layer: nn.Conv2d, scheme: LayerScheme) -> None:
        """Take the place of `layer`; call `store_` or load a state dict to give it codes."""
        self._take_over(layer, scheme)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with `weight` and add the bias; the input is padded here, after it was rounded."""
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


class QuantEmbedding(Quantized, nn.Embedding):  # type: ignore[misc, override]  # weight is a property here
    """A table of quantized rows: indices ``(...)`` to ``(..., embedding_dim)`` in the type of the float table."""

    def __init__(self, table: nn.Embedding, scheme: LayerScheme) -> None:
        """Take the place of `table`; call `store_` or load a state dict to give it codes."""
        self._take_over(table, scheme)
        # The input is whole numbers, so only this says which type the rows have; it moves with the
        # module.
        self.register_buffer("like", torch.empty(0, dtype=table.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Look rows up."""
        if self.kernel is None and not torch.compiler.is_compiling():
            self.prepare_(self.wish[0])
        return look_up(self, x)
