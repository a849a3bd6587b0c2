"""A quantized layer's weight as other libraries see it: a tensor that is computed when it is used.

PEFT, diffusers' loaders of LoRAs and some models read ``layer.weight``, mostly for its shape, its
type or its device. A `PackedWeight` has these without a computation, and in the type of the model.
Whatever else an operator wants of it, the weight is dequantized for that. It has no memory of its
own, so a change of it would be lost; it refuses one.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from msfp_cli.errors import UsageError

T = TypeVar("T")
_ATEN = torch.ops.aten


class PackedWeight(Tensor):
    """A weight without elements.

    Arguments:
        read: returns the elements, of this shape and type.
        shape, dtype, device: what is known without them.
    """

    read: Callable[[], Tensor]
    _is_hf_initialized = True  # transformers initializes tensors that do not say so

    def __new__(
        cls,
        read: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "PackedWeight":
        """Make a tensor that has no storage."""
        weight: PackedWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device
        )
        weight.read = read
        return weight

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents
        """Name what is known."""
        return f"PackedWeight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., T],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> T:
        """Refuse that ``weight.data`` is set; all else is seen by `__torch_dispatch__`."""
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise _refusal()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is not annotated as it is called
        cls,
        func: Any,  # noqa: ANN401 (an operator of torch)
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operator on the elements."""
        if func is _ATEN.detach.default:
            weight = args[0]
            return cls(weight.read, weight.shape, weight.dtype, weight.device)
        written = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(isinstance(value, cls) for value in written):
            raise _refusal()
        return func(*tree_map(_elements, args), **tree_map(_elements, kwargs or {}))


class WeightyState(OrderedDict[str, Tensor]):
    """A state of tensors that answers for weights of layers, too, which hold codes in their place.

    They are not among its keys and are not saved. diffusers' loader of Flux LoRAs asks for them.

    Arguments:
        state: what the module holds.
        module: whose layers' weights are asked for. None in what ``copy``, ``|`` and torch's
            tracer make of a state: they call its type as that of a plain dictionary.
    """

    def __init__(
        self, state: Mapping[str, Tensor] | None = None, module: nn.Module | None = None
    ) -> None:
        super().__init__(state or {})
        self._metadata = getattr(state, "_metadata", None)
        self._module = module

    def __missing__(self, name: str) -> Tensor:
        layer, _, parameter = name.rpartition(".")
        scales = (f"{layer}.weight_scale", f"{layer}.base_layer.weight_scale")  # PEFT wraps layers
        has_codes = parameter == "weight" and any(scale in self for scale in scales)
        if self._module is None or not has_codes:
            raise KeyError(name)
        weight = self._module.get_submodule(layer).weight
        assert isinstance(weight, Tensor), "it has a scale"
        return weight

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy needs: the tensors."""
        return OrderedDict, (list(self.items()),)


def answer_for_weights(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object
) -> WeightyState | None:
    """Return the state of a whole model as a `WeightyState`; a hook of torch's ``state_dict``."""
    return None if prefix else WeightyState(state, module)


def refuse_part(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse to give the state of a part of a denoiser alone; a hook of torch's ``state_dict``.

    Whoever asks for it wants float weights for another model: ``ControlNetModel.from_unet`` does,
    and ``UNetMotionModel.from_unet2d``.

    Raises:
        UsageError: the part has codes.
    """
    has_codes = any("weight_scale" in each._buffers for each in module.modules())
    if not prefix and has_codes:
        raise UsageError(
            f"this {type(module).__name__} is a part of a quantized denoiser and has no float "
            "weights; make the new model (from_unet, from_unet2d) of the full-precision pipeline, "
            "and use it beside the quantized one"
        )


def _elements(value: Any) -> Any:  # noqa: ANN401 (an argument of an operator)
    return value.read() if isinstance(value, PackedWeight) else value


def _refusal() -> UsageError:
    return UsageError(
        "a quantized weight cannot be changed in place; keep a LoRA as an adapter, or fuse it into "
        "the full-precision pipeline and run `msfp calibrate` on that; new tokens (textual "
        "inversion) need the text encoder in full precision"
    )
