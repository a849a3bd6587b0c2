"""Denoiser calls as JSON and tensors: trees of arguments in which a tensor is named by its content.

Tensors that are equal have one name, and so are stored once.
"""

import hashlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msfp_cli.errors import ModelError
from msfp_cli.files.documents import Json
from msfp_cli.pipelines.denoiser import CACHES, DenoiserCall, is_cache

# How JSON tells a tensor, a dict and a tuple from plain values. Older files have lists for tuples,
# and texts for the numbers that are keys of a dict.
_TENSOR = "$tensor"
_DICT = "$dict"
_NUMBERED = "$numbered"  # pairs of key and item
_TUPLE = "$tuple"
_CACHE = "$cache"  # the class; the attributes are beside it


def content_hash(tensor: Tensor) -> str:
    """Name a tensor by its content, type and shape."""
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        # An expanded tensor of one element counts as contiguous, but has no stride to be viewed by.
        dense = tensor.clone(memory_format=torch.contiguous_format)
        sha.update(dense.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]


class _Encoder:
    """Turns trees of arguments into JSON, setting the tensors aside."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, where: str) -> Json:  # noqa: ANN401 (a tree of arguments)
        """Return a value as JSON, each tensor as the hash of its content.

        Arguments:
            where: what the value is, for the error.

        Raises:
            ModelError: the value, or one inside of it, cannot be stored.
        """
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            name = content_hash(tensor)
            self.tensors.setdefault(name, tensor.clone())
            return {_TENSOR: name}
        if isinstance(value, dict) and any(isinstance(key, int) for key in value):
            return {_NUMBERED: [[key, self.encode(item, where)] for key, item in value.items()]}
        if isinstance(value, dict):
            items = {str(key): self.encode(item, f"{where}.{key}") for key, item in value.items()}
            return {_DICT: items}
        if isinstance(value, list | tuple):
            listed = [self.encode(item, where) for item in value]
            return {_TUPLE: listed} if type(value) is tuple else listed
        if is_cache(value):
            name = f"{type(value).__module__}:{type(value).__qualname__}"
            return {_CACHE: name, **self.encode(vars(value), where)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ModelError(
            f"cannot record the denoiser's argument {where!r} of type {type(value).__name__}"
        )


def _decode(value: Json, tensor_of: Callable[[str], Tensor]) -> Any:  # noqa: ANN401 (a tree of arguments)
    """Undo `_Encoder.encode`."""
    if isinstance(value, dict) and _TENSOR in value:
        return tensor_of(value[_TENSOR])
    if isinstance(value, dict) and _NUMBERED in value:
        return {key: _decode(item, tensor_of) for key, item in value[_NUMBERED]}
    if isinstance(value, dict) and _TUPLE in value:
        return tuple(_decode(item, tensor_of) for item in value[_TUPLE])
    if isinstance(value, dict) and _CACHE in value:
        cache = _new_cache(value[_CACHE])
        vars(cache).update(decode_items(value[_DICT], tensor_of))
        return cache
    if isinstance(value, dict):
        return decode_items(value[_DICT], tensor_of)
    if isinstance(value, list):
        return [_decode(item, tensor_of) for item in value]
    return value


def _new_cache(name: str) -> Any:  # noqa: ANN401 (an object of diffusers)
    """Return an object without attributes of a class of diffusers' models.

    Raises:
        ModelError: there is no such class, or its objects are not caches.
    """
    module, _, qualified_name = str(name).partition(":")
    try:
        if not module.startswith(CACHES):
            raise ImportError("it is not a class of diffusers' models")
        cls = getattr(importlib.import_module(module), qualified_name)
        cache = cls.__new__(cls)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read a cache of class {name!r}: {error}") from None
    if not is_cache(cache):
        raise ModelError(f"cannot read a cache of class {name!r}: its objects hold no others")
    return cache


def decode_items(values: Json, tensor_of: Callable[[str], Tensor]) -> dict[str, Any]:
    """Return a dict of values, undoing `_Encoder.encode`."""
    return {key: _decode(item, tensor_of) for key, item in values.items()}


def encode_calls(calls: list[DenoiserCall]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return the calls as JSON values and their tensors by content, each once."""
    encoder = _Encoder()
    encoded = [
        {
            "component": call.component,
            "timestep": call.timestep,
            "time": call.time,
            "is_listed": call.is_listed,
            "arguments": encoder.encode(call.arguments, "arguments"),
            "output": encoder.encode(call.output, "output"),
        }
        for call in calls
    ]
    return encoded, encoder.tensors


def tensor_sizes(calls: list[DenoiserCall]) -> dict[str, int]:
    """Return the bytes that each tensor of these calls takes on disk, by its content."""
    return {name: tensor.nbytes for name, tensor in encode_calls(calls)[1].items()}
