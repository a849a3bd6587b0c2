"""What several benchmarks share: what they record, and prompts for testing.

A benchmark calibrates many times, so it records forty pictures, fewer than `msfp calibrate` does by
default. Every benchmark that records takes the options of `add_size_options`: with a tiny model and
few pictures it ends within seconds.
"""

import argparse
import inspect
from dataclasses import replace
from pathlib import Path

import diffusers
from torch import nn

from msfp_cli.pipelines.denoiser import find_denoisers
from msfp_cli.pipelines.loading import (
    BUILT_IN,
    BUILT_IN_GUIDANCE,
    BUILT_IN_STEPS,
    ModelSource,
    Pipeline,
    default_prompts,
    resolve_model,
)
from msfp_cli.recording.recipe import RecordOptions

NUM_IMAGES = 40
RECORD = RecordOptions(num_images=NUM_IMAGES)
# Calibration takes none of these prompts.
UNSEEN = default_prompts(BUILT_IN)[40:150]
KNOWN = tuple(prompt for prompt in default_prompts(BUILT_IN) if prompt not in UNSEEN)


def add_size_options(parser: argparse.ArgumentParser, num_images: int = NUM_IMAGES) -> None:
    """Add the options that make a benchmark small: another model, fewer pictures and steps."""
    add_model_options(parser)
    parser.add_argument("--num-images", type=int, default=num_images, help="pictures to record")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that records nothing: another model, fewer steps."""
    parser.add_argument(
        "--model",
        default=BUILT_IN,
        help="a pipeline with one denoiser, of text or unconditional; the built-in one",
    )
    parser.add_argument("--steps", type=int, default=BUILT_IN_STEPS, help="steps of the sampler")


def source_of(arguments: argparse.Namespace) -> ModelSource:
    """Return the model that the size options name."""
    model, _ = resolve_model(arguments.model)
    return ModelSource(model=model)


def denoiser_of(pipe: Pipeline) -> tuple[str, nn.Module]:
    """Return the name of a pipeline's only denoiser, and the denoiser."""
    ((component, denoiser),) = find_denoisers(pipe).items()
    return component, denoiser


def part_of_page(script: str, arguments: argparse.Namespace) -> str:
    """Return the name of the part of a page that holds a script's table for the model."""
    return script if arguments.model == BUILT_IN else f"{script} {Path(arguments.model).name}"


def known_prompts(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Return the prompts that are recorded; None for a pipeline that takes no prompts."""
    if arguments.model == BUILT_IN:
        return KNOWN
    index = diffusers.DiffusionPipeline.load_config(source_of(arguments).model)
    pipeline = getattr(diffusers, index["_class_name"])
    return KNOWN if "prompt" in inspect.signature(pipeline.__call__).parameters else None


def record_options(arguments: argparse.Namespace) -> RecordOptions:
    """Return what to record, as the size options say."""
    options = replace(
        RECORD,
        num_images=arguments.num_images,
        num_inference_steps=arguments.steps,
        guidance_scale=BUILT_IN_GUIDANCE,
    )
    if arguments.model == BUILT_IN:
        return options
    prompts = known_prompts(arguments)
    guidance = None if prompts is None else BUILT_IN_GUIDANCE
    return replace(options, prompts=prompts, guidance_scale=guidance)
