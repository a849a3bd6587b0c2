"""The files that a component of a pipeline is loaded from, and its tensors without reading them."""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from msfp_cli.errors import ModelError
from msfp_cli.files.documents import open_tensors

_REDO = "download the model again"
# Weights in any format; what else lies in the folder of a component is a config or a vocabulary.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|onnx|gguf)(\.index.*\.json)?")
# What diffusers and transformers load; people keep others beside it, of averaged weights say.
_STEM = "(diffusion_pytorch_model|model)"
_SHARD = r"(-\d{5}-of-\d{5})?"
Model: TypeAlias = Any  # of diffusers, which is untyped


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: its type as the file has it, its elements, and its bytes.

    Arguments:
        name: of the tensor in the model.
        key: its name in the file, where a file of an earlier version of diffusers has another one.
    """

    file: Path
    name: str
    key: str
    dtype: str
    count: int
    size: int


def weight_files(directory: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files that a component is loaded from, the first shard first.

    Arguments:
        variant: of the files, such as ``fp16``; a component without it has the files of no variant.

    Raises:
        ModelError: there are none.
    """
    every = sorted(directory.glob("*.safetensors"))
    for infix in ([f"\\.{re.escape(variant)}"] if variant else []) + [""]:
        pattern = re.compile(rf"{_STEM}{infix}{_SHARD}\.safetensors")
        files = [path for path in every if pattern.fullmatch(path.name)]
        shards = [path for path in files if "-of-" in path.name]
        if files:
            return shards or files  # some models have both, of the same tensors
    if advice := variant_advice(directory, variant):
        raise ModelError(f"{directory} {advice}")
    raise ModelError(
        f"{directory} has no safetensors files; msfp reads no pickled ones, so load the model once "
        "and write it with `save_pretrained`"
    )


def variant_advice(directory: Path, variant: str | None) -> str | None:
    """Say which variants a component has, if it has weights of no other kind.

    Arguments:
        variant: that was asked for.
    """
    variants = _variants_of(directory)
    if not variants:
        return None
    missing = "" if variant is None else f"none of the variant {variant!r}, and "
    words = "a variant" if len(variants) == 1 else "variants"
    return f"has {missing}weight files of {words} only; give --variant {' or '.join(variants)}"


def _variants_of(directory: Path) -> list[str]:
    """Return the variants whose safetensors files a component has, such as ``fp16``."""
    pattern = re.compile(rf"{_STEM}{_SHARD}\.([^.]+?){_SHARD}\.safetensors")
    found = [pattern.fullmatch(path.name) for path in directory.glob("*.safetensors")]
    return sorted({match[3] for match in found if match})


def component_files(directory: Path, variant: str | None) -> list[Path]:
    """Return what `weight_files` does, and nothing for a component without weights.

    Raises:
        ModelError: it has weights, but not in safetensors files.
    """
    if not any(_WEIGHTS.fullmatch(path.name) for path in directory.iterdir()):
        return []  # a scheduler or a tokenizer
    return weight_files(directory, variant)


def stored_tensors(files: list[Path]) -> Iterator[StoredTensor]:
    """Yield what the files hold, by reading their headers.

    Raises:
        CheckpointError: a file is damaged.
    """
    for path in files:
        with open_tensors(path, redo=_REDO) as file:
            for name in file.keys():
                part = file.get_slice(name)
                count = math.prod(part.get_shape())
                bits = re.search(r"\d+", part.get_dtype())  # BF16, F8_E4M3, BOOL ...
                size = count * (int(bits[0]) if bits else 8) // 8
                yield StoredTensor(
                    file=path, name=name, key=name, dtype=part.get_dtype(), count=count, size=size
                )


def with_present_names(model: Model, tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """Name tensors as the model does, which earlier versions of diffusers did differently.

    The model does it itself, as when it is loaded: `query` becomes `to_q`, `proj_attn` `to_out.0`.

    Arguments:
        model: of diffusers; others have one name for each tensor.
    """
    by_name = {stored.name: stored for stored in tensors}
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(by_name)
    return [replace(stored, name=name) for name, stored in by_name.items()]


def copy_component(directory: Path, target: Path, variant: str | None) -> None:
    """Copy a component that stays as it is; files of a variant get the names without it."""
    target.mkdir(parents=True)
    for path in directory.iterdir():
        if path.is_file() and not _WEIGHTS.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)
    names = {path.name: _plain(path.name, variant) for path in component_files(directory, variant)}
    for name, plain in names.items():
        shutil.copyfile(directory / name, target / plain)
    for path in directory.glob("*.index*.json"):
        index = json.loads(path.read_text("utf-8"))
        places = index.get("weight_map", {})
        if set(places.values()) == names.keys():
            index["weight_map"] = {tensor: names[file] for tensor, file in places.items()}
            plain = _plain(path.name, variant)
            (target / plain).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _plain(name: str, variant: str | None) -> str:
    """Return the name of a file without its variant."""
    return name if variant is None else name.replace(f".{variant}", "", 1)
