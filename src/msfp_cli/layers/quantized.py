"""Layers that hold 4-bit codes and round their input, and tables that hold codes.

All subclass torch's own layers, so libraries that ask ``isinstance(layer, nn.Linear)`` (PEFT among
them) see what they expect; ``layer.weight`` is dequantized when it is used (see `weight`). The
state is two buffers,
``weight_codes`` (packed, one row per member of the layer's hub) and ``weight_scale`` (float32, one
per output channel, or per row of a table), beside the float bias. What is one number per layer
(formats, the input's scale and zero point) is not a tensor: it is a `LayerScheme`, a plain value
that the checkpoint stores as JSON. A layer whose hub has several members, or whose input is lifted
at some timesteps, reads from its route which variant runs at the timestep that the denoiser is at.

A kind of layer is one row of `KINDS`: the class of the float layer, that of the quantized one, and
what both compute. A layer of torch whose class has no row is left alone, and a kernel runs only the
kinds that it names. So a new kind is a class and a row, and at first only `simulated` runs it.

A layer has a kernel, which runs it, or none yet. Without one it has its codes, and chooses a kernel
when it first runs, for the device it is on then. A kernel may hold the weight in a form of its own,
and then the layer drops its codes. They come back (`Quantized.restore_`) whenever something changes
them or the layer moves to another device, and are made from the kernel's weight to be saved or
copied. What a kernel computed from codes and scales it computes again if these are other tensors
than before, or were written to; from then on the codes stay packed, as offloaders do this at each
call. A kernel is also made again if the settings of a convolution are others than before (to make
pictures that can be tiled, people set ``padding_mode``). A bias is read at each call.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from msfp_cli.layers.base import Kernel
from msfp_cli.layers.kernels.geometry import Geometry, Settings, settings_of
from msfp_cli.layers.kernels.lookup import look_up
from msfp_cli.layers.kernels.registry import AUTO, MEASURED, choose_kernel
from msfp_cli.layers.kernels.simulated import simulate, with_gradients
from msfp_cli.layers.packed import PackedLayer, Source
from msfp_cli.layers.routing import Route
from msfp_cli.layers.scheme import LayerScheme

# A layer of torch that has a weight, of a class that has a row in `KINDS`.
FloatLayer: TypeAlias = Any
Self = TypeVar("Self", bound="Quantized")
# Held while a layer chooses a kernel: threads may share a denoiser whose layers have not run yet.
_CHOOSING = threading.RLock()
# Where torch keeps a module's hooks.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class KernelChoice(NamedTuple):
    """Which kernel a layer asks for, see `Quantized.prepare_`."""

    name: str = AUTO
    keep_packed: bool = False


class Quantized(PackedLayer):
    """What all kinds share; the float layer's class comes second in the bases.

    Arguments:
        layer: the float layer whose place this takes, with its settings and its bias.
        scheme: formats and grids. A quantized weight is empty until `store_` or a state dict fills
            it, on the device of `layer`, meta included.
    """

    route: Route[int | Tensor] | None

    def __new__(cls: type[Self], *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 (torch's signature)
        """Make a quantized layer of a float one; of torch's own arguments, a float layer.

        PEFT makes the two convolutions of a LoRA with ``type(layer)(in_channels, rank, ...)``.
        """
        if args and not isinstance(args[0], nn.Module):
            twin: Self = KINDS[cls.kind].float_class(*args, **kwargs)  # type: ignore[assignment]
            return twin
        return super().__new__(cls)

    def __init__(self, layer: FloatLayer, scheme: LayerScheme) -> None:
        self._copy_settings(layer)
        self.scheme = scheme
        self.weight_shape = layer.weight.shape
        self.weight_dtype = layer.weight.dtype
        self.route = None
        self.slot = 0  # the layer's place in the choices of its route
        self.kernel = None
        self._kernel_source: Source | None = None  # of a kernel that `prepare_` made
        self._kernel_settings: Settings | None = None  # likewise
        self.kernel_choice = KernelChoice()
        self.register_parameter("bias", getattr(layer, "bias", None))
        _make_code_books(scheme)
        if scheme.weight is None:
            self.register_parameter("weight", layer.weight)
        else:
            self._make_room(scheme.hub, scheme.weight.bits, layer.weight.device)

    def _copy_settings(self, layer: FloatLayer) -> None:
        """Become an empty module with the float layer's attributes, but not its tensors."""
        nn.Module.__init__(self)
        not_settings = {"weight", "bias", "forward"} | self.__dict__.keys()
        for name, value in layer.__dict__.items():
            if name not in not_settings:
                self.__dict__[name] = value
        self.training = layer.training
        for name in _HOOKS:  # the very dictionaries, so that their handles still remove them
            self.__dict__[name] = layer.__dict__[name]

    # the kernel

    def prepare_(self, kernel: str = AUTO, *, keep_packed: bool = False) -> str:
        """Choose the kernel that runs this layer where it is now, and prepare it.

        Arguments:
            kernel: a name in `registry.KERNELS`, or ``auto``.
            keep_packed: keep the weight in 4 bits in memory, too, and unpack it at every call.

        Returns:
            Why kernels before it refused; empty if the first one took the layer.

        Raises:
            UsageError: there is no such kernel.
        """
        with _CHOOSING:
            kernel_class, reason = choose_kernel(self, kernel)
            asked = KernelChoice(kernel, keep_packed)
            if kernel_class.name == MEASURED and self._has_measured_for(asked):
                return reason
            self.restore_()
            self.kernel_choice = asked
            self.take_kernel_(kernel_class(self, keep_packed=keep_packed))
        return reason

    def take_kernel_(self, kernel: Kernel) -> None:
        """Run with a kernel that was made from this layer, until the layer is changed."""
        with _CHOOSING:
            self.kernel = kernel
            if kernel.holds_weight:
                del self._buffers["weight_codes"]
            self._kernel_settings = self.settings()
            self._kernel_source = self.source()

    def _choose_kernel(self) -> None:
        """Choose a kernel at the first call, and again if the layer was changed since.

        Compiled calls take the layer as it is.
        """
        if torch.compiler.is_compiling() or self._has_kernel():
            return
        with _CHOOSING:
            if not self._has_kernel():  # no other thread has chosen meanwhile
                name, keep_packed = self.kernel_choice
                is_new = self.kernel is None or self._kernel_source == self.source()
                self.prepare_(name, keep_packed=keep_packed or not is_new)

    def _has_measured_for(self, choice: KernelChoice) -> bool:
        """Whether the layer has a kernel that won when it ran, and nothing has changed since."""
        won = self.kernel is not None and self.kernel.seconds
        return bool(won) and self.kernel_choice == choice and self._has_kernel()

    def _has_kernel(self) -> bool:
        """Whether there is a kernel, made from the layer as it is now."""
        if self.kernel is None or self._kernel_settings != self.settings():
            return False
        return self._kernel_source in (None, self.source())

    def forward(self, input: Tensor) -> Tensor:
        """Transform the input where the scheme says so, round it, run the layer."""
        self._choose_kernel()
        return self.scheme.transform.around(self._run, input, self.bias)

    def _run(self, x: Tensor) -> Tensor:
        """Run the layer on a transformed input; the kernel decides how."""
        kernel = self.kernel
        if kernel is None:
            return simulate(self, x)
        y = kernel(self, x)
        if torch.is_grad_enabled() and not y.requires_grad:
            return with_gradients(self, y, x)
        return y

    def variant(self) -> int | Tensor:
        """Return which variant runs at this timestep; a tensor while the call is compiled."""
        return 0 if self.route is None else self.route.of(self.slot)

    def member(self, otherwise: int | None = None) -> int | Tensor:
        """Return which member serves the current timestep; a tensor while the call is compiled.

        Arguments:
            otherwise: the answer if the denoiser is not running, which is an error without it.
        """
        if self.scheme.hub == 1:
            return 0
        if otherwise is not None and (self.route is None or not self.route.is_open()):
            return otherwise
        return self.variant() % self.scheme.hub

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the float operation with the given weight and the `kernel_bias`."""
        return KINDS[self.kind].apply(self, x, weight, self.kernel_bias)

    def geometry(self) -> Geometry | None:
        """Return how a convolution slides; None if the layer is not one."""
        geometry_of = KINDS[self.kind].geometry
        return None if geometry_of is None else geometry_of(self)

    def settings(self) -> Settings | None:
        """Return what `geometry` depends on, which others may set; None if there is no geometry."""
        return None if KINDS[self.kind].geometry is None else settings_of(self)

    # moved, saved, loaded, copied

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:  # noqa: ANN401 (torch's signature)
        """Move or convert the layer, but not its scales: float16 would turn small ones to 0."""
        scale = self._buffers.get("weight_scale")
        if scale is not None:
            like = fn(torch.empty(0, dtype=self.weight_dtype, device=scale.device))
            self.weight_dtype = like.dtype
            if like.device != scale.device:
                self.restore_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None:
            moved = self.get_buffer("weight_scale")
            if moved.dtype != torch.float32:
                self._buffers["weight_scale"] = scale.to(moved.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._weight_holder is not None:
            destination[f"{prefix}weight_codes"] = self.packed_codes()

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401 (torch's signature)
        self.restore_()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: codes, because a kernel's weight cannot be copied."""
        state = self.__dict__.copy()
        if self._weight_holder is not None:
            state["_buffers"] = {**self._buffers, "weight_codes": _lent(self.packed_codes())}
        return {**state, "kernel": None}

    def extra_repr(self) -> str:
        """Name the formats beside torch's own description."""
        grid = self.scheme.input
        formats = f"weight={self.scheme.weight}, input={grid and grid.format}"
        transform = (f"{name}={value}" for name, value in self.scheme.transform.to_json().items())
        return ", ".join([super().extra_repr(), formats, *transform])


def _lent(tensor: Tensor) -> Tensor:
    """Let a tensor live as long as a process that is being started with it, if one is.

    torch tells such a process the number of an open file, which is closed with the tensor.
    """
    process = get_spawning_popen()
    if process is not None:
        vars(process).setdefault("msfp_tensors", []).append(tensor)
    return tensor


def _make_code_books(scheme: LayerScheme) -> None:
    """Make the code books before they are needed.

    Before Python 3.12 a cached property is made under a lock, at which torch.compile stops.
    """
    if scheme.weight is not None:
        _ = scheme.weight.code_book
    for grid in scheme.inputs():
        if grid is not None:
            _ = grid.format.code_book


def _spread_over(layer: FloatLayer, x: Tensor, output: Tensor) -> int:
    """Return the multiply-adds of a transposed convolution: its inputs, each times a window."""
    return x.numel() * int(layer.weight[0].numel())


def _sum_up(layer: FloatLayer, x: Tensor, output: Tensor) -> int:
    """Return the multiply-adds of other layers: their outputs, each a sum over a window."""
    return output.numel() * int(layer.weight[0].numel())


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One kind of layer: a row of `KINDS`.

    Arguments:
        float_class: the layer of torch.
        quantized_class: what takes its place.
        apply: ``(layer, x, weight, bias)`` to the output, with the settings of a float or quantized
            layer of this kind.
        geometry: how such a layer slides, None if it does not, or if no kernel but `simulated` runs
            it.
        multiply_adds: ``(layer, x, output)`` to those of a run.
        is_table: whether rows are looked up: one scale per row, no input to round.
        transforms_inputs: whether the last dimension of an input has its channels, so that it can
            be transformed before it is rounded.
    """

    float_class: type[nn.Module]
    quantized_class: type[Quantized]
    apply: Callable[[FloatLayer, Tensor, Tensor, Tensor | None], Tensor]
    geometry: Callable[[FloatLayer], Geometry] | None = None
    multiply_adds: Callable[[FloatLayer, Tensor, Tensor], int] = _sum_up
    is_table: bool = False
    transforms_inputs: bool = False

    @property
    def name(self) -> str:
        """What calibrations and kernels call it."""
        return self.quantized_class.kind

    def matches(self, module: nn.Module) -> bool:
        """Whether a module computes what this kind does.

        A subclass counts only if it runs torch's own forward: one that does something else would
        silently lose it. A table that changes its rows as they are looked up (``max_norm``) does
        not count.
        """
        is_plain = type(module).forward is self.float_class.forward
        changes_rows = getattr(module, "max_norm", None) is not None
        return isinstance(module, self.float_class) and is_plain and not changes_rows


class QuantLinear(Quantized, nn.Linear):  # type: ignore[misc, override]  # weight is a property
    """A quantized Linear layer: ``(..., in_features)`` to ``(..., out_features)``."""

    kind: ClassVar[str] = "linear"


class QuantConv2d(Quantized, nn.Conv2d):  # type: ignore[misc, override]  # weight is a property
    """A quantized Conv2d layer: ``(batch, in_channels, height, width)`` to the output of Conv2d."""

    kind: ClassVar[str] = "conv2d"


class QuantEmbedding(Quantized, nn.Embedding):  # type: ignore[misc, override]  # weight is a property
    """A quantized table: indices ``(...)`` to ``(..., embedding_dim)``, in the model's type."""

    kind: ClassVar[str] = "embedding"

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up."""
        self._choose_kernel()
        return look_up(self, input)


def _class_of(float_class: type[nn.Module], kind: str) -> type[Quantized]:
    """Make the quantized twin of a class of torch; it needs a name in this module to be pickled."""
    name = f"Quant{float_class.__name__}"
    body = {"kind": kind, "__module__": __name__, "__doc__": f"A quantized {float_class.__name__}."}
    return type(name, (Quantized, float_class), body)


# Of sound and videos, and transposed ones, whose scales are one per input channel.
QuantConv1d = _class_of(nn.Conv1d, "conv1d")
QuantConv3d = _class_of(nn.Conv3d, "conv3d")
QuantConvTranspose1d = _class_of(nn.ConvTranspose1d, "conv_transpose1d")
QuantConvTranspose2d = _class_of(nn.ConvTranspose2d, "conv_transpose2d")
QuantConvTranspose3d = _class_of(nn.ConvTranspose3d, "conv_transpose3d")


def _multiply(layer: FloatLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by the weight and add the bias."""
    return functional.linear(x, weight, bias)


def _convolve(layer: FloatLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with the weight and add the bias; the input is padded here, after it was rounded."""
    y: Tensor = layer._conv_forward(x, weight, bias)
    return y


def _convolve_transposed(
    layer: FloatLayer, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Spread each input over its window of the output, and add the bias."""
    names = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    operator = getattr(functional, names[weight.ndim - 3])
    steps = (layer.stride, layer.padding, layer.output_padding)
    y: Tensor = operator(x, weight, bias, *steps, layer.groups, layer.dilation)
    return y


def _look_up(layer: FloatLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Look rows of the weight up."""
    return functional.embedding(x, weight)


_ROWS = (
    LayerKind(
        float_class=nn.Linear,
        quantized_class=QuantLinear,
        apply=_multiply,
        transforms_inputs=True,
    ),
    LayerKind(float_class=nn.Conv1d, quantized_class=QuantConv1d, apply=_convolve),
    LayerKind(
        float_class=nn.Conv2d, quantized_class=QuantConv2d, apply=_convolve, geometry=Geometry.of
    ),
    LayerKind(float_class=nn.Conv3d, quantized_class=QuantConv3d, apply=_convolve),
    LayerKind(
        float_class=nn.ConvTranspose1d,
        quantized_class=QuantConvTranspose1d,
        apply=_convolve_transposed,
        multiply_adds=_spread_over,
    ),
    LayerKind(
        float_class=nn.ConvTranspose2d,
        quantized_class=QuantConvTranspose2d,
        apply=_convolve_transposed,
        multiply_adds=_spread_over,
    ),
    LayerKind(
        float_class=nn.ConvTranspose3d,
        quantized_class=QuantConvTranspose3d,
        apply=_convolve_transposed,
        multiply_adds=_spread_over,
    ),
    LayerKind(
        float_class=nn.Embedding,
        quantized_class=QuantEmbedding,
        apply=_look_up,
        multiply_adds=lambda layer, x, output: 0,
        is_table=True,
    ),
)
KINDS = {row.name: row for row in _ROWS}


def find_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of a float layer; None if the module is not one that can be quantized."""
    return next((kind for kind in KINDS.values() if kind.matches(module)), None)


def kind_of(layer: FloatLayer) -> LayerKind:
    """Return the kind of a float layer that has one, see `find_kind`."""
    kind = find_kind(layer)
    assert kind is not None, f"{type(layer).__name__} is not a kind of layer that can be quantized"
    return kind
