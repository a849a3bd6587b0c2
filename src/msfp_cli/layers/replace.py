"""Find and replace layers of a denoiser by name. A table of embeddings counts as a layer."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError, UsageError
from msfp_cli.layers.clock import TRAINING_CLOCK, Clock
from msfp_cli.layers.quantized import FloatLayer, Quantized, find_kind, kind_of
from msfp_cli.layers.routing import ROUTER, RouterTable
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.layers.streamed import weight_in_memory
from msfp_cli.layers.weight import answer_for_weights, refuse_part


def find_layers(denoiser: nn.Module) -> dict[str, FloatLayer]:
    """Return every layer that has a kind, by qualified name, in the order of definition.

    The module itself has no name, and could not be replaced.
    """
    modules = denoiser.named_modules()
    return {name: module for name, module in modules if name and find_kind(module) is not None}


def quantized_layers(denoiser: nn.Module) -> dict[str, Quantized]:
    """Return every quantized layer by qualified name, in the order of definition."""
    modules = denoiser.named_modules()
    return {name: module for name, module in modules if isinstance(module, Quantized)}


def require_network(network: object) -> None:
    """Refuse what has no layers, such as a pipeline in the place of one of its components.

    Raises:
        UsageError: it is not a module of torch.
    """
    if isinstance(network, nn.Module):
        return
    parts: dict[str, object] = getattr(network, "components", {})
    names = [f"pipe.{name}" for name, part in parts.items() if isinstance(part, nn.Module)]
    raise UsageError(
        f"{type(network).__name__} is not a network; give one, such as "
        f"{', '.join(names) or 'pipe.unet or pipe.transformer'}"
    )


def select_layers(names: Iterable[str], pattern: str | None) -> list[str]:
    """Return the names that match a shell pattern; None selects all.

    Raises:
        UsageError: none matches.
    """
    every = list(names)
    selected = [name for name in every if pattern is None or fnmatch.fnmatchcase(name, pattern)]
    if not selected:
        raise UsageError(f"no layer matches {pattern!r}; the first of {len(every)} is {every[0]!r}")
    return selected


def replace_module_(denoiser: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one with this qualified name."""
    parent, _, child = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), child, new)


def replace_layers_(
    denoiser: nn.Module, table: Mapping[str, LayerScheme], *, clock: Clock = TRAINING_CLOCK
) -> dict[str, Quantized]:
    """Put an empty quantized layer in the place of each float layer that `table` names.

    Layers with several variants get a router, in the order of their names: the denoiser's module
    `routing.ROUTER`.

    Arguments:
        clock: reads the timestep of the denoiser's calls, for the router.

    Returns:
        The new layers by name; they have the settings and the bias of the old ones, and no codes
        yet.

    Raises:
        CheckpointError: the denoiser has no such layer, or one of another kind.
    """
    layers = find_layers(denoiser)
    unknown = sorted(table.keys() - layers.keys())
    if unknown:
        raise CheckpointError(
            f"{type(denoiser).__name__} has no layer {unknown[0]!r} "
            f"({len(unknown)} unknown in all); was this made from another model?"
        )
    replaced = {name: _quantize_empty(name, layers[name], table[name]) for name in table}
    for name, new in replaced.items():
        replace_module_(denoiser, name, new)
    _attach_router_(denoiser, replaced, clock)
    if answer_for_weights not in denoiser._state_dict_hooks.values():
        denoiser._register_state_dict_hook(answer_for_weights)
        for child in denoiser.children():
            child.register_state_dict_pre_hook(refuse_part)
    return replaced


@torch.no_grad()
def store_layers_(
    denoiser: nn.Module,
    table: Mapping[str, LayerScheme],
    scales: Mapping[str, Tensor],
    multipliers: Mapping[str, Tensor] = MappingProxyType({}),
    move: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
    *,
    clock: Clock = TRAINING_CLOCK,
) -> None:
    """Replace each layer that `table` names, and store its weight, rounded.

    One float weight at a time is let go of.

    Arguments:
        scales: float32 weight scales, ``(out,)``, of the layers with a quantized weight.
        multipliers: uint8 ``(out, groups)``, of the layers whose weights have groups.
        move: gives the weight to round, rotated where inputs are, for the name of a layer and its
            weight.
        clock: see `replace_layers_`.

    Raises:
        CheckpointError: the denoiser has no such layer.
    """
    layers = find_layers(denoiser)
    for name, quantized in replace_layers_(denoiser, table, clock=clock).items():
        layer = layers.pop(name)
        if table[name].weight is not None:
            with weight_in_memory(layer):
                weight = move(name, layer.weight.detach())
            quantized.store_(weight, scales[name], multipliers=multipliers.get(name))


def store_variants_(denoiser: nn.Module, columns: Mapping[str, Tensor]) -> None:
    """Write the table of a denoiser's router.

    Arguments:
        columns: the variant at each row of the table, ``(1001,)``, for each layer with several.
    """
    if columns:
        table = torch.stack([columns[name] for name in sorted(columns)], dim=1)
        denoiser.get_submodule(ROUTER).get_buffer("table").copy_(table)


def replace_by_codes_(
    denoiser: nn.Module,
    name: str,
    layer: FloatLayer,
    scheme: LayerScheme,
    scale: Tensor,
    codes: Tensor,
) -> None:
    """Put a quantized layer with these codes in the place of a float layer, which may be empty.

    Arguments:
        scale: float32, ``(out,)``.
        codes: uint8, the packed codes of its only member.
    """
    new = _quantize_empty(name, layer, scheme)
    new._buffers["weight_scale"] = scale
    new._buffers["weight_codes"] = codes[None]
    replace_module_(denoiser, name, new)


def _quantize_empty(name: str, layer: FloatLayer, scheme: LayerScheme) -> Quantized:
    """Return the empty quantized layer that takes a float one's place."""
    kind = kind_of(layer)
    rotation = scheme.transform.rotation
    is_transformed = not scheme.transform.is_identity
    fits = kind.transforms_inputs and not (rotation and layer.in_features % rotation)
    if kind.is_table != scheme.lookup or (is_transformed and not fits):
        raise CheckpointError(
            f"layer {name!r} is of another kind, {type(layer).__name__}; "
            "was this made from another model?"
        )
    return kind.quantized_class(layer, scheme)


def _attach_router_(denoiser: nn.Module, layers: Mapping[str, Quantized], clock: Clock) -> None:
    """Give the layers with several variants a common router, if there are any."""
    switching = [layers[name] for name in sorted(layers) if layers[name].scheme.variants > 1]
    if not switching:
        return
    router = RouterTable(
        len(switching), clock, device=switching[0].get_buffer("weight_scale").device
    )
    for slot, layer in enumerate(switching):
        layer.route = router.route
        layer.slot = slot
    router.attach_(denoiser)
