"""The denoisers of a pipeline, and replaying their calls.

A pipeline is never re-implemented here. Its denoisers are learned by watching it (`discovery`), a
hook on a denoiser's own ``forward`` sees each call (`watch.watch_calls`), and `replay` repeats one.
So classifier-free guidance, added conditions, guidance vectors and any scheduler come along without
a line about them.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from msfp_cli.errors import ModelError, UsageError
from msfp_cli.files.documents import digest
from msfp_cli.formats.weights import is_finite
from msfp_cli.layers.clock import TRAINING_CLOCK, Clock
from msfp_cli.layers.streamed import weight_in_memory
from msfp_cli.pipelines.loading import Pipeline

# The names under which most pipelines of diffusers keep their denoisers, for pipelines that are
# not called.
_ROLES = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_3",
    "unconditional_transformer",  # Ideogram 4
    "prior",
    "prior_prior",  # of pipelines that join a prior and a decoder: Kandinsky, Stable Cascade
    "decoder",
    "super_res_first",  # unCLIP
    "super_res_last",
)

Output: TypeAlias = Any  # of a denoiser: a tensor, a tuple, a list, or a class of diffusers
# Arguments of a denoiser: tensors and plain values, in lists, tuples, dicts and caches.
Tree: TypeAlias = Any
CACHES = "diffusers.models."  # begins the names of the modules whose caches are known


@dataclass(frozen=True, kw_only=True)
class DenoiserCall:
    """One call of a denoiser.

    Arguments:
        component: the pipeline's name for the denoiser, e.g. ``unet``.
        timestep: of the call, 1000 (noise) to 0 (clean), see `Clock`.
        arguments: all arguments by name, as they were before the call; some denoisers empty lists
            that they are given, or write into caches.
        output: what it returned, without the wrapping tuple, and without channels that the pipeline
            throws away.
        time: the argument that says what time it is.
        is_listed: whether the denoiser takes and returns lists with an item for each picture.
    """

    component: str
    timestep: float
    arguments: dict[str, Any]
    output: Tensor
    time: str = "timestep"
    is_listed: bool = False

    @classmethod
    def of(
        cls,
        component: str,
        arguments: dict[str, Any],
        output: object,
        clock: Clock = TRAINING_CLOCK,
    ) -> "DenoiserCall":
        """Describe a call by its arguments and by what it returned, however that is wrapped.

        Raises:
            ModelError: the denoiser was called without its time.
        """
        if clock.argument not in arguments:
            raise ModelError(f"{component} was called without its argument {clock.argument!r}")
        first = _unwrapped(output)
        return cls(
            component=component,
            timestep=clock.read(arguments[clock.argument]),
            arguments=arguments,
            output=_first(output).clone(),  # some pipelines compute in it
            time=clock.argument,
            is_listed=not isinstance(first, Tensor),
        )


def find_denoisers(pipe: Pipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that may be denoisers, by component name.

    They are the models of diffusers that do not decode pictures; `discovery.learn_clocks` says
    which of them are.

    Raises:
        ModelError: there is none.
    """
    networks = {name: part for name, part in pipe.components.items() if _may_denoise(part)}
    if not networks:
        present = [name for name, part in pipe.components.items() if part is not None]
        raise _no_denoiser(type(pipe).__name__, present)
    return networks


def likely_denoisers(pipe: Pipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that are its denoisers, judged by their names.

    Where a component has a usual name, others (a ControlNet, an adapter) are left alone.

    Raises:
        ModelError: there is none.
    """
    networks = find_denoisers(pipe)
    usual = {name: network for name, network in networks.items() if name in _ROLES}
    return usual or networks


def denoiser_names(index: Mapping[str, Any]) -> list[str]:
    """Return the names of components that may be denoisers, without loading them.

    Where a component has a usual name, others (a ControlNet, an adapter) are left alone.

    Arguments:
        index: what ``model_index.json`` holds: library and class by component.

    Raises:
        ModelError: there is none.
    """
    lists = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    parts = {name: entry for name, entry in lists.items() if isinstance(entry[0], str)}
    models = [name for name, entry in parts.items() if _class_may_denoise(*entry)]
    names = [role for role in _ROLES if role in models] or models
    if not names:
        raise _no_denoiser(str(index.get("_class_name")), parts)
    return names


def _no_denoiser(pipeline: str, parts: Iterable[str]) -> ModelError:
    return ModelError(
        f"{pipeline} has no denoiser: none of its components is a UNet or transformer of "
        f"diffusers (it has {', '.join(sorted(parts)) or 'nothing'})"
    )


def _class_may_denoise(library: str, name: str) -> bool:
    """Whether a class is a model of diffusers, and not one that decodes pictures."""
    import diffusers

    kind = getattr(diffusers, name, None) if library == "diffusers" else None
    is_model = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    return is_model and not hasattr(kind, "decode")


def refuse_changed(component: str, denoiser: nn.Module) -> None:
    """Refuse a denoiser that has adapters, or whose layers are offloaded.

    Raises:
        UsageError: the adapters' own matrices would be quantized, or hooks be lost.
    """
    refuse_adapters(component, denoiser)
    wrapped = [name for name, module in denoiser.named_modules() if _is_wrapped(module)]
    if wrapped:
        raise UsageError(
            f"{component}: the forward of module {wrapped[0]!r} is replaced, as offloading does; "
            "calibrate a pipeline that is not offloaded"
        )


def refuse_adapters(component: str, model: nn.Module) -> None:
    """Refuse a model that has adapters, fused or not.

    Raises:
        UsageError: matrices of their own would be quantized, or saved in the place of the model, as
            transformers does.
    """
    adapters: dict[str, Any] | None = getattr(model, "peft_config", None)
    if adapters:
        raise UsageError(
            f"{component} has adapters ({', '.join(adapters)}); call "
            "`pipe.fuse_lora()` and `pipe.unload_lora_weights()` before calibrating"
        )


def refuse_broken(component: str, model: nn.Module) -> None:
    """Refuse a model with a weight or bias that is not finite, before anything is made with it.

    Raises:
        ModelError: the message names the tensor and where it lies.
    """
    for module_name, module in model.named_modules():
        with weight_in_memory(module):
            for name in ("weight", "bias"):  # others may be there for other tasks
                parameter = module._parameters.get(name)
                if parameter is not None and not is_finite(parameter):
                    full_name = f"{module_name}.{name}" if module_name else name
                    raise ModelError(
                        f"the tensor {full_name} in the files of {component} holds a NaN or "
                        "infinity, so the model's file is broken; download it again"
                    )


def _is_wrapped(module: nn.Module) -> bool:
    """Whether a module runs another forward than its class's."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _may_denoise(component: object) -> bool:
    """Whether a component is a model of diffusers, and not one that decodes pictures."""
    from diffusers import ModelMixin  # whose import brings ours along

    return isinstance(component, ModelMixin) and not hasattr(component, "decode")


_SAMPLES = 256  # elements of each parameter that a fingerprint reads


def fingerprint(denoiser: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return a digest that tells a float denoiser from other models and from other trainings.

    It reads evenly spaced elements of each parameter, so it takes no time on large models; it does
    not prove that every element is as it was.

    Arguments:
        dtype: that elements are rounded to, so that the type that the model was loaded in does not
            matter; None takes them as they are.
    """
    sampled = {}
    for name, parameter in denoiser.named_parameters():
        with weight_in_memory(denoiser.get_submodule(name.rpartition(".")[0])):
            flat = parameter.detach().reshape(-1)
            stride = max(1, flat.numel() // _SAMPLES)
            sampled[f"{name} {tuple(parameter.shape)}"] = flat[::stride].to(dtype).cpu().clone()
    return digest(sampled)


def _unwrapped(output: Output) -> Output:
    """Return what a denoiser returned: a tensor, or a list of one tensor for each picture."""
    return output if isinstance(output, Tensor) else output[0]


def _first(output: object) -> Tensor:
    """Return what a denoiser returned as one tensor."""
    first = _unwrapped(output)
    return first if isinstance(first, Tensor) else torch.stack(list(first))


def call_with(denoiser: nn.Module, arguments: Mapping[str, Any], recorded: Tensor) -> Tensor:
    """Call `denoiser` with recorded arguments, with gradients where they are enabled.

    Returns:
        Those channels of its output that were recorded.
    """
    device = next(denoiser.parameters()).device
    own = map_tensors(lambda tensor: tensor.to(device), dict(arguments))
    output = _first(denoiser(**own, return_dict=False))
    return output[:, : recorded.shape[1]]


@torch.no_grad()
def replay(denoiser: nn.Module, call: DenoiserCall) -> Tensor:
    """Call `denoiser` as it was called in `call`, without gradients."""
    return call_with(denoiser, call.arguments, call.output)


def map_tensors(function: Callable[[Tensor], Tree], tree: Tree) -> Tree:
    """Return a copy of a tree of arguments with a function applied to its tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, item) for item in tree)
    if is_cache(tree):
        return with_attributes(tree, map_tensors(function, vars(tree)))
    return tree


def is_cache(value: object) -> bool:
    """Whether an argument is an object of diffusers that holds others, such as keys and values."""
    is_ours = type(value).__module__.startswith(CACHES)
    return is_ours and hasattr(value, "__dict__") and not isinstance(value, nn.Module)


def with_attributes(cache: Tree, attributes: Mapping[str, Tree]) -> Tree:
    """Return a copy of a cache with other attributes."""
    other = copy.copy(cache)
    vars(other).update(attributes)
    return other
