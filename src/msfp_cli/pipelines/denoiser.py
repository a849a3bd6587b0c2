"""Find the denoiser of a pipeline, watch its calls, and replay them.

A pipeline is never re-implemented here. Its denoiser is found by looking at its components, a hook
on the denoiser's own ``forward`` sees each call, and `replay` repeats one. So classifier-free
guidance, added conditions, guidance vectors and any scheduler come along without a line about them.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.errors import ModelError
from msfp_cli.files import digest

# The attribute names under which diffusers' pipelines keep the network that is called once per
# timestep.
_ROLES = ("unet", "transformer", "transformer_2", "transformer_3", "prior", "decoder")


@dataclass(frozen=True, kw_only=True)
class DenoiserCall:
    """One call of a denoiser.

    Arguments:
        component: the pipeline's name for the denoiser, e.g. ``unet``.
        timestep: the timestep it was called with, in the denoiser's own unit.
        arguments: all arguments by name; tensors, plain values, and lists or dicts of them.
        output: what it returned, without the wrapping tuple, and without channels that the pipeline
            throws away.
    """

    component: str
    timestep: float
    arguments: dict[str, Any]
    output: Tensor


def find_denoisers(pipe: Any) -> dict[str, nn.Module]:  # noqa: ANN401 (a pipeline's class is the user's)
    """Return the pipeline's denoisers by component name, usually one.

    Raises:
        ModelError: there is none.
    """
    components = pipe.components
    found = {
        role: components[role]
        for role in _ROLES
        if isinstance(components.get(role), nn.Module)
        and "timestep" in inspect.signature(components[role].forward).parameters
    }
    if not found:
        names = (
            ", ".join(sorted(name for name, part in components.items() if part is not None))
            or "nothing"
        )
        raise ModelError(
            f"{type(pipe).__name__} has no denoiser (looked for {', '.join(_ROLES)}; it has {names}); "
            "msfp quantizes pipelines whose UNet or transformer is called once per timestep"
        )
    return found


_SAMPLES = 256  # elements of each parameter that a fingerprint reads


def fingerprint(denoiser: nn.Module) -> str:
    """Return a digest that tells a float denoiser from other models and from other trainings.

    It reads evenly spaced elements of each parameter, so it takes no time on large models; it does
    not prove that every element is as it was.
    """
    sampled = {}
    for name, parameter in denoiser.named_parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES)
        sampled[f"{name} {tuple(parameter.shape)}"] = flat[::stride].cpu()
    return digest(sampled)


def _as_timestep(value: Any) -> float:  # noqa: ANN401 (tensor or number, as the pipeline passes it)
    """Return the timestep of a call, whose batch shares one."""
    return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


def _first(output: Any) -> Tensor:  # noqa: ANN401 (tuple or diffusers' output class)
    """Return the tensor a denoiser returned."""
    return output[0] if not isinstance(output, Tensor) else output


@contextmanager
def watch_calls(
    denoisers: dict[str, nn.Module], seen: Callable[[DenoiserCall], None]
) -> Iterator[None]:
    """Give every call of the denoisers to `seen` while the context is open."""
    handles = []
    for component, module in denoisers.items():
        signature = inspect.signature(module.forward)

        def hook(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,  # noqa: ANN401
            component: str = component,
            signature: inspect.Signature = signature,
        ) -> None:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            arguments.pop("return_dict", None)
            seen(
                DenoiserCall(
                    component=component,
                    timestep=_as_timestep(arguments["timestep"]),
                    arguments=arguments,
                    output=_first(output),
                )
            )

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_steps(scheduler: Any, seen: Callable[[Tensor], None]) -> Iterator[None]:  # noqa: ANN401 (any diffusers scheduler)
    """Give every model output that the pipeline passes to its scheduler's ``step`` to `seen` while the context is open.

    A scheduler without ``step``, or none at all, is left alone.
    """
    step = getattr(scheduler, "step", None)
    if step is None:
        yield
        return

    @functools.wraps(step)  # pipelines look at its signature
    def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (as each scheduler has it)
        seen(args[0] if args else kwargs["model_output"])
        return step(*args, **kwargs)

    before = vars(scheduler).get("step")
    scheduler.step = watched
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before


def call_with(denoiser: nn.Module, arguments: Mapping[str, Any], recorded: Tensor) -> Tensor:
    """Call `denoiser` with recorded arguments, with gradients where they are enabled.

    Returns:
        Those channels of its output that were recorded.
    """
    device = next(denoiser.parameters()).device
    output = _first(denoiser(**_to_device(dict(arguments), device), return_dict=False))
    return output[:, : recorded.shape[1]]


@torch.no_grad()
def replay(denoiser: nn.Module, call: DenoiserCall) -> Tensor:
    """Call `denoiser` as it was called in `call`, without gradients."""
    return call_with(denoiser, call.arguments, call.output)


def _to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401 (a tree of arguments)
    """Move the tensors of a tree of arguments."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value
