"""What a pipeline is conditioned on: prompts, class labels, or nothing."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msfp_cli.errors import UsageError
from msfp_cli.files.documents import read_json
from msfp_cli.files.seal import REDO
from msfp_cli.pipelines.loading import ModelSource, Pipeline, default_prompts
from msfp_cli.progress import Progress

_MAX_PICTURES = 10_000  # of a contact sheet


def conditioning_of(pipe: Pipeline) -> str:
    """Say what a pipeline is conditioned on: ``prompt``, ``class_labels`` or ``none``."""
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" in parameters:
        return "prompt"
    return "class_labels" if "class_labels" in parameters and _num_classes(pipe) else "none"


def example_option(pipeline: str) -> str:
    """Return the option of `msfp sample` that a class of pipelines needs, with an example.

    Arguments:
        pipeline: name of the class; nothing is known of one that is not in diffusers.
    """
    parameters = _parameters_of(pipeline)
    if "prompt" in parameters:
        return " --prompt 'a red dress'"
    return " --prompt 1" if "class_labels" in parameters else ""


def refuse_missing_prompt(directory: Path, prompts: Sequence[str], num_images: int) -> None:
    """Refuse what `expand_conditions` will refuse, before a pipeline that takes prompts is loaded.

    Arguments:
        directory: the pipeline.

    Raises:
        UsageError: a prompt is missing, or there are too few or too many pictures.
    """
    index = read_json(directory / "model_index.json", dict, redo=REDO)
    if "prompt" in _parameters_of(str(index.get("_class_name"))):
        expand_conditions(prompts, num_images, "prompt")


def _parameters_of(pipeline: str) -> Mapping[str, inspect.Parameter]:
    """Return what a class of pipelines is called with; nothing if diffusers has no such class."""
    import diffusers

    found = getattr(diffusers, pipeline, None)
    return inspect.signature(found.__call__).parameters if found else {}


def _num_classes(pipe: Pipeline) -> int:
    """Return how many classes a denoiser tells apart, 0 if none."""
    if getattr(pipe, "transformer", None) is not None:
        return int(pipe.transformer.config.get("num_embeds_ada_norm") or 1000)
    return int(pipe.unet.config.get("num_class_embeds") or 0)


def prompts_of(prompts: Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return prompts, those of a file or those given; None says that there are none."""
    if prompts is None:
        return None
    return read_prompts(prompts) if isinstance(prompts, Path) else tuple(prompts)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, one a line; empty lines do not count.

    Raises:
        UsageError: the file cannot be read or holds no prompt.
    """
    try:
        text = path.read_text("utf-8-sig")  # a mark at the beginning is not part of the prompt
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"it is not UTF-8 ({error}); save it as UTF-8"
        raise UsageError(f"cannot read prompts from {path}: {reason}") from None
    if "\0" in text:
        raise UsageError(f"cannot read prompts from {path}: it is in UTF-16; save it as UTF-8")
    lines = [line.strip() for line in text.split("\n")]  # not at every mark that Unicode calls one
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise UsageError(f"{path} holds no prompts; write one a line")
    return prompts


def conditions_for(
    pipe: Pipeline,
    source: ModelSource,
    prompts: tuple[str, ...] | None,
    num_images: int,
) -> tuple[str | None, ...]:
    """Return at most so many conditions, one per image.

    Arguments:
        prompts: prompts or class labels; None takes a built-in list, class labels spread over all,
            or nothing.

    Raises:
        UsageError: the pipeline takes no prompts.
    """
    kind = conditioning_of(pipe)
    if kind == "none":
        if prompts is not None:
            raise UsageError(f"{type(pipe).__name__} takes no prompts; leave --prompts out")
        return (None,) * num_images
    if prompts is not None:
        return prompts[:num_images]
    if kind == "prompt":
        return default_prompts(source.model)[:num_images]
    classes = _num_classes(pipe)
    return tuple(str(i * classes // num_images) for i in range(num_images))


def expand_conditions(prompts: Sequence[str], num_images: int, kind: str) -> tuple[str | None, ...]:
    """Repeat each prompt `num_images` times; an unconditional pipeline takes none.

    Raises:
        UsageError: a prompt is missing, or given to a pipeline that takes none.
    """
    if not 1 <= num_images * max(1, len(prompts)) <= _MAX_PICTURES:
        raise UsageError(
            f"--num-images must be at least 1, and all prompts together at most {_MAX_PICTURES} "
            f"pictures; got {num_images}"
        )
    if kind == "none":
        if prompts:
            raise UsageError("this pipeline takes no prompt; leave --prompt out")
        return (None,) * num_images
    if not prompts:
        raise UsageError('no prompt; give at least one, for instance --prompt "a red dress"')
    texts = [_as_utf8(prompt) for prompt in prompts]
    return tuple(texts[i // num_images] for i in range(len(texts) * num_images))


def _as_utf8(prompt: str) -> str:
    """Return a prompt as it was typed, also where the locale of the terminal is not UTF-8.

    Raises:
        UsageError: it was typed in another encoding.
    """
    try:
        return prompt.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise UsageError(
            f"cannot read the prompt {prompt!r}: it is not UTF-8; give it in a file with --prompts"
        ) from None


def say_cut_prompts(pipe: Pipeline, conditions: Sequence[str | None], progress: Progress) -> None:
    """Say which prompts are longer than every text encoder of the pipeline reads."""
    prompts = dict.fromkeys(prompt for prompt in conditions if prompt is not None)
    limits = dict(_token_limits(pipe))
    if conditioning_of(pipe) != "prompt" or not limits:
        return
    cut = [prompt for prompt in prompts if _is_cut(pipe, prompt, limits)]
    if cut:
        others = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        progress.log(
            f"the prompt {cut[0][:40]!r}...{others}: only the first {max(limits.values())} tokens "
            "are read; shorten it, or put what matters first"
        )


def _token_limits(pipe: Pipeline) -> Iterator[tuple[str, int]]:
    """Yield each tokenizer's name, and how many tokens of a prompt the pipeline takes of it.

    Pipelines with a limit of their own use it for encoders that have no learned positions.
    """
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    for name, tokenizer in pipe.components.items():
        if "tokenizer" in name and hasattr(tokenizer, "model_max_length"):
            is_clip = "CLIP" in type(tokenizer).__name__
            own = None if is_clip or parameter is None else parameter.default
            yield name, own or tokenizer.model_max_length


def _is_cut(pipe: Pipeline, prompt: str, limits: Mapping[str, int]) -> bool:
    """Whether no tokenizer takes the whole prompt; each adds marks at its ends."""
    return all(
        len(getattr(pipe, name)(prompt, truncation=False, verbose=False).input_ids) > limit
        for name, limit in limits.items()
    )


def arguments_of(pipe: Pipeline, conditions: Sequence[str | None]) -> dict[str, Any]:
    """Return the arguments that pass one condition per image."""
    kind = conditioning_of(pipe)
    parameters = inspect.signature(pipe.__call__).parameters
    size = {"batch_size": len(conditions)} if "batch_size" in parameters else {}
    if kind == "none":
        return size
    if any(condition is None for condition in conditions):
        raise UsageError(
            f"{type(pipe).__name__} needs a prompt for every picture; give --prompt or "
            "--prompts FILE"
        )
    if kind == "prompt":
        return {"prompt": list(conditions)}
    labels = [_class_label(pipe, str(condition)) for condition in conditions]
    return {"class_labels": labels, **size}


def _class_label(pipe: Pipeline, text: str) -> int:
    """Read a class label: its number, or its name where the pipeline knows names.

    Raises:
        UsageError: it is neither, or larger than the labels that the denoiser knows.
    """
    if text.strip().isdecimal():
        return _require_class(pipe, int(text))
    labels = getattr(pipe, "labels", None) or {}
    if text not in labels:
        raise UsageError(
            f"{text!r} is not a class label of this pipeline; give a number or one of its names"
        )
    return int(labels[text])


def _require_class(pipe: Pipeline, label: int) -> int:
    count = _num_classes(pipe)
    if label >= count:
        raise UsageError(
            f"class label {label} is too large: this pipeline has {count} classes, 0 to {count - 1}"
        )
    return label
