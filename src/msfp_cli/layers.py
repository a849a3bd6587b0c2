"""Linear and Conv2d layers that hold 4-bit codes and round their input.

Both subclass torch's own layers, so libraries that ask ``isinstance(layer, nn.Linear)`` (PEFT among them) see what
they expect; ``layer.weight`` dequantizes on the fly. The state is two buffers, ``weight_codes`` (packed, one row per
member of the layer's hub) and ``weight_scale`` (float32, one per output channel), beside the float bias. What is one
number per layer (formats, the input's scale and zero point) is no tensor: it is `LayerParameters`, a plain value that
the checkpoint stores as JSON. A layer whose hub has several members reads from its route which one serves the timestep
that the denoiser is at.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from msfp_cli.formats import FloatFormat
from msfp_cli.kernels import KERNELS
from msfp_cli.packing import pack, packed_size, unpack
from msfp_cli.rounding import Grid, dequantize, quantize
from msfp_cli.routing import Route


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """What one quantized layer needs besides its tensors.

    Arguments:
        weight: format of the weight, one scale per output channel; None leaves the weight in floating point.
        input: grid of the input, one for the whole tensor; None leaves the input in floating point.
        hub: sets of weights, of which the denoiser's router picks one by timestep.
        further_inputs: grids of the input for the second set of weights and those after it; empty if they share one.
    """

    weight: FloatFormat | None = None
    input: Grid | None = None
    hub: int = 1
    further_inputs: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        if self.hub < 1 or len(self.further_inputs) not in (0, self.hub - 1):
            raise ValueError(f"{len(self.further_inputs)} further inputs do not fit {self.hub} sets of weights")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; floats are exact in float32 and survive the trip."""
        return {
            "weight": None if self.weight is None else self.weight.name,
            "input": None if self.input is None else _grid_to_json(self.input),
            "hub": self.hub,
            "further_inputs": [_grid_to_json(grid) for grid in self.further_inputs],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LayerParameters":
        """Undo `to_json`.

        Raises:
            UsageError: a format is unknown.
            KeyError, TypeError: a field is missing or of the wrong kind.
        """
        weight, grid = data["weight"], data["input"]
        return cls(
            weight=None if weight is None else FloatFormat.parse(weight),
            input=None if grid is None else _grid_from_json(grid),
            hub=int(data.get("hub", 1)),
            further_inputs=tuple(_grid_from_json(further) for further in data.get("further_inputs", ())),
        )

    def input_of(self, member: int) -> Grid | None:
        """Return the grid of the input that goes with a set of weights."""
        return self.further_inputs[member - 1] if member and self.further_inputs else self.input


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    return {"format": grid.format.name, "scale": grid.scale, "zero_point": grid.zero_point}


def _grid_from_json(data: dict[str, Any]) -> Grid:
    return Grid(FloatFormat.parse(data["format"]), float(data["scale"]), float(data["zero_point"]))


class QuantizedLayer(Protocol):
    """What a kernel may ask of a layer."""

    parameters_of: LayerParameters
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, shape of the float layer's."""
        ...

    def member(self) -> int:
        """Which set of weights serves the timestep that the denoiser is at."""
        ...

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the float operation with the given weight and the layer's own bias."""
        ...


class _Quantized(nn.Module):
    """The part that both layers share; the float layer's class comes second in the bases."""

    parameters_of: LayerParameters
    kernel: str
    weight_shape: torch.Size
    route: Route[int] | None
    slot: int
    bias: Any  # nn.Parameter or None; torch types it differently in its two layers

    def _take_over(self, layer: nn.Linear | nn.Conv2d, parameters: LayerParameters) -> None:
        """Take the settings and bias of a float layer, and room for its codes (on its device, meta included)."""
        nn.Module.__init__(self)
        tensors = {"weight", "bias"} | set(layer.__dict__.keys() & nn.Module().__dict__.keys())
        self.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in tensors})
        self.parameters_of, self.kernel, self.weight_shape = parameters, "reference", layer.weight.shape
        self.training, self.route, self.slot = layer.training, None, 0
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
        if parameters.weight is None:
            self.register_parameter("weight", layer.weight)  # type: ignore[arg-type]
            return
        size = packed_size(layer.weight.numel(), parameters.weight.bits)
        device = layer.weight.device
        self.register_buffer("weight_codes", torch.empty(parameters.hub, size, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(layer.weight.shape[0], dtype=torch.float32, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ANN401 (torch's signature)
        """Move or convert the layer, but keep its scales in float32: float16 would turn small ones to 0."""
        scale = self._buffers.get("weight_scale")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None:
            moved = self.get_buffer("weight_scale")
            if moved.dtype != torch.float32:
                self._buffers["weight_scale"] = scale.to(moved.device)
        return self

    @property
    def weight(self) -> Tensor:
        """The weight in floating point; dequantized to float32 where it is held as codes.

        Raises:
            MsfpError: the layer has several sets of weights, and its denoiser is not running.
        """
        if "weight" in self._parameters:
            return self._parameters["weight"]  # type: ignore[return-value]
        if "weight_codes" not in self._buffers:
            raise AttributeError("weight")
        return dequantize(self.codes(self.member()), self.weight_grid())

    def member(self) -> int:
        """Return which set of weights serves the timestep that the denoiser is at."""
        return 0 if self.route is None else self.route.of(self.slot)

    def codes(self, member: int = 0) -> Tensor:
        """Return the codes of one set of weights, uint8, shape of the float weight."""
        fmt = self.parameters_of.weight
        assert fmt is not None, "this layer's weight is in floating point"
        return unpack(self.get_buffer("weight_codes")[member], fmt.bits, self.weight_shape)

    def weight_grid(self) -> Grid:
        """Return the weight's grid, one scale per output channel."""
        fmt = self.parameters_of.weight
        assert fmt is not None, "this layer's weight is in floating point"
        scale = self.get_buffer("weight_scale")
        return Grid(fmt, scale.view(-1, *[1] * (len(self.weight_shape) - 1)))

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
        fmt = self.parameters_of.weight
        assert fmt is not None, "this layer's weight is in floating point"
        self.get_buffer("weight_scale").copy_(scale)
        self.get_buffer("weight_codes")[member].copy_(pack(quantize(steps, Grid(fmt, 1.0)), fmt.bits))

    def forward(self, x: Tensor) -> Tensor:
        """Round the input, run the layer; the kernel decides how."""
        return KERNELS[self.kernel](self, x)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Name the formats beside torch's own description."""
        grid = self.parameters_of.input
        return f"{super().extra_repr()}, weight={self.parameters_of.weight}, input={grid and grid.format}"


class QuantLinear(_Quantized, nn.Linear):  # type: ignore[misc, override]  # weight is a property here
    """A Linear layer with quantized weight and input: ``(..., in_features) -> (..., out_features)``."""

    def __init__(self, layer: nn.Linear, parameters: LayerParameters) -> None:
        """Take the place of `layer`; call `store_` or load a state dict to give it codes."""
        self._take_over(layer, parameters)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply by `weight` and add the bias."""
        return nn.functional.linear(x, weight, self.bias)


class QuantConv2d(_Quantized, nn.Conv2d):  # type: ignore[misc, override]  # weight is a property here
    """A Conv2d layer with quantized weight and input: ``(batch, in_channels, height, width)`` to the layer's output."""

    def __init__(self, layer: nn.Conv2d, parameters: LayerParameters) -> None:
        """Take the place of `layer`; call `store_` or load a state dict to give it codes."""
        self._take_over(layer, parameters)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with `weight` and add the bias; the input is padded here, after it was rounded."""
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y
