"""Which pipeline is meant, and loading it with plain ``from_pretrained``.

Where it cannot be loaded, one line says why. torch and diffusers are imported only to load.
"""

import contextlib
import re
import threading
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from msfp_cli.errors import ModelError, MsfpError, UsageError
from msfp_cli.files.seal import REDO, checked
from msfp_cli.files.weight_files import variant_advice
from msfp_cli.pipelines.bounds import (
    no_random_tensors,
    refuse_empty_tensors,
    refuse_endless_prompts,
    refuse_endless_sizes,
    refuse_missing_parts,
)
from msfp_cli.recipe import Recipe, option

if TYPE_CHECKING:  # `msfp --help` must not load torch
    import torch

Pipeline: TypeAlias = Any  # any diffusers pipeline: its class is the user's
Scheduler: TypeAlias = Any  # any diffusers scheduler

DTYPES = ("float32", "float16", "bfloat16")

# While diffusers and transformers load a model, they replace functions of torch.nn for the whole
# process; of two threads that load at once, the later would leave its replacement behind for good.
LOADING = threading.RLock()

BUILT_IN = "msfp:fashion"
BUILT_IN_STEPS, BUILT_IN_GUIDANCE = 20, 3.0

# Ids that have left the hub, with their maintained successors.
_SUCCESSORS = {
    "runwayml/stable-diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}


@dataclass(frozen=True, kw_only=True)
class ModelSource(Recipe):
    """Where a pipeline comes from.

    Arguments:
        model: a local directory, a hub id, or ``msfp:fashion`` for the built-in pipeline.
    """

    model: str
    revision: str | None = option(None, "Revision of a hub model. Default: the newest.")
    variant: str | None = option(
        None, "Variant of the weights' files, such as fp16. Default: the files without a variant."
    )
    dtype: str | None = option(
        None,
        f"Type to compute in: {', '.join(DTYPES)}. Default: float32 on a CPU, else bfloat16.",
        choices=DTYPES,
    )
    pipeline: str | None = option(
        None,
        "Class of diffusers to load the model as, such as StableDiffusionImg2ImgPipeline. Default: "
        "the one that the model names.",
        later=True,
    )


def resolve_model(model: str | None) -> tuple[str, str | None]:
    """Return the model to load and, where it is not what was asked for, one line that says so.

    Arguments:
        model: a directory, a hub id, or None for the built-in pipeline.

    Raises:
        UsageError: it is empty.
    """
    if model is None:
        return BUILT_IN, None
    if model in _SUCCESSORS and not Path(model).exists():
        successor = _SUCCESSORS[model]
        return successor, f"{model} has left the hub; using its maintained successor {successor}"
    if not model:
        raise UsageError("MODEL is empty; give a directory or a hub id, or leave it out")
    path = Path(model)
    return (str(path.resolve()) if path.is_dir() else model), None


def built_in_directory() -> Path:
    """Return where the built-in pipeline lies inside the installed package."""
    return Path(str(files("msfp_cli") / "data" / "fashion"))


def default_prompts(model: str) -> tuple[str, ...]:
    """Return the prompts that a text-to-image model is recorded with when the user gives none."""
    name = "fashion_prompts.txt" if model == BUILT_IN else "prompts.txt"
    return tuple((files("msfp_cli") / "data" / name).read_text("utf-8").splitlines())


def choose_device(device: "str | torch.device | None") -> str:
    """Return the device asked for, else an accelerator if there is one.

    The CPU has one name, ``cpu``, whatever number it was given.

    Raises:
        ModelError: the device is not there.
    """
    import torch

    if device is None:
        accelerator = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return "cpu" if accelerator is None else accelerator.type
    try:
        torch.zeros(1, device=device).item()  # the device "meta" holds no values
    except (RuntimeError, AssertionError) as error:
        is_unknown = "device type at start" in str(error)
        reason = "torch knows no such device" if is_unknown else re.split(r"\. |\n", str(error))[0]
        raise ModelError(
            f"device {str(device)!r} cannot be used here ({reason}); try --device cpu"
        ) from None
    return "cpu" if torch.device(device).type == "cpu" else str(device)


def choose_dtype(dtype: str | None, device: str) -> "torch.dtype":
    """Return the type of every component: by default float32 on a CPU and bfloat16 elsewhere."""
    import torch

    if dtype is not None:
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    return torch.float32 if device == "cpu" else torch.bfloat16


def _place_of(source: ModelSource) -> str:
    """Return the directory or the hub id that a model is loaded from.

    Raises:
        ModelError: it cannot be either.
    """
    model = str(built_in_directory()) if source.model == BUILT_IN else source.model
    if Path(model).is_file():
        raise ModelError(
            f"{model} is a file, and msfp reads directories in diffusers' format; "
            "`StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)` makes one"
        )
    if Path(model).is_dir() and not (Path(model) / "model_index.json").exists():
        raise ModelError(f"{model} is not a diffusers pipeline: it has no model_index.json")
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise ModelError(f"{model!r} is neither a directory nor a hub id (owner/name)")
    refuse_missing_parts(Path(model))
    return model


def fetch_pipeline(source: ModelSource) -> Path:
    """Return the directory of a pipeline's files, which are downloaded if they are on the hub.

    Raises:
        ModelError: it cannot be found; the message says why, as far as can be known.
    """
    from diffusers import DiffusionPipeline

    model = _place_of(source)
    if Path(model).is_dir():
        return Path(model)
    options = {"revision": source.revision, "variant": source.variant}
    try:
        return Path(
            DiffusionPipeline.download(model, **{k: v for k, v in options.items() if v is not None})
        )
    except Exception as error:
        raise ModelError(_explain(source, error)) from error


def load_pipeline(
    source: ModelSource, device: "str | torch.device | None" = None, *, streamed: bool = False
) -> Pipeline:
    """Load a stock pipeline, all components in one type, ready to be called.

    Arguments:
        streamed: leave weights in their files until their layers run, see `layers.streamed`.

    Raises:
        ModelError: it cannot be found or loaded; the message says why, as far as can be known.
        CheckpointError: it is an export that was altered.
    """
    from msfp_cli.pipelines.streamed import component_files, stored_types, stream_components_

    place = choose_device(device)
    dtype = choose_dtype(source.dtype, place)
    pipeline = pipeline_class(source.pipeline)
    model = str(fetch_pipeline(source)) if streamed else _place_of(source)
    stored = component_files(Path(model), source.variant) if streamed else {}
    options = {"revision": source.revision, "variant": source.variant}
    with checked(Path(model), redo=REDO):  # what msfp exported; others have no seal
        refuse_endless_sizes(Path(model))
        try:
            with LOADING, no_random_tensors():
                pipe = pipeline.from_pretrained(
                    model,
                    dtype={"default": dtype, **dict(stored_types(stored))} if stored else dtype,
                    **{k: v for k, v in options.items() if v is not None},
                )
        except MsfpError:
            raise
        except Exception as error:  # every library below has its own kinds
            raise ModelError(_explain(source, error)) from error
    refuse_empty_tensors(model, pipe.components)
    refuse_endless_prompts(pipe.components)
    stream_components_(pipe.components, stored, dtype, place)
    with contextlib.suppress(AttributeError):
        pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def pipeline_class(name: str | None) -> Any:  # noqa: ANN401 (a class of diffusers)
    """Return the class that loads a pipeline.

    Raises:
        UsageError: diffusers has no such pipeline.
    """
    import diffusers

    if name is None:
        return diffusers.DiffusionPipeline
    found = getattr(diffusers, name, None) if "Pipeline" in name else None
    if found is None:
        raise UsageError(
            f"--pipeline {name!r} is not a pipeline of diffusers {diffusers.__version__}; "
            "give a class such as StableDiffusionImg2ImgPipeline"
        )
    return found


def _explain(source: ModelSource, error: Exception) -> str:
    """Say in one line why a model could not be loaded."""
    from huggingface_hub import errors as hub

    model, causes = source.model, [error]
    while isinstance(causes[-1].__cause__, Exception) and len(causes) < 8:
        causes.append(causes[-1].__cause__)
    if any(isinstance(c, hub.GatedRepoError) for c in causes):
        return f"{model} is gated: accept its licence on the hub and run `hf auth login`"
    if any(isinstance(c, hub.RevisionNotFoundError) for c in causes):
        return f"{model} has no revision {source.revision!r}; leave --revision out for the newest"
    if any(isinstance(c, hub.RepositoryNotFoundError) for c in causes):
        return (
            f"model {model!r} was not found on the hub: the id may be misspelt or removed, or the "
            "model may be private (then run `hf auth login`); a local directory works too"
        )
    if any(
        isinstance(c, hub.OfflineModeIsEnabled | hub.LocalEntryNotFoundError) for c in causes
    ) or any(
        "Connect" in type(c).__name__ or isinstance(c, ConnectionError | TimeoutError)
        for c in causes
    ):
        return (
            f"model {model!r} is not a local directory, and the hub cannot be reached: "
            "check the name or the network"
        )
    if not Path(model).exists() and model.count("/") != 1 and source.model != BUILT_IN:
        return f"{model!r} is neither a directory nor a hub id (owner/name)"
    reason = str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__]
    return _explain_variant(source, reason[0]) or f"cannot load {model}: {reason[0][:300]}"


def _explain_variant(source: ModelSource, reason: str) -> str | None:
    """Say which variant to load where only files of another one are there; None: it is not that.

    Arguments:
        reason: what diffusers or transformers say.
    """
    if source.variant is not None and "no such modeling files" in reason:
        return (
            f"{source.model} has no files of the variant {source.variant!r}; leave --variant out, "
            "or give one that it has"
        )
    place = re.search(r"no file named .* found in directory (.+?)\.?$", reason)
    if place is None:
        return None
    component = Path(place[1])
    advice = variant_advice(component, source.variant)
    return advice and f"cannot load {source.model}: its {component.name} {advice}"
