"""Call a stock pipeline the way its user would, whatever it is conditioned on.

What a pipeline takes is read off its signature: a prompt, class labels, or only a batch size. Image
``i`` always gets its own generator seeded with ``seed + i``, so a picture does not depend on the
batch it was made in.
"""

import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msfp_cli.errors import ModelError, UsageError
from msfp_cli.pipelines.conditions import arguments_of, say_cut_prompts
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.pipelines.pictures import (
    digest_of_pictures,
    passed,
    picture_arguments,
    pictures_of,
    refuse_list,
    refuse_without_media,
    say_pictures,
)
from msfp_cli.progress import Progress
from msfp_cli.recipe import Recipe, option

if TYPE_CHECKING:  # `msfp --help` must not load torch
    import torch
    from PIL.Image import Image

_STEPS = "num_inference_steps"
MAX_SEED = 2**62  # torch takes 64 bits; pictures count on from here

S = TypeVar("S", bound="Sampling")


@dataclass(frozen=True, kw_only=True)
class Sampling(Recipe):
    """How to call a pipeline; recipes that draw pictures extend it.

    Steps and guidance that are None are left to the pipeline, or to what was calibrated.
    """

    num_inference_steps: int | None = option(
        None,
        "Steps of the sampler. Default: 20 to calibrate, then as calibrated.",
        names=("--steps",),
        at_least=1,
    )
    guidance_scale: float | None = option(
        None,
        "Strength of classifier-free guidance. Default: the pipeline's own to calibrate, then as "
        "calibrated.",
        at_least=-1000,
        at_most=1000,
    )
    seed: int = option(
        0,
        "Seed of the first picture; picture i is drawn with seed + i.",
        at_least=0,
        at_most=MAX_SEED,
    )
    batch_size: int = option(8, "Pictures per call of the pipeline.", at_least=1)
    height: int | None = option(
        None,
        "Height of the pictures in pixels. Default: the pipeline's own.",
        at_least=1,
        later=True,
    )
    width: int | None = option(
        None,
        "Width of the pictures in pixels. Default: the pipeline's own.",
        at_least=1,
        later=True,
    )
    num_frames: int | None = option(
        None, "Frames of a video. Default: the pipeline's own.", at_least=1, later=True
    )
    images: Path | None = option(
        None,
        "Folder with pictures for pipelines that take some (img2img, inpainting, ControlNet, "
        "upscaling). The mask of NAME.png is NAME-mask.png, white where it is to be repainted. "
        "Default: stand-ins made from noise to calibrate, then as calibrated.",
        read=Path,
        later=True,
    )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call, which an export remembers as well."""
        sizes = {"height": self.height, "width": self.width, "num_frames": self.num_frames}
        return {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            **{name: size for name, size in sizes.items() if size is not None},
        }

    def digest_of_images(self) -> str | None:
        """Return what tells the pictures that are given from others, None if there are none."""
        return None if self.images is None else digest_of_pictures(self.images)

    def settings(self) -> dict[str, Any]:
        """Return the fields of a sampling by name, without those of whatever extends it."""
        return {field.name: getattr(self, field.name) for field in fields(Sampling)}

    def or_else(self: S, defaults: Mapping[str, Any]) -> S:
        """Return the same sampling with defaults in place of what is None."""
        unset = {key for key, value in self.settings().items() if value is None}
        return replace(self, **{key: defaults[key] for key in unset & defaults.keys()})


def refuse_settings(pipe: Pipeline, sampling: Sampling) -> None:
    """Refuse more steps than the schedule that a pipeline was trained with has timesteps.

    A height without a width is refused, too: many pipelines ignore it, and draw their usual size.

    Raises:
        UsageError: there are more, or only half of a size is given.
    """
    sizes = {"--height": sampling.height, "--width": sampling.width}
    given = [name for name, size in sizes.items() if size is not None]
    if len(given) == 1:
        (other,) = sizes.keys() - given
        raise UsageError(f"many pipelines ignore {given[0]} without {other}; give both")
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    limit = config.get("num_train_timesteps")
    steps = sampling.num_inference_steps
    if steps is not None and limit is not None and 1 < limit < steps:  # 1: time is a share
        raise UsageError(
            f"--steps {steps} is more than the {limit} timesteps that the model was trained with; "
            "give fewer"
        )


def refuse_untaken(pipe: Pipeline, asked: Sampling) -> None:
    """Refuse an option that the call of a pipeline does not take, and so would do nothing.

    Pictures that are given to a pipeline are cut to a size, whether its call takes that or not.

    Arguments:
        asked: what the user gave, without what other results remember.

    Raises:
        UsageError: the message names the option.
    """
    sizes = () if picture_arguments(pipe) else ("height", "width")
    parameters = inspect.signature(pipe.__call__).parameters
    for name in (*sizes, "num_frames", "guidance_scale"):
        if getattr(asked, name) is not None and name not in parameters:
            option_name = f"--{name.replace('_', '-')}"
            raise UsageError(f"{type(pipe).__name__} takes no {option_name}; leave it out")


def write_prompts(prompts: Path | Sequence[str]) -> str:
    """Return the file of an option for prompts; those from Python stand for a file of them."""
    return str(prompts) if isinstance(prompts, Path) else "prompts.txt"


def say_conditions(
    pipe: Pipeline, conditions: Sequence[str | None], sampling: Sampling, progress: Progress
) -> None:
    """Say which prompts are not read to their end, and where stand-ins take the place of pictures.

    Raises:
        UsageError: there are pictures, and the pipeline takes none, or they cannot be read; or more
            steps than it can take; or half of a size; or a label that it does not have.
    """
    refuse_settings(pipe, sampling)
    arguments_of(pipe, conditions)  # which refuses a label that only a later call would get
    say_cut_prompts(pipe, conditions, progress)
    say_pictures(pipe, sampling, progress, len(conditions))
    for line in _other_stages(pipe, sampling):
        progress.log(line)


def _other_stages(pipe: Pipeline, sampling: Sampling) -> Iterator[str]:
    """Yield what a stage before the last, as a prior is, does not take from the options."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(pipe.__call__).parameters.items()
    }
    suffix = f"_{_STEPS}"
    for stage in [name.removesuffix(suffix) for name in defaults if name.endswith(suffix)]:
        for option_name, name in (("--steps", _STEPS), ("--guidance-scale", "guidance_scale")):
            own = f"{stage}_{name}"
            if getattr(sampling, name) is not None and name in defaults and own in defaults:
                yield (
                    f"{option_name} does not reach the {stage} of {type(pipe).__name__}, whose "
                    f"{own} stays at {defaults[own]}"
                )


def draw_stills(
    pipe: Pipeline, conditions: Sequence[str | None], sampling: Sampling, *, first: int = 0
) -> "tuple[list[Image], bool]":
    """Run the pipeline once for a batch.

    Returns:
        A picture that shows each thing it made, and whether these are drawings of what is none.
    """
    from msfp_cli.pipelines.media import is_drawing, still

    stills = [still(work) for work in call_pipeline(pipe, conditions, sampling, first=first)]
    return stills, any(map(is_drawing, stills))


def call_pipeline(
    pipe: Pipeline,
    conditions: Sequence[str | None],
    sampling: Sampling,
    *,
    first: int = 0,
    output_type: str = "pil",
) -> Any:  # noqa: ANN401 (a list of works, or latents)
    """Run the pipeline once for a batch and return what it made (or latents).

    Arguments:
        conditions: prompt or class label for each image; None for an unconditional pipeline.
        sampling: steps, guidance, seed.
        first: index of the first image of the batch, which fixes the seeds.
        output_type: ``pil``, or ``latent`` to skip the decoder.
    """
    count = len(conditions)
    options = {
        "generator": _generators(sampling.seed + first, count),
        "output_type": output_type if _decodes(pipe) else None,
        **sampling.arguments(),
    }
    parameters = inspect.signature(pipe.__call__).parameters
    arguments = {
        key: value for key, value in options.items() if key in parameters and value is not None
    }
    arguments |= arguments_of(pipe, conditions)
    for name, pictures in pictures_of(pipe, sampling, first, count).items():
        arguments[name] = passed(pipe, name, pictures)
    _refuse_missing(pipe, parameters, arguments)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    try:
        result = _run(pipe, arguments)
    except RuntimeError as error:
        _refuse_few_steps(pipe, arguments, error)
        raise
    except NameError as error:
        _refuse_missing_package(pipe, error)
        raise
    except (TypeError, AttributeError, ValueError) as error:
        refuse_list(pipe, arguments, error)
        refuse_without_media(pipe, arguments, error)
        _refuse_checked(pipe, error)
        _refuse_few_steps(pipe, arguments, error)
        if "ScalarType" not in str(error):
            raise
        raise ModelError(
            f"{type(pipe).__name__} cannot turn this type into pictures ({error}); "
            "use --dtype float32"
        ) from None
    if output_type == "latent":
        return result[0]
    from msfp_cli.pipelines.media import one_for_each, works_of

    return one_for_each(works_of(result), count)


def _refuse_few_steps(pipe: Pipeline, arguments: Mapping[str, Any], error: Exception) -> None:
    """Refuse in one line a call that failed because no step of its schedule was left.

    Pipelines that start from a picture leave out the first steps: of ``steps``, many take no more
    than ``int(steps * strength)``.

    Raises:
        UsageError: there were so few steps.
    """
    parameter = inspect.signature(pipe.__call__).parameters.get("strength")
    strength = None if parameter is None else parameter.default
    steps = arguments.get("num_inference_steps")
    is_memory = "OutOfMemory" in type(error).__name__
    if is_memory or not isinstance(strength, float) or strength <= 0:
        return
    if steps and steps * strength < 1:
        raise UsageError(
            f"--steps {steps} leaves {type(pipe).__name__} no step: it starts from a picture, and "
            f"takes {strength:g} of the steps; give at least --steps {math.ceil(1 / strength)}"
        ) from error


def _refuse_missing_package(pipe: Pipeline, error: NameError) -> None:
    """Refuse in one line a pipeline that imports a package only where there is one.

    Raises:
        UsageError: the package is not installed.
    """
    name = error.name or ""
    module = sys.modules[type(pipe).__module__]
    if not re.search(rf"^\s+import {re.escape(name)}$", inspect.getsource(module), re.MULTILINE):
        return
    if importlib.util.find_spec(name) is None:
        raise UsageError(
            f"{type(pipe).__name__} needs the package {name}; install it with `pip install {name}`"
        ) from error


def _refuse_checked(pipe: Pipeline, error: Exception) -> None:
    """Refuse in one line what a pipeline refused when it checked its arguments.

    Raises:
        UsageError: the error comes from that check, which all pipelines of diffusers call alike.
    """
    if traceback.extract_tb(error.__traceback__)[-1].name == "check_inputs":
        raise UsageError(f"{type(pipe).__name__} refuses its arguments: {error}") from error


def _run(pipe: Pipeline, arguments: Mapping[str, Any]) -> Any:  # noqa: ANN401 (an output)
    """Call a pipeline, and a second time in the way that the error of the first asks for."""
    try:
        return pipe(**arguments)
    except (NotImplementedError, ValueError) as error:
        others = _adapted(pipe, arguments, error)
    for generator in arguments.get("generator", ()):
        generator.manual_seed(generator.initial_seed())
    return pipe(**others)


def _adapted(pipe: Pipeline, arguments: Mapping[str, Any], error: Exception) -> dict[str, Any]:
    """Return the arguments of a second call.

    Some decoders need tiles, some pipelines make arrays only, and some take one prompt and no list,
    or one generator and no list, too.

    Raises:
        Exception: the error is about something else.
    """
    text = str(error)
    others = dict(arguments)
    single = {
        name: value[0]
        for name, value in arguments.items()
        if name in ("prompt", "generator") and isinstance(value, list) and len(value) == 1
    }
    if isinstance(error, NotImplementedError) and "tiling" in text:
        pipe.vae.enable_tiling()
    elif "output_type" in text and "output_type" in others:
        del others["output_type"]
    elif "prompt" in single and re.search(r"`prompt` .*\blist'", text):
        others["prompt"] = single["prompt"]
    elif "prompt" in single and "list of prompts" in text:
        others |= single
    else:
        raise error
    return others


def _decodes(pipe: Pipeline) -> bool:
    """Whether a pipeline has a network that decodes latents: others have no type of output."""
    parts = getattr(pipe, "components", {}).values()
    return any(hasattr(part, "decode") and hasattr(part, "parameters") for part in parts)


def _refuse_missing(
    pipe: Pipeline, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]
) -> None:
    """Refuse a pipeline that needs what msfp has not.

    Raises:
        UsageError: an argument without a default is missing.
    """
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name, parameter in parameters.items():
        has_default = parameter.default is not inspect.Parameter.empty
        if not has_default and parameter.kind not in variable and name not in arguments:
            raise UsageError(
                f"{type(pipe).__name__} needs {name!r}, which is neither a prompt nor a picture; "
                "calibrate the combined pipeline, if there is one, or record it from Python"
            )


def _generators(seed: int, count: int) -> "list[torch.Generator]":
    """Return a generator for each image of a batch."""
    import torch

    return [torch.Generator().manual_seed(seed + i) for i in range(count)]
