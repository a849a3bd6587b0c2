"""Follow a recorded call through a denoiser: which layers see the sample, and in which order.

Names do not say which layer is the first: it is ``conv_in`` in a UNet, ``img_in`` in Qwen-Image and
``all_x_embedder.2-1`` in Z-Image. So one call is replayed, and each tensor in it knows its origins:
the sample, or the layers that its values come from without another layer between. An operator gives
its outputs the origins of its inputs; a layer is the only origin of its output.

Origins are kept by where a tensor lies in memory, so that views share them with their base.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.prefix import tensors_of
from msfp_cli.pipelines.watch import watch_layers

FIRST = "first"  # sees the sample, and no layer before it does
LAST = "last"  # sees the sample, and gives the output, but to no other layer
CONDITIONS = "conditions"  # sees nothing of the sample, and leads into the blocks or the last layer

T = TypeVar("T")
Origins: TypeAlias = frozenset[str]
_SAMPLE = ""  # the origin that is not a layer
_NOTHING: Origins = frozenset()


@dataclass(frozen=True)
class _Step:
    """What a layer saw, in all of its runs.

    Arguments:
        origins: of its inputs.
        sees_sample: whether the sample is among them, through however many layers.
        has_one_row: whether its input has one row for each picture, not one for each token.
    """

    origins: Origins
    sees_sample: bool
    has_one_row: bool


class _Flow(TorchDispatchMode):
    """Knows the origins of each tensor while the context is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: dict[str, _Step] = {}
        self._origins: dict[int, Origins] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., T],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> T:
        """Run an operator; its outputs come from where its inputs come from."""
        result = func(*args, **(kwargs or {}))
        self.mark(result, self.origins_of((args, kwargs)))
        return result

    def mark(self, value: object, origins: Origins) -> None:
        """Say where the tensors of a tree come from."""
        for place in filter(None, map(_place, tensors_of(value))):  # what is empty has no place
            self._origins[place] = origins

    def origins_of(self, value: object) -> Origins:
        """Return where the tensors of a tree come from."""
        places = map(_place, tensors_of(value))
        return _NOTHING.union(*(self._origins.get(place, _NOTHING) for place in places))

    def add(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note one run of a layer."""
        origins = self.origins_of(args)
        self.mark(output, frozenset({name}))
        shape = args[0].shape
        before = self.steps.get(name, _Step(_NOTHING, False, True))
        self.steps[name] = _Step(
            origins=before.origins | origins,
            sees_sample=before.sees_sample or self.see_sample(origins),
            has_one_row=before.has_one_row and args[0].numel() == shape[0] * shape[-1],
        )

    def see_sample(self, origins: Iterable[str]) -> bool:
        """Whether the sample is among some origins, or was seen by a layer that is."""
        return any(
            name == _SAMPLE or (name in self.steps and self.steps[name].sees_sample)
            for name in origins
        )

    def readers(self, name: str) -> list[_Step]:
        """Return what the layers saw that a layer leads into."""
        return [step for step in self.steps.values() if name in step.origins]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def trace_roles(denoiser: nn.Module, call: DenoiserCall) -> dict[str, str]:
    """Replay a call, and return the role of each layer that has one.

    A layer that sees nothing of the sample has the role `CONDITIONS` if it lies outside of the
    blocks, which are the items of lists of modules, or if it makes one row for each picture that
    only such layers see: DiT has a time embedding in each of its blocks. What modulates its own
    block, or makes keys of the text in it, has no role.
    """
    flow = _Flow()
    call = _with_own_sample(call)
    sample = call.arguments[_name_of_sample(call)]
    with watch_layers(find_layers(denoiser), flow.add), flow:
        flow.mark(sample, frozenset({_SAMPLE}))
        output = replay(denoiser, call)
    last = flow.origins_of(output)
    roles = {}
    for name, step in flow.steps.items():
        if step.sees_sample and not flow.see_sample(step.origins - {_SAMPLE}):
            roles[name] = FIRST
        elif step.sees_sample and name in last and not flow.readers(name):
            roles[name] = LAST
        elif not step.sees_sample and _leads_in(denoiser, flow, name):
            roles[name] = CONDITIONS
    return roles


def _name_of_sample(call: DenoiserCall) -> str:
    """Return the argument that is the sample: of those with tensors, diffusers has it first."""
    tensors = {name: next(tensors_of(value), None) for name, value in call.arguments.items()}
    return next(name for name, first in tensors.items() if first is not None and name != call.time)


def _with_own_sample(call: DenoiserCall) -> DenoiserCall:
    """Return a call whose sample is not the same tensor as another argument of equal content."""
    name = _name_of_sample(call)
    value = call.arguments[name]
    own = value.clone() if isinstance(value, Tensor) else [each.clone() for each in value]
    return replace(call, arguments={**call.arguments, name: own})


def _leads_in(denoiser: nn.Module, flow: _Flow, name: str) -> bool:
    """Whether a layer that does not see the sample is there for more than its own block."""
    if not _is_in_block(denoiser, name):
        return True
    readers = flow.readers(name)
    is_shared = bool(readers) and not any(step.sees_sample for step in readers)
    return is_shared and flow.steps[name].has_one_row


def _is_in_block(denoiser: nn.Module, name: str) -> bool:
    """Whether a module lies in a list of modules."""
    parts = name.split(".")
    parents = (".".join(parts[:count]) for count in range(1, len(parts)))
    return any(isinstance(denoiser.get_submodule(parent), nn.ModuleList) for parent in parents)
