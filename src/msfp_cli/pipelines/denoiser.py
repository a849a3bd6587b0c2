"""Find the denoiser of a pipeline, and replay its calls.

A pipeline is never re-implemented here. Its denoiser is found by looking at its components, a hook
on the denoiser's own ``forward`` sees each call (`watch.watch_calls`), and `replay` repeats one. So
classifier-free guidance, added conditions, guidance vectors and any scheduler come along without a
line about them.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msfp_cli.errors import ModelError, UsageError
from msfp_cli.files.documents import digest
from msfp_cli.pipelines.loading import Pipeline

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

    @classmethod
    def of(cls, component: str, arguments: dict[str, Any], output: object) -> "DenoiserCall":
        """Describe a call by its arguments and by what it returned, however that is wrapped."""
        return cls(
            component=component,
            timestep=_as_timestep(arguments["timestep"]),
            arguments=arguments,
            output=_first(output),
        )


def find_denoisers(pipe: Pipeline) -> dict[str, nn.Module]:
    """Return the pipeline's denoisers by component name, usually one.

    Raises:
        ModelError: there is none.
    """
    components = pipe.components
    denoisers = {role: components[role] for role in _ROLES if _is_denoiser(components.get(role))}
    if not denoisers:
        names = sorted(name for name, part in components.items() if part is not None)
        raise ModelError(
            f"{type(pipe).__name__} has no denoiser (looked for {', '.join(_ROLES)}; "
            f"it has {', '.join(names) or 'nothing'}); "
            "msfp quantizes pipelines whose UNet or transformer is called once per timestep"
        )
    return denoisers


def denoiser_names(index: Mapping[str, Any]) -> list[str]:
    """Return the names of components that may be denoisers, without loading them.

    Arguments:
        index: what ``model_index.json`` holds: library and class by component.

    Raises:
        ModelError: there is none.
    """
    names = [role for role in _ROLES if (index.get(role) or [None])[0] == "diffusers"]
    if not names:
        raise ModelError(
            f"{index.get('_class_name')} has no denoiser (looked for {', '.join(_ROLES)})"
        )
    return names


def refuse_changed(component: str, denoiser: nn.Module) -> None:
    """Refuse a denoiser that has adapters, or whose layers are offloaded.

    Raises:
        UsageError: the adapters' own matrices would be quantized, or hooks be lost.
    """
    adapters: dict[str, Any] | None = getattr(denoiser, "peft_config", None)
    if adapters:
        raise UsageError(
            f"{component} has adapters ({', '.join(adapters)}); call "
            "`pipe.fuse_lora()` and `pipe.unload_lora_weights()` before calibrating"
        )
    wrapped = [name for name, module in denoiser.named_modules() if _is_wrapped(module)]
    if wrapped:
        raise UsageError(
            f"{component}: the forward of module {wrapped[0]!r} is replaced, as offloading does; "
            "calibrate a pipeline that is not offloaded"
        )


def _is_wrapped(module: nn.Module) -> bool:
    """Whether a module runs another forward than its class's."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _is_denoiser(component: object) -> bool:
    """Whether a component of a pipeline is a network that is called with a timestep."""
    if not isinstance(component, nn.Module):
        return False
    return "timestep" in inspect.signature(component.forward).parameters


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


def _first(output: Any) -> Tensor:  # noqa: ANN401 (a tuple, or an output class of diffusers)
    """Return the tensor a denoiser returned."""
    return output[0] if not isinstance(output, Tensor) else output


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
