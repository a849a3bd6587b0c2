"""Leave the weights of a pipeline in its files, so that a model larger than memory can be called.

The pipeline is loaded by stock ``from_pretrained`` in the types that its files have: then its
tensors are mapped, and take no memory before they are used. After that the weights of its layers
are read when the layers run (`layers.streamed`), and whatever else there is gets the type and the
device to compute on.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msfp_cli.files.documents import read_json
from msfp_cli.files.weight_files import (
    StoredTensor,
    stored_tensors,
    weight_files,
    with_present_names,
)
from msfp_cli.layers.quantized import KINDS
from msfp_cli.layers.replace import find_layers
from msfp_cli.layers.streamed import stream_

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A subclass may hand its weight to somebody else without running, as in nn.MultiheadAttention.
_PLAIN = [kind.float_class for kind in KINDS.values()]
_Files = dict[str, StoredTensor]


def component_files(directory: Path, variant: str | None) -> dict[str, _Files]:
    """Return the tensors of each component of a pipeline that has any, by their names.

    Raises:
        ModelError: a component has other files than safetensors.
    """
    index = read_json(directory / "model_index.json", dict, redo="download the model again")
    parts = [name for name, entry in sorted(index.items()) if isinstance(entry, list) and entry[0]]
    places = [directory / name for name in parts if (directory / name / "config.json").exists()]
    files = {place.name: stored_tensors(weight_files(place, variant)) for place in places}
    return {name: {each.name: each for each in tensors} for name, tensors in files.items()}


def stored_types(files: Mapping[str, _Files]) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the components whose files are in floating point, each with the most frequent type."""
    for component, tensors in files.items():
        sizes = Counter[str]()
        for each in tensors.values():
            sizes[each.dtype] += each.size
        ((most, _),) = sizes.most_common(1)
        if most in _TYPES:
            yield component, _TYPES[most]


def stream_components_(
    components: Mapping[str, Any],
    files: Mapping[str, _Files],
    dtype: torch.dtype,
    device: str,
) -> None:
    """Leave the weights of components in their files, and convert the rest.

    Arguments:
        components: of a pipeline that was loaded in `stored_types`.
        dtype, device: to compute in and on.
    """
    types = dict(stored_types(files))
    for component, module in components.items():
        if isinstance(module, nn.Module) and component in types:
            named = {
                each.name: each for each in with_present_names(module, files[component].values())
            }
            _stream_(module, named, types[component], dtype, device)


def _names_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the names of parts that stock loading in `dtype` leaves in float32.

    Models of transformers have two lists, one for float16 alone and one for bfloat16, too.
    """
    from transformers import PreTrainedModel

    names = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if not isinstance(module, PreTrainedModel):
        return names
    strict = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    return names | strict if dtype == torch.float16 else strict


def _stream_(
    module: nn.Module, files: _Files, stored: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    exact = _names_in_float32(module, dtype)

    def target(name: str, own: torch.dtype) -> torch.dtype:
        """Return the type of a tensor that stock loading in `dtype` would give."""
        if stored == dtype or not own.is_floating_point:
            return own
        return torch.float32 if exact & set(name.split(".")) else dtype

    for layer_name, layer in find_layers(module).items():
        name = f"{layer_name}.weight"
        if type(layer) in _PLAIN and name in files:
            kind = target(name, layer.weight.dtype)
            stored_weight = files[name]
            place = torch.empty((), dtype=kind, device=device)
            stream_(layer, stored_weight.file, stored_weight.key, place)
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(target(name, tensor.dtype))
