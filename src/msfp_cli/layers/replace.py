"""Find and replace layers of a denoiser by name. A table of embeddings counts as a layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msfp_cli.errors import CheckpointError
from msfp_cli.layers.quantized import KINDS, FloatLayer, QuantConv2d, QuantEmbedding, QuantLinear
from msfp_cli.layers.routing import RouterTable
from msfp_cli.layers.scheme import LayerScheme

QuantizedModule = QuantLinear | QuantConv2d | QuantEmbedding


def find_layers(denoiser: nn.Module) -> dict[str, FloatLayer]:
    """Return every layer that can be quantized, by qualified name, in the order of definition.

    A subclass counts only if it runs torch's own forward: one that does something else would
    silently lose it. Nor does a table count that changes its rows as they are looked up
    (``max_norm``).
    """
    found: dict[str, FloatLayer] = {}
    for name, module in denoiser.named_modules():
        for kind in KINDS.values():
            if (
                isinstance(module, kind)
                and type(module).forward is kind.forward
                and not _renormalizes(module)
            ):
                found[name] = module
    return found


def _renormalizes(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is not None


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedModule]:
    """Return every quantized layer by qualified name, in the order of definition."""
    return {name: m for name, m in denoiser.named_modules() if isinstance(m, QuantizedModule)}


def replace_layers_(
    denoiser: nn.Module, table: Mapping[str, LayerScheme], *, timestep_unit: float = 1.0
) -> dict[str, QuantizedModule]:
    """Put an empty quantized layer in the place of each float layer that `table` names.

    Layers with several sets of weights get a router, the denoiser's module `routing.ROUTER`, in the
    order of their names.

    Arguments:
        timestep_unit: what brings the denoiser's timesteps to 0..1000, for the router.

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
            f"{type(denoiser).__name__} has no layer {unknown[0]!r} ({len(unknown)} unknown in all); "
            "was this made from another model?"
        )
    odd = [name for name in table if isinstance(layers[name], nn.Embedding) != table[name].lookup]
    if odd:
        kind = type(layers[odd[0]]).__name__
        raise CheckpointError(
            f"layer {odd[0]!r} is of another kind, {kind}; was this made from another model?"
        )
    replaced: dict[str, QuantizedModule] = {}
    for name, scheme in table.items():
        new = _quantized(layers[name], scheme)
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, new)
        replaced[name] = new
    _attach_router_(denoiser, replaced, timestep_unit)
    return replaced


@torch.no_grad()
def store_layers_(
    denoiser: nn.Module, table: Mapping[str, LayerScheme], scales: Mapping[str, Tensor]
) -> None:
    """Replace each layer that `table` names, and store its weight, rounded, on the way: one float weight at a time.

    Arguments:
        scales: float32 weight scales, ``(out,)``, of the layers with a quantized weight.

    Raises:
        CheckpointError: the denoiser has no such layer.
    """
    layers = find_layers(denoiser)
    for name, quantized in replace_layers_(denoiser, table).items():
        weight = layers.pop(name).weight.detach()
        if table[name].weight is not None:
            quantized.store_(weight, scales[name].to(weight.device))


def _quantized(layer: FloatLayer, scheme: LayerScheme) -> QuantizedModule:
    """Return the empty quantized layer that takes a float one's place."""
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(layer, scheme)
    return (
        QuantLinear(layer, scheme) if isinstance(layer, nn.Linear) else QuantConv2d(layer, scheme)
    )


def _attach_router_(
    denoiser: nn.Module, layers: Mapping[str, QuantizedModule], unit: float
) -> None:
    """Give the layers with several sets of weights a common router, if there are any."""
    switching = [layers[name] for name in sorted(layers) if layers[name].scheme.hub > 1]
    if not switching:
        return
    router = RouterTable(
        len(switching), unit, device=switching[0].get_buffer("weight_scale").device
    )
    for slot, layer in enumerate(switching):
        layer.route, layer.slot = router.route, slot
    router.attach_(denoiser)
