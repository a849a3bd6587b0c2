"""Watch a pipeline at work: calls of its denoisers, layers inside of them, steps of its scheduler.

Each function is a context manager. It reports to a function of the caller, changes nothing of what
passes by, and takes its hooks away when the context closes, also after an error.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from msfp_cli.errors import ModelError
from msfp_cli.layers.clock import TRAINING_CLOCK, Clock
from msfp_cli.pipelines.denoiser import DenoiserCall, map_tensors
from msfp_cli.pipelines.loading import Pipeline, Scheduler
from msfp_cli.pipelines.sampling import Sampling, call_pipeline

Passed: TypeAlias = Any  # to a scheduler, or by it
# A layer's name, the layer, its arguments in the order they were given in, and its output.
LayerReport: TypeAlias = Callable[[str, nn.Module, tuple[Any, ...], Tensor], None]
# A step's timestep, the output of the denoiser that the pipeline passed to it, and what it
# returned, whose first item is the new sample.
StepReport: TypeAlias = Callable[[Any, Tensor, Any], None]


@contextmanager
def watch_layers(layers: Mapping[str, nn.Module], report: LayerReport) -> Iterator[None]:
    """Report every run of some layers while the context is open."""
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = functools.partial(_report_layer, name, report)
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _report_layer(
    name: str,
    report: LayerReport,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> None:
    """Report one run; some models call their layers by keyword, or with nothing in a tensor."""
    if output.numel():
        report(name, layer, (*args, *kwargs.values()), output)


@contextmanager
def watch_calls(
    denoisers: Mapping[str, nn.Module],
    report: Callable[[DenoiserCall], None],
    clocks: Mapping[str, Clock] = MappingProxyType({}),
) -> Iterator[None]:
    """Report every call of some denoisers, by component name, while the context is open.

    Arguments:
        clocks: by component, where the denoiser is not passed a training timestep.
    """
    with ExitStack() as hooks:
        for component, denoiser in denoisers.items():
            signature = inspect.signature(denoiser.forward)
            clock = clocks.get(component, TRAINING_CLOCK)
            arguments: dict[str, Passed] = {}
            before = functools.partial(_keep_arguments, signature, arguments, _Copies())
            after = functools.partial(_report_call, component, clock, arguments, report)
            handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(handle.remove)
            handle = denoiser.register_forward_hook(after)
            hooks.callback(handle.remove)
        yield


class _Copies:
    """Copies tensors of calls; one that the call before had, too, is copied once.

    Some pipelines write the next sample into the tensor that they passed.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._now: dict[int, tuple[Tensor, int, Tensor]] = {}

    def of_call(self, arguments: Passed) -> Passed:
        """Return the arguments of the next call with copies of their tensors."""
        self._before, self._now = self._now, {}
        return map_tensors(self._copy, arguments)

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # nothing tells whether it was written to
            return tensor.clone()
        key = id(tensor)
        for known in (self._now.get(key), self._before.get(key)):
            if known is not None and known[0] is tensor and known[1] == tensor._version:
                self._now[key] = known
                return known[2]
        self._now[key] = (tensor, tensor._version, tensor.clone())
        return self._now[key][2]


def _keep_arguments(
    signature: inspect.Signature,
    arguments_: dict[str, Passed],
    copies: _Copies,
    denoiser: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Keep the arguments of a call that begins; the last three are those of torch's hooks.

    Some denoisers take items out of lists that they are given, or write into caches, so what holds
    the tensors is copied, too.
    """
    arguments_.clear()
    arguments_.update(copies.of_call(signature.bind(*args, **kwargs).arguments))
    arguments_.pop("return_dict", None)


def _report_call(
    component: str,
    clock: Clock,
    arguments: Mapping[str, Passed],
    report: Callable[[DenoiserCall], None],
    denoiser: nn.Module,
    args: tuple[Any, ...],
    output: object,
) -> None:
    """Report a call that ended; the last three arguments are those of torch's hooks.

    A call that predicts nothing only fills a cache, which later calls are given.
    """
    if not isinstance(output, tuple) or output[0] is not None:
        report(DenoiserCall.of(component, dict(arguments), output, clock))


@contextmanager
def watch_scheduler(scheduler: Scheduler, report: StepReport) -> Iterator[None]:
    """Report every step of a scheduler, and of copies of it, while the context is open.

    A scheduler without ``step``, or None, is left alone.
    """
    step = getattr(type(scheduler), "step", None)
    if step is None:
        yield
        return
    own = vars(scheduler).get("step")  # None: it is the class's
    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines look at its signature
    def watched(self: Scheduler, *args: Passed, **kwargs: Passed) -> Passed:
        result = step(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        report(arguments.get("timestep"), arguments["model_output"], result)
        return result

    scheduler.step = MethodType(watched, scheduler)  # of a copy, its own
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


@contextmanager
def watch_samples(pipe: Pipeline) -> Iterator[list[Tensor]]:
    """Keep the last sample that the scheduler made while the context is open: the final latents.

    Raises:
        ModelError: the pipeline has no scheduler.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ModelError(
            f"{type(pipe).__name__} has no scheduler, so its final latents are not known"
        )
    samples: list[Tensor] = []

    def keep(timestep: object, model_output: Tensor, result: Sequence[Tensor]) -> None:
        samples[:] = [result[0]]

    with watch_scheduler(scheduler, keep):
        yield samples


def final_sample(pipe: Pipeline, conditions: Sequence[str | None], sampling: Sampling) -> Tensor:
    """Draw pictures, so many a call as the sampling says, and return the scheduler's last samples.

    Returns:
        A row for each picture.
    """
    last = list[Tensor]()
    for first in range(0, len(conditions), sampling.batch_size):
        batch = conditions[first : first + sampling.batch_size]
        with watch_samples(pipe) as samples:
            call_pipeline(pipe, batch, sampling, first=first, output_type="latent")
        last.append(samples[-1])
    return torch.cat(last)


@contextmanager
def watch_times(
    denoiser: nn.Module, clock: Clock, report: Callable[[float], None]
) -> Iterator[None]:
    """Report the timestep of every call of a denoiser, before it runs.

    Arguments:
        clock: reads it.
    """
    signature = inspect.signature(denoiser.forward)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        report(clock.read(signature.bind(*args, **kwargs).arguments[clock.argument]))

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
