"""What a denoiser is called with: a tree of arguments as JSON, and its tensors by name.

An engine has a list of tensors for inputs. Everything else in a call (None, numbers, texts) becomes
part of what is traced, so two calls with different trees need two conversions. Shapes are not part
of a tree. The timestep is always a tensor, so that one conversion serves all of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from msfp_cli.errors import UsageError
from msfp_cli.files.documents import Json

Value: TypeAlias = Any  # an argument of a denoiser
_PLAIN = (bool, int, float, str, type(None))


class Call(NamedTuple):
    """A call of a denoiser.

    Arguments:
        tree: the arguments; ``{"tensor": name, "type": ..., "dims": ...}`` stands for a tensor.
        tensors: by name, in the order of the tree; floating point is float32.
    """

    tree: dict[str, Json]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], time: str = "timestep") -> "Call":
        """Describe a call by its arguments.

        Arguments:
            time: the argument that says what time it is.

        Raises:
            UsageError: an argument is neither a tensor nor a plain value.
        """
        tensors = dict[str, Tensor]()
        given = dict(arguments)
        given[time] = torch.as_tensor(given[time]).float()
        tree = {name: _describe(value, name, tensors) for name, value in given.items()}
        return cls(tree, tensors)

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments with other tensors in the place of the call's own."""
        return {name: _rebuild(value, tensors) for name, value in self.tree.items()}


def _describe(value: Value, name: str, tensors_: dict[str, Tensor]) -> Json:
    """Describe one argument, and take its tensors."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        tensors_[name] = tensor.float() if tensor.is_floating_point() else tensor
        tensor = tensors_[name]
        return {"tensor": name, "type": str(tensor.dtype), "dims": tensor.ndim}
    if isinstance(value, dict):
        return {"dict": {key: _describe(v, f"{name}.{key}", tensors_) for key, v in value.items()}}
    if isinstance(value, list | tuple):
        return [_describe(item, f"{name}.{i}", tensors_) for i, item in enumerate(value)]
    if isinstance(value, _PLAIN):
        return value
    raise UsageError(
        f"the argument {name!r} of the denoiser is a {type(value).__name__}, which kernel "
        "'openvino' cannot take; choose another kernel"
    )


def _rebuild(value: Json, tensors: Mapping[str, Tensor]) -> Value:
    """Undo `_describe`."""
    if isinstance(value, list):
        return [_rebuild(item, tensors) for item in value]
    if isinstance(value, dict):
        if "dict" in value:
            return {key: _rebuild(item, tensors) for key, item in value["dict"].items()}
        return tensors[value["tensor"]]
    return value
