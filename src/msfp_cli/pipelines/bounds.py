"""What the files of a pipeline may ask for: what cannot be met is refused before anybody tries.

A text encoder of a thousand million layers is built until somebody ends the process, and a prompt
is padded to whatever length the tokenizer names. Where a file lacks a tensor, diffusers leaves the
parameter without values, and transformers draws random ones.
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from msfp_cli.errors import ModelError
from msfp_cli.files.documents import Json, require_file

_ALWAYS_MET = 10**8  # ids, seeds and frequencies may be larger than a tiny model's files
_REDO = "download it again, or export it again with --overwrite"


def _made_by(pipeline: str) -> Collection[str]:
    """Return the parts that a pipeline makes itself, and that diffusers neither saves nor loads."""
    import diffusers

    cls: Any = getattr(diffusers, pipeline, None)
    names: Callable[[type], Any] | None = getattr(cls, "_get_signature_keys", None)
    settings: Collection[str] = () if names is None else names(cls)[1]
    return settings


def refuse_missing_parts(directory: Path) -> None:
    """Refuse a pipeline without the folder of a component that its index names.

    Whoever looks for files in a folder that may not be read finds none, and says that.

    Raises:
        ModelError: one is missing, or may not be read; the message names it.
    """
    try:
        index = json.loads((directory / "model_index.json").read_bytes())
        # Lists of numbers are settings, as Krea 2 has one.
        lists = {name: entry for name, entry in index.items() if isinstance(entry, list)}
        parts = {name: entry[0] for name, entry in lists.items() if isinstance(entry[0], str)}
    except (OSError, ValueError, AttributeError, IndexError, RecursionError):
        return  # whoever loads it says what is wrong
    settings = _made_by(str(index.get("_class_name")))
    for name in parts:
        if name not in settings and not (directory / name).is_dir():
            raise ModelError(f"{directory} lacks the folder of its {name}; {_REDO}")
        if (directory / name).is_dir() and not os.access(directory / name, os.R_OK | os.X_OK):
            raise ModelError(f"{directory / name} may not be read; check your rights to it")


@contextlib.contextmanager
def no_random_tensors() -> Iterator[None]:
    """While the context is open, refuse models of transformers that are loaded and lack a tensor.

    transformers says it in its log only. As it replaces a method, one thread at a time may open it.

    Raises:
        ModelError: in the context; the message names the tensor.
    """
    from transformers import PreTrainedModel

    stock = PreTrainedModel.__dict__["from_pretrained"]

    def load(cls: type, /, *args: object, **options: object) -> object:
        model, report = stock.__func__(cls, *args, **{**options, "output_loading_info": True})
        refuse_random_tensors(str(args[0]), report)
        return (model, report) if options.get("output_loading_info") else model

    PreTrainedModel.from_pretrained = classmethod(load)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = stock


def refuse_random_tensors(place: str, report: Mapping[str, Collection[str]]) -> None:
    """Refuse a model for which transformers drew the numbers of a tensor.

    Arguments:
        place: where it was loaded from.
        report: what transformers says of the loading.

    Raises:
        ModelError: the files lack a tensor; the message names it.
    """
    for name in sorted(report["missing_keys"])[:1]:
        _refuse_lacking(place, name)


def refuse_empty_tensors(model: str, components: Mapping[str, Any]) -> None:
    """Refuse a pipeline with a tensor that diffusers left without values.

    Raises:
        ModelError: the files lack a tensor; the message names it.
    """
    for component, module in components.items():
        state = module.state_dict() if hasattr(module, "state_dict") else {}
        for name, tensor in state.items():
            if getattr(tensor, "is_meta", False):
                _refuse_lacking(f"{model}/{component}", name)


def _refuse_lacking(place: str, name: str) -> None:
    raise ModelError(f"the files of {place} lack the tensor {name}; {_REDO}")


def refuse_endless_sizes(directory: Path) -> None:
    """Refuse a component whose config has a whole number that no model of its size can have.

    A model has at least a byte for each layer, channel, head or token.

    Raises:
        ModelError: a number is larger than the component's files have bytes.
        CheckpointError: a config is something else than a file.
    """
    for path in sorted(directory.glob("*/config.json")):
        require_file(path, redo=_REDO)
        size = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
        try:
            numbers = list(_numbers(json.loads(path.read_bytes())))
        except (ValueError, RecursionError):
            continue  # whoever loads it says what is wrong
        for key, number in numbers:
            if number > max(size, _ALWAYS_MET):
                raise ModelError(
                    f"{path} asks for {key} = {number}, more than its files have bytes; {_REDO}"
                )


def _numbers(value: Json, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in a tree, each with the innermost key that leads to it."""
    if isinstance(value, int):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)


def refuse_endless_prompts(components: Json) -> None:
    """Refuse a tokenizer whose limit is no number of tokens, or more than its encoder can take.

    Raises:
        ModelError: its ``model_max_length`` is not a whole number of at least 1, or it belongs to a
            CLIP text encoder and is larger than that has positions.
    """
    for name, tokenizer in components.items():
        length = getattr(tokenizer, "model_max_length", None) if "tokenizer" in name else None
        if length is None:
            continue
        if type(length) is not int or length < 1:
            raise ModelError(
                f"the {name} cuts prompts to {length!r} tokens, which is not a whole number of at "
                "least 1; set model_max_length in its tokenizer_config.json"
            )
        limit = _positions(components.get(name.replace("tokenizer", "text_encoder")))
        if limit is not None and length > limit:
            raise ModelError(
                f"the {name} pads prompts to {length} tokens, but its text "
                f"encoder takes {limit}; set model_max_length in its tokenizer_config.json"
            )


def _positions(encoder: Json) -> int | None:
    """Return how many tokens a CLIP text encoder takes, None for other parts."""
    config = getattr(encoder, "config", None)
    is_clip = getattr(config, "model_type", "") == "clip_text_model"
    return config.max_position_embeddings if is_clip else None  # type: ignore[union-attr]
