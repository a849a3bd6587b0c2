"""Choose the timesteps at which inputs are lifted to 8 bits (`input_lift`).

What 8 bits gain at a timestep is measured where it counts: the stock pipeline draws a few of the
recorded pictures again, in full precision but for the inputs at that timestep, which are rounded as
they would be without a lift, and the error of the final sample is taken (ours). The error of the
denoiser's output would not say: it is largest at the last timesteps, but an error at the first ones
changes the course that a picture takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp_cli.calibration.result import LayerChoice
from msfp_cli.calibration.sensitivity import quantize_input
from msfp_cli.layers.clock import Clock
from msfp_cli.layers.input_lift import InputLift, choose_timesteps
from msfp_cli.pipelines.watch import final_sample, watch_times
from msfp_cli.processes import Processes
from msfp_cli.recording.compare import relative_error
from msfp_cli.recording.recipe import RecordRecipe

_DRAWN_AGAIN = 4  # pictures, to see what rounded inputs do to them at each timestep
_MOST_STRETCHES = 20  # of the schedule; the timesteps of one are measured together


@torch.no_grad()
def lift_inputs(
    component: str,
    pipe: DiffusionPipeline,
    clock: Clock,
    choices: Mapping[str, LayerChoice],
    record: RecordRecipe,
    budget: float,
    processes: Processes,
) -> InputLift | None:
    """Choose the timesteps at which a denoiser's inputs are lifted; None if there are none.

    Arguments:
        pipe: in full precision; it stays so.
        clock: reads the timestep of the denoiser's calls.
        choices: what was chosen for each layer.
        record: how the recording was made, of which a few pictures are drawn again.
        budget: share of the timesteps, 0 to 1.
        processes: those that share the stretches of the schedule.
    """
    schemes = {name: choice.scheme for name, choice in choices.items()}
    lifting = [name for name, scheme in schemes.items() if scheme.lifted_input is not None]
    if not lifting:
        return None
    draw = partial(final_sample, pipe, record.conditions[:_DRAWN_AGAIN], record)
    denoiser = pipe.components[component]
    with _rounding(denoiser, {name: choices[name] for name in lifting}, clock) as rounding:
        exact = draw()
        timesteps = sorted(set(rounding.timesteps), reverse=True)
        if not choose_timesteps(dict.fromkeys(timesteps, 1.0), budget):
            processes.progress.log(
                f"--input-lift {budget:g} is less than one of {len(timesteps)} steps, so no inputs "
                f"are lifted; give at least {1 / len(timesteps):.2g}"
            )
            return None
        stretches = _stretches(timesteps)
        own = processes.part(range(len(stretches)))
        measured = dict[str, float]()
        with processes.progress.task(f"Measuring timesteps of {component}", len(own)) as advance:
            for number in own:
                rounding.stretch = stretches[number]
                measured[str(number)] = relative_error(draw(), exact)
                advance(1)
    measured = processes.gather(measured, float)
    errors = dict[float, float]()
    for number, stretch in enumerate(stretches):
        errors |= dict.fromkeys(stretch, measured[str(number)] / len(stretch))
    chosen = choose_timesteps(errors, budget)
    if not chosen:
        return None
    total = sum(errors.values())
    return InputLift(
        timesteps=tuple(timesteps),
        lifted=tuple(timestep in chosen for timestep in timesteps),
        gains=tuple(errors[timestep] / total for timestep in timesteps),
    )


class _Rounding:
    """Rounds the inputs of layers while the denoiser is at certain timesteps.

    ``stretch`` has these timesteps, and ``timesteps`` those of all calls so far.
    """

    def __init__(self) -> None:
        self.stretch: Sequence[float] = ()
        self.timesteps: list[float] = []

    def round_input(
        self,
        choice: LayerChoice,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Round the one argument of a layer; a forward pre-hook of torch."""
        if choice.scheme.input is None or self.timesteps[-1] not in self.stretch:
            return None
        return quantize_input(choice.scheme, layer, args, kwargs)


@contextmanager
def _rounding(
    denoiser: nn.Module, choices: Mapping[str, LayerChoice], clock: Clock
) -> Iterator[_Rounding]:
    """Let the inputs of layers be rounded while the context is open."""
    rounding = _Rounding()
    with ExitStack() as hooks:
        hooks.enter_context(watch_times(denoiser, clock, rounding.timesteps.append))
        for name, choice in choices.items():
            hook = partial(rounding.round_input, choice)
            handle = denoiser.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield rounding


def _stretches(timesteps: Sequence[float]) -> list[Sequence[float]]:
    """Part a schedule into stretches of neighbours, each timestep its own where they are few."""
    size = -(-len(timesteps) // _MOST_STRETCHES)
    return [timesteps[start : start + size] for start in range(0, len(timesteps), size)]
