"""The chain over a run directory: record, calibrate, export, sample; each step finds what the one before it left."""

import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msfp_cli.atomic import refuse_existing
from msfp_cli.calibrate import calibrate_
from msfp_cli.calibration import Calibration
from msfp_cli.denoiser import find_denoisers
from msfp_cli.errors import UsageError
from msfp_cli.generation import conditioning_of
from msfp_cli.loading import BUILT_IN, BUILT_IN_GUIDANCE, default_prompts, load_pipeline
from msfp_cli.progress import SILENT, Progress
from msfp_cli.recipe import (
    LARGE,
    MAX_CONDITIONS,
    NUM_IMAGES,
    NUM_IMAGES_LARGE,
    CalibrateRecipe,
    ModelSource,
    RecordRecipe,
    recorded_conditions,
)
from msfp_cli.record import DEFAULT_MAX_BYTES, asked_for, record_calls
from msfp_cli.recording import Recording
from msfp_cli.run import Run

_HELD_OUT_SEED = 1_000_003  # far from any calibration image's seed


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What the user may say about recording.

    Arguments:
        prompts: prompts or class labels; None takes a built-in list, class labels spread over all, or nothing.
        num_images: pictures to record, a fifth held out, of many some 24; with few prompts these come again, with other
            noise. None takes one for each of `prompts`, else `NUM_IMAGES`, `NUM_IMAGES_LARGE` of a large denoiser.
        num_inference_steps, guidance_scale, seed, batch_size: as in `RecordRecipe`.
        max_bytes: bound on the recording's size.
    """

    prompts: tuple[str, ...] | None = None
    num_images: int | None = None
    num_inference_steps: int | None = 20
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 8
    max_bytes: int = DEFAULT_MAX_BYTES


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, one a line; empty lines do not count.

    Raises:
        UsageError: the file cannot be read or holds no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts from {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise UsageError(f"{path} holds no prompts; write one a line")
    return prompts


def conditions_for(
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
    source: ModelSource,
    prompts: tuple[str, ...] | None,
    num_images: int,
) -> tuple[str | None, ...]:
    """Return at most so many conditions, one per image.

    Arguments:
        prompts: prompts or class labels; None takes a built-in list, class labels spread over all, or nothing.

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
    classes = int(pipe.transformer.config.get("num_embeds_ada_norm") or 1000)
    return tuple(str(i * classes // num_images) for i in range(num_images))


def record_recipes(pipe: Any, source: ModelSource, options: RecordOptions) -> tuple[RecordRecipe, RecordRecipe]:  # noqa: ANN401
    """Return the recipes of the calibration recording and of the held-out one."""
    guidance = options.guidance_scale
    if guidance is None:
        guidance = BUILT_IN_GUIDANCE if source.model == BUILT_IN else _default(pipe, "guidance_scale")
    given, count = options.prompts, options.num_images
    if count is None:
        count = _usual_num_images(pipe) if given is None else len(given)
    if count < 1:
        raise UsageError(f"--num-images must be at least 1, got {count}")
    distinct = conditions_for(pipe, source, given, min(count, MAX_CONDITIONS) if given is None else count)
    chosen, held_out = recorded_conditions(distinct, count)

    def recipe(conditions: tuple[str | None, ...], seed: int) -> RecordRecipe:
        return RecordRecipe(
            conditions=conditions,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=guidance,
            seed=seed,
            batch_size=options.batch_size,
        )

    return recipe(chosen, options.seed), recipe(held_out, options.seed + _HELD_OUT_SEED)


def _usual_num_images(pipe: Any) -> int:  # noqa: ANN401
    size = sum(parameter.numel() for module in find_denoisers(pipe).values() for parameter in module.parameters())
    return NUM_IMAGES if size < LARGE else NUM_IMAGES_LARGE


def _default(pipe: Any, argument: str) -> Any:  # noqa: ANN401
    """Return the default of an argument of the pipeline's call, None if it has no such argument."""
    parameter = inspect.signature(pipe.__call__).parameters.get(argument)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def record_both(
    pipe: Any,  # noqa: ANN401 (a pipeline's class is the user's)
    run: Run,
    source: ModelSource,
    options: RecordOptions,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> tuple[Recording, Recording]:
    """Record the calibration calls and the held-out calls, or reuse those that the run has from the same settings."""
    recordings = []
    recipes = record_recipes(pipe, source, options)
    for recipe, directory, title in zip(
        recipes, (run.recording, run.held_out), ("Recording", "Recording held-out"), strict=True
    ):
        # Only what a recording's own manifest marks as ours is deleted.
        if (
            overwrite
            and (directory / "recording.json").exists()
            and not _is_of(directory, asked_for(pipe, source, recipe))
        ):
            shutil.rmtree(directory)
        recordings.append(
            record_calls(
                pipe, source, recipe, directory, max_bytes=options.max_bytes, progress=progress, description=title
            )
        )
    return recordings[0], recordings[1]


def _is_of(directory: Path, asked: dict[str, Any]) -> bool:
    """Whether a directory holds the recording of just these settings."""
    try:
        return Recording(directory).recipe == asked
    except Exception:  # damaged in whatever way: it is replaced, which is what --overwrite asks for
        return False


def calibrate_run(
    run: Run,
    source: ModelSource,
    options: RecordOptions,
    recipe: CalibrateRecipe,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Calibration:
    """Record and calibrate a model into a run directory.

    Raises:
        RunError: the run holds a calibration already, or a recording of other settings, and `overwrite` is not set.
        ModelError, CalibrationError: as said by what they wrap.
    """
    refuse_existing(run.calibration, overwrite=overwrite)
    pipe = load_pipeline(source, device)
    recording, held_out = record_both(pipe, run, source, options, overwrite=overwrite, progress=progress)
    calibration = calibrate_(pipe, recording, held_out, recipe, progress=progress)
    calibration.save(run.calibration, overwrite=overwrite)
    return calibration


def expand_conditions(prompts: Sequence[str], num_images: int, kind: str) -> tuple[str | None, ...]:
    """Repeat each prompt `num_images` times; an unconditional pipeline takes none.

    Raises:
        UsageError: a prompt is missing, or given to a pipeline that takes none.
    """
    if num_images < 1:
        raise UsageError(f"--num-images must be at least 1, got {num_images}")
    if kind == "none":
        if prompts:
            raise UsageError("this pipeline takes no prompt; leave --prompt out")
        return (None,) * num_images
    if not prompts:
        raise UsageError('no prompt; give at least one, for instance --prompt "a red dress"')
    return tuple(prompt for prompt in prompts for _ in range(num_images))
