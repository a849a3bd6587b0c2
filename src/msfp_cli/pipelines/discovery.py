"""Learn which networks of a pipeline are its denoisers, and how they are told the time.

Names do not say: Stable Diffusion has a ``unet`` with a ``timestep``, Z-Image a ``transformer``
with a ``t`` that counts up, a video model may have two transformers, and a ControlNet runs at every
step as well. So a picture is drawn while every network and every scheduler is watched. The denoiser
is the network that ran last before a step of a scheduler, and its clock is the argument that goes
with the timesteps of the steps.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from msfp_cli.errors import CalibrationError, ModelError
from msfp_cli.layers.clock import Clock
from msfp_cli.pipelines.denoiser import DenoiserCall
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.pipelines.watch import watch_calls, watch_scheduler

Argument: TypeAlias = Any  # of a denoiser: a tensor, a number, or anything else
Clocks: TypeAlias = Mapping[str, Clock]  # by component
_Readings: TypeAlias = dict[str, float]  # arguments of a call that are one number
# The ways in which diffusers' pipelines make the denoiser's argument of a training timestep of
# 0..1000, undone: as it is, a share of it, and both counted from the other end.
_FORMS = ((1.0, 0.0), (1000.0, 0.0), (-1000.0, 1000.0), (-1.0, 1000.0))
_ROUNDING = 5.0  # how far bfloat16 may move a timestep of 0..1000
_FEW = 20  # training timesteps; what is less and not a share is in another unit, such as radians
_MOST_ELEMENTS = 100_000  # of an argument that may be a time for each token


@dataclass
class _Watcher:
    """Pairs the calls of networks with the steps of schedulers.

    Arguments:
        last: the last call since the last step. Those before it may have another time, such as one
            of clean frames that fills a cache.
        pairs: by component, what the last call before each step was given, and the step's timestep.
    """

    last: tuple[str, _Readings] | None = None
    pairs: dict[str, list[tuple[_Readings, float]]] = field(default_factory=dict)

    def add_call(
        self,
        component: str,
        signature: inspect.Signature,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Note a call; the last three arguments are those of torch's hooks."""
        arguments = signature.bind(*args, **kwargs).arguments
        numbers = {name: _number(value) for name, value in arguments.items()}
        readings = {name: number for name, number in numbers.items() if number is not None}
        self.last = (component, readings)

    def add_step(self, timestep: Argument, model_output: Tensor, result: object) -> None:
        """Pair the last call with a step."""
        time = _number(timestep)
        if self.last is not None and time is not None:
            denoiser, readings = self.last
            self.pairs.setdefault(denoiser, []).append((readings, time))
        self.last = None


def schedulers_of(pipe: Pipeline) -> dict[str, Any]:
    """Return the schedulers of a pipeline by component name."""
    return {name: part for name, part in pipe.components.items() if hasattr(part, "step")}


def learn_clocks(pipe: Pipeline, draw: Callable[[], object]) -> dict[str, Clock]:
    """Return how each denoiser of a pipeline is told the time, by component name.

    Arguments:
        draw: calls the pipeline, with at least two steps.

    Raises:
        ModelError: no network runs before the steps of a scheduler, or none of its arguments goes
            with their timesteps.
    """
    watcher = _Watcher()
    with ExitStack() as hooks:
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                report = functools.partial(watcher.add_call, name, inspect.signature(part.forward))
                hooks.callback(part.register_forward_pre_hook(report, with_kwargs=True).remove)
        for scheduler in schedulers_of(pipe).values():
            hooks.enter_context(watch_scheduler(scheduler, watcher.add_step))
        draw()
    if not watcher.pairs:
        raise ModelError(
            f"{type(pipe).__name__} has no denoiser: none of its networks ran before a step of a "
            f"scheduler (it has {', '.join(_present(pipe)) or 'nothing'})"
        )
    return {name: clock_of(name, pairs) for name, pairs in watcher.pairs.items()}


@contextmanager
def watch_pipeline(
    pipe: Pipeline,
    clocks: Clocks,
    report_call: Callable[[DenoiserCall], None],
    report_step: Callable[[str, Argument, Tensor, object], None],
) -> Iterator[None]:
    """Report every call of the denoisers of a pipeline, and every step of its schedulers.

    Arguments:
        report_step: is given the scheduler's name, and what `watch_scheduler` reports.
    """
    denoisers = {component: pipe.components[component] for component in clocks}
    with ExitStack() as hooks:
        hooks.enter_context(watch_calls(denoisers, report_call, clocks))
        for name, scheduler in schedulers_of(pipe).items():
            report = functools.partial(report_step, name)
            hooks.enter_context(watch_scheduler(scheduler, report))
        yield


def refuse_idle(pipe: Pipeline, clocks: Clocks, active: Collection[str]) -> None:
    """Refuse a pipeline of which a denoiser never ran, such as that of low noise at one step.

    Arguments:
        clocks: of the denoisers that are known. Other networks of their classes are denoisers, too.
        active: the components that ran while pictures were drawn.

    Raises:
        CalibrationError: the message names the denoiser.
    """
    classes = {type(pipe.components[component]) for component in clocks}
    for component, part in pipe.components.items():
        if type(part) in classes and component not in active:
            raise CalibrationError(
                f"{component} never ran while pictures were made, so it cannot be calibrated; give "
                "more --steps, or save the pipeline without it"
            )


def _present(pipe: Pipeline) -> list[str]:
    """Return the names of the components that are there."""
    return sorted(name for name, part in pipe.components.items() if part is not None)


def clock_of(component: str, pairs: Sequence[tuple[_Readings, float]]) -> Clock:
    """Return the clock of a denoiser.

    Arguments:
        pairs: for each call, in order, its arguments that are one number, and the timestep of the
            scheduler's step after it.

    Raises:
        ModelError: no argument goes with the timesteps.
    """
    times = [time for _, time in pairs]
    names = [name for name in pairs[0][0] if all(name in readings for readings, _ in pairs)]
    columns = {name: [readings[name] for readings, _ in pairs] for name in names}
    for name, values in columns.items():
        form = _form(values, times)
        if form is not None:
            return Clock(argument=name, scale=form[0], offset=form[1])
    for name, values in columns.items():
        if _goes_with(values, times):
            return _spread(name, values)
    raise ModelError(
        f"no argument of {component!r} goes with the timesteps of the scheduler, so nobody knows "
        "what time it is when it is called; msfp cannot quantize this pipeline"
    )


def _form(values: Sequence[float], times: Sequence[float]) -> tuple[float, float] | None:
    """Return the scale and offset of a usual clock, None if the argument is not one.

    A scheduler counts training timesteps of 0..1000, or shares of them; noise comes first.
    """
    is_share = max(times) <= 1
    if min(times) < 0 or max(times) > 1000 or not (is_share or max(times) > _FEW):
        return None
    factor = 1000 if is_share else 1
    is_falling = times[0] >= times[-1]
    wanted = [time * factor if is_falling else 1000 - time * factor for time in times]
    for scale, offset in _FORMS:
        pairs = zip(values, wanted, strict=True)
        if all(abs(value * scale + offset - each) <= _ROUNDING for value, each in pairs):
            return scale, offset
    return None


def _goes_with(values: Sequence[float], times: Sequence[float]) -> bool:
    """Whether an argument is a strictly rising or falling function of the timestep."""
    by_time = sorted(set(zip(times, values, strict=True)))
    if len({time for time, _ in by_time}) < len(by_time):
        return False
    steps = [
        later - earlier for (_, earlier), (_, later) in zip(by_time, by_time[1:], strict=False)
    ]
    return bool(steps) and (all(step > 0 for step in steps) or all(step < 0 for step in steps))


def _spread(argument: str, values: Sequence[float]) -> Clock:
    """Return the clock that spreads what an argument was over 1000 (first) .. 0."""
    low = min(values)
    high = max(values)
    scale = 1000 / (high - low)
    if values[0] >= values[-1]:
        return Clock(argument=argument, scale=scale, offset=-low * scale)
    return Clock(argument=argument, scale=-scale, offset=high * scale)


def _number(value: Argument) -> float | None:
    """Return an argument as a number, None if it is not one.

    A tensor may hold the number once for each row or token; tokens that are given have a smaller
    one, which is 0 where the tensor has no dimension for tokens.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Tensor) or not 0 < value.numel() <= _MOST_ELEMENTS:
        return None
    distinct = value.detach().unique()
    is_of_tokens = value.ndim > 1 or distinct[0] == 0
    if value.dtype == torch.bool or len(distinct) > 1 + is_of_tokens:
        return None
    return float(distinct[-1])
