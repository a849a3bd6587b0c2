"""Call the denoiser once, as a recording would, to know what all of its calls will take."""

import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.errors import UsageError
from msfp_cli.pipelines.denoiser import likely_denoisers, map_tensors
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.pipelines.prefix import tensors_of
from msfp_cli.pipelines.sampling import call_pipeline
from msfp_cli.recording.recipe import RecordRecipe


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """What the calls of a denoiser take.

    Arguments:
        seconds: of one call.
        rows: of its batch, guidance included.
        steps: calls in one run of the pipeline.
        num_bytes: of such a run, recorded. What changes from call to call is the sample and the
            output, which has its size.
    """

    seconds: float
    rows: int
    steps: int
    num_bytes: int


# What a pipeline raises where an argument is missing or of another kind than it expects.
_FAULTS = (AttributeError, TypeError, ValueError, LookupError, AssertionError)


class _StopError(Exception):
    """Ends a run of the pipeline after the first call of its denoiser."""


def probe(pipe: Pipeline, recipe: RecordRecipe) -> CallCost:
    """Run the pipeline up to the first call of its largest denoiser, and time that call once more.

    Returns:
        Nothing but zeros if that denoiser is not called.

    Raises:
        UsageError: the pipeline cannot be called with what msfp has for it.
    """
    denoiser = max(likely_denoisers(pipe).values(), key=_num_parameters)
    passed: list[Any] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed[:] = map_tensors(lambda tensor: tensor, [args, kwargs])

    def stop(module: nn.Module, args: object, output: object) -> None:
        outputs.extend(tensors_of(output))
        raise _StopError

    before = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    after = denoiser.register_forward_hook(stop)
    try:
        conditions = recipe.conditions[: recipe.batch_size]
        call_pipeline(pipe, conditions, recipe, output_type="latent")
    except _StopError:
        pass
    except _FAULTS as error:
        text = (str(error).splitlines() or [_line_of(error)])[0]
        raise UsageError(
            f"{type(pipe).__name__} fails when it is called ({type(error).__name__}: {text}); "
            "if the pipeline needs more than prompts, pictures and sizes, calibrate the model "
            "as another pipeline, with --pipeline CLASS"
        ) from error
    finally:
        before.remove()
        after.remove()
    if not outputs:
        return CallCost(seconds=0.0, rows=1, steps=1, num_bytes=0)
    output_bytes = sum(tensor.nbytes for tensor in outputs)
    first_bytes = output_bytes + sum(tensor.nbytes for tensor in tensors_of(passed))
    steps = len(getattr(getattr(pipe, "scheduler", None), "timesteps", (0,)))
    return CallCost(
        seconds=_seconds(denoiser, *passed),
        rows=len(outputs[0]),
        steps=steps,
        num_bytes=first_bytes + 2 * output_bytes * (steps - 1),
    )


def _line_of(error: Exception) -> str:
    """Return the line of source that failed, for an error without words, as of a bare assert."""
    return traceback.extract_tb(error.__traceback__)[-1].line or ""


@torch.no_grad()
def _seconds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    start = time.perf_counter()
    for tensor in tensors_of(module(*args, **kwargs)):
        tensor.cpu()  # waits for an accelerator
    return time.perf_counter() - start


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
